"""The few frames of a clip that its scores are made of."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PAIRS = 8
"""Pairs of near frames in a clip; half of all scores need only one frame of each."""
PAIR_SECONDS = 1 / 12
"""Between the two frames of a pair: short enough that optical flow follows fast motion."""
NEAR_SECONDS = 0.25
"""Two frames further apart are no pair: nothing is said about what happened between them."""


@dataclass(frozen=True)
class Sample:
    """Frames (T, H, W, 3) uint8 RGB of one clip, upright, and the seconds (T,) at which they are shown, rising."""

    frames: NDArray[np.uint8]
    seconds: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not len(self.frames):
            raise ValueError(f"frames of type {self.frames.dtype} and shape {shape} must be uint8 (T >= 1, H, W, 3).")
        if len(self.seconds) != len(self.frames) or (np.diff(self.seconds) <= 0).any():
            raise ValueError(f"seconds={self.seconds.tolist()} must rise, one for each of {len(self.frames)} frames.")

    @cached_property
    def luma(self) -> NDArray[np.uint8]:
        """(T, H, W), 0 black to 255 white, as BT.601 weighs the colours."""
        import cv2

        return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in self.frames]).astype(np.uint8, copy=False)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of neighbouring frames that are near in time."""
        gaps = np.diff(self.seconds)
        return [(i, i + 1) for i in range(len(gaps)) if gaps[i] <= NEAR_SECONDS]

    def crop(self, top: int, bottom: int, left: int, right: int) -> "Sample":
        """Without so many pixels at each side."""
        height, width = self.frames.shape[1:3]
        return Sample(self.frames[:, top : height - bottom, left : width - right], self.seconds)

    def luma_at(self, short_side: int) -> NDArray[np.uint8]:
        """Luma with the shorter side scaled, up or down, to `short_side`."""
        import cv2

        height, width = self.luma.shape[1:]
        factor = short_side / min(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        return np.stack([cv2.resize(picture, size, interpolation=how) for picture in self.luma]).astype(np.uint8)


def frames_to_sample(num_frames: int, fps: float, pairs: int = PAIRS) -> list[int]:
    """Rising frame numbers: a pair of near frames in the middle of each of `pairs` equal parts of the clip."""
    if num_frames < 1 or pairs < 1:
        raise ValueError(f"num_frames={num_frames} and pairs={pairs} must be at least 1.")
    step = max(1, round(PAIR_SECONDS * fps))
    first = np.rint((np.arange(pairs) + 0.5) / pairs * num_frames - 0.5 - step / 2).astype(int)
    return sorted(set(np.clip([*first, *(first + step)], 0, num_frames - 1).tolist()))
