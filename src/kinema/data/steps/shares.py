"""Which data set of a mixture each clip comes from: fixed shares, spread as evenly as whole clips allow."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PERIOD = 10_000
"""Clips after which the pattern repeats; a weight is kept to one part in so many."""


class Shares:
    """How many of the first n clips come from each source, for any n at once.

    Independent draws would stray from the weights by the root of n, and would have to be replayed on resume. Here
    clip k of a source with quota q lies at time (k + 1/2) / q, and the sources are merged by time: after any n clips
    each source is within the number of sources of its share.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str] = ()) -> None:
        """`weights` need not add up to 1; ValueError for one that is not above 0, or too small to be kept."""
        names = names or [str(number) for number in range(len(weights))]
        for name, weight in zip(names, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"data.mixture.{name}.weight={weight} must be above 0. Leave the data set out instead."
                )
        exact = np.array(weights, np.float64) / sum(weights) * PERIOD
        quotas = np.floor(exact).astype(np.int64)
        behind = np.argsort(quotas - exact, kind="stable")  # largest remainder first
        quotas[behind[: PERIOD - int(quotas.sum())]] += 1
        for name, weight, quota in zip(names, weights, quotas, strict=True):
            if not quota:
                raise ValueError(
                    f"data.mixture.{name}.weight={weight} is less than 1/{PERIOD} of all weights together: "
                    "it would never be drawn. Type a larger weight, or leave the data set out."
                )
        self.quotas = quotas.tolist()

    @cached_property
    def _counts(self) -> NDArray[np.int32]:
        """Clips of each source among the first 0, 1, ..., PERIOD - 1 of a period."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        times = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self.quotas])
        sequence = sources[np.argsort(times, kind="stable")]
        chosen = sequence[:, None] == np.arange(len(self.quotas))
        return np.cumsum(np.insert(chosen, 0, False, axis=0), axis=0, dtype=np.int32)[:-1]

    def of_clips(self, source: int, clips: int) -> int:
        """How many of the first `clips` clips come from this source."""
        periods, rest = divmod(clips, PERIOD)
        return periods * self.quotas[source] + int(self._counts[rest, source])

    def of_tokens(self, source: int, tokens: int) -> int:
        """How many of the first `tokens` tokens, rounded down."""
        return tokens * self.quotas[source] // PERIOD
