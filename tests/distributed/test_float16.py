"""float16: a loss scale that is too large costs repeated steps and nothing else, under every ZeRO stage."""

import math

import pytest
import torch
import torch.distributed as dist

from kinema.distributed.engine import Precision
from kinema.distributed.loss_scale import LossScale
from tests.distributed.test_engine import LANES, build, lane_loss, mine
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def run(engine, lanes, steps: int) -> tuple[int, list[float]]:
    """Repeated steps, and the norm of each that went through."""
    repeated, norms = 0, []
    while len(norms) < steps:
        for lane in lanes:
            engine.backward(lane_loss(engine, len(norms), lane))
            engine.step(1e-2)
        if engine.moved:
            norms.append(engine.grad_norm())
        else:
            assert engine.loss_scale.lowered
            repeated += 1
    return repeated, norms


def compare() -> dict[int, tuple[int, float, float, float, torch.dtype]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for stage in (0, 1, 2, 3):
        exact = build(stage, LANES // world)
        _, expected = run(exact, mine(rank, world), 3)
        engine = build(stage, LANES // world, precision=Precision.float16)
        engine.loss_scale.value = 2.0**24  # beyond what float16 can hold
        repeated, norms = run(engine, mine(rank, world), 3)
        weights = dict(exact.gather())
        off = max(float((value - weights[key]).abs().max()) for key, value in engine.gather())
        off_norm = max(abs(a / b - 1) for a, b in zip(norms, expected, strict=True))
        found[stage] = (repeated, engine.loss_scale.value, off_norm, off, engine.shards()[0].dtype)
    return found


def test_float16_finds_its_loss_scale_and_learns_as_float32_does():
    for found in run_ranks(compare, 2):
        for repeated, scale, off_norm, off, dtype in found.values():
            assert repeated == 24 - math.log2(scale) > 0
            assert off_norm < 5e-3
            assert 0 < off < 5e-3  # moves are 3e-2; what is equal was not computed in float16
            assert dtype == torch.float32


def test_the_scale_halves_on_overflow_doubles_after_calm_and_continues():
    scale = LossScale(8.0, patience=3, largest=16.0)
    seen = []
    for moved in [False, True, True, True, True, True, True, False, False, False, False, False, False]:
        scale.update(moved)
        seen.append((scale.value, scale.lowered))
    assert [value for value, _ in seen] == [4, 4, 4, 8, 8, 8, 16, 8, 4, 2, 1, 1, 1]
    assert [lowered for _, lowered in seen][-3:] == [True, False, False]  # at 1 the gradient itself is to blame
    other = LossScale()
    other.load(scale.state())
    assert (other.value, other.state()) == (1.0, scale.state())
