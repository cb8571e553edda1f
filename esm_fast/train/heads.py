"""Heads on a layer's features: linear; with a hidden layer beside; or that choose the residues they look at.

All are linear at the start, so that what the solved head knows is where each begins. `features` are (rows, width), and
a head that looks at residues gets theirs, with the numbers of them in each protein.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("linear", "mlp", "attention")


class Linear(nn.Linear):
    """(rows, width) -> (rows, outputs)."""

    kind = "linear"
    of_residues = False  # whether it makes a protein's outputs of its residues' rows

    def __init__(self, width: int, outputs: int, *, device=None):
        super().__init__(width, outputs, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(features)

    def maps(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """The weights, with their biases, that meet the features themselves."""
        return [(self.weight, self.bias)]


class Mlp(Linear):
    """Beside the linear map a hidden layer, whose outgoing weights begin at 0."""

    kind = "mlp"

    def __init__(self, width: int, outputs: int, hidden: int = 128, *, device=None):
        super().__init__(width, outputs, device=device)
        self.inner = nn.Linear(width, hidden, device=device)
        nn.init.normal_(self.inner.weight, std=width**-0.5)
        nn.init.zeros_(self.inner.bias)
        self.outer = nn.Parameter(torch.zeros(outputs, hidden, device=device))

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(features) + F.linear(F.gelu(self.inner(features)), self.outer)

    def maps(self):
        return [*super().maps(), (self.inner.weight, self.inner.bias)]


class Attention(Linear):
    """Each output looks at the residues by a softmax of its own (label-wise attention, Mullenbach et al. 2018), which
    begins as their mean: sum_i softmax_i(query . x_i) (weight . x_i) + bias."""

    kind = "attention"
    of_residues = True

    def __init__(self, width: int, outputs: int, *, device=None):
        super().__init__(width, outputs, device=device)
        self.query = nn.Parameter(torch.zeros(outputs, width, device=device))

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        score, value = features @ self.query.T, features @ self.weight.T
        which = torch.repeat_interleave(torch.arange(len(lengths), device=score.device), lengths)
        index, shape = which[:, None].expand_as(score), (len(lengths), score.shape[1])
        most = score.detach().new_full(shape, -torch.inf).scatter_reduce(0, index, score.detach(), "amax")
        share = (score - most[which]).exp()
        total = share.new_zeros(shape).index_add(0, which, share)
        return share.new_zeros(shape).index_add(0, which, share * value) / total + self.bias

    def maps(self):
        return [*super().maps(), (self.query, None)]


_KINDS = {kind.kind: kind for kind in (Linear, Mlp, Attention)}


def make(kind: str, width: int, outputs: int, *, hidden: int = 128, device=None) -> Linear:
    """A head of one of KINDS, all of whose outputs are 0."""
    options = {"hidden": hidden} if kind == "mlp" else {}
    return _KINDS[kind](width, outputs, device=device, **options)


class Standardised(nn.Module):
    """A head on features of mean 0 and spread 1, as they were at the start; all its weights move alike.

    mean, spread: float64 (width,).
    """

    def __init__(self, head: Linear, mean: np.ndarray, spread: np.ndarray):
        super().__init__()
        device = head.weight.device
        self.register_buffer("mean", torch.from_numpy(mean).float().to(device))
        self.register_buffer("spread", torch.from_numpy(spread).float().to(device))
        self.head = copy.deepcopy(head)
        with torch.no_grad():
            for weight, bias in self.head.maps():
                if bias is not None:
                    bias += weight @ self.mean
                weight *= self.spread

    def forward(self, rows: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.head((rows - self.mean) / self.spread, lengths)

    @torch.no_grad()
    def write_to(self, head: Linear) -> None:
        """The same head for features as they are."""
        head.load_state_dict(self.head.state_dict())
        for weight, bias in head.maps():
            weight /= self.spread
            if bias is not None:
                bias -= weight @ self.mean
