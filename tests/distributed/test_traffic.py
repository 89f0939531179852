"""Bytes of every collective of a step, counted on two real ranks, are those of the formula in docs/scaling.md."""

import pytest
import torch
from torch import nn

from benchmarks.traffic import Traffic
from kinema.distributed.deepspeed_config import TrafficConfig
from kinema.distributed.engine import Engine, Precision
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
WIDTH, DEPTH, SMALL = 96, 6, 100
CELLS = [(0, 2, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 0), (3, 2, SMALL)]
"""ZeRO stage, accumulation, largest tensor that stays whole."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.leave = nn.Linear(WIDTH, 32)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.leave(x)


def count() -> dict[tuple[int, int, int], dict[str, int]]:
    found = {}
    for stage, accumulation, small in CELLS:
        torch.manual_seed(0)
        net = Net()
        engine = Engine(
            net, torch.optim.AdamW(net.parameters(), fused=True), zero_stage=stage, precision=Precision.float32,
            accumulation=accumulation, gradient_clipping=1.0,
            traffic=TrafficConfig(bucket_elements=WIDTH * (WIDTH + 1), resident_elements=small),
        )  # fmt: skip
        for _ in range(3):  # ZeRO 3 learns in the first steps what to fetch ahead
            with Traffic() as traffic:
                for _ in range(accumulation):
                    engine.backward(engine(torch.randn(8, 64)).square().mean())
                    engine.step(1e-3)
        found[stage, accumulation, small] = dict(traffic.found)
    return found


def formula(stage: int, accumulation: int, small: int) -> dict[str, int]:
    """Bytes of whole messages by kind."""
    sizes = [p.numel() for p in Net().parameters()]
    weights, whole = sum(sizes), sum(size for size in sizes if size <= small)
    if stage == 0:
        return {"allreduce": 4 * weights}
    if stage < 3:
        return {"allreduce": 4 * weights * (accumulation if stage == 2 else 1), "allgather_base": 4 * weights}
    live, held = 3 * WIDTH * (WIDTH + 1), 0
    cut = [
        p.numel() for layer in reversed([*Net().blocks, Net().leave]) for p in layer.parameters() if p.numel() > small
    ]
    for size in cut:  # from the last layer on, as much as may be whole at a time is not gathered again
        if held + size > live:
            break
        held += size
    gathered = accumulation * (2 * (weights - whole) - held) + whole
    return {"reduce_scatter_base": 4 * accumulation * weights, "allgather_base": 4 * gathered}


def test_every_collective_moves_the_bytes_of_the_formula():
    for found in run_ranks(count, 2):
        for cell, counted in found.items():
            scalars = counted.pop("scalars")
            assert scalars < 0.01 * sum(counted.values())
            assert counted == pytest.approx(formula(*cell), rel=0.01), cell
