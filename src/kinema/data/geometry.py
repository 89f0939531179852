"""Which clip sizes fit the VAE and the patches, and which size each clip is given."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.dataset.columns import Columns, columns_of_records
from kinema.data.dataset.sample import ClipRecord

ROWS_AT_ONCE = 1 << 18
"""Clips that are given shapes in one go, to bound memory."""


class ClipShape(NamedTuple):
    """Frames and sides of one clip, in pixels; H before W everywhere."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """VAE strides and patch size, and the clip shapes that they allow.

    A causal VAE maps the first frame alone and then groups of `temporal_stride`, so a clip has
    k * temporal_stride + 1 frames; its k + 1 latent frames and its latent sides divide into whole patches.
    """

    temporal_stride: int
    spatial_stride: int
    patch_size: tuple[int, int, int]

    def __post_init__(self) -> None:
        numbers = (self.temporal_stride, self.spatial_stride, *self.patch_size)
        if len(self.patch_size) != 3 or min(numbers) < 1:
            raise ValueError(
                f"temporal_stride={self.temporal_stride}, spatial_stride={self.spatial_stride} and "
                f"patch_size={self.patch_size} must be whole numbers from 1 (patch_size has three: t, h, w)."
            )

    def describe(self) -> dict[str, Any]:
        """Strides, patch and the rule for frames, as a manifest holds them."""
        step, first = self.temporal_stride * self.patch_size[0], self.temporal_stride * (self.patch_size[0] - 1) + 1
        return {
            "temporal_stride": self.temporal_stride,
            "spatial_stride": self.spatial_stride,
            "patch_size": list(self.patch_size),
            "frames": f"{step}k+{first}",
        }

    def check(self, shape: Sequence[int], key: str = "data.shapes") -> ClipShape:
        """Return the shape when it is legal; else raise ValueError with the rules and the nearest legal
        shapes.
        """
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{key}={list(shape)} must be [frames, height, width], each at least 1.")
        wanted = ClipShape(*shape)
        if self._is_legal(wanted):
            return wanted
        frames, height, width = self._steps
        legal_frames = [k * self.temporal_stride + 1 for k in range(frames - 1, 4 * frames, frames)]
        raise ValueError(
            f"{key}={list(wanted)} does not fit the VAE (strides {self.temporal_stride} in time and "
            f"{self.spatial_stride} in space) and patch_size={list(self.patch_size)}: frames must be one of "
            f"{_listed(legal_frames)}, ..., height a multiple of {height}, width of {width}. Nearest legal: "
            f"{', '.join(str(list(near)) for near in self.nearest(wanted))}."
        )

    def nearest(self, shape: Sequence[int]) -> list[ClipShape]:
        """Up to four legal shapes around the wanted one, nearest first (sum of the axes' absolute log
        ratios).
        """
        wanted = ClipShape(*shape)
        frame_step, *side_steps = self._steps
        latent_frames = (wanted.frames - 1) / self.temporal_stride + 1
        axes = [[(k - 1) * self.temporal_stride + 1 for k in _around(latent_frames, frame_step)]]
        axes += [_around(side, step) for side, step in zip(wanted[1:], side_steps, strict=True)]
        candidates = [ClipShape(*candidate) for candidate in itertools.product(*axes)]
        return sorted(candidates, key=lambda candidate: _distance(candidate, wanted))[:4]

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Latent frames, height and width of a legal clip shape."""
        frames, height, width = self.check(shape)
        return (
            (frames - 1) // self.temporal_stride + 1,
            height // self.spatial_stride,
            width // self.spatial_stride,
        )

    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Patches of a legal clip shape along time, height and width."""
        t, h, w = (side // patch for side, patch in zip(self.latent_shape(shape), self.patch_size, strict=True))
        return t, h, w

    def num_tokens(self, shape: Sequence[int]) -> int:
        """Patches of a legal clip shape."""
        return math.prod(self.token_grid(shape))

    @property
    def _steps(self) -> tuple[int, int, int]:
        """Multiples that latent frames, height and width must be; sides in pixels."""
        return (
            self.patch_size[0],
            self.spatial_stride * self.patch_size[1],
            self.spatial_stride * self.patch_size[2],
        )

    def _is_legal(self, shape: ClipShape) -> bool:
        frame_step, *side_steps = self._steps
        groups, rest = divmod(shape.frames - 1, self.temporal_stride)
        whole_sides = all(side % step == 0 for side, step in zip(shape[1:], side_steps, strict=True))
        return rest == 0 and (groups + 1) % frame_step == 0 and whole_sides


def assign_shapes(columns: Columns, shapes: Sequence[ClipShape], fps: float) -> NDArray[np.int32]:
    """Give each clip the shape of nearest aspect ratio, and of those the longest that it can fill at `fps`.

    Shapes of equal aspect ratio and length are told apart by area: the largest that needs no enlarging, else
    the smallest. A clip of one frame, an image, is given shapes of one frame only. Returns places in `shapes`, -1
    where the clip is shorter than every shape of its aspect ratio; the caller counts it.
    """
    ids = np.full(len(columns), -1, np.int32)
    for first in range(0, len(columns), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        width, height, seconds = columns.width[rows], columns.height[rows], columns.duration_seconds[rows]
        aspect = np.log(width / height)
        misfits = np.stack([np.abs(math.log(shape.width / shape.height) - aspect) for shape in shapes])
        image = columns.num_frames[rows] == 1
        moving = np.array([[shape.frames > 1] for shape in shapes])
        misfits = np.where(image & moving, np.inf, misfits)
        nearest = misfits < misfits.min(axis=0) + 1e-9
        best = np.full((3, len(width)), -np.inf)  # of the preferred shape so far: frames, not enlarged, area
        for place, shape in enumerate(shapes):
            enlarged = (shape.height > height) | (shape.width > width)
            area = shape.height * shape.width
            preference = np.stack([np.full(len(width), shape.frames), ~enlarged, np.where(enlarged, -area, area)])
            # Durations are rounded when written; a thousandth of a frame is not a missing frame.
            fits = nearest[place] & np.where(image, shape.frames == 1, shape.frames <= seconds * fps + 1e-3)
            wins = fits & _greater(preference, best)
            ids[rows][wins] = place
            best = np.where(wins, preference, best)
    return ids


def assign_shape(record: ClipRecord, shapes: Sequence[ClipShape], fps: float) -> ClipShape | None:
    """The shape that `assign_shapes` gives one clip, or None."""
    place = int(assign_shapes(columns_of_records([record], [""]), shapes, fps)[0])
    return None if place < 0 else shapes[place]


def _greater(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the columns of `one` come after those of `other`, compared row by row from the first."""
    greater = np.zeros(one.shape[1], np.bool_)
    for ours, theirs in zip(one[::-1], other[::-1], strict=True):
        greater = (ours > theirs) | ((ours == theirs) & greater)
    return greater


def _around(value: float, step: int) -> list[int]:
    """The multiples of `step` at or just below and above the value, without 0."""
    below = math.floor(value / step) * step
    above = math.ceil(value / step) * step
    return sorted({max(below, step), max(above, step)})


def _distance(a: ClipShape, b: ClipShape) -> float:
    return sum(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
