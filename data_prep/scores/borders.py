"""Black bars around the picture: letterbox, pillarbox, or both."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.scores.sample import Sample

BAR_LUMA = 28
"""Of 255; a bar of limited-range black with coding noise stays below it in every frame."""
LARGEST_BAR = 0.4
"""Share of a side: where more is black the whole picture is dark, and nothing is called a bar."""
EDGE_PIXELS = 3
STRAIGHT_EDGE = 0.3
"""Share of the first rows behind a bar that must be lit: the night sky over a city is black, but no bar."""


class Borders(NamedTuple):
    """Width of the bar at each side in pixels."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @property
    def any(self) -> bool:
        """Whether there is a bar."""
        return max(self) > 0


def find_borders(sample: Sample) -> Borders:
    """The bars that are black in every sampled frame and end in a straight edge; none in a dark picture."""
    brightest = sample.luma.max(axis=0)  # (H, W) over time
    rows = _bars(brightest)
    inside = brightest[rows[0] : brightest.shape[0] - rows[1]]
    return Borders(*rows, *_bars(inside.T))


def border_share(sample: Sample) -> float:
    """Share of the picture that bars take, 0 to 1."""
    height, width = sample.luma.shape[1:]
    bars = find_borders(sample)
    return 1 - (height - bars.top - bars.bottom) * (width - bars.left - bars.right) / (height * width)


def _bars(brightest: NDArray[np.uint8]) -> tuple[int, int]:
    """Rows of the bar at the top and at the bottom."""
    return _bar(brightest), _bar(brightest[::-1])


def _bar(brightest: NDArray[np.uint8]) -> int:
    lit = np.flatnonzero(np.percentile(brightest, 99, axis=1) > BAR_LUMA)  # a few pixels of noise do not count
    if not len(lit) or lit[0] == 0 or lit[0] > LARGEST_BAR * len(brightest):
        return 0
    edge = brightest[lit[0] : lit[0] + EDGE_PIXELS]
    straight = (edge.max(axis=0) > BAR_LUMA).mean() >= STRAIGHT_EDGE
    return int(lit[0]) if straight else 0
