"""The operations of the DiT on tokens: attention of every kind and MLPs; `sublayers.py` has what lies around each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinema.models.attention import Attention, Lengths
from kinema.models.dit.activations import gelu_tanh
from kinema.models.dit.axes import Activation, NormKind, QKNorm
from kinema.models.dit.compiled import CompiledSegment
from kinema.models.dit.memory import made_again
from kinema.models.dit.modulating import modulated
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import (
    Segment,
    Segments,
    Span,
    Tokens,
    Turns,
    clip_segment,
    joined,
    repeated,
    totals,
)
from kinema.models.position import apply_rope

Read = Mapping[str, Segment] | Mapping[str, CompiledSegment]
"""The segments, as layers around an attention read them."""
Triples = Mapping[str, tuple[Tensor | None, Tensor, Tensor]]
"""Queries, keys and values (N, h, d) of some segments; without queries, a segment only answers."""
Asked = tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]
"""Queries of the segment that asks, and by name keys and values of those that answer, (N, h, d) each."""


class Linear(nn.Linear):
    """A linear layer that takes its input in any float dtype: the residual stream stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of the weights, or of autocast."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Counts(NamedTuple):
    """What the cost of a forward pass on one clip depends on."""

    tokens: Mapping[str, int]
    """Of each segment."""
    seen: Mapping[Span, int]
    """Pairs of the video's tokens that attend to one another."""


class FeedForward(nn.Module):
    """A two-layer MLP on each token of the segments that ask, with the same weights for all of them."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.expand, self.project = Linear(width, hidden, bias), Linear(hidden, width, bias)
        self.gate = Linear(width, hidden, bias) if activation is Activation.swiglu else None
        self.activation = activation

    def forward(self, asking: Tokens, tokens: Tokens, segments: Segments) -> Tokens:
        """asking (N, D), already normalised -> its updates (N, D)"""
        return {name: self.mlp(x) for name, x in asking.items()}

    def mlp(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D)"""
        if self.gate is not None:
            return made_again(lambda gate, x: self.project(F.silu(gate) * x), self.gate(x), self.expand(x))
        return made_again(lambda x: self.project(activate(x, self.activation)), self.expand(x))

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip, for these segments."""
        layers = 2 if self.gate is None else 3
        return layers * self.expand.weight.numel() * sum(counts.tokens[name] for name in asks)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The element-wise non-linearities by name."""
    if activation is Activation.silu:
        return F.silu(x)
    assert activation is not Activation.swiglu
    return gelu_tanh(x) if activation is Activation.gelu_tanh else F.gelu(x)


class Activate(nn.Module):
    """The same as a module, for `nn.Sequential`."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape"""
        return activate(x, self.activation)


class HeadShape(NamedTuple):
    """What all attentions of a model have in common."""

    width: int
    num_heads: int
    qk_norm: QKNorm
    eps: float
    bias: bool
    inner: int = 0
    """Channels of all heads together; 0 for the width."""
    qkv_bias: bool = True
    """Whether queries, keys and values have it, too."""
    gated: bool = False
    """Whether tokens that ask weigh the heads; says nothing in one softmax for several segments."""

    @property
    def heads_width(self) -> int:
        """Channels of all heads together."""
        return self.inner or self.width

    def linear(self, given: int | None = None) -> Linear:
        """Queries, keys or values: width, or that of what is given, to all heads."""
        return Linear(given or self.width, self.heads_width, self.bias and self.qkv_bias)

    def way_back(self, given: int | None = None) -> Linear:
        """What the heads found: all heads to width, or to that of what was given."""
        return Linear(self.heads_width, given or self.width, self.bias)

    def norm(self) -> nn.Module:
        """The norm of queries or keys."""
        if self.qk_norm is QKNorm.none:
            return nn.Identity()
        kind = NormKind.layer if self.qk_norm is QKNorm.layer_head else NormKind.rms
        channels = self.heads_width if self.qk_norm is QKNorm.rms_all else self.heads_width // self.num_heads
        return Norm(kind, channels, self.eps, affine=True)

    def heads(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, h, d)"""
        return rearrange(x, "n (h d) -> n h d", h=self.num_heads)

    def normed_heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x (N, D) -> (N, h, d), normalised before or after the cut."""
        return self.heads(norm(x)) if self.qk_norm is QKNorm.rms_all else norm(self.heads(x))


class KeyValue(nn.Module):
    """Keys and values of a segment that only answers."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.key, self.value = shape.linear(), shape.linear()
        self.key_norm = shape.norm()

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (M, D) -> keys and values (M, h, d)"""
        return self.shape.normed_heads(self.key(source), self.key_norm), self.shape.heads(self.value(source))


class SegmentAttention(nn.Module):
    """Multi-head attention: the tokens of one segment look at their own or at those of others, clip by clip.

    A segment that answers itself is self-attention, over the `span`, with rotary positions. Others that answer
    are cross-attention, each in a softmax of its own, and the results are summed (Ye et al. 2023, IP-Adapter). Where
    both lie on a common clock, it turns them. A `gated` shape weighs what each head found (Qiu et al. 2025); with
    `answer_modulated` those who answer first do so behind a shift and scale.
    """

    def __init__(
        self,
        shape: HeadShape,
        asks: str,
        answers: Sequence[str],
        attention: Attention,
        span: Span = Span.clip,
        answer_width: int | None = None,
        ask_width: int | None = None,
        *,
        answer_modulated: bool = False,
    ) -> None:
        super().__init__()
        self.asks, self.answers, self.span = asks, answers[0], span
        self.shape, self.attention = shape, attention
        self.query = shape.linear(ask_width)
        self.key, self.value = shape.linear(answer_width), shape.linear(answer_width)
        self.query_norm, self.key_norm = shape.norm(), shape.norm()
        self.project = shape.way_back(ask_width)
        self.gates = Linear(ask_width or shape.width, shape.num_heads) if shape.gated else None
        table = torch.zeros(2, answer_width or shape.width)
        self.answer_table = nn.Parameter(table) if answer_modulated else None
        self.others = nn.ModuleDict({name: KeyValue(shape) for name in answers[1:]})

    def forward(self, asking: Tokens, tokens: Tokens, segments: Segments) -> Tokens:
        """asking (N, D), already normalised -> its update (N, D)"""
        return self.answer(asking, self.attend(self.ask(asking, tokens, segments), segments))

    def ask(self, asking: Tokens, tokens: Tokens, segments: Read) -> Asked:
        """asking (N, D), already normalised -> queries; of each segment that answers keys and values. (N, h, d) each"""
        x = asking[self.asks]
        source = asking[self.answers] if self.answers in asking else tokens[self.answers]
        source = self._told(source, segments[self.answers])
        q = self.shape.normed_heads(self.query(x), self.query_norm)
        k = self.shape.normed_heads(self.key(source), self.key_norm)
        v = self.shape.heads(self.value(source))

        rope = segments[self.asks].rope
        clocks = segments[self.asks].clock, segments[self.answers].clock
        if self.answers == self.asks and rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        elif clocks[0] is not None and clocks[1] is not None:
            q, k = apply_rope(q, *clocks[0]), apply_rope(k, *clocks[1])
        others = {name: other(tokens[name]) for name, other in self.others.items()}
        return q, {self.answers: (k, v), **others}

    def attend(self, asked: Asked, segments: Segments) -> Tokens:
        """What those that ask find, (N, h, d), the sum over all that answer."""
        q, answers = asked
        (name, (k, v)), *others = answers.items()
        mixed = self._mix(q, k, v, name, segments)
        for name, (k, v) in others:
            mixed = mixed + self._mix(q, k, v, name, segments)
        return {self.asks: mixed}

    def answer(self, asking: Tokens, found: Tokens) -> Tokens:
        """What was found, (N, h, d) -> the update (N, D) of those that asked."""
        return {self.asks: self.project(self._weighed(found[self.asks], asking).flatten(1))}

    @property
    def asks_again(self) -> bool:
        """Whether `answer` reads the tokens that ask."""
        return self.gates is not None

    def _told(self, source: Tensor, segment: Segment | CompiledSegment) -> Tensor:
        """Tokens that answer (M, D), behind the shift and scale that their segment is told and this table."""
        if self.answer_table is None:
            return source
        assert segment.told is not None
        assert segment.clips is not None
        shift, scale = map(segment.clips.of, (segment.told + self.answer_table).unbind(1))
        return modulated(source.to(shift.dtype), shift, scale, segment.clips.lengths)

    def _weighed(self, mixed: Tensor, asking: Tokens) -> Tensor:
        """mixed (N, h, d) by gates between 0 and 2 of each token and head; those of a new model are 1."""
        if self.gates is None:
            return mixed
        logits = self.gates(asking[self.asks])
        gates = 2 * torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return mixed * gates.to(mixed.dtype).unsqueeze(-1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, answers: str, segments: Segments) -> Tensor:
        asks, asking, answering = self.asks, segments[self.asks], segments[answers]
        q, k = q.to(v.dtype), k.to(v.dtype)
        if asking.group is not answering.group:  # whoever shares the tokens that ask has all that answer them
            _, held = asking.share.pieces(asking.lengths)
            return self.attention(q, k, v, held, answering.lengths)
        q_cut, k_cut = asking.cuts[self.span], answering.cuts[self.span]

        def mix(q: Tokens, k: Tokens, v: Tokens) -> Tokens:
            lengths = q_cut.lengths, k_cut.lengths
            return {asks: self.attention(q[asks], k[answers], v[answers], *lengths, order=q_cut.order)}

        counts = {asks: asking.count, answers: answering.count}
        return asking.group.attend(mix, {asks: q}, {answers: k}, {answers: v}, counts)[asks]

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip."""
        asking, inner = counts.tokens[self.asks], self.shape.heads_width
        square = self.shape.width * inner
        gates = 0 if self.gates is None else asking * self.gates.weight.numel()
        if self.answers == self.asks:
            pairs = counts.seen[self.span] if self.asks == "video" else asking**2
            return 4 * asking * square + 2 * pairs * inner + gates
        others = sum(counts.tokens[name] for name in self.others)
        keys = 2 * counts.tokens[self.answers] * self.key.weight.numel() + 2 * others * square
        own = asking * (self.query.weight.numel() + self.project.weight.numel())
        return own + gates + keys + 2 * asking * (counts.tokens[self.answers] + others) * inner


class Stream(nn.Module):
    """Queries, keys and values of tokens that share weights; without `asks` they only answer.

    The tokens may have a `width` of their own. `idle` queries are weights that nothing computes with.
    """

    def __init__(self, shape: HeadShape, *, asks: bool, width: int | None = None, idle: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.query = shape.linear(width) if asks or idle else None
        self.key, self.value = shape.linear(width), shape.linear(width)
        self.query_norm = shape.norm() if asks or idle else None
        self.key_norm = shape.norm()
        self.project = shape.way_back(width) if asks else None

    def forward(self, x: Tensor, rope: Turns | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """x (N, D) -> queries, keys and values (N, h, d)"""
        k, v = self.shape.normed_heads(self.key(x), self.key_norm), self.shape.heads(self.value(x))
        k = k if rope is None else apply_rope(k, *rope)
        if self.project is None or self.query is None or self.query_norm is None:
            return None, k.to(v.dtype), v
        q = self.shape.normed_heads(self.query(x), self.query_norm)
        return (q if rope is None else apply_rope(q, *rope)).to(v.dtype), k.to(v.dtype), v

    def products(self) -> int:
        """Multiplications on one token, attention apart."""
        layers = [self.key, self.value, *([] if self.project is None else [self.query, self.project])]
        return sum(layer.weight.numel() for layer in layers if layer is not None)


class JointAttention(nn.Module):
    """One softmax over the tokens of several segments of a clip: MMDiT (Esser et al. 2024).

    Each segment has a stream, its weights, or all share one. Streams that do not ask answer the others. The video sees
    of itself its `span`, and the other segments see all of it.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        attention: Attention,
        *,
        shared_by: Sequence[str] = (),
        span: Span = Span.clip,
    ) -> None:
        super().__init__()
        self.attention, self.span = attention, span
        self.streams = nn.ModuleDict(streams)
        (first, *_) = streams
        self.stream_of = {name: name for name in streams} | dict.fromkeys(shared_by, first)

    def forward(self, asking: Tokens, tokens: Tokens, segments: Segments) -> Tokens:
        """asking (N, D) of every segment, already normalised -> updates (N, D) of those not silent"""
        return self.answer(asking, self.attend(self.ask(asking, tokens, segments), segments))

    def ask(self, asking: Tokens, tokens: Tokens, segments: Read) -> Triples:
        """asking (N, D) of every segment, already normalised -> queries, keys and values (N, h, d)"""
        return {name: self.streams[self.stream_of[name]](x, segments[name].rope) for name, x in asking.items()}

    def attend(self, asked: Triples, segments: Segments) -> Tokens:
        """What was found, (N, D) of those not silent."""
        return attend_jointly(asked, segments, self.attention, self.span)

    def answer(self, asking: Tokens, found: Tokens) -> Tokens:
        """What was found -> updates (N, D)"""
        return {name: self.streams[self.stream_of[name]].project(x) for name, x in found.items()}

    asks_again = False
    """`answer` does not read the tokens that ask."""

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip, for these segments."""
        streams = {name: self.streams[self.stream_of[name]] for name in asks}
        asking = sum(counts.tokens[name] for name, stream in streams.items() if stream.project is not None)
        answering = sum(counts.tokens[name] for name in asks)
        unseen = counts.tokens["video"] ** 2 - counts.seen[self.span]
        layers = sum(counts.tokens[name] * stream.products() for name, stream in streams.items())
        return layers + 2 * (asking * answering - unseen) * self.streams["video"].shape.heads_width


class SingleStream(nn.Module):
    """Joint attention and an MLP side by side, with one set of weights and one way back for all segments.

    The parallel block of Dehghani et al. 2023 (ViT-22B), as in FLUX and HunyuanVideo.
    """

    def __init__(
        self, shape: HeadShape, hidden: int, activation: Activation, attention: Attention, span: Span = Span.clip
    ) -> None:
        super().__init__()
        self.shape, self.attention, self.activation, self.span = shape, attention, activation, span
        self.query, self.key, self.value = (shape.linear() for _ in range(3))
        self.query_norm, self.key_norm = shape.norm(), shape.norm()
        self.expand = Linear(shape.width, hidden, shape.bias)
        self.gate = Linear(shape.width, hidden, shape.bias) if activation is Activation.swiglu else None
        self.project = Linear(shape.heads_width + hidden, shape.width, shape.bias)

    def forward(self, asking: Tokens, tokens: Tokens, segments: Segments) -> Tokens:
        """asking (N, D) of every segment, already normalised -> updates (N, D)"""
        return self.answer(asking, self.attend(self.ask(asking, tokens, segments), segments))

    def ask(self, asking: Tokens, tokens: Tokens, segments: Read) -> Triples:
        """asking (N, D) of every segment, already normalised -> queries, keys and values (N, h, d)"""
        return {name: self._heads(x, segments[name].rope) for name, x in asking.items()}

    def attend(self, asked: Triples, segments: Segments) -> Tokens:
        """What was found, (N, D)."""
        return attend_jointly(asked, segments, self.attention, self.span)

    def answer(self, asking: Tokens, found: Tokens) -> Tokens:
        """What was found, and the MLP on the tokens that asked -> updates (N, D)"""
        return {name: made_again(self._way_back, found[name], *self._hidden(x)) for name, x in asking.items()}

    asks_again = True
    """`answer` reads the tokens that ask: for the MLP."""

    def _heads(self, x: Tensor, rope: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.shape.normed_heads(self.query(x), self.query_norm)
        k = self.shape.normed_heads(self.key(x), self.key_norm)
        v = self.shape.heads(self.value(x))
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q.to(v.dtype), k.to(v.dtype), v

    def _hidden(self, x: Tensor) -> list[Tensor]:
        """x (N, D) -> what the MLP's non-linearity takes, (N, hidden) each"""
        return [self.expand(x)] if self.gate is None else [self.expand(x), self.gate(x)]

    def _way_back(self, mixed: Tensor, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        active = activate(hidden, self.activation) if gate is None else F.silu(gate) * hidden
        return self.project(torch.cat([mixed, active], dim=-1))

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip, for these segments."""
        count, inner = sum(counts.tokens[name] for name in asks), self.shape.heads_width
        gate = 0 if self.gate is None else self.gate.weight.numel()
        layers = 3 * self.shape.width * inner + self.expand.weight.numel() + self.project.weight.numel() + gate
        pairs = count**2 - counts.tokens["video"] ** 2 + counts.seen[self.span]
        return count * layers + 2 * pairs * inner


def attend_jointly(triples: Triples, segments: Segments, attention: Attention, span: Span = Span.clip) -> Tokens:
    """One softmax for each clip over all these segments -> mixed (N, D) of those that ask."""

    def mix(q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        whole = {name: (q.get(name), k[name], v[name]) for name in k}
        return _attend_by_span(whole, segments, attention, span)

    q = {name: query for name, (query, _, _) in triples.items() if query is not None}
    k, v = ({name: triple[part] for name, triple in triples.items()} for part in (1, 2))
    counts = {name: segments[name].count for name in triples}
    mixed = segments["video"].group.attend(mix, q, k, v, counts)
    return {name: x.flatten(1) for name, x in mixed.items()}


def _attend_over_clips(triples: Triples, segments: Segments, attention: Attention) -> Tokens:
    """Packed segments lie one after the other; here the segments of each clip lie together. -> (N, h, d)"""
    asking = {name: q for name, (q, _, _) in triples.items() if q is not None}
    q_lengths = [segments[name].lengths for name in asking]
    k_lengths = [segments[name].lengths for name in triples]
    q = joined(list(asking.values()), q_lengths)
    k = joined([key for _, key, _ in triples.values()], k_lengths)
    v = joined([value for _, _, value in triples.values()], k_lengths)
    mixed = attention(q, k, v, totals(q_lengths), totals(k_lengths))
    pieces = mixed.split([length for clip in zip(*q_lengths, strict=True) for length in clip])
    return {name: torch.cat(pieces[place :: len(asking)]) for place, name in enumerate(asking)}


def _attend_by_span(triples: Triples, segments: Segments, attention: Attention, span: Span) -> Tokens:
    """The video asks its own span and the other segments, which ask the whole clip: no answer of theirs is averaged."""
    if span is Span.clip:
        return _attend_over_clips(triples, segments, attention)
    query, key, value = triples["video"]
    video, others = segments["video"], {name: triple for name, triple in triples.items() if name != "video"}
    copies = video.pieces(span)
    pieces = {"video": clip_segment(video.cuts[span].lengths)}
    answers: dict[str, tuple[Tensor | None, Tensor, Tensor]] = {"video": (query, key, value)}
    for name, (_, k, v) in others.items():
        lengths = segments[name].lengths
        pieces[name] = clip_segment(repeated(lengths, copies))
        answers[name] = (None, _repeat(k, lengths, copies), _repeat(v, lengths, copies))
    mixed = _attend_over_clips(answers, pieces, attention)
    if any(q is not None for q, _, _ in others.values()):
        mixed |= _attend_over_clips({"video": (None, key, value), **others}, segments, attention)
    return mixed


def _repeat(x: Tensor, lengths: Lengths, copies: Sequence[int]) -> Tensor:
    """The tokens of each clip as many times as that clip has copies, one after the other."""
    return torch.cat([clip for clip, count in zip(x.split(list(lengths)), copies, strict=True) for _ in range(count)])
