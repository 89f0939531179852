"""Adaptive layer norm's two ends: shift and scale before an operation, the gate behind it, one row for many tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinema.models.attention import Lengths, runs


def modulated(normed: Tensor, shift: Tensor | None, scale: Tensor, lengths: Lengths | None) -> Tensor:
    """normed * (1 + scale) + shift with one row for each length: normed (N, D), rows (R, D) -> (N, D).

    Without lengths there is one row for each token, which only a compiler does not write out.
    """
    if lengths is None:
        return normed * (1 + scale) if shift is None else torch.addcmul(shift, normed, 1 + scale)
    if shift is None:
        return _by_rows(torch.mul, lengths, [normed], [1 + scale])
    return _by_rows(lambda x, a, b: torch.addcmul(a, x, b), lengths, [normed], [shift, 1 + scale])


def gated_sum(tokens: Tensor, gate: Tensor, update: Tensor, lengths: Lengths | None) -> Tensor:
    """tokens + gate * update, with one gate for each length: tokens and update (N, D), gate (R, D) -> (N, D).

    Without lengths there is one gate for each token, as in `modulated`.
    """
    if lengths is None:
        return torch.addcmul(tokens, gate, update)
    return _by_rows(_gated, lengths, [tokens, update], [gate])


def _gated(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not update.is_contiguous():
        return torch.addcmul(tokens, gate, update)
    return _GatedSum.apply(tokens, update.to(tokens.dtype), gate)


class _GatedSum(torch.autograd.Function):
    """tokens + gate * update of (b, n, D), (b, 1, D) and (b, n, D); its backward takes one buffer instead of two."""

    @staticmethod
    def forward(ctx, tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(update, gate)
        return torch.addcmul(tokens, gate, update)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        update, gate = ctx.saved_tensors
        product = grad * update
        grad_gate = product.sum(1, keepdim=True)
        return grad, torch.mul(grad, gate, out=product), grad_gate


def _by_rows(
    function: Callable[..., Tensor], lengths: Lengths, tokens: Sequence[Tensor], rows: Sequence[Tensor]
) -> Tensor:
    """Call `function` with tokens (b, n, D) and rows (b, 1, D) for each run of rows of equal length.

    Rows broadcast and are never written out token by token: that costs more memory than the tokens.
    """
    parts = runs(lengths)
    if len(parts) == 1:  # a plain batch; splitting it into one part would cost a copy in the backward
        return _broadcast(function, tokens, rows)
    token_parts = zip(*(x.split([clips * length for clips, length in parts]) for x in tokens), strict=True)
    row_parts = zip(*(x.split([clips for clips, _ in parts]) for x in rows), strict=True)
    return torch.cat([_broadcast(function, *part) for part in zip(token_parts, row_parts, strict=True)])


def _broadcast(function: Callable[..., Tensor], tokens: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    batched = [x.unflatten(0, (len(rows[0]), -1)) for x in tokens]
    return function(*batched, *(row[:, None] for row in rows)).flatten(0, 1)
