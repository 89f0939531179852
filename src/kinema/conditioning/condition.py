"""What the denoiser is told of one clip: one record, made by the same code for training and for sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Of one clip; what is None, the model was not built for or is not told."""

    text: Tensor
    """Embedding (L, D) of the caption."""
    frames: Tensor | None = None
    """Given latents (C, n, H, W): the first n latent frames of the clip, clean."""
    channels: Tensor | None = None
    """Given latents (condition_channels, T, H, W) beside the noisy ones."""
    image: Tensor | None = None
    """Tokens (L, image_width) of a given image."""
    pooled: Tensor | None = None
    """One vector (pooled_width,) for the caption."""
    guidance: float | None = None
    """Embedded strength of guidance, of a model that was distilled to need no second pass."""

    @property
    def num_frames(self) -> int:
        """Latent frames that are given clean, and that nobody has to predict."""
        return 0 if self.frames is None else self.frames.shape[1]


def without_text(conditions: Sequence[Condition], null_text: Tensor) -> list[Condition]:
    """The same with the null text (L0, D): what guidance pushes away from. Images stay, as in published pipelines."""
    return [replace(condition, text=null_text) for condition in conditions]
