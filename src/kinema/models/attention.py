"""The door to the attention kernels: packed clips of any length in, no clip ever sees another."""

from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Lengths = tuple[int, ...]
"""Tokens of each clip, in the order in which the clips lie in the pack."""


class Order(NamedTuple):
    """A permutation of the tokens of a pack, and the one that undoes it; both int64 (N,)."""

    index: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, index: Tensor) -> "Order":
        """The order that puts token `index[i]` at place i."""
        return cls(index, index.argsort())


class Attention(Protocol):
    """What a block calls. Sequence parallelism replaces it by a function that gathers tokens around it."""

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

    Equal lengths are one batched call over views, without a copy. Otherwise one call for each run of
    neighbours that ask with the same length; keys of several lengths in a run are padded and masked.
    """
    if order is not None:
        q, k, v = (_Reorder.apply(x, *order) for x in (q, k, v))
        mixed = attention(q, k, v, q_lengths, k_lengths)
        return _Reorder.apply(mixed, order.inverse, order.index)

    _check_lengths(q, k, v, q_lengths, k_lengths)
    if _is_uniform(q_lengths) and _is_uniform(k_lengths):
        return _attend(q, k, v, len(q_lengths))
    return torch.cat([_attend_run(q, k, v, run) for run in _runs(q_lengths, k_lengths)])


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


def runs(lengths: Lengths) -> list[tuple[int, int]]:
    """Neighbours of equal length as (clips, length): a plain batch is one run."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def _is_uniform(lengths: Lengths) -> bool:
    return len(set(lengths)) == 1


def _check_lengths(q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths) -> None:
    assert len(q) == sum(q_lengths), f"{len(q)} query tokens, lengths sum to {sum(q_lengths)}"
    assert len(k) == len(v) == sum(k_lengths), f"{len(k)} key tokens, lengths sum to {sum(k_lengths)}"
    assert len(q_lengths) == len(k_lengths), f"{len(q_lengths)} clips ask, {len(k_lengths)} answer"
    assert 0 not in k_lengths, "a clip without keys has no softmax"


def _attend(q: Tensor, k: Tensor, v: Tensor, clips: int, mask: Tensor | None = None) -> Tensor:
    """Equal clips: views of (clips * n, h, d) as (clips, h, n, d), which the kernels read as they lie."""
    q, k, v = (x.unflatten(0, (clips, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)


class _Run(NamedTuple):
    """Neighbouring clips that ask with the same number of tokens."""

    clips: int
    queries: slice
    keys: slice
    key_lengths: Lengths


def _runs(q_lengths: Lengths, k_lengths: Lengths) -> Iterator[_Run]:
    clip = q_start = k_start = 0
    for clips, length in runs(q_lengths):
        keys = k_lengths[clip : clip + clips]
        q_end, k_end = q_start + clips * length, k_start + sum(keys)
        yield _Run(clips, slice(q_start, q_end), slice(k_start, k_end), keys)
        clip, q_start, k_start = clip + clips, q_end, k_end


def _attend_run(q: Tensor, k: Tensor, v: Tensor, run: _Run) -> Tensor:
    q, k, v = q[run.queries], k[run.keys], v[run.keys]
    if _is_uniform(run.key_lengths):
        return _attend(q, k, v, run.clips)
    places, mask = _padding(run.key_lengths, q.device)
    return _attend(q, k[places], v[places], run.clips, mask)


@lru_cache(maxsize=64)  # every block of a step asks for the same table
def _padding(lengths: Lengths, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token of each padded place (clips * longest,) and which places are real (clips, 1, 1, longest).

    A padded place repeats the clip's first token, so that no clip's memory holds another's numbers.
    """
    with torch.inference_mode(False):  # or a table first made while sampling could never be used in training
        counts = torch.tensor(lengths, device=device)
        starts = counts.cumsum(0) - counts
        place = torch.arange(max(lengths), device=device)
        real = place < counts[:, None]
        return torch.where(real, starts[:, None] + place, starts[:, None]).flatten(), real[:, None, None]


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
    q_ends, k_ends = _cumulative(q_lengths, q.device), _cumulative(k_lengths, q.device)
    mixed = flash_attn_varlen_func(q, k, v, q_ends, k_ends, max(q_lengths), max(k_lengths))
    return mixed if order is None else _Reorder.apply(mixed, order.inverse, order.index)


@lru_cache(maxsize=64)
def _cumulative(lengths: Lengths, device: torch.device) -> Tensor:
    """(0, n_1, n_1 + n_2, ...) int32, where each clip begins and the last one ends."""
    with torch.inference_mode(False):
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
