"""Averages of the weights, float32, sharded exactly as the optimiser's masters are."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinema.distributed.engine import Engine
from kinema.distributed.layout import Fill
from kinema.training.profiles import exponent_of, power_decay


@dataclass
class EMAConfig:
    """Constant decay with a warm-up that lets early weights be forgotten, and further averages beside it."""

    decay: float = 0.999
    """Share of the old average that one step keeps."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that the average is useful from the first steps."""
    power: list[float] = field(default_factory=list)
    """Lengths of further averages, each a share of all steps so far, e.g. [0.05, 0.1] (Karras et al. 2024, EDM2).

    `kinema checkpoint average --length` makes averages of any other length from them, after the run.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must be in [0, 1).")
        for length in self.power:
            exponent_of(length, "ema.power")
        if len({average_name(length) for length in self.power}) < len(self.power):
            raise ValueError(f"ema.power={self.power} has a length twice (they are told apart to a thousandth).")

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows step `step` (counted from 1)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


def average_name(length: float) -> str:
    """What a checkpoint calls the average of this length."""
    return f"ema_{length:.3f}"


class EMA:
    """The averages' shards beside the engine's. Each rank averages what it owns: no collective, right under ZeRO 3."""

    def __init__(self, config: EMAConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.shards = [shard.clone() for shard in engine.shards()]
        self._exponents = {average_name(length): exponent_of(length) for length in config.power}
        self._further = {name: [shard.clone() for shard in self.shards] for name in self._exponents}

    @property
    def averages(self) -> dict[str, list[Tensor]]:
        """The shards of each average, as a checkpoint calls them; `ema` is the one that is sampled."""
        return {"ema": self.shards, **self._further}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after step `step` (counted from 1)."""
        weights = self.engine.shards()
        torch._foreach_lerp_(self.shards, weights, 1.0 - self.config.decay_at(step))
        for name, exponent in self._exponents.items():
            torch._foreach_lerp_(self._further[name], weights, 1.0 - power_decay(exponent, step))

    def full(self) -> dict[str, Tensor]:
        """The averaged weights by name; a collective."""
        return dict(self.engine.gather(self.shards))

    def fill(self, name: str, fill: Fill) -> None:
        """Continue an average of which `fill` gives this rank what it owns, part by part."""
        self.engine.layout.fill(self.averages[name], self.engine.names, fill)
