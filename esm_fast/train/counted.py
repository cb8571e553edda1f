"""Updates made and steps passed over, counted on the device: the host asks when it logs or saves, and never waits else.

Whether a gradient was finite is known on the device alone. An update that must not be is left out there (`found_inf` of
torch's fused Adam), and the rate, which counts updates made, is chosen there of those that it may be.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Seen(NamedTuple):
    """Since the last `read`. first: the step, counted from 1, of the first gradient that was not finite, or None.
    longest: how many such steps in a row, those just before included."""

    skipped: int
    longest: int
    first: int | None


class Counted:
    """updates: those made, as of the last `read`."""

    def __init__(self, device: torch.device, updates: int = 0):
        self.device, self.updates = device, updates
        self._rates: list[float] = []  # of the steps since then, had none been passed over
        self._seen = torch.zeros(4, dtype=torch.int64, device=device)  # skipped, now in a row, longest, first

    def rate(self, of: Callable[[int], float], factor: float) -> torch.Tensor:
        """of(updates made) * factor of the step that comes, (), float64; float32 on a GPU, as Adam takes it there."""
        self._rates.append(of(self.updates + len(self._rates)))
        table = torch.tensor(self._rates, dtype=torch.float64).to(self.device, non_blocking=True)
        chosen = table.gather(0, (len(self._rates) - 1 - self._seen[:1])).squeeze(0) * factor
        return chosen if self.device.type == "cpu" else chosen.float()

    def saw(self, bad: torch.Tensor, step: int) -> None:
        """bad: bool (), whether the gradient of this step, counted from 1, was not finite."""
        skipped, row, longest, first = self._seen.unbind()
        row = (row + 1) * bad
        first = torch.where(bad & (first == 0), step, first)
        self._seen = torch.stack([skipped + bad, row, torch.maximum(longest, row), first])

    def read(self) -> Seen:
        """Waits for the device."""
        skipped, row, longest, first = self._seen.tolist()
        self.updates += len(self._rates) - skipped
        self._rates = []
        self._seen = torch.tensor([0, row, row, 0], device=self.device)
        return Seen(skipped, longest, first or None)
