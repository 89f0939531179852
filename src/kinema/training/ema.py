"""An exponential moving average of the weights, float32, sharded exactly as the optimiser's masters are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.distributed.engine import Engine
from kinema.distributed.layout import Fill


@dataclass
class EMAConfig:
    """Constant decay with a warm-up that lets early weights be forgotten."""

    decay: float = 0.999
    """Share of the old average that one step keeps."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that the average is useful from the first steps."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must be in [0, 1).")

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows step `step` (counted from 1)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class EMA:
    """The average's shards beside the engine's. Each rank averages what it owns: no collective, right under ZeRO 3."""

    def __init__(self, config: EMAConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.shards = [shard.clone() for shard in engine.shards()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step `step`."""
        torch._foreach_lerp_(self.shards, self.engine.shards(), 1.0 - self.config.decay_at(step))

    def full(self) -> dict[str, Tensor]:
        """The averaged weights by name; a collective."""
        return dict(self.engine.gather(self.shards))

    def load(self, full: dict[str, Tensor]) -> None:
        """Continue from averaged weights by name; a collective."""
        self.shards = self.engine.scatter(full)

    def fill(self, fill: Fill) -> None:
        """Continue from averaged weights of which `fill` gives this rank what it owns, part by part."""
        self.engine.layout.fill(self.shards, self.engine.names, fill)
