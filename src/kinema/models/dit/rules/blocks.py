"""What blocks are made of, and which of two experts a training moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.models.dit.axes import AttentionPattern, CrossNorm, Expert, HeadModulation, ModulationSource, TextEdge

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig


def check_experts(model: DiTConfig) -> None:
    """The boundary between two experts."""
    if not 0 <= model.expert_boundary < 1:
        raise ValueError(f"model.expert_boundary={model.expert_boundary} must be in [0, 1), for example 0.875.")
    if model.expert is not Expert.both and not model.expert_boundary:
        raise ValueError(
            f"model.expert={model.expert.name} needs two experts: type model.expert_boundary=0.875, or leave it out."
        )


def check_attention(model: DiTConfig) -> None:
    """Windows, and blocks that take turns."""
    if len(model.window) != 3 or min(model.window) < 1:
        raise ValueError(
            f"model.window={model.window} must be three numbers from 1 up (frames, rows and columns of tokens). "
            "Type for example model.window=[4,8,8]."
        )
    if model.attention is not AttentionPattern.alternating:
        return
    if model.depth % 2:
        raise ValueError(
            f"model.attention=alternating pairs a block within frames with one over time: model.depth={model.depth} "
            "must be even."
        )
    if model.modulation is ModulationSource.table and model.cross_norm is CrossNorm.modulated:
        raise ValueError(
            "model.modulation=table is shared by all blocks, but with model.attention=alternating only every other "
            "one has a caption to modulate. Type model.cross_norm=none or model.modulation=linear."
        )


def check_modulation(model: DiTConfig) -> None:
    """What modulates, what is shared, and gates behind norms."""
    is_lora = model.modulation is ModulationSource.lora
    if model.head_modulation is HeadModulation.lora and not is_lora:
        raise ValueError(
            "model.head_modulation=lora adds to what model.modulation=lora shares; model.modulation="
            f"{model.modulation.name} shares no such thing. Type model.head_modulation=linear."
        )
    if model.timestep_norm and (not is_lora or model.timestep_width):
        raise ValueError(
            f"model.timestep_norm=true needs model.modulation=lora (it is {model.modulation.name}), "
            f"and has model.timestep_channels itself: type model.timestep_width=0 (it is {model.timestep_width})."
        )
    if model.timestep_norm and model.timestep_hidden_width:
        raise ValueError(
            f"model.timestep_hidden_width={model.timestep_hidden_width} lies between two layers, which "
            "model.timestep_norm=true does not have. Type model.timestep_hidden_width=0."
        )
    if model.modulation is ModulationSource.table and model.single_depth:
        raise ValueError(
            "model.modulation=table is shared by all blocks, but those of model.single_depth="
            f"{model.single_depth} have other sublayers. Type model.modulation=linear or model.single_depth=0."
        )
    if model.head_modulation is HeadModulation.table and model.condition_width != model.width:
        raise ValueError(
            f"model.head_modulation=table adds the timestep's embedding to rows of model.width={model.width}, but "
            f"it has {model.condition_width} channels (model.timestep_width={model.timestep_width}). Type "
            "model.head_modulation=linear."
        )

    if is_lora and not model.modulation_shift:
        raise ValueError(
            "model.modulation_shift=false with model.modulation=lora: what it shares begins with a shift. Type "
            "model.modulation=linear or table."
        )
    if model.sandwich_norm and model.text is TextEdge.cross and model.cross_norm is not CrossNorm.modulated:
        raise ValueError(
            "model.sandwich_norm=true needs a gate behind every norm, which model.cross_norm="
            f"{model.cross_norm.name} does not have: a new block could not begin as the identity. Type "
            "model.cross_norm=modulated."
        )
    if model.reversed_time and model.learned_variance:
        raise ValueError(
            "model.reversed_time=true turns the sign of what the head says, and model.learned_variance=true has "
            "variances there. Type model.learned_variance=false."
        )
