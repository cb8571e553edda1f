"""The layers that all families share, as nn.Modules that hold parameters and call ops, for inference and training.

Parameter names are fair-esm's, so a state_dict goes either way.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.common import layer_norm
from ..sequences.batching import PackedBatch


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with fp32 statistics and an fp32 result, whatever the weights are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """The projections of one attention block; `TransformerLayer` calls the op."""

    def __init__(self, width: int):
        super().__init__()
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)


class TransformerLayer(nn.Module):
    """One pre-LN layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.self_attn = SelfAttention(width)
        self.self_attn_layer_norm = LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = LayerNorm(width, eps)

    def weights(self) -> ops.LayerWeights:
        attn, before_attn, before_ffn = self.self_attn, self.self_attn_layer_norm, self.final_layer_norm
        parts = (before_attn, attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, before_ffn, self.fc1, self.fc2)
        tensors = [tensor for part in parts for tensor in (_weight(part), part.bias)]
        return ops.LayerWeights(*tensors, attn_eps=before_attn.eps, ffn_eps=before_ffn.eps)

    def forward(self, x, batch: PackedBatch, rotary=None, *, rows=None, return_qk=False, recompute=False, backend=None):
        """x (n, width) -> (x,), or (x, q, k) with q and k (n, heads, head_dim) as the attention saw them.

        rotary: the tables of `ops.pre_ln_attention`, or None.
        rows: (m,) int64, ascending: the only rows that are wanted; the feed-forward block runs on these.
        recompute: keep nothing of the layer but its input for the backward pass, which runs it again
        (Chen et al. 2016).
        """
        run = partial(checkpoint, self._run, use_reentrant=False) if recompute else self._run
        # Of now: when the backward pass comes, a cast of the parameters may be gone from the module.
        return run(self.weights(), x, batch, rotary, rows, return_qk, backend)

    def _run(self, weights: ops.LayerWeights, x, batch: PackedBatch, rotary, rows, return_qk: bool, backend):
        attended = ops.pre_ln_attention(
            x,
            batch.cu_seqlens,
            batch.max_seqlen,
            *weights.attention,
            heads=self.heads,
            eps=weights.attn_eps,
            rotary=rotary,
            return_qk=return_qk,
            backend=backend,
        )
        x, *qk = attended if return_qk else (attended,)
        if rows is not None:
            x = x.index_select(0, rows)
        x = ops.gelu_ffn(x, *weights.ffn, eps=weights.ffn_eps, backend=backend)
        return x, *qk


def _weight(part: nn.Module) -> torch.Tensor:
    """A module's weight, with what adapters of peft's add to it; see train/adapters.py."""
    if not hasattr(part, "get_delta_weight"):
        return part.weight
    return part.weight + sum(part.get_delta_weight(name) for name in part.active_adapters)


class LMHead(nn.Module):
    """RoBERTa's head; its projection is the token table, the very same Parameter."""

    def __init__(self, width: int, token_table: nn.Parameter, eps: float):
        super().__init__()
        self.weight = token_table
        self.bias = nn.Parameter(torch.zeros(token_table.shape[0]))
        self.dense = nn.Linear(width, width)
        self.layer_norm = LayerNorm(width, eps)

    def forward(self, x, rows=None, targets=None, *, backend=None):
        """(logits, loss) of `ops.masked_lm_head`."""
        dense, norm = self.dense, self.layer_norm
        return ops.masked_lm_head(
            x,
            dense.weight,
            dense.bias,
            norm.weight,
            norm.bias,
            self.weight,
            self.bias,
            rows=rows,
            targets=targets,
            eps=norm.eps,
            backend=backend,
        )


_NO_REGRESSION = (
    "this checkpoint holds no contact regression (some models were published without one; for others put "
    "<name>-contact-regression.pt beside <name>.pt and load again), so contacts cannot be predicted"
)


class ContactHead(nn.Module):
    """Logistic regression over all attention maps, as coefficients: (1, layers * heads) and one bias."""

    def __init__(self, maps: int):
        super().__init__()
        self.regression = nn.Linear(maps, 1)

    def require_fitted(self) -> None:
        """Raises ValueError when no regression was loaded (all zero): bare files of fair-esm have none."""
        fitted = self.regression.weight.detach().any()
        if torch.compiler.is_compiling():
            torch._assert_async(fitted, _NO_REGRESSION)  # a graph cannot branch on a value; this raises when it runs
        elif not fitted:
            raise ValueError(_NO_REGRESSION)
