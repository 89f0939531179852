"""Steps whose numbers are not sound: agreed on by all ranks, blamed on clips where that can be, never trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.pack import Pack
from kinema.training.alive.skips import SkippedClip, SkippedStep, Skips, without
from kinema.training.alive.spikes import SpikeAction, SpikeConfig, is_spike


@dataclass
class GuardConfig:
    """What is done about numbers that are not sound."""

    max_incidents: int = 3
    """Times in a row that a step may be withheld because its loss or gradient is not finite; one more ends the run."""
    max_left_out: int = 100
    """Clips and steps that the whole run may leave out for that; one more ends it."""

    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done about losses that jump."""

    def __post_init__(self) -> None:
        for name in ("max_incidents", "max_left_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least 0.")


class NonFiniteLoss(RuntimeError):
    """Numbers stayed infinite or not numbers, whatever was left out; nothing of it was saved."""


@dataclass(frozen=True)
class Suspect:
    """A clip whose own loss was not finite."""

    key: str
    position: int
    loss: float


@dataclass(frozen=True)
class Incident:
    """A step that was withheld, and what is left out from now on."""

    what: str
    left_out: list[SkippedClip | SkippedStep]
    repeated: bool
    """It has happened before since the weights last got past such a step: the weights themselves may be to blame."""

    @property
    def told(self) -> str:
        """What is left out, in words."""
        clips = [f"{one.key} ({one.reason})" for one in self.left_out if isinstance(one, SkippedClip)]
        return ", ".join(clips) or "the whole step, as the loss of every single clip was finite"


@dataclass
class Guard:
    """Judges every step; the same on all ranks, since it decides by what was summed over them."""

    config: GuardConfig
    skips: Skips = field(default_factory=Skips)
    suspects: list[Suspect] = field(default_factory=list)
    """Clips of this rank that are to blame for the present step."""
    warnings: list[str] = field(default_factory=list)
    """What a person should know of the present step."""
    left_out: int = 0
    """Clips of the present step that this rank was to show, and that are left out."""
    _incidents: int = 0
    _furthest: int = -1

    def __post_init__(self) -> None:
        self.config = replace(self.config)  # all of it counts as read: it is in force, also where nothing goes wrong
        if self.config.spike.action is not SpikeAction.ignore:
            self.config.spike = replace(self.config.spike)

    @property
    def troubled(self) -> bool:
        """Whether steps were withheld and the weights have not got past them: no state to go back to later."""
        return self._incidents > 0

    def admit(self, packs: Sequence[Pack], index: DatasetIndex) -> list[Pack]:
        """This rank's packs of a step that begins, without the clips that are left out."""
        reasons = [self.skips.reasons(pack) for pack in packs]
        self.suspects, self.left_out = [], sum(map(len, reasons))
        return [without(pack, rows, index) if rows else pack for pack, rows in zip(packs, reasons, strict=True)]

    def hear(self, pack: Pack, losses: dict[int, float]) -> None:
        """Losses of the clips of a pack of this rank, by position."""
        for key, position, weight in zip(pack.keys, pack.positions, pack.weights.tolist(), strict=True):
            if weight and not math.isfinite(losses[position]):
                self.suspects.append(Suspect(key, position, losses[position]))

    def has_moved(self, step: int) -> None:
        """The weights have moved in this step."""
        if step >= self._furthest:
            self._incidents = 0

    def trouble(self, step: int, loss: float, before: Sequence[float], *, withheld: bool) -> str | None:
        """Why the run cannot go on from this step; NonFiniteLoss if it is to end there. `before` are earlier losses."""
        self.warnings = []
        if withheld or not math.isfinite(loss):
            return f"the {'gradient' if math.isfinite(loss) else f'loss ({loss})'} of step {step + 1} is not finite"
        if (deviations := is_spike(self.config.spike, loss, before)) is None:
            return None
        what = f"the loss ({loss:.4g}) of step {step + 1} lies {deviations:.0f} deviations above the steps before"
        if self.config.spike.action is SpikeAction.stop:
            raise NonFiniteLoss(f"{what} (guard.spike.action=stop). The last checkpoint is whole.")
        if self.config.spike.action is SpikeAction.rollback:
            return what
        self.warnings = [what]
        return None

    def condemn(self, step: int, suspects: Sequence[Suspect], what: str) -> Incident:
        """Leave out the suspects of all ranks, or the step if there are none; NonFiniteLoss if it happens too often."""
        self._incidents += 1
        self._furthest = max(self._furthest, step)
        blame = {one.key: SkippedClip(one.key, one.position, f"its loss was {one.loss}") for one in suspects}
        incident = Incident(what, list(blame.values()) or [SkippedStep(step, what)], self._incidents > 1)
        if self._incidents > self.config.max_incidents:
            raise NonFiniteLoss(
                f"{what}, after {self._incidents - 1} step(s) in a row that were withheld for that "
                f"(guard.max_incidents={self.config.max_incidents}). To blame: {incident.told}. Nothing of it was "
                "saved. Lower optim.learning_rate, or look at the weights that the run began with."
            )
        for one in incident.left_out:
            self.skips.add(one)
        if len(self.skips.clips) + len(self.skips.steps) > self.config.max_left_out:
            raise NonFiniteLoss(
                f"{what}, and more than guard.max_left_out={self.config.max_left_out} clips and steps would be left "
                f"out of this run by now: {incident.told}. Look at the data, or raise the limit on purpose."
            )
        return incident
