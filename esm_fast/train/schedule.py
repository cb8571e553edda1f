"""What changes from update to update: the learning rate, and the factor that keeps fp16 gradients in range."""

from dataclasses import dataclass


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


@dataclass
class LossScale:
    """The dynamic loss scale of fairseq: halved by an overflow, doubled after `window` updates without one."""

    scale: float = 2.0**15
    window: int = 2000
    smallest: float = 1e-4
    good: int = 0  # updates since the last change

    def overflow(self) -> None:
        """After gradients that were not finite; their step is skipped."""
        self.scale, self.good = self.scale / 2, 0
        if self.scale < self.smallest:
            raise FloatingPointError(
                f"the loss scale fell below {self.smallest}: the loss is probably diverging; lower the learning rate, "
                "lengthen the warm-up, clip gradients, or train in bfloat16"
            )

    def update(self) -> None:
        self.good += 1
        if self.good == self.window:
            self.scale, self.good = self.scale * 2, 0
