"""Frames of a clip that the denoiser is given: each choice of `configs/condition/` builds them in its own way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kinema.conditioning.dropout import uniform_from

Encode = Callable[[Tensor], Tensor]
"""Video (3, T, H, W) in [-1, 1] -> the mean of its normalised latents (C, t, h, w)."""

LatentSize = tuple[int, int, int, int]
"""C, t, h, w of a clip's latents."""


class Given(NamedTuple):
    """What one clip is given of its own frames."""

    frames: Tensor | None = None
    """(C, n, H, W): the first n latent frames, clean."""
    channels: Tensor | None = None
    """(condition_channels, T, H, W): beside the noisy latents."""


@dataclass
class FrameCondition:
    """Frames of its own that a clip is given: none here, where videos come from captions alone."""

    def num_images(self) -> int:
        """Images that a clip can be given."""
        return 0

    def num_frames(self) -> int:
        """Latent frames that are given clean, and not learnt."""
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
                f"(condition={type(self).__name__}). Leave images out, or give as many."
            )
        if images == 0 and self.needs_images():
            raise ValueError(
                f"these weights were always given {self.num_images()} image(s) (condition={type(self).__name__}, "
                "condition.dropout=0): they cannot go without. Type image=picture.png."
            )

    def of_images(self, images: Sequence[Tensor], frames: int, size: LatentSize, encode: Encode) -> Given:
        """Images (3, H, W) in [-1, 1], or none, of a clip of `frames` frames and latents of `size`."""
        return Given()

    def of_latents(self, latents: Tensor | None, size: LatentSize) -> Given:
        """As `of_images`, from the latents (C, t, h, w) of the whole clip, or None where it goes without.

        Right where the VAE is causal: then its first latent frame is the latent of the first image.
        """
        return Given()


@dataclass
class GivenFrames(FrameCondition):
    """What all choices that give images have in common."""

    dropout: float = 0.1
    """Share of clips trained without their images: the same weights then make videos from captions alone too."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"condition.dropout={self.dropout} must be in [0, 1), usually 0.1; 0 always gives images.")

    def num_images(self) -> int:
        """One, the first frame."""
        return 1

    def needs_images(self) -> bool:
        """Whether a video cannot be made without them."""
        return self.dropout == 0

    def is_dropped(self, seed: int | str) -> bool:
        """Whether a training clip goes without its images."""
        return uniform_from(f"frames {seed}") < self.dropout


@dataclass
class CleanFrame(GivenFrames):
    """The first latent frame is clean: timestep 0 for its tokens, no loss on it (Wan 2.2 TI2V-5B, LTX-Video).

    HaCohen et al. 2024 (LTX-Video), section 4, "Image-to-Video".
    """

    def num_frames(self) -> int:
        """One, the first."""
        return 1

    def of_images(self, images: Sequence[Tensor], frames: int, size: LatentSize, encode: Encode) -> Given:
        """The image (3, H, W) as one latent frame."""
        return self.of_latents(encode(images[0][:, None]) if images else None, size)

    def of_latents(self, latents: Tensor | None, size: LatentSize) -> Given:
        """The first frame of (C, t, h, w)."""
        return Given() if latents is None else Given(frames=latents[:, :1])
