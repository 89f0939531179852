"""Slabs: a clip cut along one side over several workers, and what a layer asks of those that hold the rest.

The cut is in whole latent pixels, so that a slab of pixels, of any level between and of latents are the same part of
the clip. Frame 0 is alone at every level: the first slab of a cut in time has frames of the form k * stride + 1, later
ones k * stride, as the chunks of a stream have. No layer's kernel is larger than 3: a slab needs two latent frames, or
one row or column, to hold all that its neighbours see of it.
"""

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
