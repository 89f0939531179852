"""How clips are cut into slabs, one for each rank of a sequence group: in whole latent pixels, as evenly as can be."""

from dataclasses import dataclass

from torch import Tensor

from kinema.distributed.halo import SlabAxis
from kinema.models.vae import HEIGHT, TIME, WIDTH

_AXES = {SlabAxis.time: TIME, SlabAxis.height: HEIGHT, SlabAxis.width: WIDTH}
_LEAST = {TIME: 2, HEIGHT: 1, WIDTH: 1}
"""Latent pixels that a slab needs, to hold all that its neighbours see of it."""


@dataclass(frozen=True)
class Cut:
    """How clips of one size are cut: `extents` latent pixels along `axis` for each rank, 0 for an idle one."""

    axis: int
    extents: tuple[int, ...]
    stride: int
    """Pixels of one latent pixel along the axis."""

    @property
    def working(self) -> int:
        """Workers that have a slab; they are the first ones."""
        return sum(extent > 0 for extent in self.extents)

    @property
    def idle_extent(self) -> int:
        """Latent pixels of the clip of zeros that an idle rank is given, to run the same layers as the others."""
        return min(2, sum(self.extents))

    @property
    def pixels(self) -> tuple[int, ...]:
        """Frames, rows or columns of each rank's slab."""
        return tuple(self._pixels(extent, starts=rank == 0) for rank, extent in enumerate(self.extents))

    def latents_of(self, x: Tensor, rank: int) -> Tensor:
        """A rank's part of whole latents (B, C, t, h, w)."""
        return self._part(x, self.extents, rank, self.idle_extent)

    def pixels_of(self, x: Tensor, rank: int) -> Tensor:
        """A rank's part of a whole video (B, C, T, H, W)."""
        return self._part(x, self.pixels, rank, self._pixels(self.idle_extent, starts=True))

    def _pixels(self, extent: int, starts: bool) -> int:
        alone = starts and self.axis == TIME  # frame 0 stands for itself
        return extent * self.stride - (self.stride - 1 if alone else 0)

    def _part(self, x: Tensor, sizes: tuple[int, ...], rank: int, idle_size: int) -> Tensor:
        assert x.shape[self.axis] == sum(sizes), f"{tuple(x.shape)} is not cut into {sizes}"
        if sizes[rank]:
            return x.narrow(self.axis, sum(sizes[:rank]), sizes[rank])
        return x.narrow(self.axis, 0, idle_size) * 0  # and not new zeros: its backward must take the same way

    def line(self) -> str:
        """For people, such as "height 3 + 3 + 2 latents"."""
        name = next(side.value for side, axis in _AXES.items() if axis == self.axis)
        idle = len(self.extents) - self.working
        told = f", {idle} of {len(self.extents)} ranks idle: the clip is too small" if idle else ""
        return f"{name} {' + '.join(str(n) for n in self.extents if n)} latents{told}"


def plan_cut(
    latent_size: tuple[int, int, int], strides: tuple[int, int], ranks: int, axis: SlabAxis = SlabAxis.auto
) -> Cut:
    """The cut of clips with latents of (t, h, w), strides (temporal, spatial), over so many ranks."""
    sizes = dict(zip((TIME, HEIGHT, WIDTH), latent_size, strict=True))
    extents = {axis: _extents(sizes[axis], ranks, _LEAST[axis]) for axis in sizes}
    # The largest slab sets the pace; then what crosses a border, two frames or a row either way, is the smaller the
    # longer the side that is cut.
    candidates = (HEIGHT, WIDTH, TIME) if axis is SlabAxis.auto else (_AXES[axis],)
    chosen = min(candidates, key=lambda axis: (max(extents[axis]) / sizes[axis], -sizes[axis]))
    return Cut(chosen, extents[chosen], strides[0] if chosen == TIME else strides[1])


def _extents(count: int, ranks: int, least: int) -> tuple[int, ...]:
    """`count` dealt as evenly as can be, at least so many to each, to as many ranks as that allows."""
    working = max(1, min(ranks, count // least))
    each, more = divmod(count, working)
    return tuple(each + (i < more) if i < working else 0 for i in range(ranks))
