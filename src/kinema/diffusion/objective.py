"""Objectives: what is added to the data, what the network predicts, and what that costs.

Every method takes a list of clips, each (C, T, H, W) of its own size, and one timestep a clip: `timesteps`
(B,) from 0 (data) to 1 (noise). Coefficients are float64 scalars, so a clip keeps its own dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from kinema.diffusion.schedules import (
    BetaSchedule,
    FlowSchedule,
    Level,
    NoiseSchedule,
    VPSchedule,
    make_betas,
)
from kinema.diffusion.timesteps import (
    TRAINED_TIMESTEPS,
    TimestepDistribution,
    TimestepSpacing,
    logit_normal_quantile,
    shift_timesteps,
    spaced_timesteps,
    stretch_timesteps,
    uniform_quantile,
)

Clips = list[Tensor]
Model = Callable[[Clips, Tensor, Any], Clips]
"""model(noisy clips, timesteps (B,) float32, conditions) -> predictions, one a clip and of its size."""


class PredictionTarget(Enum):
    """What the network predicts."""

    noise = "noise"
    velocity = "velocity"
    data = "data"


class LossWeighting(Enum):
    """How much each timestep counts in the loss; every choice has mean 1 over the training timesteps."""

    none = "none"
    min_snr = "min_snr"
    """min(signal-to-noise ratio, gamma) on the error of the data: Hang et al. 2023 (Min-SNR-gamma)."""


@dataclass
class Objective:
    """What every objective has in common; `RectifiedFlow` and `DDPM` are the choices."""

    prediction_target: PredictionTarget = PredictionTarget.velocity
    """noise, velocity or data."""

    timestep_distribution: TimestepDistribution = TimestepDistribution.uniform
    """uniform or logit_normal."""

    timestep_mean: float | None = None
    """Mean of the normal variable behind logit_normal; null there means 0. Above 0 means more noise."""

    timestep_std: float | None = None
    """Its standard deviation; null there means 1."""

    loss_weighting: LossWeighting = LossWeighting.none
    """none or min_snr."""

    min_snr_gamma: float | None = None
    """Cap on the signal-to-noise ratio in min_snr; null there means 5, the paper's value."""

    def __post_init__(self) -> None:
        is_logit_normal = self.timestep_distribution is TimestepDistribution.logit_normal
        for key in ("timestep_mean", "timestep_std"):
            if getattr(self, key) is not None and not is_logit_normal:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)} belongs to the logit-normal distribution, and "
                    f"objective.timestep_distribution={self.timestep_distribution.value} never reads it. "
                    f"Type objective.timestep_distribution=logit_normal or objective.{key}=null."
                )
        if self.timestep_std is not None and self.timestep_std <= 0:
            raise ValueError(f"objective.timestep_std={self.timestep_std} must be above 0, for example 1.0.")
        if self.min_snr_gamma is not None and self.loss_weighting is not LossWeighting.min_snr:
            raise ValueError(
                f"objective.min_snr_gamma={self.min_snr_gamma} is never read by objective.loss_weighting="
                f"{self.loss_weighting.value}. Type loss_weighting=min_snr or min_snr_gamma=null."
            )
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"objective.min_snr_gamma={self.min_snr_gamma} must be above 0, for example 5.0.")

    # What a kind of objective says for itself

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """Alpha and sigma at every timestep."""
        raise NotImplementedError

    @property
    def num_trained(self) -> int:
        """How many timesteps published samplers count from 0 to 1."""
        return TRAINED_TIMESTEPS

    def told(self, timesteps: Tensor) -> Tensor:
        """What the network is given for timesteps of any shape."""
        return timesteps

    def shift_for(self, num_tokens: int | None) -> float:
        """The timestep shift of a clip of `num_tokens`; training and sampling both ask here."""
        raise NotImplementedError

    def training_timesteps(self, u: Tensor, shift: Tensor | float) -> Tensor:
        """Probabilities u (n,) in (0, 1] -> the quantiles of the training timesteps, float64."""
        return shift_timesteps(self.quantile(u), shift)

    def sampling_timesteps(
        self,
        num_steps: int,
        shift: float | None = None,
        num_tokens: int | None = None,
        spacing: TimestepSpacing = TimestepSpacing.trailing,
        terminal: float | None = None,
    ) -> Tensor:
        """The timesteps that a sampler visits for one clip: (num_steps + 1,) float64, exactly 1 to exactly 0.

        The shift is the one of training unless `shift` says otherwise; `terminal` is where the last step begins.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1.")
        shift = self.shift_for(num_tokens) if shift is None else shift
        if shift <= 0:
            raise ValueError(f"timestep_shift={shift} must be above 0; 1 is no shift.")
        visited = spaced_timesteps(num_steps, spacing, shift, self.num_trained)
        if terminal is not None:
            if not 0 < terminal < 1 or num_steps == 1:
                raise ValueError(
                    f"timestep_terminal={terminal} with num_steps={num_steps}: the last step begins at a timestep "
                    "between 0 and 1, and is not the first. Type at least num_steps=2, or timestep_terminal=null."
                )
            visited = stretch_timesteps(visited, terminal)
        return torch.cat([visited, visited.new_zeros(1)])

    # Timesteps

    def quantile(self, u: Tensor) -> Tensor:
        """Probabilities (n,) in (0, 1] -> timesteps before any shift, float64."""
        if self.timestep_distribution is TimestepDistribution.uniform:
            return uniform_quantile(u.double())
        mean = 0.0 if self.timestep_mean is None else self.timestep_mean
        std = 1.0 if self.timestep_std is None else self.timestep_std
        return logit_normal_quantile(u.double(), mean, std)

    def sample_timesteps(self, n: int, generator: Generator, num_tokens: Sequence[int] | None = None) -> Tensor:
        """n clips of `num_tokens` each -> their timesteps (n,) float32 in (0, 1], on the generator's device.

        `num_tokens` is needed only where the shift depends on the size of the clip.
        """
        u = 1 - torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)  # (0, 1]
        shifts = [self.shift_for(tokens) for tokens in per_clip(num_tokens, n)]
        shift = torch.tensor(shifts, dtype=torch.float64, device=generator.device)
        return self.training_timesteps(u, shift).float()

    # The formulas

    def levels(self, timesteps: Tensor) -> list[Level]:
        """Timesteps (B,) -> the schedule's coefficients, float64 scalars for each clip."""
        return [Level(*clip) for clip in zip(*self.noise_schedule.level(timesteps), strict=True)]

    def add_noise(self, latents: Clips, noise: Clips, timesteps: Tensor) -> Clips:
        """Clean latents, unit noise and timesteps (B,) -> noisy latents."""
        levels = self.levels(timesteps)
        return [level.alpha * x + level.sigma * e for level, x, e in zip(levels, latents, noise, strict=True)]

    def target(self, latents: Clips, noise: Clips, timesteps: Tensor) -> Clips:
        """What a perfect network answers."""
        if self.prediction_target is PredictionTarget.noise:
            return noise
        if self.prediction_target is PredictionTarget.data:
            return latents
        levels = self.levels(timesteps)
        return [
            level.velocity_noise * e - level.velocity_data * x
            for level, x, e in zip(levels, latents, noise, strict=True)
        ]

    def to_data(self, noisy: Clips, prediction: Clips, timesteps: Tensor) -> Clips:
        """The clean latents that a prediction implies."""
        if self.prediction_target is PredictionTarget.data:
            return prediction
        clips = zip(self.levels(timesteps), noisy, prediction, strict=True)
        if self.prediction_target is PredictionTarget.noise:
            return [(x - level.sigma * p) / level.alpha for level, x, p in clips]
        return [(level.velocity_noise * x - level.sigma * p) / velocity_norm(level) for level, x, p in clips]

    def to_noise(self, noisy: Clips, prediction: Clips, timesteps: Tensor) -> Clips:
        """The noise that a prediction implies; with a data prediction there is none to find at t = 0."""
        if self.prediction_target is PredictionTarget.noise:
            return prediction
        clips = zip(self.levels(timesteps), noisy, prediction, strict=True)
        if self.prediction_target is PredictionTarget.data:
            return [(x - level.alpha * p) / level.sigma for level, x, p in clips]
        return [(level.velocity_data * x + level.alpha * p) / velocity_norm(level) for level, x, p in clips]

    def velocity(self, noisy: Clips, prediction: Clips, timesteps: Tensor) -> Clips:
        """noise - latents as a prediction implies it: the slope of the straight path, for every objective."""
        data = self.to_data(noisy, prediction, timesteps)
        noise = self.to_noise(noisy, prediction, timesteps)
        return [e - x for x, e in zip(data, noise, strict=True)]

    # The loss

    def loss(
        self,
        model: Model,
        latents: Clips,
        conditions: Sequence[Any],
        timesteps: Tensor,
        noise: Clips,
        num_tokens: Sequence[int] | None = None,
        given_frames: Sequence[int] | None = None,
    ) -> Tensor:
        """Clips with one timestep (B,) each -> mean squared error of each clip (B,), float32, weighted.

        The mean is over the frames after the first `given_frames` of a clip, which the model need not predict.
        `num_tokens` is needed only where both the shift depends on it and a weighting is chosen.
        """
        prediction = model(self.add_noise(latents, noise, timesteps), timesteps.float(), conditions)
        target = self.target(latents, noise, timesteps)
        clips = zip(prediction, target, given_frames or [0] * len(latents), strict=True)
        errors = [(p.float() - y.float())[:, given:].square().mean() for p, y, given in clips]
        return torch.stack(errors) * self.loss_weights(timesteps, num_tokens).to(errors[0].device)

    def loss_weights(self, timesteps: Tensor, num_tokens: Sequence[int] | None = None) -> Tensor:
        """Timesteps (B,) -> weights (B,) float32 with mean 1 over the training timesteps of such clips."""
        if self.loss_weighting is LossWeighting.none:
            return torch.ones_like(timesteps, dtype=torch.float32)
        means = [self.mean_weight(self.shift_for(tokens)) for tokens in per_clip(num_tokens, len(timesteps))]
        weights = self.raw_weights(timesteps)
        return (weights / torch.tensor(means, dtype=torch.float64, device=weights.device)).float()

    def raw_weights(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) -> min(SNR, gamma) over the squared error of the target per error of the data."""
        gamma = 5.0 if self.min_snr_gamma is None else self.min_snr_gamma
        level = self.noise_schedule.level(timesteps)
        # At a fixed noisy clip, an error of 1 in the data is an error of gain / sigma in the target.
        if self.prediction_target is PredictionTarget.noise:
            gain = level.alpha
        elif self.prediction_target is PredictionTarget.data:
            gain = level.sigma
        else:
            gain = velocity_norm(level)
        return torch.minimum(level.alpha**2, gamma * level.sigma**2) / gain**2

    def mean_weight(self, shift: float, num_points: int = 20_000) -> float:
        """Mean of the raw weights over the training timesteps under `shift` (midpoint rule on quantiles)."""
        if shift not in self._mean_weights:
            u = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
            weights = self.raw_weights(self.training_timesteps(u, shift))
            self._mean_weights[shift] = weights.mean().item()
        return self._mean_weights[shift]

    @cached_property
    def _mean_weights(self) -> dict[float, float]:
        return {}


@dataclass
class RectifiedFlow(Objective):
    """Straight path from data (t = 0) to noise (t = 1); the network predicts the velocity, noise - latents.

    Esser et al. 2024 (Stable Diffusion 3), sections 2 and 3; logit-normal timesteps, section 3.1.
    """

    timestep_distribution: TimestepDistribution = TimestepDistribution.logit_normal
    """uniform or logit_normal."""

    timestep_shift: float = 1.0
    """Above 1 moves timesteps towards noise; larger clips need more. The sampler uses it too."""

    shift_base_tokens: int | None = None
    """If set, a clip of m tokens has shift timestep_shift * sqrt(m / shift_base_tokens); section 5.3.2."""

    shift_top: float | None = None
    """If set too, the logarithm of the shift is linear in tokens: this is the shift at shift_top_tokens (LTX-Video)."""

    shift_top_tokens: int | None = None
    """Tokens of a clip whose shift is shift_top."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_target is PredictionTarget.noise:
            raise ValueError(
                "objective.prediction_target=noise cannot sample a rectified flow: at t = 1 a clip is "
                "nothing but noise, and the predicted noise says nothing of the data. Type velocity or data, "
                "or choose the DDPM objective."
            )
        if self.timestep_shift <= 0:
            raise ValueError(f"objective.timestep_shift={self.timestep_shift} must be above 0; 1 is no shift.")
        if self.shift_base_tokens is not None and self.shift_base_tokens < 1:
            raise ValueError(
                f"objective.shift_base_tokens={self.shift_base_tokens} must be a number of tokens, or null "
                "for one shift."
            )
        line = (self.shift_top, self.shift_top_tokens)
        if line != (None, None):
            top, tokens = line
            if top is None or tokens is None or self.shift_base_tokens is None or tokens == self.shift_base_tokens:
                raise ValueError(
                    f"objective.shift_top={top}, shift_top_tokens={tokens}, "
                    f"shift_base_tokens={self.shift_base_tokens}: a line needs two points. Type all three, at two "
                    "numbers of tokens, or null for the first two."
                )
            if top <= 0:
                raise ValueError(f"objective.shift_top={top} must be above 0; 1 is no shift.")

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """alpha = 1 - t, sigma = t."""
        return FlowSchedule()

    def shift_for(self, num_tokens: int | None) -> float:
        """The timestep shift of a clip of `num_tokens`; training and sampling both ask here."""
        if self.shift_base_tokens is None:
            return self.timestep_shift
        if num_tokens is None:
            raise ValueError(
                f"objective.shift_base_tokens={self.shift_base_tokens} makes the shift depend on the size of "
                "the clip: num_tokens must be given wherever timesteps are drawn or visited."
            )
        if self.shift_top is None or self.shift_top_tokens is None:
            return self.timestep_shift * (num_tokens / self.shift_base_tokens) ** 0.5
        share = (num_tokens - self.shift_base_tokens) / (self.shift_top_tokens - self.shift_base_tokens)
        return self.timestep_shift * (self.shift_top / self.timestep_shift) ** share

    def velocity(self, noisy: Clips, prediction: Clips, timesteps: Tensor) -> Clips:
        """noise - latents, which a velocity network predicts itself."""
        if self.prediction_target is PredictionTarget.velocity:
            return prediction
        return super().velocity(noisy, prediction, timesteps)


@dataclass
class DDPM(Objective):
    """Denoising diffusion on a table of noise levels, visited by "trailing" timesteps.

    Ho et al. 2020; cosine betas, Nichol and Dhariwal 2021; velocity, Salimans and Ho 2022; zero terminal
    signal-to-noise ratio and trailing timesteps, Lin et al. 2023, sections 3.1 and 3.3.
    """

    prediction_target: PredictionTarget = PredictionTarget.noise
    """noise, velocity or data."""

    num_train_timesteps: int = 1000
    """Rows of the table; row i is t = (i + 1) / num_train_timesteps."""

    beta_schedule: BetaSchedule = BetaSchedule.linear
    """linear, scaled_linear or cosine."""

    beta_start: float | None = None
    """First beta of the linear and scaled_linear schedules; null there means 0.0001."""

    beta_end: float | None = None
    """Their last beta; null there means 0.02."""

    snr_shift: float = 1.0
    """Divides the signal-to-noise ratio of every row; 3 for CogVideoX-2B."""

    zero_terminal_snr: bool = False
    """Make the last row pure noise, where sampling starts; not with noise prediction."""

    rows_from_zero: bool = False
    """The network is told row i as i / num_train_timesteps, as published models are, and not as t itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_timesteps < 2:
            raise ValueError(
                f"objective.num_train_timesteps={self.num_train_timesteps} must be at least 2, usually 1000."
            )
        for key in ("beta_start", "beta_end"):
            if getattr(self, key) is not None and self.beta_schedule is BetaSchedule.cosine:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)} is never read by objective.beta_schedule=cosine. "
                    f"Type objective.{key}=null, or beta_schedule=linear."
                )
        if self.snr_shift <= 0:
            raise ValueError(f"objective.snr_shift={self.snr_shift} must be above 0; 1 is no shift.")
        first, last = self.beta_range
        if not 0 < first < last < 1:
            raise ValueError(
                f"objective.beta_start={first}, objective.beta_end={last} must satisfy 0 < start < end < 1."
            )
        if self.zero_terminal_snr and self.prediction_target is PredictionTarget.noise:
            raise ValueError(
                "objective.zero_terminal_snr=true needs objective.prediction_target=velocity or data: at "
                "t = 1 the clip is nothing but noise, and the predicted noise says nothing of the data."
            )

    @property
    def beta_range(self) -> tuple[float, float]:
        """First and last beta of the linear schedules."""
        first = 1e-4 if self.beta_start is None else self.beta_start
        return first, 0.02 if self.beta_end is None else self.beta_end

    @cached_property
    def noise_schedule(self) -> VPSchedule:
        """The table of noise levels."""
        betas = make_betas(self.beta_schedule, self.num_train_timesteps, *self.beta_range)
        return VPSchedule(betas, snr_shift=self.snr_shift, zero_terminal_snr=self.zero_terminal_snr)

    def told(self, timesteps: Tensor) -> Tensor:
        """What the network is given for timesteps of any shape."""
        return timesteps - 1 / self.num_train_timesteps if self.rows_from_zero else timesteps

    @property
    def num_trained(self) -> int:
        """Rows of the table."""
        return self.num_train_timesteps

    def shift_for(self, num_tokens: int | None) -> float:
        """A table is not shifted: 1 for a clip of any size."""
        return 1.0

    def training_timesteps(self, u: Tensor, shift: Tensor | float) -> Tensor:
        """Probabilities u (n,) in (0, 1] -> timesteps on rows of the table, likely as their intervals."""
        rows = (super().training_timesteps(u, shift) * self.num_train_timesteps).ceil()
        return rows.clamp(min=1) / self.num_train_timesteps

    def sampling_timesteps(
        self,
        num_steps: int,
        shift: float | None = None,
        num_tokens: int | None = None,
        spacing: TimestepSpacing = TimestepSpacing.trailing,
        terminal: float | None = None,
    ) -> Tensor:
        """(num_steps + 1,) float64 from 1 to 0, on rows of the table ("trailing", Lin et al. 2023, 3.3)."""
        if num_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_steps={num_steps} is more than the {self.num_train_timesteps} rows of the table "
                f"(objective.num_train_timesteps). Type at most {self.num_train_timesteps}."
            )
        if shift not in (None, 1.0):
            raise ValueError(
                f"timestep_shift={shift} has no meaning for the DDPM objective, whose noise levels are a "
                "table. Leave it out."
            )
        times = super().sampling_timesteps(num_steps, shift, num_tokens, spacing, terminal)
        return (times * self.num_train_timesteps).round() / self.num_train_timesteps


def velocity_norm(level: Level) -> Tensor:
    """Determinant of (data, noise) -> (noisy, velocity): 1 on both schedules, hence safe at both ends."""
    return level.velocity_noise * level.alpha + level.velocity_data * level.sigma


def per_clip(num_tokens: Sequence[int] | None, n: int) -> Sequence[int | None]:
    """The sizes of n clips, or n times None where nobody said."""
    if num_tokens is None:
        return [None] * n
    if len(num_tokens) != n:
        raise ValueError(f"num_tokens has {len(num_tokens)} entries for {n} clips: one each.")
    return num_tokens
