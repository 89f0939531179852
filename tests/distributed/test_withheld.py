"""A loss or gradient that is not finite on one rank moves no weight on any, under every ZeRO stage."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_engine import LANES, build, lane_loss, mine, run_steps, state
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def unsound(kind, engine, loss):
    """The loss of one lane, spoilt."""
    if kind == "a loss that is not a number":
        return loss * math.nan
    if kind == "an infinite loss with a finite gradient":
        return loss + torch.tensor(math.inf)
    return loss + (loss * 0).sqrt()  # finite itself, with the derivative 0 * inf


def spoilt_step(engine, kind, rank, lanes):
    for lane in lanes:
        loss = lane_loss(engine, 2, lane)
        engine.backward(unsound(kind, engine, loss) if rank == 1 and lane == lanes[0] else loss)
        engine.step(1e-2)
    return engine.moved, engine.grad_norm()


KINDS = ("a loss that is not a number", "an infinite loss with a finite gradient", "a gradient alone")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weigh():
    """For each stage and kind: nothing moves, and the next steps are those of an undisturbed run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    lanes = mine(rank, world)
    found = {}
    for stage in (0, 1, 2, 3):
        undisturbed = build(stage, LANES // world)
        run_steps(undisturbed, lanes, 0, 4)
        expected = state(undisturbed)
        engine = build(stage, LANES // world)
        run_steps(engine, lanes, 0, 2)
        before = state(engine)
        for kind in KINDS:
            moved, norm = spoilt_step(engine, kind, rank, lanes)
            found[stage, kind] = (moved, math.isfinite(norm), same(state(engine), before))
        run_steps(engine, lanes, 2, 4)
        found[stage, "afterwards"] = (engine.moved, same(state(engine), expected))
        found[stage, "back"] = gone_back(engine, before, lanes, expected)
    return found


def gone_back(engine, before, lanes, expected):
    """Whether weights and moments of two steps ago, loaded again, lead to the same state."""
    engine.load({key.removeprefix("weights/"): value for key, value in before.items() if key.startswith("weights/")})
    for name in engine.state_names:
        engine.load_state(name, {key: before[f"{name}/{key}"] for key in engine.names})
    engine.set_optimizer_step(2)
    run_steps(engine, lanes, 2, 4)
    return same(state(engine), expected)


def test_no_stage_moves_by_a_step_that_is_not_finite_on_one_rank():
    for found in run_ranks(weigh, 2):
        for stage in (0, 1, 2, 3):
            assert [found[stage, kind] for kind in KINDS] == [(False, False, True)] * len(KINDS), found
            assert found[stage, "afterwards"] == (True, True), found
            assert found[stage, "back"], found
