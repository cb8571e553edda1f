"""What changes from update to update: the learning rate, and the factor that keeps fp16 gradients in range."""

import torch


def learning_rate(update: int, peak: float, warmup: int) -> float:
    """Linear from 0 at update 0 to `peak` at update `warmup`, then the inverse square root, as fairseq has it."""
    if update < warmup:
        return peak * update / warmup
    return peak * (max(warmup, 1) / max(update, 1)) ** 0.5


def linear_rate(update: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from 0 to `peak` at update `warmup`, then linearly to a tenth of it at nine tenths of the steps, where it
    stays: as ESM-2 was trained (Lin et al. 2023)."""
    if update < warmup:
        return peak * update / warmup
    end = max(0.9 * steps, warmup + 1)
    return peak * max(1 - 0.9 * (update - warmup) / (end - warmup), 0.1)


def cooldown_factor(step: int, steps: int, cooldown: int) -> float:
    """1, and over the last `cooldown` of `steps` steps linearly towards 0. ESM-1b had none."""
    return min(1.0, (steps - step) / cooldown) if cooldown else 1.0


class LossScale:
    """The dynamic loss scale of fairseq: halved by an overflow, doubled after `window` updates without one.

    It lives on the device, and nothing waits for it but `check` and `state`.
    """

    def __init__(self, scale=2.0**15, window=2000, smallest=1e-4, good=0, *, device: torch.device | str = "cpu"):
        self.window, self.smallest = window, smallest
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.good = torch.tensor(good, device=device)  # updates since the last change

    def update(self, overflow: torch.Tensor) -> None:
        """overflow: bool (), whether gradients were not finite; their step is passed over."""
        good = (self.good + 1) * ~overflow
        grown = good == self.window
        self.scale = torch.where(overflow, self.scale / 2, torch.where(grown, self.scale * 2, self.scale))
        self.good = good * ~grown

    def state(self) -> dict:
        """What it is made of again, for JSON."""
        return {"scale": float(self.scale), "window": self.window, "smallest": self.smallest, "good": int(self.good)}

    def check(self) -> None:
        """Raises FloatingPointError where it fell too low."""
        if float(self.scale) < self.smallest:
            raise FloatingPointError(
                f"the loss scale fell below {self.smallest}: the loss is probably diverging; lower the learning rate, "
                "lengthen the warm-up, clip gradients, or train in bfloat16"
            )
