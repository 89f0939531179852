"""How evenly a step's work was dealt to its lanes, and how much of it counted: numbers for the metrics."""

from collections.abc import Sequence

from kinema.data.packs.pack import Pack


class Balance:
    """Cost and seconds of every lane of one step; each rank knows its own lanes, and a sum over ranks knows all.

    Neighbours whose costs are balanced together (`data.balanced_lanes`) count as one lane.
    """

    def __init__(self, lanes: int, balanced_lanes: int = 1) -> None:
        self.balanced_lanes = balanced_lanes
        self.costs, self.seconds = ([0.0] * (lanes // balanced_lanes) for _ in range(2))

    def add(self, pack: Pack, seconds: float) -> None:
        """A pack that this rank has worked on, and the seconds that it took up to the end of the forward pass."""
        lane = pack.lane // self.balanced_lanes
        self.costs[lane] += pack.cost
        self.seconds[lane] += seconds

    def values(self) -> list[float]:
        """What is to be summed over the ranks."""
        return [*self.costs, *self.seconds]

    @staticmethod
    def summary(values: Sequence[float]) -> dict[str, float]:
        """The sums over all ranks -> mean over largest cost, largest over mean seconds, and mean seconds, of a lane."""
        lanes = len(values) // 2
        costs, seconds = values[:lanes], values[lanes:]
        mean = sum(seconds) / lanes
        return {
            "lanes/efficiency": sum(costs) / lanes / max(costs),
            "lanes/slowest": max(seconds) / mean,
            "lanes/seconds": mean,
        }
