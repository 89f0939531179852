"""What brings patches' companions to the model's width: captions, timesteps, vectors and tokens told of a clip."""

from torch import nn

from kinema.models.dit.axes import NormKind, TextEmbedding
from kinema.models.dit.conditioning import (
    AttentionPooling,
    MeanPooling,
    NormedPooled,
    NormedTimesteps,
    PooledEmbedding,
    TimestepEmbedding,
)
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import Activate, Linear
from kinema.models.dit.norms import Norm
from kinema.models.dit.refiner import TextEncoder, TextRefiner, TextTower

IMAGE_NORM_EPSILON = 1e-5


def text_embedding(config: DiTConfig, text_width: int) -> nn.Module:
    """Captions to the model's width."""
    if config.text_embedding is TextEmbedding.refiner:
        return TextRefiner(config, text_width)
    if config.text_embedding is TextEmbedding.tower:
        return TextTower(config, text_width)
    if config.text_embedding is TextEmbedding.encoder:
        return TextEncoder(config, text_width)
    if config.text_embedding is TextEmbedding.none:
        if text_width != config.caption_width:
            raise ValueError(
                f"model.text_embedding=none leaves captions as they are, with text.width={text_width} channels, where "
                f"blocks read {config.caption_width}. Type model.text_channels={text_width}."
            )
        return nn.Identity()
    first = Linear(text_width, config.caption_width)
    if config.text_embedding is TextEmbedding.linear:
        return first
    if config.text_embedding is TextEmbedding.activated:
        return nn.Sequential(first, Activate(config.text_activation))
    return nn.Sequential(first, Activate(config.text_activation), Linear(config.caption_width, config.caption_width))


def timestep_embedding(config: DiTConfig) -> TimestepEmbedding | NormedTimesteps:
    """Timesteps to the condition's width."""
    channels, scale, bias = config.timestep_channels, config.timestep_scale, config.edge_bias
    if config.timestep_norm:
        return NormedTimesteps(channels, scale, bias=bias)
    hidden = config.timestep_hidden_width or None
    return TimestepEmbedding(channels, config.condition_width, scale, bias=bias, hidden=hidden)


def guidance_embedding(config: DiTConfig) -> TimestepEmbedding:
    """The strength of guidance to the condition's width."""
    return TimestepEmbedding(config.timestep_channels, config.condition_width, config.timestep_scale)


def ofs_embedding(config: DiTConfig) -> TimestepEmbedding:
    """CogVideoX's number for each clip to the condition's width."""
    return TimestepEmbedding(config.ofs_channels, config.condition_width, 1.0)


def pooled_text(config: DiTConfig, text_width: int) -> MeanPooling | AttentionPooling:
    """All tokens of a caption to one vector of the condition's width."""
    heads = config.pooled_text_heads
    if not heads:
        return MeanPooling(text_width, config.condition_width)
    if text_width % heads:
        raise ValueError(f"model.pooled_text_heads={heads} must divide the captions' text.width={text_width}.")
    return AttentionPooling(text_width, config.condition_width, heads)


def pooled_embedding(config: DiTConfig) -> PooledEmbedding | NormedPooled:
    """One vector given for each caption to the condition's width."""
    if config.pooled_norm:
        return NormedPooled(config.pooled_width, config.condition_width, config.norm_eps)
    return PooledEmbedding(config.pooled_width, config.condition_width)


def image_embedding(config: DiTConfig) -> nn.Sequential:
    """Image tokens to the model's width: norm, an MLP of the image's own width, norm."""
    given, width = config.image_width, config.width
    norms = (Norm(NormKind.layer, channels, IMAGE_NORM_EPSILON, affine=True) for channels in (given, width))
    return nn.Sequential(next(norms), Linear(given, given), nn.GELU(), Linear(given, width), next(norms))


def glyph_embedding(config: DiTConfig) -> nn.Sequential:
    """Glyph tokens to the model's width: norm, and an MLP of three layers."""
    inside = config.glyph_hidden_width
    norm = Norm(NormKind.layer, config.glyph_width, IMAGE_NORM_EPSILON, affine=True)
    first, second, last = Linear(config.glyph_width, inside), Linear(inside, inside), Linear(inside, config.width)
    return nn.Sequential(norm, first, nn.GELU(), second, nn.GELU(), last)
