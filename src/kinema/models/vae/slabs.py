"""Slabs: a clip cut along one side over several workers, and what a layer asks of those that hold the rest.

The cut is in whole latent pixels, so that a slab of pixels, of any level between and of latents are the same part of
the clip. Frame 0 is alone at every level: the first slab of a cut in time has frames of the form k * stride + 1, later
ones k * stride, as the chunks of a stream have.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

TIME, HEIGHT, WIDTH = 2, 3, 4
"""Dimensions of (B, C, T, H, W) along which a clip can be cut."""


class Slab(Protocol):
    """One worker's slab, as a layer sees it; the workers run the same layers in the same order.

    Sums of losses over all workers have the right gradients: what a worker's values do to another's outputs comes
    back to them.
    """

    axis: int
    """Along which dimension the clip is cut: TIME, HEIGHT or WIDTH."""

    @property
    def first(self) -> bool:
        """Whether the clip begins with this slab."""

    @property
    def last(self) -> bool:
        """Whether the clip ends with this slab."""

    @property
    def start(self) -> int:
        """Latent pixels of the clip before this slab."""

    def widen(self, x: Tensor, before: int, after: int) -> Tensor:
        """x with the last `before` pixels of the slab before it and the first `after` of the one behind it.

        Along `axis`; nothing is added where the clip begins or ends.
        """

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All slabs' x one after the other along `dim`, whose size is proportional to the latent pixels of a slab."""

    def stack(self, x: Tensor) -> Tensor:
        """(...) of the same shape everywhere -> (slabs, ...)."""


class SlabAxis(Enum):
    """Along which side clips are cut."""

    auto = "auto"
    """Where the largest slab is smallest, and of those where the neighbours have least to send."""
    time = "time"
    height = "height"
    width = "width"


_AXES = {SlabAxis.time: TIME, SlabAxis.height: HEIGHT, SlabAxis.width: WIDTH}
_LEAST = {TIME: 2, HEIGHT: 1, WIDTH: 1}
"""Latent pixels that a slab needs: as many as a kernel of 3 reaches into its neighbour."""
_HALO = {TIME: 2, HEIGHT: 2, WIDTH: 2}
"""Pixels that cross a border for one such convolution: the past two frames, or one row on either side."""


@dataclass(frozen=True)
class Cut:
    """How clips of one size are cut: `extents` latent pixels along `axis` for each worker, 0 for an idle one."""

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
        """Latent pixels of the clip of zeros that an idle worker is given, to run the same layers as the others."""
        return min(2, sum(self.extents))

    @property
    def pixels(self) -> tuple[int, ...]:
        """Frames, rows or columns of each worker's slab."""
        return tuple(self._pixels(extent, starts=worker == 0) for worker, extent in enumerate(self.extents))

    def latents_of(self, x: Tensor, worker: int) -> Tensor:
        """A worker's part of whole latents (B, C, t, h, w)."""
        return self._part(x, self.extents, worker, self.idle_extent)

    def pixels_of(self, x: Tensor, worker: int) -> Tensor:
        """A worker's part of a whole video (B, C, T, H, W)."""
        return self._part(x, self.pixels, worker, self._pixels(self.idle_extent, starts=True))

    def _pixels(self, extent: int, starts: bool) -> int:
        alone = starts and self.axis == TIME  # frame 0 stands for itself
        return extent * self.stride - (self.stride - 1 if alone else 0)

    def _part(self, x: Tensor, sizes: tuple[int, ...], worker: int, idle_size: int) -> Tensor:
        assert x.shape[self.axis] == sum(sizes), f"{tuple(x.shape)} is not cut into {sizes}"
        if sizes[worker]:
            return x.narrow(self.axis, sum(sizes[:worker]), sizes[worker])
        return x.narrow(self.axis, 0, idle_size) * 0  # and not new zeros: its backward must take the same way

    def line(self) -> str:
        """For people, such as "height 3 + 3 + 2 latents"."""
        name = {TIME: "time", HEIGHT: "height", WIDTH: "width"}[self.axis]
        idle = len(self.extents) - self.working
        told = f", {idle} of {len(self.extents)} ranks idle: the clip is too small" if idle else ""
        return f"{name} {' + '.join(str(n) for n in self.extents if n)} latents{told}"


def plan_cut(
    latent_size: tuple[int, int, int], strides: tuple[int, int], workers: int, axis: SlabAxis = SlabAxis.auto
) -> Cut:
    """The cut of clips with latents of (t, h, w), strides (temporal, spatial), over so many workers."""
    candidates = [TIME, HEIGHT, WIDTH] if axis is SlabAxis.auto else [_AXES[axis]]

    def cost(axis: int) -> tuple[float, int]:
        extents = _extents(latent_size[axis - TIME], workers, _LEAST[axis])
        area = latent_size[0] * latent_size[1] * latent_size[2] // latent_size[axis - TIME]
        return max(extents) / sum(extents), area * _HALO[axis]

    chosen = min(candidates, key=cost)
    extents = _extents(latent_size[chosen - TIME], workers, _LEAST[chosen])
    return Cut(chosen, extents, strides[0] if chosen == TIME else strides[1])


def _extents(count: int, workers: int, least: int) -> tuple[int, ...]:
    """`count` dealt as evenly as can be, at least so many to each, to as many workers as that allows."""
    working = max(1, min(workers, count // least))
    each, more = divmod(count, working)
    return tuple(each + (i < more) if i < working else 0 for i in range(workers))
