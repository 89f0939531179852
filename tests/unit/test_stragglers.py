"""Slow ranks are named soon, with what they are slow in; steps that are merely uneven name nobody."""

import random

import pytest

from kinema.training.alive.stragglers import PHASES, Stragglers


def heard(watch, times, costs):
    """What is told of a step of these seconds by rank and phase."""
    return watch.hear([value for row, cost in zip(times, costs, strict=True) for value in (*row, cost)])


def clean(chance, ranks, noise):
    """Seconds of ranks that do the same, as uneven as on shared machines, and the costs of their packs."""
    costs = [chance.uniform(1, 3) for _ in range(ranks)]
    return [
        [0.01 * chance.lognormvariate(0, 1), *(cost * chance.lognormvariate(0, noise) for _ in range(2))]
        for cost in costs
    ], costs


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_thousand_clean_steps_name_nobody(ranks):
    chance, watch = random.Random(0), Stragglers(2.0, 0, ["host"] * ranks)
    for _ in range(1000):
        assert heard(watch, *clean(chance, ranks, 0.3)) == []


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_three_times_slower_is_named_once_within_twenty_steps(ranks, phase):
    chance, watch = random.Random(1), Stragglers(2.0, 0, [f"host{rank}" for rank in range(ranks)])
    for _ in range(50):
        assert heard(watch, *clean(chance, ranks, 0.1)) == []
    told = []
    for step in range(100):
        times, costs = clean(chance, ranks, 0.1)
        if phase == "data":
            times[1][0] = 3.0
        times[1][PHASES.index(phase)] *= 3
        told += [(step, line) for line in heard(watch, times, costs)]
    assert len(told) == 1
    step, line = told[0]
    assert step < 20
    assert line.startswith(f"rank 1 on host1: {phase} takes")
