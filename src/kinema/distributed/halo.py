"""A clip cut into slabs over the ranks of a group: what crosses a border, forwards and backwards.

Every rank, idle or not, takes part in every exchange, in the order in which the model's layers ask for them; autograd
runs backwards in the reverse of that order, on all ranks alike.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class SlabAxis(Enum):
    """Along which side clips are cut."""

    auto = "auto"
    """Where the largest slab is smallest, and of those where neighbours have least to send."""
    time = "time"
    height = "height"
    width = "width"


class RankSlab:
    """This rank's slab among those of a group: `extents` latent pixels along `axis` for each rank, 0 for idle ones.

    Idle ranks come last. One computes on a clip of its own, of `idle_extent`, of which nothing reaches the others.
    """

    def __init__(self, group: dist.ProcessGroup, axis: int, extents: Sequence[int], idle_extent: int) -> None:
        self.group = group
        self.axis = axis
        self.index = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        assert len(extents) == self.size, f"{len(extents)} extents for {self.size} ranks"
        self.extents = tuple(extents)
        self.working = sum(extent > 0 for extent in extents)
        self.idle = self.index >= self.working
        self.extent = idle_extent if self.idle else self.extents[self.index]

    @property
    def first(self) -> bool:
        """Whether the clip begins with this slab."""
        return self.idle or self.index == 0

    @property
    def last(self) -> bool:
        """Whether the clip ends with this slab."""
        return self.idle or self.index == self.working - 1

    @property
    def start(self) -> int:
        """Latent pixels of the clip before this slab."""
        return sum(self.extents[: self.index])

    def widen(self, x: Tensor, before: int, after: int) -> Tensor:
        """x between the last `before` pixels of the slab before it and the first `after` of the one behind it."""
        if before == after == 0:
            return x
        assert x.shape[self.axis] >= max(before, after), f"{tuple(x.shape)} is thinner than what neighbours need"
        return _Widen.apply(x, self, before, after)

    def stack(self, x: Tensor) -> Tensor:
        """(...) of the same shape on every rank -> (working ranks, ...); gradients of all ranks are added."""
        return _Stack.apply(x, self)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All slabs' x one after the other along `dim`, whose size is proportional to a slab's extent.

        Gradients of all ranks are added.
        """
        unit = x.shape[dim] // self.extent
        sizes = [unit * extent for extent in self.extents]
        return joined(self.stack(fitted(x, dim, max(sizes))), dim, sizes)

    def whole(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The clip from its slabs of these sizes along `axis`, on every rank.

        For a loss that every rank computes alike on the whole clip: backwards each takes its own slab's gradient and
        nothing is sent, so that the sum over ranks is the gradient once.
        """
        return _Whole.apply(x, self, tuple(sizes))

    def swap(self, x: Tensor, back: int, on: int, from_previous: int, from_next: int) -> tuple[Tensor, Tensor]:
        """Send x's first `back` pixels to the previous rank and its last `on` to the next; what they sent in return.

        Those at an end of the clip have no neighbour there: they send and receive nothing.
        """
        pixels = x.movedim(self.axis, 0)
        one = pixels[0].numel() if len(pixels) else 0
        sent, received = [0] * self.size, [0] * self.size
        parts = []
        if not self.first:
            parts.append(pixels[:back])
            sent[self.index - 1], received[self.index - 1] = back * one, from_previous * one
        if not self.last:
            parts.append(pixels[len(pixels) - on :])
            sent[self.index + 1], received[self.index + 1] = on * one, from_next * one
        outgoing = torch.cat([part.flatten() for part in parts]) if parts else x.new_empty(0)
        incoming = x.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self.group)
        counts = (0 if self.first else from_previous, 0 if self.last else from_next)
        previous, following = incoming.view(-1, *pixels.shape[1:]).split(counts)
        return previous.movedim(0, self.axis), following.movedim(0, self.axis)

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) of the same shape on every rank -> (working ranks, ...), without a gradient."""
        everyone = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(everyone, x.contiguous()[None], group=self.group)
        return everyone[: self.working]

    def sum_of_own(self, x: Tensor) -> Tensor:
        """(working ranks, ...) -> (...): the sum over all ranks of their rows for this rank; zeros for an idle one."""
        one = x[0].numel()
        received = [0 if self.idle else one] * self.size
        sent = [one if rank < self.working else 0 for rank in range(self.size)]
        incoming = x.new_empty(sum(received))
        dist.all_to_all_single(incoming, x.contiguous().flatten(), received, sent, group=self.group)
        return x.new_zeros(x.shape[1:]) if self.idle else incoming.view(self.size, *x.shape[1:]).sum(0)


def fitted(x: Tensor, dim: int, size: int) -> Tensor:
    """x of that size along `dim`, cut or with zeros behind it: collectives want the same shape everywhere."""
    missing = size - x.shape[dim]
    if missing <= 0:
        return x.narrow(dim, 0, size)
    return F.pad(x.movedim(dim, -1), (0, missing)).movedim(-1, dim)


def joined(parts: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """(ranks, ...) -> the first `sizes[i]` of each along `dim` of the parts, one after the other."""
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=False)], dim=dim)


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slab: RankSlab, before: int, after: int) -> Tensor:
        ctx.slab, ctx.before, ctx.after = slab, before, after
        previous, following = slab.swap(x, back=after, on=before, from_previous=before, from_next=after)
        parts = [part.movedim(1, -1) for part in (previous, x, following)]  # channels last, as the layers keep it
        return torch.cat(parts, dim=slab.axis - 1).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slab: RankSlab = ctx.slab
        before, after = (0 if slab.first else ctx.before), (0 if slab.last else ctx.after)
        own = grad.shape[slab.axis] - before - after
        previous, following = slab.swap(
            grad, back=ctx.before, on=ctx.after, from_previous=ctx.after, from_next=ctx.before
        )
        mine = grad.narrow(slab.axis, before, own).clone()
        mine.narrow(slab.axis, 0, previous.shape[slab.axis]).add_(previous)
        count = following.shape[slab.axis]
        mine.narrow(slab.axis, own - count, count).add_(following)
        return mine, None, None, None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slab: RankSlab) -> Tensor:
        ctx.slab = slab
        return slab.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.slab.sum_of_own(grad), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slab: RankSlab, sizes: tuple[int, ...]) -> Tensor:
        ctx.slab, ctx.sizes, ctx.shape = slab, sizes, x.shape
        return joined(slab.all_gather(fitted(x, slab.axis, max(sizes))), slab.axis, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slab: RankSlab = ctx.slab
        if slab.idle:
            return grad.new_zeros(ctx.shape), None, None
        return grad.narrow(slab.axis, sum(ctx.sizes[: slab.index]), ctx.sizes[slab.index]), None, None
