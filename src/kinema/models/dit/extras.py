"""What some models are told of a clip beside its latents, timestep and caption."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Extras:
    """One entry for each clip of the pack; a model demands those that its config names and refuses the others."""

    channels: Sequence[Tensor] | None = None
    """Given latents (condition_channels, T, H, W), concatenated to the noisy ones."""
    image: Sequence[Tensor] | None = None
    """Image tokens (L, image_width)."""

    def take(self, clips: Sequence[int]) -> "Extras":
        """The same for these clips, in this order."""
        return Extras(_take(self.channels, clips), _take(self.image, clips))


def _take(values: Sequence[Tensor] | None, clips: Sequence[int]) -> list[Tensor] | None:
    return None if values is None else [values[clip] for clip in clips]
