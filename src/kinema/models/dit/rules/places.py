"""Heads, rotary positions and position embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kinema.models.dit.axes import (
    AttentionPattern,
    HeadModulation,
    ModulationSource,
    PositionEmbedding,
    Rope,
    TextEdge,
    typed,
)
from kinema.models.position import check_rope_axes

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig


ALONE_WITH_SOUND: dict[str, Any] = {
    "modulation": ModulationSource.linear,
    "head_modulation": HeadModulation.linear,
    "first_frame_given": False,
    "guidance": False,
    "pooled_text": False,
    "pooled_width": 0,
    "ofs_channels": 0,
    "audio": None,
}
"""What sound in the video's softmax demands of the rest: nothing but timesteps modulates."""


def check_heads(model: DiTConfig) -> None:
    """Heads whose channels belong to axes, or heads that divide the width."""
    if model.rope in (Rope.axes, Rope.packed):
        check_rope_axes(model.rope_axes, model.head_dim, model.rope_still)
    elif model.rope_still or model.head_channels:
        raise ValueError(
            f"model.rope_still={model.rope_still} and model.head_channels={model.head_channels} need heads whose "
            f"channels belong to axes: those of model.rope={model.rope.name} do not. Type model.rope=axes, or "
            "model.rope_still=0 model.head_channels=0."
        )


def check_packed(model: DiTConfig) -> None:
    """One clock for all that shares a softmax, and what sound in it demands."""
    if model.rope is not Rope.packed:
        for name, plain in {"rope_spans": [1.0], "audio_channels": 0}.items():
            if getattr(model, name) != plain:
                raise ValueError(
                    f"model.{name}={getattr(model, name)} needs model.rope=packed (it is {model.rope.name}). Type "
                    f"model.rope=packed or model.{name}={plain}."
                )
        return
    if not model.rope_spans or min(model.rope_spans) <= 0:
        raise ValueError(
            f"model.rope_spans={model.rope_spans} must be one or more numbers above zero. Type model.rope_spans=[1]."
        )
    check_needed(model, "rope=packed", {"text": TextEdge.shared, "attention": AttentionPattern.full})
    if model.audio_channels:
        check_needed(model, f"audio_channels={model.audio_channels}", ALONE_WITH_SOUND)


def check_needed(model: DiTConfig, what: str, needed: dict[str, Any]) -> None:
    """Refuse a config in which one of these keys has another value."""
    for key, value in needed.items():
        if getattr(model, key) != value:
            raise ValueError(f"model.{what} needs model.{key}={typed(value)}. Type model.{key}={typed(value)}.")


def check_scaling(model: DiTConfig) -> None:
    """Stretched waves, and frame rates."""
    scaled = [size for size, scale in zip(model.rope_axes, model.rope_scale, strict=True) if scale != 1]
    if scaled and (model.rope not in (Rope.axes, Rope.packed) or min(scaled) <= 2):
        raise ValueError(
            f"model.rope_scale={model.rope_scale} stretches waves of model.rope_axes={model.rope_axes} with "
            f"model.rope={model.rope.name}: it needs rope=axes or packed and, for a scale, more "
            "than one wave (two channels). Type model.rope_scale=[1,1,1]."
        )
    if model.rope_fps and model.rope not in (Rope.axes, Rope.seconds):
        raise ValueError(f"model.rope_fps={model.rope_fps} needs model.rope=axes or seconds. Type model.rope_fps=0.")
    if model.rope is Rope.seconds and not model.rope_fps:
        raise ValueError("model.rope=seconds needs a frame rate for clips that name none. Type model.rope_fps=24.")


def check_positions(model: DiTConfig) -> None:
    """What tokens are told of their place, beside or instead of rotary positions."""
    is_learned = model.position_embedding in (PositionEmbedding.learned_axes, PositionEmbedding.learned)
    if len(model.position_grid) != 3 or min(model.position_grid) < 0 or is_learned is not all(model.position_grid):
        raise ValueError(
            f"model.position_grid={model.position_grid} must be frames, rows and columns of tokens of the "
            "largest clip with model.position_embedding=learned_axes or learned, and [0,0,0] with any other."
        )
    of_words = model.position_embedding is PositionEmbedding.learned
    if of_words is not bool(model.position_words) or (of_words and model.text is not TextEdge.shared):
        raise ValueError(
            f"model.position_words={model.position_words} must be the words of the longest caption with "
            f"model.position_embedding=learned and model.text=shared (it is {model.text.name}), and 0 otherwise."
        )
    if is_learned and (any(model.position_extent) or any(scale != 1 for scale in model.position_scale)):
        raise ValueError(
            f"model.position_extent={model.position_extent} and model.position_scale={model.position_scale} move "
            f"tokens between places; model.position_embedding={model.position_embedding.name} knows none. Type "
            "model.position_extent=[0,0,0] model.position_scale=[1,1,1]."
        )
    if model.position_embedding is PositionEmbedding.sincos_quarters and model.width % 16:
        raise ValueError(
            f"model.position_embedding=sincos_quarters cuts model.width={model.width} into quarters and eighths "
            "of whole pairs: it must be a multiple of 16."
        )
    halves = (PositionEmbedding.sincos_apart, PositionEmbedding.sincos_space)
    if model.position_embedding in halves and model.width % 4:
        raise ValueError(
            f"model.position_embedding={model.position_embedding.name} cuts model.width={model.width} into sines and "
            "cosines of columns and of rows: it must be a multiple of 4."
        )
    if len(model.position_extent) != 3 or min(model.position_extent) < 0:
        raise ValueError(f"model.position_extent={model.position_extent} must be three numbers from 0 up.")
    if model.position_embedding is PositionEmbedding.none and any(model.position_extent):
        raise ValueError(
            f"model.position_extent={model.position_extent} changes nothing with model.position_embedding=none. "
            "Type model.position_extent=[0,0,0]."
        )
    if model.position_embedding is PositionEmbedding.none and any(scale != 1 for scale in model.position_scale):
        raise ValueError(
            f"model.position_scale={model.position_scale} changes nothing with model.position_embedding=none. Type "
            "model.position_scale=[1,1,1]."
        )
    if model.rope is Rope.none and model.position_embedding is PositionEmbedding.none:
        raise ValueError(
            "model.rope=none with model.position_embedding=none: no token would know its place. Type "
            "model.position_embedding=sincos or model.rope=axes."
        )
