"""Frames of a clip that the denoiser is given: each choice of `configs/condition/` builds them in its own way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kinema.conditioning.dropout import uniform_from
from kinema.conditioning.image import ImageTokens

Encode = Callable[[Tensor], Tensor]
"""Video (3, T, H, W) in [-1, 1] -> the mean of its normalised latents (C, t, h, w)."""


class ClipSize(NamedTuple):
    """How large a clip is before the VAE and behind it."""

    pixels: tuple[int, int, int]
    """T, H, W."""
    latents: tuple[int, int, int, int]
    """C, t, h, w."""
    temporal_stride: int
    """Frames of a latent frame; the first holds one alone."""


class Given(NamedTuple):
    """What one clip is given of its own frames."""

    frames: Tensor | None = None
    """(C, n, H, W): the first n latent frames, clean."""
    channels: Tensor | None = None
    """(condition_channels, T, H, W): beside the noisy latents."""


@dataclass
class FrameCondition:
    """Frames of its own that a clip is given: none here, where videos come from captions alone."""

    @property
    def name(self) -> str:
        """What is typed after `condition=`."""
        fitting = [name for name, kind in FRAME_CONDITIONS.items() if isinstance(self, kind)]
        return fitting[-1]  # every choice is a `FrameCondition`, which comes first

    def num_images(self) -> int:
        """Images that a clip can be given."""
        return 0

    def channels(self, latent_channels: int, temporal_stride: int) -> int:
        """What model.condition_channels must be."""
        return 0

    def needs_images(self) -> bool:
        """Whether a video cannot be made without them: training never went without."""
        return False

    def is_dropped(self, seed: int | str) -> bool:
        """Whether a training clip goes without its images; `seed` alone decides, as for captions."""
        return False

    def check_images(self, images: int) -> None:
        """Refuse a number of images that training did not know."""
        if images not in (0, self.num_images()):
            raise ValueError(
                f"{images} image(s) given: these weights were trained with {self.num_images()} "
                f"(condition={self.name}). Leave image and last_image out, or give as many."
            )
        if images == 0 and self.needs_images():
            raise ValueError(
                f"these weights were always given {self.num_images()} image(s) (condition={self.name}, "
                "condition.dropout=0): they cannot go without. Type image=picture.png."
            )

    def reads_pixels(self) -> bool:
        """Whether the latents of the clip cannot stand in for its images."""
        return False

    def of_images(self, images: Sequence[Tensor], size: ClipSize, encode: Encode) -> Given:
        """Images (3, H, W) in [-1, 1] of a clip, or none."""
        return self.of_latents(encode(images[0][:, None]) if images else None, size)

    def of_latents(self, latents: Tensor | None, size: ClipSize) -> Given:
        """As `of_images`, from the latents (C, t, h, w) of the whole clip, or None where it goes without.

        Right where the VAE is causal: then its first latent frame is the latent of the first image.
        """
        return Given()


@dataclass
class GivenFrames(FrameCondition):
    """What all choices that give images have in common."""

    dropout: float = 0.1
    """Share of clips trained without their images: the same weights then make videos from captions alone too."""
    image: ImageTokens | None = None
    """The images also as tokens, for models with `model.image_width`."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"condition.dropout={self.dropout} must be in [0, 1), usually 0.1; 0 always gives images.")

    def num_images(self) -> int:
        """One, the first frame."""
        return 1

    def needs_images(self) -> bool:
        """Whether a video cannot be made without them."""
        return self.dropout == 0

    def reads_pixels(self) -> bool:
        """Tokens are made of pixels."""
        return self.image is not None

    def is_dropped(self, seed: int | str) -> bool:
        """Whether a training clip goes without its images."""
        return uniform_from(f"frames {seed}") < self.dropout


@dataclass
class CleanFrame(GivenFrames):
    """The first latent frame is clean: timestep 0 for its tokens, no loss on it.

    Wan 2.2 TI2V-5B (Wan team 2025); LTX-Video (HaCohen et al. 2024).
    """

    def of_latents(self, latents: Tensor | None, size: ClipSize) -> Given:
        """The first frame of (C, t, h, w)."""
        return Given() if latents is None else Given(frames=latents[:, :1])


@dataclass
class FrameChannels(GivenFrames):
    """Beside the noisy latents: those of the first frame and zeros after it (HunyuanVideo I2V, CogVideoX I2V)."""

    mask: bool = True
    """One more channel, 1 where a frame is given: HunyuanVideo and HunyuanVideo-1.5 have it, CogVideoX has not."""

    def channels(self, latent_channels: int, temporal_stride: int) -> int:
        """The latents, and the mask behind them."""
        return latent_channels + self.mask

    def of_latents(self, latents: Tensor | None, size: ClipSize) -> Given:
        """The first frame of (C, t, h, w), as (C + 1, t, h, w)."""
        count, *extent = size.latents
        channels = torch.zeros(count + self.mask, *extent)
        if latents is not None:
            channels[:count, 0], channels[count:, 0] = latents[:, 0], 1
        return Given(channels=channels)


@dataclass
class PaddedClip(GivenFrames):
    """Beside the noisy latents: those of the clip with grey in place of frames that are not given, and a mask.

    Wan team 2025: Wan 2.1 I2V, its model of first and last frame, and Wan 2.2 I2V-A14B.
    """

    last: bool = False
    """Whether the last frame is given too."""

    def num_images(self) -> int:
        """The first frame, or the first and the last."""
        return 2 if self.last else 1

    def channels(self, latent_channels: int, temporal_stride: int) -> int:
        """The mask says which frames are given, one channel for each frame of a latent; the latents follow."""
        return temporal_stride + latent_channels

    def reads_pixels(self) -> bool:
        """The grey frames change every latent after the first."""
        return True

    def of_images(self, images: Sequence[Tensor], size: ClipSize, encode: Encode) -> Given:
        """The mask and the latents of the padded clip, (temporal stride + C, t, h, w)."""
        video, is_given = torch.zeros(3, *size.pixels), torch.zeros(size.pixels[0])
        for place, image in zip((0, -1), images, strict=False):
            video[:, place], is_given[place] = image, 1
        latents = encode(video)
        # The first latent holds one frame alone, which counts for all the frames that its mask has places for.
        flags = torch.cat([is_given[:1].repeat(size.temporal_stride), is_given[1:]])
        mask = flags.unflatten(0, (-1, size.temporal_stride)).T[:, :, None, None].expand(-1, *latents.shape[1:])
        return Given(channels=torch.cat([mask.to(latents), latents]))


FRAME_CONDITIONS: dict[str, type[FrameCondition]] = {
    "none": FrameCondition,
    "clean_frame": CleanFrame,
    "frame_channels": FrameChannels,
    "padded_clip": PaddedClip,
}
"""The choices of `condition` by the names of their schemas."""
