"""Which sizes fit together, and which axes exclude one another: every config is held against these as it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.models.dit.rules.blocks import check_attention, check_experts, check_modulation
from kinema.models.dit.rules.places import check_heads, check_packed, check_positions, check_scaling
from kinema.models.dit.rules.sizes import check_sizes
from kinema.models.dit.rules.streams import check_audio, check_control
from kinema.models.dit.rules.text import check_pooled, check_text

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig

__all__ = ["check"]


def check(model: DiTConfig) -> None:
    """Refuse, naming the key, what to type instead and why."""
    check_sizes(model)
    check_heads(model)
    check_packed(model)
    check_scaling(model)
    check_positions(model)
    check_experts(model)
    check_attention(model)
    check_text(model)
    check_pooled(model)
    check_modulation(model)
    check_control(model)
    check_audio(model)
