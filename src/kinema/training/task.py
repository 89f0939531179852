"""What the loop trains: the contract of `task=dit` and `task=vae`."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from kinema.data.packs.pack import Pack
from kinema.distributed.engine import Engine
from kinema.training.records.metrics import Clock


class Task(Protocol):
    """What the loop needs from `task=dit` and `task=vae`."""

    clip_losses: dict[int, float]
    """Loss of each clip of the last micro-step, by its position."""
    noise_marks: dict[int, tuple[float, ...]]
    """First numbers of the noise of each clip of the last micro-step, by its position."""

    def engines(self) -> dict[str, Engine]:
        """Engines by name; the first, `model`, is the one that is averaged and sampled."""
        ...

    def micro_step(self, pack: Pack, total_weight: float, learning_rate: float, clock: Clock) -> dict[str, float]:
        """Forward, backward and `engine.step` of one pack; values to be summed over packs and ranks."""
        ...

    def recompute(self, pack: Pack) -> dict[int, float]:
        """The clip losses that `micro_step` would find, by forward alone; empty where that cannot be."""
        ...

    def validate(self, packs: list[Pack]) -> dict[str, float]:
        """Sums over held-out packs: `loss`, `weight` and more."""
        ...

    def beside(self, gather: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that a checkpoint holds beside the trained weights, the same on every rank; a collective.

        `gather` gives the full weights, for those that are measured under them (the VAE's latent statistics).
        """
        ...

    def finished_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full weights of the model as a checkpoint holds them, on the main rank; elsewhere as given."""
        ...


def marks_of_noise(positions: Sequence[int], noise: Sequence[Tensor]) -> dict[int, tuple[float, ...]]:
    """The first numbers of each clip's noise, drawn on the CPU, by the clip's position."""
    return {position: tuple(x.flatten()[:4].tolist()) for position, x in zip(positions, noise, strict=True)}
