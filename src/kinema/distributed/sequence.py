"""Sequence parallelism: ranks share the tokens of a pack, and swap them for heads around every attention."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kinema.distributed.mesh import Mesh

Segmented = dict[str, Tensor]
"""Tokens of some segments of a pack by name."""
Mixing = Callable[[Segmented, Segmented, Segmented], Segmented]


class Ulysses:
    """A sequence group as models see it (`kinema.models.sequence.SequenceGroup`), by DeepSpeed's Ulysses.

    Jacobs et al. 2023: one exchange each brings queries, keys and values from all heads of a rank's tokens to all
    tokens of a rank's heads, and a fourth brings back what was found. DeepSpeed's is right for equal parts alone, so
    tokens and heads are padded on the way. The attention in between sees no padded token; a padded head is zero, and
    so is what it finds.
    """

    def __init__(self, mesh: Mesh) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        assert mesh.sequence_group is not None, "a rank alone has nothing to exchange"
        self.rank, self.size, self.group = mesh.sequence_rank, mesh.sequence_size, mesh.sequence_group
        self._exchanged = DistributedAttention(_mixed, self.group, scatter_idx=2, gather_idx=1)

    def share(self, tokens: int) -> tuple[int, int]:
        """This rank's of so many tokens: the first, and the first behind them. Shares are equal or differ by one."""
        return tokens * self.rank // self.size, tokens * (self.rank + 1) // self.size

    # A compiler that traced into either would find a buffer that nothing fills, and a gradient of zero.

    @torch.compiler.disable
    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """x (n, ...) of this rank's share -> (N, ...) of all; the gradient of x is its own part of the whole's."""
        return _Gather.apply(x, self._sizes(tokens), self.rank, self.group)

    @torch.compiler.disable
    def attend(self, mix: Mixing, q: Segmented, k: Segmented, v: Segmented, tokens: Mapping[str, int]) -> Segmented:
        """`mix` on whole segments, of so many tokens each, and this rank's heads; (n, h, d) of its share in and out."""
        heads = next(iter(q.values())).shape[1]
        asking, answering = ({name: self._sizes(tokens[name]) for name in names} for names in (q, k))
        most = -(-heads // self.size) * self.size
        sent = (_block(part, sizes, most) for part, sizes in ((q, asking), (k, answering), (v, answering)))
        found = self._exchanged(*sent, 0, mix=mix, asking=asking, answering=answering)
        parts = found[0].split([max(sizes) for sizes in asking.values()])
        return {name: x[: asking[name][self.rank], :heads] for name, x in zip(asking, parts, strict=True)}

    def _sizes(self, tokens: int) -> list[int]:
        """How many of so many tokens each rank has."""
        ends = [tokens * rank // self.size for rank in range(self.size + 1)]
        return [end - start for start, end in pairwise(ends)]


# What DeepSpeed exchanges is a block of each rank, as long as any other's: of each segment the rank's tokens and, where
# it has one less than others, one of padding. `Sizes` are the tokens of each rank, by segment.
Sizes = Mapping[str, list[int]]


def _block(tokens: Segmented, sizes: Sizes, heads: int) -> Tensor:
    """Tokens (n, h, d) of this rank -> its block (1, m, heads, d)."""
    return torch.cat([_padded(x, max(sizes[name]), heads) for name, x in tokens.items()])[None]


def _mixed(q: Tensor, k: Tensor, v: Tensor, *, mix: Mixing, asking: Sizes, answering: Sizes) -> Tensor:
    """Blocks (1, P * m, h, d) of all ranks, with some of the heads -> the same of what those that ask found."""
    found = mix(_whole(q, asking), _whole(k, answering), _whole(v, answering))
    parts = [_of_ranks(found[name], each) for name, each in asking.items()]
    return torch.cat(parts, dim=1).flatten(0, 1)[None]


def _whole(blocks: Tensor, sizes: Sizes) -> Segmented:
    """Blocks (1, P * m, h, d) of all ranks -> tokens (N, h, d) of each segment."""
    ranks = len(next(iter(sizes.values())))
    parts = blocks[0].unflatten(0, (ranks, -1)).split([max(each) for each in sizes.values()], dim=1)
    return {name: _joined(part, sizes[name]) for name, part in zip(sizes, parts, strict=True)}


def _joined(parts: Tensor, sizes: list[int]) -> Tensor:
    """A segment's padded parts (P, m, ...) -> its tokens (N, ...)."""
    if min(sizes) == max(sizes):
        return parts.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _of_ranks(tokens: Tensor, sizes: list[int]) -> Tensor:
    """The inverse."""
    if min(sizes) == max(sizes):
        return tokens.unflatten(0, (len(sizes), -1))
    return torch.stack([_padded(part, max(sizes)) for part in tokens.split(sizes)])


def _padded(x: Tensor, tokens: int, heads: int | None = None) -> Tensor:
    """x (n, h, d) with zeros behind its tokens and its heads -> (tokens, heads, d)."""
    more = tokens - x.shape[0], 0 if heads is None else heads - x.shape[1]
    return F.pad(x, (0, 0, 0, more[1], 0, more[0])) if any(more) else x


class _Gather(torch.autograd.Function):
    """All ranks' parts laid end to end; backwards a rank takes its own, since all have the same loss of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        padding = x.new_zeros(max(sizes) - len(x), *x.shape[1:])
        parts = x.new_empty(len(sizes) * max(sizes), *x.shape[1:])
        dist.all_gather_into_tensor(parts, torch.cat([x, padding]), group=group)
        return _joined(parts.unflatten(0, (len(sizes), -1)), sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.narrow(0, ctx.start, ctx.size), None, None, None
