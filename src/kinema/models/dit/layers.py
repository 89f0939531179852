"""The bricks of the DiT: operations on tokens, the sublayer around each, and the block that lists them."""

from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kinema.models.attention import Attention
from kinema.models.dit.conditioning import (
    Condition,
    LinearModulation,
    TableModulation,
    gated_sum,
    modulated_norm,
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


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head with a learned scale (Zhang and Sennrich 2019), in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, h, d) -> (N, h, d) in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if x.device.type == "cpu":  # where torch has no fused kernel, and its backward takes twelve passes
            return _RMSNorm.apply(x, weight)
        return F.rms_norm(x, weight.shape, weight, RMS_EPSILON)


RMS_EPSILON = 1e-6


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm with its backward written out, in half the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        inverse = (x.square().mean(-1, keepdim=True) + RMS_EPSILON).rsqrt()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).unsqueeze(-1) / len(weight)
        grad_x = torch.addcmul(grad * weight, normed, along, value=-1).mul_(inverse)
        return grad_x, product.sum_to_size(weight.shape)


class SegmentAttention(nn.Module):
    """Multi-head attention: the tokens of segment `asks` look at those of segment `answers`, clip by clip.

    The same segment twice is self-attention, over the `span`, with rotary positions. Another one that
    answers is cross-attention. With `qk_norm`, queries and keys are RMS-normalised per head (as in Stable
    Diffusion 3, Esser et al. 2024), which keeps the logits from growing until bfloat16 training diverges.
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
        self.query_norm = HeadNorm(head_dim) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(head_dim) if qk_norm else nn.Identity()
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
        mixed = self.attention(q.to(v.dtype), k.to(v.dtype), v, q_cut.lengths, k_cut.lengths, order=q_cut.order)
        return self.project(mixed.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h d) -> n h d", h=self.num_heads)


class Sublayer(nn.Module):
    """tokens + gate * operation(modulated norm of tokens), for one segment; other segments pass through."""

    def __init__(self, segment: str, operation: nn.Module) -> None:
        super().__init__()
        self.segment = segment
        self.operation = operation

    def forward(self, tokens: Tokens, segments: Segments, modulation: Tensor) -> Tokens:
        """Tokens of all segments and the modulation (B, 3 * D) of this sublayer -> tokens of all segments."""
        x = tokens[self.segment]
        lengths = segments[self.segment].lengths
        shift, scale, gate = modulation.chunk(SLOTS, dim=-1)
        update = self.operation(modulated_norm(x, shift, scale, lengths), tokens, segments)
        return {**tokens, self.segment: gated_sum(x, gate, update, lengths)}


class Block(nn.Module):
    """A list of sublayers and the source of their modulation; an architecture is a choice of that list.

    All gates start at zero: a new block is the identity.
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
