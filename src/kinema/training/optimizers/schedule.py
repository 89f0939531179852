"""Learning-rate schedules: pure functions of the step, so that no state can be lost or stepped twice."""

import math
from dataclasses import dataclass


@dataclass
class LRSchedule:
    """Linear warm-up to the peak, then constant."""

    warmup_steps: int = 100
    """Steps over which the rate rises linearly to `optim.learning_rate`; 0 starts at the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps} must not be negative.")

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the peak rate for the update that turns step `step` into `step + 1`."""
        return self.warmup(step)

    def warmup(self, step: int) -> float:
        """The rising part: (step + 1) / warmup_steps, at most 1."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


@dataclass
class Constant(LRSchedule):
    """Warm-up, then the peak rate for ever."""


@dataclass
class Cosine(LRSchedule):
    """Warm-up, then half a cosine down to `final_fraction` at the last step (Loshchilov and Hutter 2017, SGDR)."""

    final_fraction: float = 0.0
    """Rate at the last step as a fraction of the peak."""

    def factor(self, step: int, total_steps: int) -> float:
        """See `LRSchedule.factor`."""
        if step < self.warmup_steps:
            return self.warmup(step)
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
