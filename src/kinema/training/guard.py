"""Steps whose numbers are not sound: agreed on by all ranks, blamed on clips where that can be, never trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kinema.data.pack import Pack
from kinema.training.skips import SkippedClip, SkippedStep, Skips


@dataclass
class GuardConfig:
    """What is done about numbers that are not finite."""

    max_incidents: int = 3
    """Steps in a row that may be withheld because their loss or gradient was not finite; one more ends the run."""

    def __post_init__(self) -> None:
        if self.max_incidents < 0:
            raise ValueError(f"guard.max_incidents={self.max_incidents} must be at least 0.")


class NonFiniteLoss(RuntimeError):
    """Numbers stayed infinite or not numbers, whatever was left out; nothing of it was saved."""


@dataclass(frozen=True)
class Suspect:
    """A clip whose own loss was not finite."""

    key: str
    position: int
    loss: float


@dataclass
class Guard:
    """Judges every step; equal on all ranks, since it hears only what was summed over them."""

    config: GuardConfig
    skips: Skips = field(default_factory=Skips)
    incidents: int = 0
    """Withheld steps since the weights last moved past the furthest of them."""
    _furthest: int = -1
    _suspects: list[Suspect] = field(default_factory=list)

    def begin(self) -> None:
        """A step begins."""
        self._suspects = []

    def hear(self, pack: Pack, losses: dict[int, float]) -> None:
        """Loss of each clip of a pack of this rank, by its position."""
        for key, position, weight in zip(pack.keys, pack.positions, pack.weights.tolist(), strict=True):
            if weight and not math.isfinite(losses[position]):
                self._suspects.append(Suspect(key, position, losses[position]))

    def own_suspects(self) -> list[Suspect]:
        """Clips of this rank that are to blame for the step."""
        return self._suspects

    def moved(self, step: int) -> None:
        """The weights have moved in this step."""
        if step > self._furthest:
            self.incidents = 0

    def condemn(self, step: int, suspects: Sequence[Suspect], what: str) -> list[SkippedClip | SkippedStep]:
        """Leave out the suspects of all ranks, or the step if there are none; NonFiniteLoss if it happens too often."""
        self.incidents += 1
        self._furthest = max(self._furthest, step)
        told = ", ".join(f"{one.key} ({one.loss})" for one in suspects) or "none: every clip's own loss was finite"
        if self.incidents > self.config.max_incidents:
            raise NonFiniteLoss(
                f"{what} of step {step + 1}, the {self.incidents}th time in a row that a step had to be withheld "
                f"(guard.max_incidents={self.config.max_incidents}). Clips to blame: {told}. Nothing of it was saved. "
                "Lower optim.learning_rate, or look at the weights that the run began with."
            )
        reason = f"{what} in step {step + 1}"
        found: list[SkippedClip | SkippedStep]
        found = [SkippedClip(one.key, one.position, f"{reason}: its own was {one.loss}") for one in suspects]
        found = found or [SkippedStep(step, reason)]
        for one in found:
            self.skips.add(one)
        return found
