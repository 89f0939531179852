"""A step's clips dealt to its lanes, so that the packs cost the same under a cap of tokens."""

import math
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray


class Packing(Enum):
    """What may lie in one pack."""

    packs = "packs"
    """Clips of any shape, dealt so that the packs cost the same."""
    buckets = "buckets"
    """Clips of one shape only, so that a step has few distinct shapes; lanes are shared out by cost."""


def deal(
    costs: NDArray[np.float64], tokens: NDArray[np.int64], lanes: int, max_pack_tokens: int, *, balanced_lanes: int = 1
) -> NDArray[np.int32]:
    """The lane of each clip: dearest first, each to the cheapest group of lanes with room, there to the cheapest lane.

    A group is `balanced_lanes` neighbouring lanes, the packs that a rank trains on one after the other: only its
    sum has to be equal. In a group the dearest pack comes first, so ranks that wait for each other after every
    pack wait little. Graham 1969, "Bounds on multiprocessing timing anomalies": without the token cap, the
    dearest group costs at most 4/3 - 1/(3 groups) times the least possible. Ties go to the earlier clip and the
    lower lane. Every lane gets a clip if there are as many.
    """
    room = [max_pack_tokens] * lanes
    groups = [(0.0, group) for group in range(lanes // balanced_lanes)]
    packs = [[(0.0, group * balanced_lanes + lane) for lane in range(balanced_lanes)] for _, group in groups]
    lane_of = [0] * len(costs)
    cost_list, token_list = costs.tolist(), tokens.tolist()  # a NumPy scalar would take longer than all the rest
    for clip in np.argsort(-costs, kind="stable").tolist():
        cost, size = cost_list[clip], token_list[clip]
        total, group = groups[0]
        lane = packs[group][0][1]
        if room[lane] >= size:  # nearly always
            heapreplace(groups, (total + cost, group))
            if balanced_lanes > 1:
                heapreplace(packs[group], (packs[group][0][0] + cost, lane))
        else:
            lane = _with_room(groups, packs, room, cost, size)
        room[lane] -= size
        lane_of[clip] = lane
    dealt = np.array(lane_of, np.int32)
    return dealt if balanced_lanes == 1 else _dearest_first(_none_empty(dealt, costs, lanes), costs, balanced_lanes)


def _with_room(
    groups: list[tuple[float, int]], packs: list[list[tuple[float, int]]], room: list[int], cost: float, size: int
) -> int:
    """The cheapest lane with room in the cheapest group that has one, its cost added in both heaps."""
    full = []
    while not (fitting := [pack for pack in packs[groups[0][1]] if room[pack[1]] >= size]):
        full.append(heappop(groups))
        assert groups, "pack_tokens_needed promised room"
    (total, group), (pack_total, lane) = groups[0], min(fitting)
    packs[group].remove((pack_total, lane))
    packs[group].append((pack_total + cost, lane))
    heapify(packs[group])
    heapreplace(groups, (total + cost, group))
    for each in full:
        heappush(groups, each)
    return lane


def _none_empty(lane_of: NDArray[np.int32], costs: NDArray[np.float64], lanes: int) -> NDArray[np.int32]:
    """Give each lane without a clip the cheapest of a lane that has others."""
    counts = np.bincount(lane_of, minlength=lanes)
    cheapest = iter(np.argsort(costs, kind="stable").tolist())
    for lane in np.flatnonzero(counts == 0).tolist():
        clip = next(clip for clip in cheapest if counts[lane_of[clip]] > 1)
        counts[lane_of[clip]] -= 1
        lane_of[clip] = lane
    return lane_of


def _dearest_first(lane_of: NDArray[np.int32], costs: NDArray[np.float64], balanced_lanes: int) -> NDArray[np.int32]:
    """Number the lanes of each group by falling cost."""
    totals = np.bincount(lane_of, costs).reshape(-1, balanced_lanes)
    order = np.argsort(-totals, axis=1, kind="stable").argsort(axis=1)
    return (lane_of - lane_of % balanced_lanes + order.reshape(-1)[lane_of]).astype(np.int32)


def deal_buckets(
    kinds: NDArray[np.int32],
    costs: NDArray[np.float64],
    tokens: NDArray[np.int64],
    lanes: int,
    max_pack_tokens: int,
) -> NDArray[np.int32]:
    """The lane of each clip when a pack holds clips of one kind only; `kinds` are numbers of their shapes.

    Each kind has the lanes that its clips need under the cap; the others go one by one to the kind whose packs
    are dearest, and a kind's clips are spread evenly over its lanes.
    """
    found, first, counts = np.unique(kinds, return_index=True, return_counts=True)
    fitting = max_pack_tokens // tokens[first]
    shares = -(-counts // fitting)
    assert shares.sum() <= lanes, "bucket_lanes_needed promised room"
    for _ in range(lanes - int(shares.sum())):
        pack_costs = np.where(shares < counts, -(-counts // shares) * costs[first], -1.0)
        shares[int(np.argmax(pack_costs))] += 1
    lane_of = np.empty(len(kinds), np.int32)
    for kind, share, lane in zip(found, shares, np.cumsum(shares) - shares, strict=True):
        here = np.flatnonzero(kinds == kind)
        lane_of[here] = lane + np.arange(len(here)) * share // len(here)
    return lane_of


@dataclass(frozen=True)
class LargestStep:
    """Bounds on what any step of a plan can hold."""

    sizes: NDArray[np.int64]
    """Tokens of its clips, or of each kind of clip, falling."""
    before: NDArray[np.int64]
    """For each of these, the most tokens that other clips of that size or larger have together."""
    clips: int | None
    """Number of clips, if it is fixed."""

    @classmethod
    def of_clips(cls, sizes: NDArray[np.int64]) -> "LargestStep":
        """A step of these clips, or of smaller ones."""
        return cls(sizes, np.cumsum(sizes) - sizes, len(sizes))

    @classmethod
    def of_tokens(cls, sizes: NDArray[np.int64], tokens: int) -> "LargestStep":
        """A step of so many tokens in clips of these sizes."""
        return cls(sizes, tokens - sizes, None)

    def pack_tokens_needed(self, lanes: int, *, largest_first: bool = True) -> int:
        """Token cap under which `deal` finds room for every clip.

        A clip of t tokens finds no room only when every lane holds more than cap - t. When larger clips are
        dealt first these are clips of at least t, so they have lanes * max(cap - t + 1, t) tokens at least, and
        there may be fewer. Nor can it be while some lane holds fewer than ceil(clips / lanes) clips under a cap of
        so many of the largest. The lower of the caps is enough.
        """
        first = int(self.sizes[0])
        before = self.before if largest_first else np.full_like(self.before, self.before.max())
        refused = self.before >= lanes * self.sizes if largest_first else np.ones(len(before), np.bool_)
        needed = int((before // lanes + self.sizes)[refused].max(initial=first))
        return needed if self.clips is None else min(math.ceil(self.clips / lanes) * first, needed)

    def bucket_lanes_needed(self, max_pack_tokens: int) -> int:
        """Lanes with which `deal_buckets` finds room for every clip."""
        kinds = np.unique(self.sizes)
        fitting = max_pack_tokens // kinds
        if not fitting.all():
            raise ValueError(
                f"data.max_pack_tokens={max_pack_tokens} is less than the largest clip, {kinds[-1]} tokens. "
                f"Type data.max_pack_tokens={kinds[-1]} or more."
            )
        most = int((self.before + self.sizes).max()) / int((fitting * kinds).min())
        if self.clips is not None:
            most = min(most, self.clips / int(fitting.min()))
        return math.ceil(most + float(((fitting - 1) / fitting).sum()) - 1e-9)
