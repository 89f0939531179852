"""How captions enter, and what they share with the video."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.models.dit.axes import AttentionPattern, ModulationSource, TextEdge, TextEmbedding, typed

if TYPE_CHECKING:
    from kinema.models.dit.config import DiTConfig


def check_text(model: DiTConfig) -> None:
    """Where captions go, at which width, and what joins them."""
    if model.text_embedding is TextEmbedding.refiner and model.head_channels:
        raise ValueError(
            f"model.text_embedding=refiner has heads of its own: model.head_channels={model.head_channels} does not "
            "reach them. Type model.text_embedding=linear or model.head_channels=0."
        )
    for name in ("head_gates", "modulated_captions"):
        if getattr(model, name) and model.text is not TextEdge.cross:
            raise ValueError(
                f"model.{name}=true needs model.text=cross (it is {model.text.name}): one softmax for captions and "
                f"video has neither. Type model.{name}=false."
            )
    own_width = model.text_embedding in (TextEmbedding.refiner, TextEmbedding.tower, TextEmbedding.encoder)
    if model.text_channels and (model.text is TextEdge.shared or own_width):
        raise ValueError(
            f"model.text_channels={model.text_channels}: only model.text=cross or joint without refiner, tower "
            "or encoder reads captions of another width than the model's. Type model.text_channels=0."
        )
    if model.text_channels and model.text is TextEdge.joint:
        check_two_widths(model)
    if model.glyph_width and (model.text_channels or model.text_embedding is TextEmbedding.none):
        raise ValueError(
            f"model.glyph_width={model.glyph_width} joins captions of the model's width, which those with "
            f"model.text_channels={model.text_channels} and model.text_embedding={model.text_embedding.name} do not "
            "have. Type model.glyph_width=0."
        )
    if model.image_positions and not model.image_width:
        raise ValueError(
            f"model.image_positions={model.image_positions} places image tokens, which model.image_width=0 refuses. "
            "Type their width, or model.image_positions=0."
        )
    whole = model.attention in (AttentionPattern.full, AttentionPattern.factorised)
    if model.text is not TextEdge.cross and not whole:
        raise ValueError(
            f"model.text={model.text.name} puts captions into the softmax of a clip or of its frames, which "
            f"model.attention={model.attention.name} does not have. Type model.attention=factorised, "
            "model.attention=full or model.text=cross."
        )
    if model.single_depth and (model.text is not TextEdge.joint or model.single_depth >= model.depth):
        raise ValueError(
            f"model.single_depth={model.single_depth} needs model.text=joint and to be below model.depth="
            f"{model.depth}: single streams follow blocks in which captions have weights of their own. Type "
            "model.single_depth=0 or model.text=joint."
        )
    for name in ("text_to_the_end", "text_queries_to_the_end"):
        if getattr(model, name) and (model.text is not TextEdge.joint or model.single_depth):
            raise ValueError(
                f"model.{name}=true says something only of model.text=joint without single_depth: elsewhere "
                "the last block has no weights for captions alone."
            )
    if model.text_to_the_end and model.text_queries_to_the_end:
        raise ValueError(
            "model.text_to_the_end=true has the queries of model.text_queries_to_the_end=true and all else. Type "
            "model.text_queries_to_the_end=false."
        )


def check_pooled(model: DiTConfig) -> None:
    """Vectors of a whole caption."""
    if model.pooled_norm and not model.pooled_width:
        raise ValueError("model.pooled_norm=true needs a vector to norm: type model.pooled_width, or leave it out.")
    if model.pooled_text_heads and not model.pooled_text:
        raise ValueError(
            f"model.pooled_text_heads={model.pooled_text_heads} pool what model.pooled_text=false leaves out. Type "
            "model.pooled_text=true, or model.pooled_text_heads=0."
        )


def check_two_widths(model: DiTConfig) -> None:
    """What blocks share between captions and video has one width."""
    needed = {
        "modulation": ModulationSource.linear,
        "norm_affine": False,
        "single_depth": 0,
        "image_width": 0,
    }
    for key, value in needed.items():
        if getattr(model, key) != value:
            raise ValueError(
                f"model.text_channels={model.text_channels} with model.text=joint needs model.{key}="
                f"{typed(value)}: what captions and video share there has one width."
            )
