"""What the denoiser is told of one clip: one record, made by the same code for training and for sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kinema.conditioning.text import TextEncoder


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
    glyphs: Tensor | None = None
    """Embedding (L, glyph_width) of the words that shall be seen; L is 0 where there are none."""
    control: Tensor | None = None
    """Given latents (control_channels, T, H, W) of a control tower."""
    guidance: float | None = None
    """Embedded strength of guidance, of a model that was distilled to need no second pass."""
    fps: float | None = None
    """Frames a second, for a model whose positions in time are seconds."""
    ofs: float | None = None
    """A number that CogVideoX 1.5 embeds like a timestep."""

    @property
    def num_frames(self) -> int:
        """Latent frames that are given clean, and that nobody has to predict."""
        return 0 if self.frames is None else self.frames.shape[1]


Words = dict[str, Tensor]
"""What an encoder makes of one caption, as `Condition` names it: `text` (L, D), sometimes `pooled` or `glyphs`."""


def embed(encoder: TextEncoder, captions: Sequence[str]) -> list[Words]:
    """The words of each caption, on the encoder's device."""
    named = {"text": encoder.encode(captions), **encoder.beside(captions)}
    return [{name: values[i] for name, values in named.items()} for i in range(len(captions))]


def null_words(encoder: TextEncoder) -> Words:
    """The words of the null caption: the same bytes for dropout and for guidance."""
    return {"text": encoder.null(), **encoder.null_beside()}


def with_words(conditions: Sequence[Condition], words: Words) -> list[Condition]:
    """The same with other words: with the null ones, what guidance pushes away from. Images stay."""
    return [replace(condition, **words) for condition in conditions]
