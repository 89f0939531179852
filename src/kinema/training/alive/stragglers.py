"""Ranks that are slower than the others, and in what: told from times that travel with the sums of every step."""

import statistics
from collections import deque

from kinema.training.records.metrics import Clock

PHASES = ("data", "encode", "forward")
"""What a rank does before it waits for others (under ZeRO 3 and sequence parallelism `forward` waits as well)."""
WINDOW, ENOUGH, RECOVERED = 10, 8, 2
"""A rank is named that was slow in 8 of the last 10 steps, and again only after it was so in 2 at most."""
LEAST_SHARE = 0.2
"""Of the slowest rank's time for these phases: what is lost in a phase must be so much."""


class Stragglers:
    """Compares the ranks' times; the same on all of them, as each hears the times of all."""

    def __init__(self, ratio: float, rank: int, hosts: list[str]) -> None:
        """A phase is slow that takes `ratio` times the median of the other ranks; 0 compares nothing."""
        self.ratio, self.rank, self.hosts = ratio, rank, hosts
        self._before = dict.fromkeys(PHASES, 0.0)
        self._slow: dict[tuple[int, str], deque[bool]] = {}
        self._named: set[tuple[int, str]] = set()

    def begin_step(self, clock: Clock) -> None:
        """Before this rank's packs are fetched."""
        self._before = {phase: clock.spent(phase) for phase in PHASES}

    def own(self, clock: Clock, cost: float) -> list[float]:
        """This rank's seconds by phase in this step and the cost of its packs, in places of its own, to be summed."""
        width = len(PHASES) + 1
        values = [0.0] * (width * len(self.hosts))
        seconds = [clock.spent(phase) - self._before[phase] for phase in PHASES]
        values[width * self.rank : width * (self.rank + 1)] = [*seconds, cost]
        return values

    def hear(self, values: list[float]) -> list[str]:
        """The sums over all ranks -> what is to be told, usually nothing."""
        width, ranks = len(PHASES) + 1, len(self.hosts)
        if ranks == 1 or not self.ratio:
            return []
        rows = [values[width * rank : width * (rank + 1)] for rank in range(ranks)]
        least = LEAST_SHARE * max(sum(row[:-1]) for row in rows)
        told = []
        for number, phase in enumerate(PHASES):
            costs = [row[-1] if phase != "data" else 1.0 for row in rows]  # dearer packs may take longer
            seconds = [row[number] / (cost or 1.0) for row, cost in zip(rows, costs, strict=True)]
            for rank, own in enumerate(seconds):
                others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
                lost = (own - others) * (costs[rank] or 1.0)
                if self._note(rank, phase, slow=own > self.ratio * others and lost > least):
                    told.append(self._line(rank, phase, rows[rank][number], rows[rank][number] - lost))
        return told

    def _note(self, rank: int, phase: str, *, slow: bool) -> bool:
        """Whether this makes the rank one to be named."""
        key = (rank, phase)
        seen = self._slow.setdefault(key, deque(maxlen=WINDOW))
        seen.append(slow)
        if sum(seen) <= RECOVERED:
            self._named.discard(key)
        if sum(seen) < ENOUGH or key in self._named:
            return False
        self._named.add(key)
        return True

    def _line(self, rank: int, phase: str, own: float, others: float) -> str:
        times = f"{own / others:.1f} times the " if others > 0 else "against "
        return (
            f"rank {rank} on {self.hosts[rank]}: {phase} takes {own:.3g} s a step, {times}{others:.3g} s of the others"
        )
