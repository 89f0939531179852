"""Jumps of the loss are found; noise, heavy tails and falling curves are not taken for them."""

import math
import random

import pytest

from kinema.training.alive.guard import Guard, GuardConfig, NonFiniteLoss
from kinema.training.alive.spikes import SpikeAction, SpikeConfig, deviations_above, is_spike


def curve(kind, chance, steps=10_000):
    noise = {
        "normal": lambda: chance.gauss(0, 0.1),
        "lognormal": lambda: 0.3 * chance.lognormvariate(0, 0.5),
        "uneven clips": lambda: 0.2 * sum(chance.expovariate(1) for _ in range(4)) / 4,
    }[kind]
    return [2 * math.exp(-step / 1000) + 0.5 + noise() for step in range(steps)]


@pytest.mark.parametrize("kind", ["normal", "lognormal", "uneven clips"])
def test_clean_curves_raise_no_alarm_and_a_jump_does(kind):
    losses, config = curve(kind, random.Random(0)), SpikeConfig()
    assert [step for step, loss in enumerate(losses) if is_spike(config, loss, losses[:step][-100:])] == []
    for step in (100, 1000, 9000):
        assert is_spike(config, 6 * losses[step], losses[:step]) is not None


def test_the_measure_is_that_of_its_formula_and_outliers_do_not_move_it():
    before = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, deviations 2 1 0 1 97: their median 1
    assert deviations_above(3 + 5 * 1.4826, before) == pytest.approx(5)


def test_nothing_is_judged_before_half_a_window():
    assert is_spike(SpikeConfig(window=20), 1e9, [1.0] * 9) is None
    assert is_spike(SpikeConfig(window=20), 1e9, [1.0] * 10) is not None


def test_each_action_does_what_its_name_says():
    before, told = [1.0, 1.1] * 50, {}
    for action in SpikeAction:
        guard = Guard(GuardConfig(spike=SpikeConfig(action=action)))
        try:
            told[action] = guard.trouble(7, 50.0, before, withheld=False), len(guard.warnings)
        except NonFiniteLoss as error:
            told[action] = str(error)
    assert told[SpikeAction.ignore] == (None, 0)
    assert told[SpikeAction.warn] == (None, 1)
    assert "of step 8 lies" in told[SpikeAction.rollback][0]
    assert "guard.spike.action=stop" in told[SpikeAction.stop]
