"""Averages whose memory is a share of the steps so far, and new ones made from stored ones.

Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2). After step T the weights
of step t have a share proportional to t^exponent; the length of an average is the standard deviation of that profile,
divided by T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Profile(NamedTuple):
    """Which average: its exponent, and the step after which it was stored."""

    exponent: float
    step: int


def length_of(exponent: float) -> float:
    """The length of an average, a share of all steps."""
    return float(np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))))


def exponent_of(length: float, key: str = "length") -> float:
    """The exponent of an average of this length, the inverse of `length_of`; ValueError outside (0, 0.288)."""
    if not 0 < length < length_of(0):
        raise ValueError(
            f"{key} has {length}, which must lie between 0 and {length_of(0):.3f}: for example 0.05 or 0.1."
        )
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.argmax(roots.real)].real)


def power_decay(exponent: float, step: int) -> float:
    """Share of the old average that the update after `step` (counted from 1) keeps; 0 after the first."""
    return float((1 - 1 / step) ** (exponent + 1))


def factors_of(stored: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """What to multiply stored averages with so that their sum comes nearest to the wanted one, in least squares.

    They sum to 1 nearly, and may be negative.
    """
    rows = np.array([[overlap(one, other) for other in stored] for one in stored])
    return np.linalg.lstsq(rows, np.array([overlap(one, wanted) for one in stored]), rcond=None)[0]


def distance(stored: Sequence[Profile], factors: NDArray[np.float64], wanted: Profile) -> float:
    """How far the sum's profile is from the wanted one: the norm of their difference over that of the wanted."""
    rows = np.array([[overlap(one, other) for other in stored] for one in stored])
    crossed = np.array([overlap(one, wanted) for one in stored])
    squared = factors @ rows @ factors - 2 * factors @ crossed + overlap(wanted, wanted)
    return float(np.sqrt(max(squared, 0.0) / overlap(wanted, wanted)))


def overlap(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles over all steps, each profile having area 1."""
    (a, first), (b, last) = sorted((one, other), key=lambda profile: profile.step)
    return (a + 1) * (b + 1) / (a + b + 1) * (first / last) ** b / last
