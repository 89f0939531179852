"""The bricks of the DiT: operations on tokens, the sublayer around each, and the block that lists them."""

from collections.abc import Sequence
from enum import Enum

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinema.models.attention import Attention
from kinema.models.dit.conditioning import (
    Condition,
    LinearModulation,
    TableModulation,
    gated_sum,
    modulated_norm,
    spread,
)
from kinema.models.dit.segments import Segments, Span, Tokens
from kinema.models.position import apply_rope

SLOTS = 3  # shift, scale and gate: the modulation of one sublayer


class Linear(nn.Linear):
    """A linear layer that takes its input in any float dtype: the residual stream stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of the weights, or of autocast."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Activation(Enum):
    """The non-linearity of the MLP."""

    gelu = "gelu"
    """Exact; three times as fast as gelu_tanh on a CPU."""
    gelu_tanh = "gelu_tanh"
    """The approximation which most published video models use."""


class FeedForward(nn.Module):
    """A two-layer MLP on each token."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.expand, self.project = Linear(width, hidden), Linear(hidden, width)
        self.approximate = "tanh" if activation is Activation.gelu_tanh else "none"

    def forward(self, x: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        """x (N, D) -> (N, D)"""
        return self.project(F.gelu(self.expand(x), approximate=self.approximate))


class SegmentAttention(nn.Module):
    """Multi-head attention: the tokens of segment `asks` look at those of segment `answers`, clip by clip.

    The same segment twice is self-attention, over the `span`, with rotary positions. Another one that answers is
    cross-attention. Queries and keys are RMS-normalised per head if `qk_norm` (Henry et al. 2020; Esser et al.
    2024, section 5.3.2), which keeps the softmax from saturating in bfloat16.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        asks: str,
        answers: str,
        *,
        attention: Attention,
        qk_norm: bool,
        span: Span = Span.clip,
    ) -> None:
        super().__init__()
        self.asks, self.answers, self.span = asks, answers, span
        self.num_heads = num_heads
        self.attention = attention
        self.query, self.key, self.value = (Linear(width, width) for _ in range(3))
        head_dim = width // num_heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.project = Linear(width, width)

    def forward(self, x: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        """x (N, D) of the asking segment, already normalised -> (N, D)"""
        source = x if self.answers == self.asks else tokens[self.answers]
        q = self.query_norm(self._heads(self.query(x)))
        k = self.key_norm(self._heads(self.key(source)))
        v = self._heads(self.value(source))

        asking, answering = segments[self.asks], segments[self.answers]
        if self.answers == self.asks and asking.rope is not None:
            q, k = apply_rope(q, *asking.rope), apply_rope(k, *asking.rope)
        q_cut, k_cut = asking.cuts[self.span], answering.cuts[self.span]
        mixed = self.attention(
            q.to(v.dtype), k.to(v.dtype), v, q_cut.lengths, k_cut.lengths, order=q_cut.order
        )
        return self.project(mixed.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h d) -> n h d", h=self.num_heads)


class Sublayer(nn.Module):
    """tokens + gate * operation(modulated norm of the tokens), for one segment; other segments pass through."""

    def __init__(self, segment: str, operation: nn.Module) -> None:
        super().__init__()
        self.segment = segment
        self.operation = operation

    def forward(self, tokens: Tokens, segments: Segments, modulation: Tensor) -> Tokens:
        """Tokens of all segments and the modulation (B, 3 * D) of this sublayer -> tokens of all segments."""
        x = tokens[self.segment]
        rows = spread(modulation, segments[self.segment].lengths)
        shift, scale, gate = rows.chunk(SLOTS, dim=-1)
        update = self.operation(modulated_norm(x, shift, scale), tokens, segments)
        return {**tokens, self.segment: gated_sum(x, gate, update)}


class Block(nn.Module):
    """A list of sublayers and the source of their modulation. All gates start at zero: a new block is the identity.

    Every architecture is a choice of the list; the block itself has no options.
    """

    def __init__(self, sublayers: Sequence[Sublayer], modulation: TableModulation | LinearModulation) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.modulation = modulation

    def forward(self, tokens: Tokens, segments: Segments, condition: Condition) -> Tokens:
        """Tokens of all segments -> tokens of all segments, of the same shapes."""
        parts = self.modulation(condition).chunk(len(self.sublayers), dim=-1)
        for sublayer, part in zip(self.sublayers, parts, strict=True):
            tokens = sublayer(tokens, segments, part)
        return tokens
