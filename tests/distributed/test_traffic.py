"""Bytes of every collective of a step, counted on two real ranks, are those of the formula in docs/scaling.md."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from benchmarks.traffic import Traffic
from kinema.distributed.deepspeed_config import TrafficConfig
from kinema.distributed.engine import Engine, Precision
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
WIDTH, DEPTH, SMALL = 96, 6, 100
CELLS = [(0, 2, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 0), (3, 2, SMALL)]
"""ZeRO stage, accumulation, largest tensor that stays whole."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, unused):
        return x + self.layer(x).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.leave = nn.Linear(WIDTH, 32)
        self.most_whole = 0

    def forward(self, x):
        entered = x = self.enter(x)
        for block in self.blocks:
            x = block(x, entered)
            x.register_hook(self.look)
        return self.leave(x)

    def look(self, gradient):
        """How many weights of blocks are whole at the worst moment of the backward."""
        cut = [p for p in self.blocks.parameters() if not getattr(p, "ds_persist", True)]
        whole = sum(p.ds_numel for p in cut if p.ds_status is ZeroParamStatus.AVAILABLE)
        self.most_whole = max(self.most_whole, whole)


def count() -> dict[tuple[int, int, int], dict[str, int]]:
    found = {}
    for stage, accumulation, small in CELLS:
        torch.manual_seed(0)
        net = Net()
        engine = Engine(
            net, torch.optim.AdamW(net.parameters(), fused=True), zero_stage=stage, precision=Precision.float32,
            accumulation=accumulation, gradient_clipping=1.0,
            traffic=TrafficConfig(bucket_elements=WIDTH * (WIDTH + 1), resident_elements=small),
            blocks=list(net.blocks),
        )  # fmt: skip
        for _ in range(3):  # ZeRO 3 learns in the first steps what to fetch ahead
            with Traffic() as traffic:
                for _ in range(accumulation):
                    engine.backward(engine(torch.randn(8, 64)).square().mean())
                    engine.step(1e-3)
        assert net.most_whole <= engine.traffic.live, "blocks stay whole that the backward has left"
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
    gathered = accumulation * (2 * (weights - whole) - held_from_forward_to_backward(small)) + whole
    return {"reduce_scatter_base": 4 * accumulation * weights, "allgather_base": 4 * gathered}


def held_from_forward_to_backward(small: int) -> int:
    """All that lies outside of blocks, and as many blocks, from the last on, as may be whole; but what is never cut."""
    net, block = Net(), WIDTH * (WIDTH + 1)
    held, behind = [*net.enter.parameters(), *net.leave.parameters()], 32 * (WIDTH + 1)
    for each in reversed(net.blocks):
        if behind >= 3 * block:
            break
        held, behind = [*held, *each.parameters()], behind + block
    return sum(p.numel() for p in held if p.numel() > small)


def test_every_collective_moves_the_bytes_of_the_formula():
    for found in run_ranks(count, 2):
        for cell, counted in found.items():
            scalars = counted.pop("scalars", 0)
            assert scalars < 0.01 * sum(counted.values())
            assert counted == pytest.approx(formula(*cell), rel=0.01), cell
