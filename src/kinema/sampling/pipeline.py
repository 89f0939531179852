"""The sampling pipeline: everything between captions and frames, for the trainer and for `sample.py` alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from kinema.conditioning.condition import Condition, Words, embed, null_words, with_words
from kinema.conditioning.frames import FrameCondition
from kinema.conditioning.image import ImageEncoder
from kinema.conditioning.text import NULL_CAPTION, TextEncoder
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.pixels import to_uint8
from kinema.diffusion.guidance import Scales, by_noise, by_row, check_guidance, guided
from kinema.diffusion.objective import DDPM, Objective
from kinema.diffusion.solvers import Solver, solve
from kinema.diffusion.timesteps import TimestepSpacing
from kinema.models.dit import DiTConfig
from kinema.models.vae import CausalVAE
from kinema.sampling.conditioner import Conditioner, numbers_told
from kinema.sampling.denoiser import Denoiser, check_embedded_guidance, with_given_frames


@dataclass
class SamplingConfig:
    """How noise becomes video."""

    solver: Solver = Solver.euler
    """euler, heun, ddim or dpmpp_2m; unipc or dpm_multistep by diffusers."""
    num_steps: int = 30
    """Steps of the solver."""
    guidance_scale: float = 4.0
    """Classifier-free guidance (Ho and Salimans 2022); 1 turns it off and halves the cost."""
    guidance_scale_low: float | None = None
    """guidance_scale of the expert for low noise, of two (model.expert_boundary); null is as for the other."""
    dynamic_guidance: bool = False
    """Guidance that changes with the step as `use_dynamic_cfg` of CogVideoX's pipelines has it."""
    timestep_shift: float | None = None
    """Shift of the sampler's timesteps; null obeys the training objective, any number overrides it visibly."""
    embedded_guidance: float | None = None
    """Strength that a model is told of which was distilled to need no second pass, 6 for HunyuanVideo; or null."""
    seed: int = 0
    """Seed of the first video; the next ones count up from it."""
    negative_prompt: str = NULL_CAPTION
    """What guidance leads away from; empty is the null caption of training."""
    timestep_spacing: TimestepSpacing = TimestepSpacing.trailing
    """trailing or linspace, as flow Euler of diffusers has it."""
    timestep_terminal: float | None = None
    """Where the last step begins, the others stretched to it; null leaves it to spacing and shift. LTX-Video: 0.1."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Options of the library's scheduler, for its solvers, such as {solver_order: 3}."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1.")

    def alone(self) -> "SamplingConfig":
        """Only how noise becomes video, for a manifest, of a config that says more."""
        return SamplingConfig(**{each.name: getattr(self, each.name) for each in fields(SamplingConfig)})

    def describe(self) -> str:
        """One line for people."""
        shift = "of training" if self.timestep_shift is None else f"{self.timestep_shift:g}"
        rest = [
            f"guidance {self.guidance_scale_low or 0:g} for low noise" * (self.guidance_scale_low is not None),
            "guidance dynamic" * self.dynamic_guidance,
            f"timesteps {self.timestep_spacing.value}" * (self.timestep_spacing is not TimestepSpacing.trailing),
            f"the last from {self.timestep_terminal}" * (self.timestep_terminal is not None),
            f"embedded guidance {self.embedded_guidance}" * (self.embedded_guidance is not None),
            f"negative prompt {self.negative_prompt!r}" * bool(self.negative_prompt),
        ]
        line = f"{self.solver.value}, {self.num_steps} steps, guidance {self.guidance_scale:g}, shift {shift}"
        return ", ".join([line, *filter(None, rest)])


class OtherVAE(nn.Module):
    """A published VAE that Kinema cannot be: its latents are sampled, and another library makes the frames."""

    def __init__(self, name: str, strides: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.geometry_strides = name, strides

    def decode(self, latents: Tensor) -> Tensor:
        """ValueError."""
        raise self.no_frames()

    def no_images(self) -> ValueError:
        """Why none can be given."""
        return ValueError(f"Kinema's VAE cannot be {self.name}, so it encodes no given image. Leave image out.")

    def no_frames(self) -> ValueError:
        """Why there are none."""
        return ValueError(f"Kinema's VAE cannot be {self.name}, so it makes no frames. Type latents_only=true.")


@dataclass(frozen=True)
class Pipeline:
    """A denoiser with all that its numbers depend on."""

    denoiser: nn.Module
    vae: CausalVAE | OtherVAE
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
    image_encoder: ImageEncoder | None = None
    """What makes tokens of them, where the denoiser reads some."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the release, or the training, sampled with it: what is meant where nobody says otherwise."""

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
        for scale in (config.guidance_scale, config.guidance_scale_low):
            check_guidance(config.guidance_scale if scale is None else scale, self.guidance_dropout)
        guidance_of(config, self.denoiser.config, self.objective)
        self.condition.check_images(images)
        check_embedded_guidance(config.embedded_guidance, self.denoiser.config)

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
        size = (self.denoiser.latent_channels, *self.geometry.latent_shape(shape))
        noise = [initial_noise(size, config.seed + index).to(device) for index in range(len(captions))]
        conditions = self.conditions(captions, shape, config, images)
        nulls = with_words(conditions, self.null_words(config.negative_prompt))
        denoiser = Denoiser(self.denoiser, self.geometry.patch_size[0])
        latents = solve(
            guided(denoiser, conditions, nulls, guidance_of(config, self.denoiser.config, self.objective)),
            noise,
            self.objective,
            config.solver,
            config.num_steps,
            shift=config.timestep_shift,
            spacing=config.timestep_spacing,
            terminal=config.timestep_terminal,
            scheduler=config.scheduler,
            num_tokens=[self.geometry.num_tokens(shape)] * len(captions),
            progress=progress,
        )
        return with_given_frames(latents, conditions)

    def conditions(
        self,
        captions: Sequence[str],
        shape: ClipShape,
        config: SamplingConfig,
        images: Sequence[Tensor] | None = None,
    ) -> list[Condition]:
        """What the denoiser is told of each video, on its device."""
        numbers = numbers_told(self.denoiser.config, self.fps, config.embedded_guidance)
        if isinstance(self.vae, OtherVAE):
            if images is not None and any(map(len, images)):
                raise self.vae.no_images()
            return [Condition(**words, **numbers) for words in embed(self.text_encoder, captions)]
        given = images or [torch.empty(0, *shape[1:], 3, dtype=torch.uint8)] * len(captions)
        conditioner = Conditioner(self.condition, self.vae, self.geometry, self.image_encoder, numbers)
        return list(map(conditioner.of_images, embed(self.text_encoder, captions), [shape] * len(captions), given))

    def null_words(self, negative_prompt: str) -> Words:
        """What guidance leads away from: the null caption, or another."""
        return embed(self.text_encoder, [negative_prompt])[0] if negative_prompt else null_words(self.text_encoder)

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


def guidance_of(config: SamplingConfig, model: DiTConfig, objective: Objective) -> float | Scales:
    """How strongly clips are led at each timestep; ValueError for what this model or objective does not have."""
    high, low = config.guidance_scale, config.guidance_scale_low
    if low is not None and not model.expert_boundary:
        raise ValueError(
            f"guidance_scale_low={low} is for the expert for low noise, and this model is one alone "
            "(model.expert_boundary=0). Type guidance_scale alone."
        )
    if not config.dynamic_guidance:
        return high if low is None else by_noise(high, low, model.expert_boundary)
    if low is not None or not isinstance(objective, DDPM) or not objective.rows_from_zero:
        raise ValueError(
            "dynamic_guidance=true is of CogVideoX: one model, on a table of noise levels whose rows count from 0 "
            "(objective=ddpm, objective.rows_from_zero=true). Type dynamic_guidance=false."
        )
    return by_row(high, config.num_steps, objective.num_trained)


def initial_noise(size: Sequence[int], seed: int) -> Tensor:
    """Unit noise of one video, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(tuple(size), generator=torch.Generator().manual_seed(seed))
