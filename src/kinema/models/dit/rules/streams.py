"""Sound and the control tower beside the video."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.models.dit.axes import AttentionPattern, PositionEmbedding, Rope, TextEdge, typed

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig


def check_audio(model: DiTConfig) -> None:
    """A second stream: two towers on a common clock."""
    if model.audio is None:
        return
    needed = {
        "text": TextEdge.cross,
        "attention": AttentionPattern.full,
        "rope": Rope.seconds,
        "position_embedding": PositionEmbedding.none,
        "control_layers": [],
        "norm_affine": False,
        "reversed_time": False,
    }
    for key, value in needed.items():
        if getattr(model, key) != value:
            raise ValueError(f"model.audio needs model.{key}={typed(value)}: two towers of blocks on a common clock.")
    if model.audio.text_width < 0:
        raise ValueError(f"model.audio.text_width={model.audio.text_width} must be zero or more.")
    if model.audio.width % (2 * model.audio.num_heads):
        raise ValueError(
            f"model.audio.num_heads={model.audio.num_heads} must divide model.audio.width={model.audio.width} into "
            "heads of an even width."
        )


def check_control(model: DiTConfig) -> None:
    """The control tower's layers and channels."""
    layers = model.control_layers
    if bool(layers) != bool(model.control_channels):
        raise ValueError(
            f"model.control_layers={layers} with model.control_channels={model.control_channels}: a control tower "
            "needs both, the blocks it adds to and the channels it reads. Type both, or neither."
        )
    if layers != sorted(set(layers) & set(range(model.depth))):
        raise ValueError(
            f"model.control_layers={layers} must be blocks from 0 to {model.depth - 1} in rising order, each once."
        )
    if layers and model.text is not TextEdge.cross:
        raise ValueError(
            f"model.control_layers={layers} needs model.text=cross: with model.text={model.text.name} the tower "
            "would change captions that nobody reads."
        )
