"""What the denoiser is told of a clip, built by one piece of code for trainer, validator and sampler."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.conditioning.condition import Condition, Words
from kinema.conditioning.frames import ClipSize, FrameCondition, Given
from kinema.conditioning.image import ImageEncoder
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.pixels import to_model_range
from kinema.models.dit import DiTConfig
from kinema.models.vae import CausalVAE

PUBLISHED_OFS = 2.0
"""What CogVideoX 1.5 was made with."""

Numbers = dict[str, float]
"""Numbers of `Condition` by their names."""


def numbers_told(model: DiTConfig, fps: float, guidance: float | None) -> Numbers:
    """The numbers that a model reads of every clip: its frame rate, strength of guidance, and others of its kind."""
    named = {
        "guidance": guidance,
        "fps": fps if model.rope_fps else None,
        "ofs": PUBLISHED_OFS if model.ofs_channels else None,
    }
    return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Conditioner:
    """Captions and given images to conditions."""

    frames: FrameCondition
    vae: CausalVAE
    geometry: Geometry
    image_encoder: ImageEncoder | None
    numbers: Numbers
    """What every clip is told alike."""

    def of_images(self, words: Words, shape: ClipShape, images: Tensor) -> Condition:
        """A clip of this shape with its embedded caption, and the frames that it is given, uint8 (n, H, W, 3)."""
        pixels = to_model_range(images).unbind(1)
        given = self.frames.of_images(pixels, self._size(shape), self._encode)
        return self._told(words, given, self._tokens(images))

    def of_latents(self, words: Words, shape: ClipShape, mean: Tensor | None) -> Condition:
        """As `of_images`, from the mean (C, t, h, w) of the clip's posterior, or None where it is given nothing."""
        return self._told(words, self.frames.of_latents(mean, self._size(shape)))

    def _tokens(self, images: Tensor) -> Tensor | None:
        if self.image_encoder is None:
            return None
        return (
            self.image_encoder.encode(images) if len(images) else self.image_encoder.nothing(self.frames.num_images())
        )

    def _told(self, words: Words, given: Given, image: Tensor | None = None) -> Condition:
        device = next(self.vae.parameters()).device
        told = {**words, **given._asdict(), "image": image}
        tensors = {name: value.to(device) for name, value in told.items() if value is not None}
        return Condition(**tensors, **self.numbers)

    def _size(self, shape: ClipShape) -> ClipSize:
        latents = (self.vae.config.latent_channels, *self.geometry.latent_shape(shape))
        return ClipSize(shape, latents, self.geometry.temporal_stride)

    @torch.no_grad()
    def _encode(self, video: Tensor) -> Tensor:
        """The encoding of given frames is the mean of their posterior, in training and in sampling."""
        device = next(self.vae.parameters()).device
        return self.vae.encode(video[None].to(device)).mean[0]


def shown_frames(frames: Tensor, count: int) -> Tensor:
    """The frames (count, H, W, 3) of a clip (T, H, W, 3) that it is given: none, the first, or the first and last."""
    return frames[[0, -1][:count]]
