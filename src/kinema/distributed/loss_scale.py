"""Loss scaling for float16, whose smallest gradients would vanish."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """A power of two that halves when a gradient overflows and doubles after steps that did not.

    Micikevicius et al. 2018, Mixed Precision Training, section 3.2. A power of two rounds nothing.
    """

    value: float = 2.0**16
    patience: int = 1000
    """Steps without overflow before it doubles."""
    largest: float = 2.0**24
    lowered: bool = False
    """Whether the last step overflowed and the scale went down for it: the same step may now go through."""
    _calm: int = 0

    def update(self, moved: bool) -> None:
        """After a step that moved the weights, or whose gradient was not finite."""
        self.lowered = not moved and self.value > 1
        self._calm = self._calm + 1 if moved else 0
        if self.lowered:
            self.value /= 2
        elif self._calm >= self.patience:
            self.value, self._calm = min(2 * self.value, self.largest), 0

    def state(self) -> list[float]:
        """What a checkpoint holds."""
        return [self.value, float(self._calm)]

    def load(self, state: list[float]) -> None:
        """Go on from `state()`."""
        self.value, self._calm = state[0], int(state[1])
