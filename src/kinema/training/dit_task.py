"""Training the DiT: packs to latents and text, one keyed draw of noise a clip, the objective's loss."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kinema.conditioning.condition import Condition, Words, embed, null_words
from kinema.conditioning.dropout import drop_text
from kinema.conditioning.frames import FrameCondition
from kinema.conditioning.image import ImageEncoder
from kinema.conditioning.text import TextEncoder
from kinema.data.config import DataConfig
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.pack import Pack
from kinema.data.pixels import to_model_range
from kinema.data.steps.keyed import keyed_seed
from kinema.diffusion.objective import Objective
from kinema.diffusion.timesteps import in_range
from kinema.distributed.engine import Engine
from kinema.distributed.process import seed_default
from kinema.models.dit import DiTConfig, check_grid
from kinema.models.vae import CausalVAE, Posterior, VAEConfig
from kinema.sampling.conditioner import Conditioner, Numbers, shown_frames
from kinema.sampling.denoiser import Denoiser
from kinema.sampling.pipeline import SamplingConfig
from kinema.training.context_parallel import ContextParallel
from kinema.training.records.metrics import Clock
from kinema.training.task import marks_of_noise


class PosteriorDraw(enum.Enum):
    """Which latent of a clip's posterior the denoiser learns."""

    sample = "sample"
    """A draw, new each time the clip comes."""
    mean = "mean"
    """Its mean: without the noise that the decoder was trained to remove."""


MAX_DRAWS = 1000
NOISE_BINS = 4
"""Losses are reported for this many equal ranges of the timestep."""


@dataclass
class SamplesConfig(SamplingConfig):
    """Sample videos during training, made by the sampler's own code from the EMA weights."""

    every_steps: int = 500
    """Steps between samples; 0 makes none."""
    prompts: list[str] = field(default_factory=list)
    """Captions to sample, always the same, so that the pictures show progress."""
    images: list[str] = field(default_factory=list)
    """Picture files: for each caption the first frame that its video is given, or its first and last; empty gives none.
    """
    shape: list[int] = field(default_factory=list)
    """Frames, height, width; empty takes the first of data.shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and (not self.prompts or len(self.images) % len(self.prompts)):
            raise ValueError(
                f"task.samples.images has {len(self.images)} pictures for {len(self.prompts)} prompts: type as many "
                "for each of task.samples.prompts, or none."
            )

    def captions(self) -> list[str]:
        """Every caption that the samples are made with, or led away from."""
        return [*self.prompts, *filter(None, [self.negative_prompt])]

    def images_of_prompts(self) -> list[list[str]]:
        """The picture files of each caption."""
        count = len(self.images) // max(len(self.prompts), 1)
        return [self.images[i * count : (i + 1) * count] for i in range(len(self.prompts))]


@dataclass
class DiTTaskConfig:
    """`task=dit`: train the denoiser on the latents of a trained VAE."""

    guidance_dropout: float = 0.1
    """Share of captions replaced by the null caption, so that guidance can be used (Ho and Salimans 2022)."""
    embedded_guidance: float | None = None
    """Strength of guidance that a distilled model (model.guidance=true) is told, always the same; null for others."""
    posterior: PosteriorDraw = PosteriorDraw.sample
    """sample or mean. A VAE with a strong KL term keeps noise in its latents that only costs the denoiser effort."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Sample videos during training."""
    overfit_check: bool = False
    """End with PASS or FAIL: whether samples of the first clip's caption are that clip (with data.max_clips=1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_dropout < 1:
            raise ValueError(f"task.guidance_dropout={self.guidance_dropout} must be in [0, 1), usually 0.1.")


class Drawn(NamedTuple):
    """What the objective is given of a pack: one item a clip."""

    latents: list[Tensor]
    conditions: list[Condition]
    timesteps: Tensor
    """(B,)"""
    noise: list[Tensor]
    tokens: list[int]
    dropped: Sequence[bool]
    """Captions that were replaced by the null caption."""
    without: list[bool]
    """Clips that go without their images."""


class DiTTask:
    """What the loop needs to know of the DiT: how a pack becomes a loss."""

    def __init__(
        self,
        *,
        engine: Engine,
        vae: CausalVAE,
        context: ContextParallel,
        text_encoder: TextEncoder,
        objective: Objective,
        condition: FrameCondition,
        image_encoder: ImageEncoder | None,
        geometry: Geometry,
        guidance_dropout: float,
        numbers: Numbers,
        posterior: PosteriorDraw,
        seed: int,
        device: torch.device,
        frozen: dict[str, Tensor],
        timestep_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.engine = engine
        self.vae = vae
        self.context = context
        self.text_encoder = text_encoder
        self.objective = objective
        self.condition = condition
        self.geometry = geometry
        self.denoiser = Denoiser(engine, geometry.patch_size[0])
        self.conditioner = Conditioner(condition, vae, geometry, image_encoder, numbers)
        self.guidance_dropout = guidance_dropout
        self.posterior = posterior
        self.timestep_range = timestep_range
        self.seed = seed
        self.device = device
        self.frozen = frozen
        self.clip_losses: dict[int, float] = {}
        self.noise_marks: dict[int, tuple[float, ...]] = {}

    def micro_step(self, pack: Pack, total_weight: float, learning_rate: float, clock: Clock) -> dict[str, float]:
        """One pack's share of the step: forward, backward, and the engine's step. Returns sums, to be reduced."""
        with clock.phase("encode"):
            drawn = self.prepare(pack)
        with clock.phase("forward"):
            losses = self.loss_of(pack, drawn)  # (B,)
            weights = pack.weights.to(self.device)
            loss = (losses * weights).sum() / total_weight
            # Read here, where the lane waits for no other: the phases of a GPU's lanes are then their own.
            told = losses.detach().cpu()
            levels = by_noise_level(told, drawn.timesteps.cpu(), pack.weights)
            self.clip_losses = dict(zip(pack.positions, told.tolist(), strict=True))
        with clock.phase("backward"):
            self.engine.backward(loss)
        with clock.phase("optimizer"):
            self.engine.step(learning_rate)
        return {
            "loss": float(loss.detach()),
            "clips": float((pack.weights > 0).sum()),
            "tokens": float(sum(drawn.tokens)),
            "padding_tokens": float(sum(n for n, weight in zip(drawn.tokens, pack.weights, strict=True) if not weight)),
            "captions_dropped": float(sum(drawn.dropped)),
            **({"images_dropped": float(sum(drawn.without))} if self.condition.num_images() else {}),
            **levels,
        }

    def prepare(self, pack: Pack) -> "Drawn":
        """Latents, conditions, timesteps and noise of a pack's clips, keyed by their places in the global batch."""
        generators = [self.generator("noise", position) for position in pack.positions]
        posteriors = self.encode(pack)
        latents = self.draw(posteriors, generators)
        words, null = embed(self.text_encoder, pack.captions), null_words(self.text_encoder)
        words, dropped = drop_text(words, null, self.guidance_dropout, self.seeds("dropout", pack))
        without = [self.condition.is_dropped(seed) for seed in self.seeds("condition", pack)]
        conditions = self.conditions(pack, posteriors, words, without)
        tokens = [self.geometry.num_tokens(shape) for shape in pack.shapes]
        draws = [self.timestep(g, count) for g, count in zip(generators, tokens, strict=True)]
        noise = [
            torch.randn(clip.shape, generator=generator) for clip, generator in zip(latents, generators, strict=True)
        ]
        self.noise_marks = marks_of_noise(pack.positions, noise)
        noise = [x.to(self.device) for x in noise]
        return Drawn(latents, conditions, torch.cat(draws).to(self.device), noise, tokens, dropped, without)

    def loss_of(self, pack: Pack, drawn: "Drawn") -> Tensor:
        """The losses (B,) of a pack's clips."""
        # Of the adapters' dropout, drawn by torch.
        seed_default(keyed_seed(self.seed, "adapters", pack.step, pack.lane), self.device)
        return self.loss(drawn.latents, drawn.conditions, drawn.timesteps, drawn.noise, drawn.tokens)

    @torch.no_grad()
    def recompute(self, pack: Pack) -> dict[int, float]:
        """The losses that `micro_step` would find, by place in the global batch; nothing else happens."""
        return dict(zip(pack.positions, self.loss_of(pack, self.prepare(pack)).tolist(), strict=True))

    def timestep(self, generator: torch.Generator, tokens: int) -> Tensor:
        """The timestep (1,) of a clip: the objective's, drawn again until one falls into the range of the expert."""
        for _ in range(MAX_DRAWS):
            drawn = self.objective.sample_timesteps(1, generator, [tokens])
            if in_range(drawn, self.timestep_range):
                return drawn
        low, high = self.timestep_range
        raise ValueError(
            f"none of {MAX_DRAWS} timesteps fell between {low} and {high}, the range of model.expert: the objective "
            "hardly draws any there. Move objective.timestep_shift or objective.timestep_mean towards it."
        )

    def encode(self, pack: Pack) -> list[Posterior]:
        """The normalised posterior of each clip, cached or fresh; a batch of one each."""
        if pack.latents is not None:
            return [Posterior(mean[None], logvar[None]) for mean, logvar in pack.latents]
        assert pack.frames is not None
        with torch.no_grad():
            return encode_frames(partial(self.context.encode, self.vae), pack.frames, self.device)

    def draw(self, posteriors: list[Posterior], generators: list[torch.Generator]) -> list[Tensor]:
        """Latents (C, T, H, W) of each clip: a draw from its posterior, or the mean."""
        if self.posterior is PosteriorDraw.mean:
            return [p.mean[0].to(self.device) for p in posteriors]
        draws = [torch.randn(p.mean.shape, generator=g) for p, g in zip(posteriors, generators, strict=True)]
        samples = [p.sample(draw.to(p.mean.device))[0] for p, draw in zip(posteriors, draws, strict=True)]
        return [sample.to(self.device) for sample in samples]

    def conditions(
        self, pack: Pack, posteriors: list[Posterior], words: list[Words], without: list[bool]
    ) -> list[Condition]:
        """What the model is told of each clip; `without` says which go without their images."""
        if pack.frames is None:
            means = [None if drop else p.mean[0] for p, drop in zip(posteriors, without, strict=True)]
            return list(map(self.conditioner.of_latents, words, pack.shapes, means))
        counts = [0 if drop else self.condition.num_images() for drop in without]
        return list(map(self.conditioner.of_images, words, pack.shapes, map(shown_frames, pack.frames, counts)))

    def loss(
        self, latents: list[Tensor], conditions: list[Condition], timesteps: Tensor, noise: list[Tensor],
        tokens: list[int],
    ) -> Tensor:  # fmt: skip
        """The objective's loss (B,) of clips with what the model is told of them."""
        given = [condition.num_frames for condition in conditions]
        return self.objective.loss(self.denoiser, latents, conditions, timesteps, noise, tokens, given)

    @torch.no_grad()
    def validate(self, packs: list[Pack]) -> dict[str, float]:
        """Loss of held-out clips at fixed noise and evenly spread timesteps. Returns sums, to be reduced."""
        self.engine.module.eval()
        totals: dict[str, float] = {}
        for pack in packs:
            # Keyed by position alone: the same noise at every validation, on any number of ranks.
            generators = [self.generator("validation", position) for position in pack.positions]
            posteriors = self.encode(pack)
            latents = self.draw(posteriors, generators)
            noise = [
                torch.randn(x.shape, generator=g).to(self.device) for x, g in zip(latents, generators, strict=True)
            ]
            spread = torch.tensor([(position * 0.6180339887) % 1 for position in pack.positions])  # golden ratio
            low, high = self.timestep_range
            timesteps = (low + (high - low) * (0.02 + 0.96 * spread)).to(self.device)
            words = embed(self.text_encoder, pack.captions)
            conditions = self.conditions(pack, posteriors, words, [False] * len(words))
            tokens = [self.geometry.num_tokens(shape) for shape in pack.shapes]
            losses = self.loss(latents, conditions, timesteps, noise, tokens).cpu()
            sums = {
                "loss": float((losses * pack.weights).sum()),
                "weight": float(pack.weights.sum()),
                **by_noise_level(losses, timesteps.cpu(), pack.weights),
            }
            totals = {key: totals.get(key, 0.0) + value for key, value in sums.items()}
        self.engine.module.train()
        return totals

    def engines(self) -> dict[str, Engine]:
        """The engines whose state a checkpoint holds; the first is the model's."""
        return {"model": self.engine}

    def beside(self, gather: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weights that are not trained."""
        return self.frozen

    def finished_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full weights as they go into a checkpoint: the trained ones, and the others as they always were."""
        return {**self.frozen, **weights}

    def seeds(self, name: str, pack: Pack) -> list[int]:
        """One seed for each clip of a pack, for draws of this name."""
        return [keyed_seed(self.seed, name, position) for position in pack.positions]

    def generator(self, *key: int | str) -> torch.Generator:
        """The generator of one clip's draws; a function of the seed and the key alone."""
        return torch.Generator().manual_seed(keyed_seed(self.seed, *key))


def check_training(condition: FrameCondition, data: DataConfig, vae: VAEConfig) -> None:
    """Refuse clips of which nothing would be left to learn, and cached latents that hold no image alone."""
    for shape in data.clip_shapes:
        if shape.frames <= condition.num_images():
            raise ValueError(
                f"data.shapes has {list(shape)}, of which condition={condition.name} gives every frame: "
                "nothing is left to learn. Leave that shape out, or type condition=none."
            )
    if not data.latent_folders:
        return
    cached = " ".join(f"{key}={folder}" for key, folder in data.latent_folders.items())
    none = " ".join(f"{key}=null" for key in data.latent_folders)
    if condition.reads_pixels():
        raise ValueError(
            f"{cached}: condition={condition.name} encodes images of its own, which cached latents do not hold. "
            f"Type {none}."
        )
    if condition.num_images() and (reason := vae.encoder_looks_ahead()):
        raise ValueError(
            f"{cached}: {reason}, so the first latent frame of a clip is not the latent of its first image. "
            f"Type {none} to encode both in every step."
        )


def check_sizes(model: DiTConfig, geometry: Geometry, shapes: Sequence[ClipShape]) -> None:
    """Refuse a model of fixed places for clips of other sizes: all that a pack cannot mix."""
    for shape in shapes:
        grid = geometry.token_grid(shape)
        try:
            check_grid(model, grid)
        except ValueError as error:
            raise ValueError(
                f"data.shapes has {list(shape)}: {error} Leave that shape out, or type "
                f"model.position_grid={list(grid)}."
            ) from error


def encode_frames(encode: Callable[[Tensor], Posterior], frames: list[Tensor], device: torch.device) -> list[Posterior]:
    """uint8 frames (T, H, W, 3) of any sizes -> one posterior a clip; equal sizes share a call."""
    posteriors: list[Posterior | None] = [None] * len(frames)
    for shape in dict.fromkeys(tuple(clip.shape) for clip in frames):
        members = [i for i, clip in enumerate(frames) if tuple(clip.shape) == shape]
        batch = torch.stack([to_model_range(frames[i].to(device)) for i in members])
        posterior = encode(batch)
        for row, i in enumerate(members):
            posteriors[i] = Posterior(posterior.mean[row : row + 1], posterior.logvar[row : row + 1])
    return [posterior for posterior in posteriors if posterior is not None]


def by_noise_level(losses: Tensor, timesteps: Tensor, weights: Tensor) -> dict[str, float]:
    """Sums and weights of losses (B,) in equal ranges of the timesteps (B,), under keys that `noise_table` reads."""
    bins = (timesteps * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
    sums = torch.zeros(NOISE_BINS).index_add_(0, bins, losses * weights)
    counts = torch.zeros(NOISE_BINS).index_add_(0, bins, weights)
    return {
        **{f"noise_sum_{i}": value for i, value in enumerate(sums.tolist())},
        **{f"noise_weight_{i}": value for i, value in enumerate(counts.tolist())},
    }


def noise_table(totals: dict[str, float]) -> dict[str, Any]:
    """Mean loss by range of the timestep, for example {"0.00-0.25": 0.8, ...}; None where no clip fell."""
    table: dict[str, Any] = {}
    for i in range(NOISE_BINS):
        weight = totals.pop(f"noise_weight_{i}")
        total = totals.pop(f"noise_sum_{i}")
        table[f"{i / NOISE_BINS:.2f}-{(i + 1) / NOISE_BINS:.2f}"] = total / weight if weight else None
    return table
