"""Numbers that mean something, each on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.models.dit.axes import Activation, Rope

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig


def check_sizes(model: DiTConfig) -> None:
    """Above zero, zero or more, even, or three of them; heads that divide the width."""
    above_zero = ["width", "depth", "num_heads", "mlp_ratio", "rope_theta", "norm_eps", "qk_norm_eps"]
    above_zero += ["modulation_rank", "timestep_scale", "glyph_hidden_width", "rope_side"]
    for name in (*above_zero, "timestep_channels"):
        if getattr(model, name) <= 0:
            raise ValueError(f"model.{name}={getattr(model, name)} must be above zero.")
    for name in (
        "condition_channels",
        "image_width",
        "timestep_width",
        "text_channels",
        "ofs_channels",
        "position_words",
        "rope_fps",
        "pooled_width",
        "single_depth",
        "image_positions",
        "control_channels",
        "glyph_width",
        "head_channels",
        "rope_still",
        "timestep_hidden_width",
        "audio_channels",
        "pooled_text_heads",
    ):
        if getattr(model, name) < 0:
            raise ValueError(f"model.{name}={getattr(model, name)} must be zero or more.")
    if not model.head_channels and model.width % (2 * model.num_heads):
        usable = [heads for heads in range(1, model.width + 1) if model.width % (2 * heads) == 0]
        raise ValueError(
            f"model.num_heads={model.num_heads} must divide model.width={model.width} into heads of an "
            f"even width: rotary positions turn channel pairs. Usable: {usable or 'an even width'}."
        )
    if len(model.patch_size) != 3 or min(model.patch_size) < 1:
        raise ValueError(
            f"model.patch_size={model.patch_size} must be three numbers from 1 up (frames, rows, columns)."
            " Type for example model.patch_size=[1,2,2]."
        )
    for name in ("timestep_channels", "ofs_channels", "head_channels", "rope_still"):
        if getattr(model, name) % 2:
            raise ValueError(f"model.{name}={getattr(model, name)} must be even: waves and turns take pairs.")
    if model.text_activation is Activation.swiglu:
        raise ValueError("model.text_activation=swiglu needs a third layer. Type gelu, gelu_tanh or silu.")
    for name in ("rope_extent", "rope_units", "rope_scale", "position_scale"):
        value = getattr(model, name)
        flat = name == "rope_extent" and model.rope is Rope.seconds  # rows and columns need not turn
        if len(value) != 3 or min(value[:1] if flat else value) <= 0 or min(value) < 0:
            raise ValueError(f"model.{name}={value} must be three numbers above zero.")
