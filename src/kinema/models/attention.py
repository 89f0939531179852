"""The door to the attention kernels: packed clips of any length in, no clip ever sees another."""

from collections.abc import Hashable, Sequence
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Lengths = tuple[int, ...]
"""Tokens of each clip, in the order in which the clips lie in the pack."""

Length = TypeVar("Length", bound=Hashable)
"""A number of tokens, or a pair of them: of those that ask and of those that answer."""


class Order(NamedTuple):
    """A permutation of the tokens of a pack, and the one that undoes it; both int64 (N,)."""

    index: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, index: Tensor) -> "Order":
        """The order that puts token `index[i]` at place i."""
        return cls(index, index.argsort())


class Attention(Protocol):
    """What a block calls."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lengths: Lengths,
        k_lengths: Lengths,
        *,
        order: Order | None = None,
    ) -> Tensor:
        """q (N, h, d), k and v (M, h, d), both packed clip after clip -> (N, h, d).

        `order` is for self-attention over parts that do not lie together, as one place over time does: the
        lengths cut the reordered tokens, and the result comes back in the old order.
        """


class AttentionKernel(Enum):
    """Which kernel stands behind the door."""

    sdpa = "sdpa"
    """torch's scaled_dot_product_attention: every device, every dtype."""
    flash = "flash"
    """flash-attn's variable-length kernel: CUDA, bfloat16 or float16, no padding at all."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, *, order: Order | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each clip, by torch's SDPA; shapes as in `Attention`.

    Neighbours of equal lengths are one batched call over views, without a copy; a plain batch is one call. Nothing is
    padded and nothing masked, so a clip costs what it costs alone.
    """
    if order is not None:
        q, k, v = (_Reorder.apply(x, *order) for x in (q, k, v))
        mixed = attention(q, k, v, q_lengths, k_lengths)
        return _Reorder.apply(mixed, order.inverse, order.index)

    _check_lengths(q, k, v, q_lengths, k_lengths)
    neighbours = runs(list(zip(q_lengths, k_lengths, strict=True)))
    if len(neighbours) == 1:
        return _attend(q, k, v, len(q_lengths))
    q_parts = q.split([clips * asking for clips, (asking, _) in neighbours])
    k_parts, v_parts = (x.split([clips * answering for clips, (_, answering) in neighbours]) for x in (k, v))
    counts = [clips for clips, _ in neighbours]
    return torch.cat([_attend(*part) for part in zip(q_parts, k_parts, v_parts, counts, strict=True)])


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, *, order: Order | None = None
) -> Tensor:
    """The same function by flash-attn's variable-length kernel; CUDA tensors in bfloat16 or float16 only."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"model.attention_kernel=flash got {q.dtype} on {q.device.type}: flash-attn runs on CUDA in "
            "bfloat16 or float16. Type model.attention_kernel=sdpa, or train in bf16 on a GPU."
        )
    return _flash_varlen(q, k, v, q_lengths, k_lengths, order=order)


def attention_of(kernel: AttentionKernel) -> Attention:
    """The function behind a configured kernel; one that is not installed is an error, not another kernel."""
    if kernel is AttentionKernel.flash:
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "model.attention_kernel=flash needs the flash-attn package, which is not installed here. "
                'Type: pip install "kinema[cuda]", or model.attention_kernel=sdpa.'
            ) from error
        return flash_attention
    return attention


def runs(lengths: Sequence[Length]) -> list[tuple[int, Length]]:
    """Neighbours of equal length as (clips, length): a plain batch is one run."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def _check_lengths(q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths) -> None:
    assert len(q) == sum(q_lengths), f"{len(q)} query tokens, lengths sum to {sum(q_lengths)}"
    assert len(k) == len(v) == sum(k_lengths), f"{len(k)} key tokens, lengths sum to {sum(k_lengths)}"
    assert len(q_lengths) == len(k_lengths), f"{len(q_lengths)} clips ask, {len(k_lengths)} answer"
    assert 0 not in k_lengths, "a clip without keys has no softmax"


def _attend(q: Tensor, k: Tensor, v: Tensor, clips: int) -> Tensor:
    """Equal clips: views of (clips * n, h, d) as (clips, h, n, d), which the kernels read as they lie."""
    q, k, v = (x.unflatten(0, (clips, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class _Reorder(torch.autograd.Function):
    """Rows in another order. Both directions gather; autograd's own backward would scatter, far slower."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        index, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, index), None, None


def _flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, *, order: Order | None = None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    if order is not None:
        q, k, v = (_Reorder.apply(x, *order) for x in (q, k, v))
    _check_lengths(q, k, v, q_lengths, k_lengths)
    mixed = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=_cumulative(q_lengths, q.device),
        cu_seqlens_k=_cumulative(k_lengths, q.device),
        max_seqlen_q=max(q_lengths),
        max_seqlen_k=max(k_lengths),
    )
    return mixed if order is None else _Reorder.apply(mixed, order.inverse, order.index)


@lru_cache(maxsize=64)  # every block of a step asks for the same table
def _cumulative(lengths: Lengths, device: torch.device) -> Tensor:
    """(0, n_1, n_1 + n_2, ...) int32, where each clip begins and the last one ends."""
    with torch.inference_mode(False):  # or a table first made while sampling could never be used in training
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
