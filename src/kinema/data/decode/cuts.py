"""Where a run of frames jumps to another shot: a cheap detector without weights."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_HISTOGRAM_CHANGE = 0.30
"""Share of the pixels that change their colour bin; an object crossing the picture moves few."""
MIN_PIXEL_CHANGE = 14.0
"""Mean absolute difference of the small pictures, of 255."""
MIN_PROMINENCE = 2.5
"""How many times larger than in the frames around; a fast pan is large everywhere."""
CLEAR_HISTOGRAM_CHANGE, CLEAR_PIXEL_CHANGE, CLEAR_PROMINENCE = 0.12, 20.0, 4.0
"""Enough as well: a cut inside one scene keeps the colours, but dwarfs even the largest change around it."""
NEIGHBOURS = 4
SEEN_AROUND = NEIGHBOURS + 2
"""Frames on either side of a cut that the decision looks at."""
WINDOW = 256


def suspected_cuts(frames: NDArray[np.uint8]) -> list[int]:
    """First frame of each suspected new shot, for uint8 frames (T, H, W, 3) of one clip in order.

    A cut needs all three: another colour histogram, other pixels, and a jump that stands out among its
    neighbours; the clearer the jump, the less the colours need to change. Slow dissolves and fades are not
    found. Raises ValueError for another layout.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames of type {frames.dtype} and shape {frames.shape} must be uint8 (T, H, W, 3).")
    if len(frames) < 2:
        return []
    small = np.stack([_shrink(frame) for frame in frames])
    pixels = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))  # (T - 1,)
    histograms = np.stack([_histogram(frame) for frame in frames])
    colours = np.abs(np.diff(histograms, axis=0)).sum(1) / 2  # 0 same, 1 disjoint
    return [
        i + 1
        for i in range(len(pixels))
        if (colours[i] >= MIN_HISTOGRAM_CHANGE and pixels[i] >= MIN_PIXEL_CHANGE and _stands_out(pixels, i))
        or (colours[i] >= CLEAR_HISTOGRAM_CHANGE and _dwarfs_all(pixels, i))
    ]


def split_shots(frames: Iterable[NDArray[np.uint8]], min_frames: int = 1) -> list[tuple[int, int]]:
    """[start, stop) of each shot of at least `min_frames`; shorter ones are left out.

    `frames` are uint8 (H, W, 3) and may be a stream of any length: a few hundred are held at a time, and the
    cuts are those that `suspected_cuts` finds in all of them at once.
    """
    cuts, held, first = [], [], 0
    for frame in frames:
        held.append(frame)
        if len(held) == WINDOW + 2 * SEEN_AROUND:
            cuts += _cuts_of_window(held, first, first + len(held) - SEEN_AROUND)
            del held[:WINDOW]
            first += WINDOW
    stop = first + len(held)
    cuts += _cuts_of_window(held, first, stop)
    return [(a, b) for a, b in pairwise([0, *cuts, stop]) if b - a >= max(1, min_frames)]


def _cuts_of_window(held: list[NDArray[np.uint8]], first: int, stop: int) -> list[int]:
    """Cuts before frame `stop` in a window from frame `first`, but for those of the window before."""
    start = first + SEEN_AROUND if first else 0
    found = suspected_cuts(np.stack(held)) if held else []
    return [first + cut for cut in found if start <= first + cut < stop]


def _around(change: NDArray[np.float32], index: int) -> NDArray[np.float32]:
    return np.delete(change[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1], min(index, NEIGHBOURS))


def _dwarfs_all(change: NDArray[np.float32], index: int) -> bool:
    """Whether the change is large, and several times the largest of the frames around it."""
    largest = max(_around(change, index).max(initial=0.0), 1.0)
    return bool(change[index] >= max(CLEAR_PIXEL_CHANGE, CLEAR_PROMINENCE * largest))


def _stands_out(change: NDArray[np.float32], index: int) -> bool:
    """Whether the change is a local maximum well above the usual change of the frames around it."""
    around = _around(change, index)
    if len(around) == 0:
        return True
    beside = change[max(0, index - 1) : index + 2]
    return bool(change[index] >= beside.max() and change[index] >= MIN_PROMINENCE * max(float(np.median(around)), 1.0))


def _shrink(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colour of about 16 x 16 blocks, so that noise and small motion hardly count."""
    rows, columns = max(1, frame.shape[0] // 16), max(1, frame.shape[1] // 16)
    height, width = frame.shape[0] // rows, frame.shape[1] // columns
    blocks = frame[: height * rows, : width * columns].reshape(height, rows, width, columns, 3)
    return blocks.mean((1, 3), dtype=np.float32)


def _histogram(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Shares of the pixels in 6 x 6 x 6 colour bins, half of each bin spread to its six neighbours.

    Soft, because a drift of one level would otherwise move a flat area to another bin at once.
    """
    levels = (frame.astype(np.int64) * 6) >> 8
    bins = (levels[..., 0] * 6 + levels[..., 1]) * 6 + levels[..., 2]
    hard = np.bincount(bins.ravel(), minlength=216).reshape(6, 6, 6).astype(np.float64)
    soft = hard / 2
    for axis in range(3):
        spread = np.moveaxis(hard, axis, 0)
        target = np.moveaxis(soft, axis, 0)  # a view
        target[1:] += spread[:-1] / 12
        target[:-1] += spread[1:] / 12
        target[0] += spread[0] / 12
        target[-1] += spread[-1] / 12
    return soft.ravel() / soft.sum()
