"""The DiT as objectives, guidance and solvers call it: noisy clips, timesteps, and one record of conditions a clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kinema.conditioning.condition import Condition
from kinema.conditioning.frames import CleanFrame, FrameCondition
from kinema.conditioning.image import ImageEncoder
from kinema.models.dit import DiTConfig, Extras
from kinema.models.vae import VAEConfig

Clips = list[Tensor]


@dataclass(frozen=True)
class Denoiser:
    """Trainer, validator and sampler all ask the model through this call, so none can place a condition otherwise."""

    model: Callable[..., Clips]
    """A `DiT`, or the engine around it."""
    frames_per_token: int
    """Latent frames that one token holds: patch_size[0]."""

    def __call__(self, noisy: Clips, timesteps: Tensor, conditions: Sequence[Condition]) -> Clips:
        """Noisy clips (C, T, H, W), timesteps (B,) -> predictions. Given frames are clean and have timestep 0."""
        given = with_given_frames(noisy, conditions)
        times = timesteps if given is noisy else self._by_frame(noisy, timesteps, conditions)
        return self.model(given, times, [condition.text for condition in conditions], extras_of(conditions))

    def _by_frame(self, noisy: Clips, timesteps: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """One timestep for each frame of tokens."""
        rows = []
        for clip, time, condition in zip(noisy, timesteps, conditions, strict=True):
            row = time.repeat(clip.shape[1] // self.frames_per_token)
            row[: condition.num_frames // self.frames_per_token] = 0
            rows.append(row)
        return rows


def with_given_frames(clips: Clips, conditions: Sequence[Condition]) -> Clips:
    """Clips (C, T, H, W) with their given frames in place; the very list where no clip has any."""
    if not any(condition.num_frames for condition in conditions):
        return clips
    return [
        clip if condition.frames is None else torch.cat([condition.frames.to(clip), clip[:, condition.num_frames :]], 1)
        for clip, condition in zip(clips, conditions, strict=True)
    ]


def check_condition(
    condition: FrameCondition, model: DiTConfig, vae: VAEConfig, image_encoder: ImageEncoder | None = None
) -> None:
    """Refuse a model that cannot take what the condition gives."""
    width = image_encoder.width if image_encoder else 0
    if width != model.image_width:
        raise ValueError(
            f"model.image_width={model.image_width}, and condition={condition.name} gives image tokens of width "
            f"{width} (condition.image). Type model.image_width={width}, or another condition."
        )
    tokens = image_encoder.num_tokens * condition.num_images() if image_encoder else 0
    if model.image_positions not in (0, tokens):
        raise ValueError(
            f"model.image_positions={model.image_positions}, and condition={condition.name} gives {tokens} image "
            f"tokens. Type model.image_positions={tokens}, or another condition."
        )
    channels = condition.channels(vae.latent_channels, vae.temporal_stride)
    if channels != model.condition_channels:
        raise ValueError(
            f"condition={condition.name} gives {channels} channels beside {vae.latent_channels} latent ones, "
            f"and model.condition_channels={model.condition_channels}. Type model.condition_channels={channels}, or "
            "another condition."
        )
    if isinstance(condition, CleanFrame) and model.patch_size[0] != 1:
        raise ValueError(
            f"condition=clean_frame gives one latent frame, and model.patch_size={list(model.patch_size)} puts "
            f"{model.patch_size[0]} into a token. Type a patch_size of one frame, or another condition."
        )


def check_embedded_guidance(value: float | None, model: DiTConfig, key: str = "embedded_guidance") -> None:
    """Refuse a strength of guidance for a model that reads none, and none for one that does."""
    if model.guidance is not (value is not None):
        needed = "a number, such as 6" if model.guidance else "null"
        raise ValueError(
            f"{key}={value} and model.guidance={model.guidance}: a model is told of guidance exactly where it was "
            f"built for it. Type {key}={needed}."
        )


def extras_of(conditions: Sequence[Condition]) -> Extras:
    """What the model reads beside text and frames; clips of a pack are told the same kinds of things."""
    names = [field.name for field in fields(Condition) if field.name not in ("text", "frames")]
    told: dict[str, Any] = {name: _all_or_none([getattr(c, name) for c in conditions], name) for name in names}
    return Extras(**told)


def _all_or_none(values: list[Any], name: str) -> list[Any] | None:
    told = [value is not None for value in values]
    assert all(told) or not any(told), f"{name}: some clips of the pack have it and others do not"
    return values if all(told) else None
