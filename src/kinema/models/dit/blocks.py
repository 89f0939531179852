"""From the axes of a config to a block: which sublayers it lists."""

from torch import nn

from kinema.models.attention import attention_of
from kinema.models.dit.conditioning import LinearModulation, TableModulation
from kinema.models.dit.config import CrossNorm, DiTConfig, ModulationSource, NormKind
from kinema.models.dit.layers import SLOTS, Block, FeedForward, HeadShape, SegmentAttention, Sublayer
from kinema.models.dit.norms import Norm

VIDEO = {"video": SLOTS}


def block(config: DiTConfig) -> Block:
    """Self-attention over each span, cross-attention to the caption, then the MLP."""
    attention, shape = attention_of(config.attention_kernel), head_shape(config)
    sublayers = [
        Sublayer(VIDEO, SegmentAttention(shape, "video", ["video"], attention, span), norm(config))
        for span in config.spans
    ]
    answers = ["text", "image"] if config.image_width else ["text"]
    sublayers.append(_cross(config, SegmentAttention(shape, "video", answers, attention)))
    mlp = FeedForward(config.width, config.hidden_width, config.activation, bias=config.bias)
    sublayers.append(Sublayer(VIDEO, mlp, norm(config)))

    slots = sum(sublayer.slots for sublayer in sublayers)
    source = TableModulation if config.modulation is ModulationSource.table else LinearModulation
    return Block(sublayers, source(config.width, slots))


def head_shape(config: DiTConfig) -> HeadShape:
    """What all attentions of this model have in common."""
    return HeadShape(config.width, config.num_heads, config.qk_norm, config.qk_norm_eps, config.bias)


def norm(config: DiTConfig) -> Norm:
    """The norm before a modulated sublayer."""
    return Norm(config.norm, config.width, config.norm_eps, affine=False)


def _cross(config: DiTConfig, operation: SegmentAttention) -> Sublayer:
    if config.cross_norm is CrossNorm.modulated:
        return Sublayer(VIDEO, operation, norm(config))
    if config.cross_norm is CrossNorm.affine:
        return Sublayer({"video": 0}, operation, Norm(NormKind.layer, config.width, config.norm_eps, affine=True))
    return Sublayer({"video": 0}, operation, nn.Identity())
