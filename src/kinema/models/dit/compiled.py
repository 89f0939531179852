"""Layers without Python numbers: what stands in for lengths where `torch.compile` takes a number for a constant."""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kinema.models.attention import runs
from kinema.models.dit.segments import Rows, Segment, Turns

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A function of tensors -> the same, compiled."""


class TokenRows(NamedTuple):
    """`Rows` as tensors: of each token the row that modulates it."""

    index: Tensor
    """(N,) int64: the row of each token."""
    counts: Tensor
    """(R,) int64, on the CPU: tokens of each row of the condition, one row after the other."""

    lengths: None = None
    """There is one row for each token."""

    def of(self, vectors: Tensor) -> Tensor:
        """vectors (R, D) -> (N, D); a compiler reads them where they are needed, and writes none out."""
        return _Spread.apply(vectors, self.index, self.counts)


class CompiledSegment(NamedTuple):
    """What the layers around an attention read of a `Segment`."""

    rows: TokenRows | None
    rope: Turns | None
    clock: Turns | None
    told: Tensor | None
    clips: TokenRows | None
    """The clips as rows, for what is told of each one."""


def compilable(segment: Segment, rows: int, device: torch.device) -> CompiledSegment:
    """A segment whose tokens are modulated by some of so many rows (none where nothing modulates them)."""
    told = segment.told
    return CompiledSegment(
        token_rows(segment.rows, rows, device) if rows else None,
        segment.rope,
        segment.clock,
        told,
        None if told is None else token_rows(segment.clips, len(told), device),
    )


@lru_cache(maxsize=64)  # every sublayer of a step asks for the same
def token_rows(rows: Rows, count: int, device: torch.device) -> TokenRows:
    """Some of `count` rows, as tensors."""
    behind = count - rows.first - len(rows.lengths)
    with torch.inference_mode(False):  # or a table first made while sampling could never be used in training
        counts = torch.tensor([0] * rows.first + list(rows.lengths) + [0] * behind)
        return TokenRows(torch.arange(count).repeat_interleave(counts).to(device), counts)


def laid_out(given: Any) -> Any:
    """Tensors, also in tuples and dictionaries, as compiled code expects all: without gaps, and no views.

    It is made for one way to lie in memory, and for the whole tensor behind a view, too.
    """
    return tree_map_only(Tensor, _laid_out, given)


def _laid_out(x: Tensor) -> Tensor:
    strides = accumulate(reversed(x.shape[1:]), lambda stride, size: stride * max(size, 1), initial=1)
    if x.stride() != tuple(strides)[::-1]:  # contiguous() would leave a slice of one row as it is
        return x.clone(memory_format=torch.contiguous_format)
    return _Whole.apply(x) if x._is_view() else x


class _Whole(torch.autograd.Function):
    """A view as a tensor of its own, without a copy."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


class _Spread(torch.autograd.Function):
    """A row for each token; backwards the sum over each row's tokens, in a fixed order and without atomic additions."""

    @staticmethod
    def forward(ctx, vectors: Tensor, index: Tensor, counts: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(counts)
        return vectors[index]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _sum_of_rows(grad, *ctx.saved_tensors), None, None


@torch.library.custom_op("kinema::sum_of_rows", mutates_args=())
def _sum_of_rows(tokens: Tensor, counts: Tensor) -> Tensor:
    """tokens (N, D), counts (R,) of each row -> sums (R, D). A compiler does not look inside, nor at the counts."""
    neighbours = runs(counts.tolist())
    parts = tokens.split([rows * count for rows, count in neighbours])
    pairs = zip(parts, neighbours, strict=True)
    return torch.cat([part.unflatten(0, (rows, count)).sum(1) for part, (rows, count) in pairs])


@_sum_of_rows.register_fake
def _(tokens: Tensor, counts: Tensor) -> Tensor:
    return tokens.new_empty(counts.shape[0], tokens.shape[1])
