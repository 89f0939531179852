"""Two functions timed in turn: on a machine whose speed drifts only their ratio, pair by pair, means something."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Seconds of both functions, pair by pair."""

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ours is, in each pair."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def row(self, name: str) -> str:
        """A line of a markdown table: seconds, and the median ratio with its quartiles."""
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        seconds = (statistics.median(each) for each in (self.ours, self.theirs))
        ours, theirs = (f"{each:.3f}" for each in seconds)
        return f"| {name} | {ours} | {theirs} | **{middle:.2f}** ({low:.2f} to {high:.2f}) |"


HEADER = "| what | Kinema, s | diffusers, s | times as fast (quartiles) |\n|---|---|---|---|"


def paired(ours: Callable[[], object], theirs: Callable[[], object], seconds: float, least: int = 5) -> Paired:
    """Time both in turn, in alternating order, for about so many seconds; a first call of each is not counted."""
    ours(), theirs()
    found: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    order, end = [ours, theirs], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[ours]) < least:
        for function in order:
            start = time.perf_counter()
            function()
            found[function].append(time.perf_counter() - start)
        order.reverse()
    return Paired(found[ours], found[theirs])
