"""From the axes of a config to its blocks: which sublayers each one lists."""

from collections.abc import Mapping, Sequence

from torch import nn

from kinema.models.attention import Attention, attention_of
from kinema.models.dit.axes import (
    Activation,
    AttentionPattern,
    CrossNorm,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    QKNorm,
    TextEdge,
)
from kinema.models.dit.conditioning import LinearModulation, LowRankModulation, TableModulation
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import (
    FeedForward,
    HeadShape,
    JointAttention,
    SegmentAttention,
    SingleStream,
    Stream,
)
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import Span
from kinema.models.dit.sublayers import Block, Slots, Sublayer

WHOLE = ("shift", "scale", "gate")
GATED = ("gate",)
ALONE = ()
VIDEO, TEXT, AUDIO = ("video",), ("text",), ("audio",)


def blocks(config: DiTConfig) -> list[Block]:
    """All blocks of the model, first to last."""
    return [_block(config, _sublayers(config, index), index) for index in range(config.depth)]


def shared_slots(made: Sequence[Block]) -> int:
    """Vectors of modulation that all blocks share: as many as the block needs that takes the most."""
    return 1 + max(row for each in made for row in _rows(each.sublayers))


def _rows(sublayers: Sequence[Sublayer]) -> list[int]:
    """Which of the shared vectors these sublayers take: each group of segments has all, and may leave the last."""
    groups = [slots for sublayer in sublayers for slots in sublayer.groups.values() if slots]
    count = max(map(len, groups))
    return [count * number + slot for number, slots in enumerate(groups) for slot in range(len(slots))]


REFINER_MLP_RATIO = 4
"""Of the refiner's MLPs in both HunyuanVideo models, whatever `mlp_ratio` is."""


def refiner_blocks(config: DiTConfig) -> list[Block]:
    """Blocks on captions alone: attention and MLP behind norms with weights, and gates."""
    attention = attention_of(config.attention_kernel)
    shape = HeadShape(config.width, config.num_heads, QKNorm.none, config.qk_norm_eps, bias=True)
    sizes = [config.width] * 2
    made = []
    for _ in range(config.refiner_depth):
        mlp = FeedForward(config.width, REFINER_MLP_RATIO * config.width, Activation.silu, bias=True)
        operations = SegmentAttention(shape, "text", TEXT, attention), mlp
        sublayers = [Sublayer({TEXT: GATED}, operation, _affine(config)) for operation in operations]
        made.append(Block(sublayers, LinearModulation(config.width, sizes), sizes))
    return made


def tower_blocks(config: DiTConfig) -> list[Block]:
    """Blocks on captions alone: attention and MLP like the video's, each modulated by a layer of its own."""
    attention = attention_of(config.attention_kernel)
    made = []
    for _ in range(config.refiner_depth):
        operations = SegmentAttention(_shape(config), "text", TEXT, attention), _mlp(config)
        sublayers = [_sublayer(config, {TEXT: _whole(config)}, operation) for operation in operations]
        sizes = _sizes(config, sublayers)
        made.append(Block(sublayers, LinearModulation(config.condition_width, sizes), sizes))
    return made


def encoder_sublayers(config: DiTConfig) -> list[Sublayer]:
    """Attention and MLP on captions alone, one after the other, behind norms with weights and with no gate."""
    attention = attention_of(config.attention_kernel)
    made = []
    for _ in range(config.refiner_depth):
        for operation in (SegmentAttention(_shape(config), "text", TEXT, attention), _mlp(config)):
            norm = Norm(config.norm, config.width, config.norm_eps, affine=True)
            made.append(Sublayer({TEXT: ALONE}, operation, norm))
    return made


def control_blocks(config: DiTConfig) -> list[Block]:
    """Blocks of the control tower, one for each layer that it adds to and like that layer's."""
    return [_block(config, _sublayers(config, index), index) for index in config.control_layers]


def _block(config: DiTConfig, sublayers: Sequence[Sublayer], index: int) -> Block:
    sizes, placed = _sizes(config, sublayers), _is_placed(config, index)
    if config.modulation is ModulationSource.table:
        return Block(sublayers, TableModulation(config.width, _rows(sublayers)), sizes, placed=placed)
    if config.modulation is ModulationSource.lora:
        groups = [len(slots) for sublayer in sublayers for slots in sublayer.groups.values() if slots]
        low_rank = LowRankModulation(config.condition_width, config.width, config.modulation_rank, groups)
        return Block(sublayers, low_rank, sizes, placed=placed)
    return Block(sublayers, LinearModulation(config.condition_width, sizes), sizes, placed=placed)


def _sizes(config: DiTConfig, sublayers: Sequence[Sublayer]) -> list[int]:
    """Width of each vector of modulation: that of the segments which it modulates."""
    groups = [group for sublayer in sublayers for group in sublayer.groups.items()]
    return [config.segment_width(segments[0]) for segments, slots in groups for _ in slots]


def _sublayer(config: DiTConfig, slots: Mapping[tuple[str, ...], Slots], operation: nn.Module) -> Sublayer:
    """Between the block's own norms, with its kind of gate."""
    after = _norm(config) if config.sandwich_norm else None
    return Sublayer(slots, operation, _norm(config), after=after, tanh_gates=config.tanh_gates)


def _whole(config: DiTConfig) -> Slots:
    return WHOLE if config.modulation_shift else WHOLE[1:]


def _is_placed(config: DiTConfig, index: int) -> bool:
    """Whether a block begins with positions: learned ones, or those in time where attention first reaches over it."""
    if config.position_embedding is PositionEmbedding.learned_axes:
        return True
    first_over_time = 1 if config.attention is AttentionPattern.alternating else 0
    return config.position_embedding is PositionEmbedding.sincos_apart and index == first_over_time


def _sublayers(config: DiTConfig, index: int) -> list[Sublayer]:
    attention = attention_of(config.attention_kernel)
    spans = config.spans(index)
    if index >= config.depth - config.single_depth:
        return [*_looks(config, attention, spans[1:]), _single(config, attention, spans[0])]
    if config.text is TextEdge.cross:
        return _cross(config, attention, spans)
    if config.text is TextEdge.shared:
        return _shared(config, attention, spans)
    return _joint(config, attention, spans, last=index == config.depth - 1)


def _looks(config: DiTConfig, attention: Attention, spans: Sequence[Span]) -> list[Sublayer]:
    """Attention of the video to itself, over one span after the other."""
    looks = [SegmentAttention(_shape(config), "video", VIDEO, attention, span) for span in spans]
    return [_sublayer(config, {VIDEO: _whole(config)}, look) for look in looks]


def _cross(config: DiTConfig, attention: Attention, spans: Sequence[Span]) -> list[Sublayer]:
    """Self-attention over each span, cross-attention to the caption unless the block is over time alone, the MLP."""
    shape = _shape(config)
    before = _looks(config, attention, spans)
    after = _sublayer(config, {VIDEO: _whole(config)}, _mlp(config))
    if spans == [Span.place]:
        return [*before, after]
    answers = ["text", "image"] if config.image_width else ["text"]
    caption = SegmentAttention(
        shape,
        "video",
        answers,
        attention,
        answer_width=config.caption_width,
        answer_modulated=config.modulated_captions,
    )
    if config.cross_norm is CrossNorm.modulated:
        reading = _sublayer(config, {VIDEO: _whole(config)}, caption)
    else:
        norms = {CrossNorm.affine: _affine(config), CrossNorm.plain: _norm(config), CrossNorm.none: nn.Identity()}
        reading = Sublayer({VIDEO: ALONE}, caption, norms[config.cross_norm])
    return [*before, reading, after]


def _joint(config: DiTConfig, attention: Attention, spans: Sequence[Span], *, last: bool) -> list[Sublayer]:
    """One softmax over video and caption, then an MLP for each; the last block only reads the caption, unless its
    weights go on to the end.

    With factorised attention a frame's softmax holds that frame and the caption, the caption's all frames; then the
    video alone looks over time.
    """
    shape, whole, changed = _shape(config), _whole(config), not last or config.text_to_the_end
    video = Stream(shape, asks=True)
    text = Stream(shape, asks=changed, width=config.caption_width, idle=config.text_queries_to_the_end)
    mixing = JointAttention({"video": video, "text": text}, attention, span=spans[0])
    first = _sublayer(config, {VIDEO: whole, TEXT: whole if changed else whole[:-1]}, mixing)
    mlps = [_sublayer(config, {VIDEO: whole}, _mlp(config))]
    if changed:
        mlps.append(_sublayer(config, {TEXT: whole}, _mlp(config, config.caption_width)))
    return [first, *_looks(config, attention, spans[1:]), *mlps]


def _shared(config: DiTConfig, attention: Attention, spans: Sequence[Span]) -> list[Sublayer]:
    """The same with one set of weights and a modulation for each, for sound too where the model has it."""
    segments, whole = [VIDEO, TEXT, *([AUDIO] if config.audio_channels else [])], _whole(config)
    shared_by = [name for segment in segments[1:] for name in segment]
    stream = {"video": Stream(_shape(config), asks=True)}
    mixing = JointAttention(stream, attention, shared_by=shared_by, span=spans[0])
    first, last = (_sublayer(config, dict.fromkeys(segments, whole), each) for each in (mixing, _mlp(config)))
    return [first, *_looks(config, attention, spans[1:]), last]


def _single(config: DiTConfig, attention: Attention, span: Span) -> Sublayer:
    """Attention and MLP side by side on video and caption, with one modulation for both."""
    operation = SingleStream(_shape(config), config.hidden_width, config.activation, attention, span)
    return _sublayer(config, {VIDEO + TEXT: _whole(config)}, operation)


def _mlp(config: DiTConfig, given: int | None = None) -> FeedForward:
    width = given or config.width
    return FeedForward(width, config.hidden_of(width), config.activation, bias=config.bias and config.mlp_bias)


def _shape(config: DiTConfig) -> HeadShape:
    return HeadShape(
        config.width,
        config.num_heads,
        config.qk_norm,
        config.qk_norm_eps,
        config.bias,
        inner=config.num_heads * config.head_dim,
        qkv_bias=config.qkv_bias,
        gated=config.head_gates,
    )


def _norm(config: DiTConfig) -> Norm:
    return Norm(config.norm, config.width, config.norm_eps, affine=config.norm_affine)


def _affine(config: DiTConfig) -> Norm:
    return Norm(NormKind.layer, config.width, config.norm_eps, affine=True)
