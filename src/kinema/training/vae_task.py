"""Training the VAE: reconstruction, KL, perceptual and adversarial terms, and its latent statistics."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinema.data.packs.pack import Pack
from kinema.data.pixels import to_model_range
from kinema.data.steps.keyed import keyed_seed
from kinema.distributed.collectives import from_main
from kinema.distributed.engine import Engine, ParallelConfig, Precision
from kinema.models.vae import CausalVAE, LatentStatistics
from kinema.models.vae.losses import VAELoss, VAELossConfig, psnr
from kinema.training.context_parallel import ContextParallel
from kinema.training.optimizers.optim import AdamW
from kinema.training.records.metrics import Clock
from kinema.training.task import marks_of_noise


@dataclass
class VAETaskConfig:
    """`task=vae`: train the causal 3D VAE on pixels."""

    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """Weights of the loss terms."""
    crop: list[int] = field(default_factory=list)
    """Train on random windows of [frames, height, width] of each clip, which a convolutional VAE carries over to
    whole clips at a fraction of the cost; empty trains on whole clips. Validation is always on whole clips."""
    statistics_clips: int = 64
    """Training clips on which each checkpoint's latent mean and deviation are measured."""
    strips: int = 4
    """Held-out clips drawn as original, reconstruction and difference."""
    strips_every_steps: int = 500
    """Steps between those pictures; 0 draws none."""

    def __post_init__(self) -> None:
        if self.crop and (len(self.crop) != 3 or min(self.crop) < 1):
            raise ValueError(f"task.crop={self.crop} must be [frames, height, width], or [] for whole clips.")
        if self.statistics_clips < 1:
            raise ValueError(f"task.statistics_clips={self.statistics_clips} must be at least 1.")


class VAETask:
    """What the loop needs to know of the VAE: how a pack becomes a loss, and what its weights are saved with."""

    def __init__(
        self,
        *,
        config: VAETaskConfig,
        engine: Engine,
        loss: VAELoss,
        twin: CausalVAE,
        context: ContextParallel,
        statistics_packs: list[Pack],
        optim: AdamW,
        parallel: ParallelConfig,
        accumulation: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.engine = engine
        self.twin = twin
        self.context = context
        self.statistics_packs = statistics_packs
        self.seed = seed
        self.device = device
        self.crop = list(config.crop)
        self.clip_losses: dict[int, float] = {}
        self.noise_marks: dict[int, tuple[float, ...]] = {}
        self.loss = loss.to(device)
        self.discriminator: Engine | None = None
        if self.loss.discriminator is not None:
            if parallel.precision is Precision.float16:
                raise ValueError(
                    "parallel.precision=float16 with a discriminator: a step that overflows is done again, and the "
                    "discriminator would move twice. Type parallel.precision=bfloat16, or leave the discriminator out."
                )
            # Replicated at any ZeRO stage: it is small, and the VAE's loss runs through its weights as they are.
            self.discriminator = Engine(
                self.loss.discriminator,
                optim.build(self.loss.discriminator),
                zero_stage=0,
                precision=Precision.float32,
                accumulation=accumulation,
                gradient_clipping=optim.gradient_clipping,
            )
        self.latent_channels = twin.config.latent_channels

    def micro_step(self, pack: Pack, total_weight: float, learning_rate: float, clock: Clock) -> dict[str, float]:
        """One pack's share of the step: forward, backward, and the engines' steps. Returns sums, to be reduced."""
        sums: dict[str, float] = {"clips": float((pack.weights > 0).sum()), "tokens": 0.0, "padding_tokens": 0.0}
        losses, judged = [], []
        self.clip_losses, self.noise_marks = {}, {}
        for video, weights, positions in self.batches(pack):
            with clock.phase("forward"):
                video = self.cropped(video, positions)
                noise = self.noise(video, positions)
                reconstruction, posterior = self.context.reconstruct(self.engine, video, noise)
                total, terms = self.loss.generator_loss(video, reconstruction, posterior, pack.step)
                losses.append((total * weights).sum() / total_weight)
                judged.append((video, reconstruction.detach(), weights))
                self.clip_losses |= zip(positions, total.tolist(), strict=True)
            for name, term in terms.items():
                key = f"term_{name}"
                sums[key] = sums.get(key, 0.0) + float((term * weights).sum()) / total_weight
            tokens = posterior.mean[0, 0].numel()
            sums["tokens"] += float(tokens * len(video))
            sums["padding_tokens"] += float(tokens * (weights == 0).sum())
        loss = torch.stack(losses).sum()
        with clock.phase("backward"):
            self.engine.backward(loss)
        with clock.phase("optimizer"):
            self.engine.step(learning_rate)
        if self.discriminator is not None:
            sums["term_discriminator"] = self._discriminator_step(judged, pack.step, total_weight, learning_rate, clock)
        return {"loss": float(loss.detach()), **sums}

    @torch.no_grad()
    def recompute(self, pack: Pack) -> dict[int, float]:
        """The losses that `micro_step` would find; none where a discriminator weighs in, which needs gradients."""
        losses: dict[int, float] = {}
        if self.loss.adversarial_runs(pack.step):
            return losses
        for video, _, positions in self.batches(pack):
            video = self.cropped(video, positions)
            reconstruction, posterior = self.context.reconstruct(self.engine, video, self.noise(video, positions))
            total, _ = self.loss.generator_loss(video, reconstruction, posterior, pack.step)
            losses |= zip(positions, total.tolist(), strict=True)
        return losses

    def _discriminator_step(
        self,
        judged: list[tuple[Tensor, Tensor, Tensor]],
        step: int,
        total_weight: float,
        rate: float,
        clock: Clock,
    ) -> float:
        assert self.discriminator is not None
        if not self.loss.adversarial_runs(step):
            return 0.0
        with clock.phase("discriminator"):
            losses = [
                (self.loss.discriminator_loss(video, fake, step)[0] * weights).sum() / total_weight
                for video, fake, weights in judged
            ]
            loss = torch.stack(losses).sum()
            self.discriminator.backward(loss / self.context.ranks)  # each of them has the whole of it
            self.discriminator.step(rate)
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, packs: list[Pack]) -> dict[str, float]:
        """Mean absolute error and PSNR of held-out clips, decoded from the posterior's mean. Returns sums."""
        totals = {"loss": 0.0, "psnr": 0.0, "weight": 0.0}
        for pack in packs:
            for video, weights, _ in self.batches(pack):
                noise = torch.zeros(self.latent_size(video), device=self.device)
                reconstruction, _ = self.context.reconstruct(self.engine, video, noise)
                totals["loss"] += float(((reconstruction - video).abs().flatten(1).mean(1) * weights).sum())
                totals["psnr"] += float((psnr(reconstruction, video).mean(1) * weights).sum())
                totals["weight"] += float(weights.sum())
        return totals

    def engines(self) -> dict[str, Engine]:
        """The engines whose state a checkpoint holds; the first is the model's."""
        return {"model": self.engine} | ({"discriminator": self.discriminator} if self.discriminator else {})

    def beside(self, gather: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The latent statistics under these weights, measured by the main rank."""
        weights = gather()
        return from_main({k: v for k, v in self.finished_weights(weights).items() if k not in weights})

    @torch.no_grad()
    def finished_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with the latent mean and deviation measured under them, on the main rank; elsewhere as given.

        Training works with latents before normalisation, so nothing of it depends on these statistics.
        """
        if not self.statistics_packs:
            return weights
        channels = self.latent_channels
        neutral = {"latent_mean": torch.zeros(channels), "latent_std": torch.ones(channels)}
        self.twin.load_state_dict({**self.twin.state_dict(), **weights, **neutral})
        statistics = LatentStatistics(channels)
        for pack in self.statistics_packs:
            for video, _, _ in self.batches(pack):
                statistics.update(self.twin.encode_unnormalised(video))
        mean, std = statistics.mean_and_std()
        self.twin.set_latent_statistics(mean, std)
        return {name: tensor.clone() for name, tensor in self.twin.state_dict().items()}

    def batches(self, pack: Pack) -> list[tuple[Tensor, Tensor, list[int]]]:
        """The pack's clips by equal shape: video (B, 3, T, H, W) in [-1, 1], weights (B,), positions."""
        assert pack.frames is not None
        batches = []
        for shape in dict.fromkeys(pack.shapes):
            members = [i for i, other in enumerate(pack.shapes) if other == shape]
            video = torch.stack([to_model_range(pack.frames[i].to(self.device)) for i in members])
            batches.append((video, pack.weights[members].to(self.device), [pack.positions[i] for i in members]))
        return batches

    def cropped(self, video: Tensor, positions: list[int]) -> Tensor:
        """The training window of each clip of `video` (B, 3, T, H, W), at a place keyed by the clip's position."""
        if not self.crop:
            return video
        windows = []
        for clip, position in zip(video, positions, strict=True):
            spare = [have - want for have, want in zip(clip.shape[1:], self.crop, strict=True)]
            if min(spare) < 0:
                raise ValueError(
                    f"task.crop={self.crop} is larger than a clip of {list(clip.shape[1:])}; crop less, or []."
                )
            draws = [keyed_seed(self.seed, axis, position) for axis in ("frame", "row", "column")]
            t, y, x = (draw % (room + 1) for draw, room in zip(draws, spare, strict=True))
            frames, height, width = self.crop
            windows.append(clip[:, t : t + frames, y : y + height, x : x + width])
        return torch.stack(windows)

    def noise(self, video: Tensor, positions: list[int]) -> Tensor:
        """Unit noise for the posteriors of `video`, one draw a clip, keyed by its place in the global batch."""
        size = self.latent_size(video)[1:]
        seeds = [keyed_seed(self.seed, "posterior", position) for position in positions]
        draws = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.noise_marks |= marks_of_noise(positions, draws)
        return torch.stack(draws).to(self.device)

    def latent_size(self, video: Tensor) -> tuple[int, ...]:
        """(B, C, t, h, w) of the latents of `video`."""
        return (len(video), *self.twin.latent_shape(*video.shape[2:]))
