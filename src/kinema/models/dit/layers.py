"""The bricks of the DiT: operations on tokens, the sublayer around each, and the block that lists them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinema.models.attention import Attention
from kinema.models.dit.conditioning import Condition, LinearModulation, TableModulation, gated_sum, modulated
from kinema.models.dit.config import Activation, NormKind, QKNorm
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import Segments, Span, Tokens
from kinema.models.position import apply_rope

SLOTS = 3  # shift, scale and gate: the modulation of one segment in one sublayer


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
    """Tokens of the video that one of them attends to."""


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
            return self.project(F.silu(self.gate(x)) * self.expand(x))
        return self.project(activate(self.expand(x), self.activation))

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip."""
        layers = 2 if self.gate is None else 3
        return layers * self.expand.weight.numel() * sum(counts.tokens[name] for name in asks)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The element-wise non-linearities by name."""
    if activation is Activation.silu:
        return F.silu(x)
    assert activation is not Activation.swiglu
    return F.gelu(x, approximate="tanh" if activation is Activation.gelu_tanh else "none")


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

    def linear(self) -> Linear:
        """Width to width."""
        return Linear(self.width, self.width, self.bias)

    def norm(self) -> nn.Module:
        """The norm of queries or keys."""
        if self.qk_norm is QKNorm.none:
            return nn.Identity()
        kind = NormKind.layer if self.qk_norm is QKNorm.layer_head else NormKind.rms
        channels = self.width if self.qk_norm is QKNorm.rms_all else self.width // self.num_heads
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
    are cross-attention, each in a softmax of its own, and the results are summed (Ye et al. 2023, IP-Adapter).
    """

    def __init__(
        self, shape: HeadShape, asks: str, answers: Sequence[str], attention: Attention, span: Span = Span.clip
    ) -> None:
        super().__init__()
        self.asks, self.answers, self.span = asks, answers[0], span
        self.shape, self.attention = shape, attention
        self.query, self.key, self.value = (shape.linear() for _ in range(3))
        self.query_norm, self.key_norm = shape.norm(), shape.norm()
        self.project = shape.linear()
        self.others = nn.ModuleDict({name: KeyValue(shape) for name in answers[1:]})

    def forward(self, asking: Tokens, tokens: Tokens, segments: Segments) -> Tokens:
        """asking (N, D), already normalised -> its update (N, D)"""
        x = asking[self.asks]
        source = x if self.answers == self.asks else tokens[self.answers]
        q = self.shape.normed_heads(self.query(x), self.query_norm)
        k = self.shape.normed_heads(self.key(source), self.key_norm)
        v = self.shape.heads(self.value(source))

        rope = segments[self.asks].rope
        if self.answers == self.asks and rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        mixed = self._mix(q, k, v, self.answers, segments)
        for name, other in self.others.items():
            k, v = other(tokens[name])
            mixed = mixed + self._mix(q, k, v, name, segments)
        return {self.asks: self.project(mixed.flatten(1))}

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, answers: str, segments: Segments) -> Tensor:
        q_cut, k_cut = segments[self.asks].cuts[self.span], segments[answers].cuts[self.span]
        return self.attention(q.to(v.dtype), k.to(v.dtype), v, q_cut.lengths, k_cut.lengths, order=q_cut.order)

    def products(self, counts: Counts, asks: Sequence[str]) -> int:
        """Multiplications on one clip."""
        asking, square = counts.tokens[self.asks], self.shape.width**2
        if self.answers == self.asks:
            return asking * (4 * square + 2 * counts.seen[self.span] * self.shape.width)
        answering = sum(counts.tokens[name] for name in (self.answers, *self.others))
        return 2 * (asking + answering) * square + 2 * asking * answering * self.shape.width


class Sublayer(nn.Module):
    """tokens + gate * operation(modulated norm of tokens), for some segments; the others pass through.

    `slots` says for each of them whether the condition modulates it (3) or its norm stands alone (0).
    """

    def __init__(self, slots: Mapping[str, int], operation: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.segments_slots = dict(slots)
        self.norm = norm
        self.operation = operation

    @property
    def slots(self) -> int:
        """Vectors of modulation that it takes."""
        return sum(self.segments_slots.values())

    def forward(self, tokens: Tokens, segments: Segments, modulation: Sequence[Tensor]) -> Tokens:
        """Tokens of all segments and the modulation, `slots` times (R, D) -> tokens of all segments."""
        parts = self._parts(modulation)
        asking = {name: self._input(tokens[name], segments[name].rows, part) for name, part in parts.items()}
        updates = self.operation(asking, tokens, segments)
        done = {name: self._sum(tokens[name], x, segments[name].rows, parts[name]) for name, x in updates.items()}
        return {**tokens, **done}

    def _parts(self, modulation: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        parts, start = dict[str, Sequence[Tensor]](), 0
        for name, slots in self.segments_slots.items():
            parts[name] = modulation[start : start + slots]
            start += slots
        return parts

    def _input(self, x: Tensor, rows: tuple[int, ...], part: Sequence[Tensor]) -> Tensor:
        return modulated(self.norm(x), part[0], part[1], rows) if part else self.norm(x)

    def _sum(self, x: Tensor, update: Tensor, rows: tuple[int, ...], part: Sequence[Tensor]) -> Tensor:
        return gated_sum(x, part[2], update, rows) if part else x + update


class Block(nn.Module):
    """A list of sublayers and the source of their modulation; an architecture is a choice of that list."""

    def __init__(self, sublayers: Sequence[Sublayer], modulation: TableModulation | LinearModulation) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.modulation = modulation

    def forward(self, tokens: Tokens, segments: Segments, condition: Condition) -> Tokens:
        """Tokens of all segments -> tokens of all segments, of the same shapes."""
        slots = [sublayer.slots for sublayer in self.sublayers]
        vectors = self.modulation(condition).chunk(sum(slots), dim=-1)
        start = 0
        for sublayer, count in zip(self.sublayers, slots, strict=True):
            tokens = sublayer(tokens, segments, vectors[start : start + count])
            start += count
        return tokens
