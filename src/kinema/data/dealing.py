"""A step's clips dealt to its lanes, so that the packs cost the same under a cap of tokens."""

import math
from heapq import heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray


def deal(costs: NDArray[np.float64], tokens: NDArray[np.int64], lanes: int, max_pack_tokens: int) -> NDArray[np.int32]:
    """The lane of each clip: dearest first, each to the cheapest lane with room.

    Graham 1969, "Bounds on multiprocessing timing anomalies": without the token cap, the dearest lane costs
    at most 4/3 - 1/(3 lanes) times the least possible. Ties go to the earlier clip and the lower lane.
    """
    lane_of = [0] * len(costs)
    cost_list, token_list = costs.tolist(), tokens.tolist()  # a NumPy scalar would take longer than all the rest
    cheapest = [(0.0, lane) for lane in range(lanes)]
    room = [max_pack_tokens] * lanes
    for clip in np.argsort(-costs, kind="stable").tolist():
        full = []
        while room[cheapest[0][1]] < token_list[clip]:
            full.append(heappop(cheapest))
            assert cheapest, "pack_tokens_needed promised room"
        cost, lane = cheapest[0]
        heapreplace(cheapest, (cost + cost_list[clip], lane))
        room[lane] -= token_list[clip]
        lane_of[clip] = lane
        for each in full:
            heappush(cheapest, each)
    return np.array(lane_of, np.int32)


def pack_tokens_needed(largest: NDArray[np.int64], lanes: int) -> int:
    """Token cap under which `deal` finds room for every clip of a step, and of any step of smaller clips.

    `largest` are the tokens of the clips of the largest step, falling. A clip of t tokens finds no room only
    when every lane holds more than cap - t. That cannot be while some lane holds fewer than
    ceil(clips / lanes) clips under a cap of so many of the largest; nor when the other clips' tokens, all lanes
    together, are too few. The lower of the two caps is enough.
    """
    first = int(largest[0])
    return min(math.ceil(len(largest) / lanes) * first, int(largest[:-1].sum()) // lanes + first)
