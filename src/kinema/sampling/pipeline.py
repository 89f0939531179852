"""The sampling pipeline: everything between captions and frames, for the trainer and for `sample.py` alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.conditioning.condition import Condition, without_text
from kinema.conditioning.frames import Encode, FrameCondition
from kinema.conditioning.text import TextEncoder
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.pixels import to_model_range, to_uint8
from kinema.diffusion.guidance import check_guidance, guided
from kinema.diffusion.objective import Objective
from kinema.diffusion.solvers import Solver, solve
from kinema.models.vae import CausalVAE
from kinema.sampling.denoiser import Denoiser, with_given_frames


@dataclass
class SamplingConfig:
    """How noise becomes video."""

    solver: Solver = Solver.euler
    """euler, heun, ddim or dpmpp_2m."""
    num_steps: int = 30
    """Steps of the solver."""
    guidance_scale: float = 4.0
    """Classifier-free guidance (Ho and Salimans 2022); 1 turns it off and halves the cost."""
    timestep_shift: float | None = None
    """Shift of the sampler's timesteps; null obeys the training objective, any number overrides it visibly."""
    seed: int = 0
    """Seed of the first video; the next ones count up from it."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1.")


@dataclass(frozen=True)
class Pipeline:
    """A denoiser with all that its numbers depend on."""

    denoiser: nn.Module
    vae: CausalVAE
    text_encoder: TextEncoder
    objective: Objective
    geometry: Geometry
    fps: float
    shapes: list[ClipShape]
    """Shapes that the denoiser was trained on."""
    guidance_dropout: float
    """Share of captions that were dropped in training; 0 forbids guidance."""
    condition: FrameCondition
    """Images that a video can be given."""

    def check(self, config: SamplingConfig, shape: ClipShape, fps: float | None = None, images: int = 0) -> None:
        """Refuse what contradicts the training: shape, frame rate, guidance, the number of given images."""
        self.geometry.check(shape, key="shape")
        if shape not in self.shapes:
            raise ValueError(
                f"shape={list(shape)} (frames, height, width) is not one that these weights were trained on: "
                f"{[list(s) for s in self.shapes]}. Choose one of them, or allow_untrained_shape=true."
            )
        if fps is not None and fps != self.fps:
            raise ValueError(
                f"fps={fps:g} contradicts the checkpoint, which was trained at {self.fps:g} frames per second: "
                f"the motion would play at another speed. Leave fps out."
            )
        check_guidance(config.guidance_scale, self.guidance_dropout)
        self.condition.check_images(images)

    @torch.no_grad()
    def latents(
        self,
        captions: Sequence[str],
        shape: ClipShape,
        config: SamplingConfig,
        progress: Callable[[int, int], None] | None = None,
        images: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Captions -> normalised latents (C, T, H, W) each; video i starts from the noise of seed + i alone.

        `images` are the frames that each video is given, uint8 (n, H, W, 3) of the size of the video.
        """
        self.denoiser.eval()
        device = next(self.denoiser.parameters()).device
        size = (self.vae.config.latent_channels, *self.geometry.latent_shape(shape))
        noise = [initial_noise(size, config.seed + index).to(device) for index in range(len(captions))]
        conditions = self.conditions(captions, shape, images)
        nulls = without_text(conditions, self.text_encoder.null().to(device))
        denoiser = Denoiser(self.denoiser, self.geometry.patch_size[0])
        latents = solve(
            guided(denoiser, conditions, nulls, config.guidance_scale),
            noise,
            self.objective,
            config.solver,
            config.num_steps,
            shift=config.timestep_shift,
            num_tokens=[self.geometry.num_tokens(shape)] * len(captions),
            progress=progress,
        )
        return with_given_frames(latents, conditions)

    def conditions(
        self, captions: Sequence[str], shape: ClipShape, images: Sequence[Tensor] | None = None
    ) -> list[Condition]:
        """What the denoiser is told of each video, on its device."""
        device = next(self.denoiser.parameters()).device
        size = (self.vae.config.latent_channels, *self.geometry.latent_shape(shape))
        conditions = []
        for index, text in enumerate(self.text_encoder.encode(list(captions))):
            given = to_model_range(images[index].to(device)).unbind(1) if images is not None else ()
            frames = self.condition.of_images(given, shape.frames, size, encode_mean(self.vae))
            conditions.append(Condition(text.to(device), *frames))
        return conditions

    @torch.no_grad()
    def videos(
        self,
        captions: Sequence[str],
        shape: ClipShape,
        config: SamplingConfig,
        progress: Callable[[int, int], None] | None = None,
        images: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Captions, and the frames that each video is given -> frames uint8 (T, H, W, 3) each."""
        latents = self.latents(captions, shape, config, progress, images)
        self.vae.eval()
        device = next(self.vae.parameters()).device
        return [to_uint8(self.vae.decode(clip[None].to(device))[0]).cpu() for clip in latents]


def encode_mean(vae: CausalVAE) -> Encode:
    """The encoding of given frames: the mean of the posterior, in training and in sampling."""

    def encode(video: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.encode(video[None]).mean[0]

    return encode


def initial_noise(size: Sequence[int], seed: int) -> Tensor:
    """Unit noise of one video, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(tuple(size), generator=torch.Generator().manual_seed(seed))
