"""Averages with a memory in proportion to the run: their profile is the paper's, and others are made from them."""

import json

import numpy as np
import pytest
import torch

from kinema.training.checkpoints.store import CheckpointStore, json_writer, tensor_writer
from kinema.training.ema import EMAConfig
from kinema.training.profiles import Profile, distance, exponent_of, factors_of, length_of, overlap, power_decay
from kinema.training.verbs.average import synthesize

STEPS = 2000


def power_shares(exponent, steps):
    """The share of each step's weights in the average after the last one, in closed form."""
    edges = (np.arange(steps + 1) / steps) ** (exponent + 1)
    return np.diff(edges)


def tracked(exponent, steps=STEPS):
    """The same by the recursion that training runs, after each step."""
    shares, trail = np.zeros(steps), []
    for step in range(1, steps + 1):
        decay = power_decay(exponent, step)
        shares *= decay
        shares[step - 1] += 1 - decay
        trail.append(shares.copy())
    return trail


def test_exponents_are_those_of_the_paper():
    assert [round(exponent_of(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]
    for length in (0.01, 0.075, 0.25):
        assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)


def test_the_recursion_has_the_power_profile_and_its_length():
    exponent = exponent_of(0.1)
    shares = tracked(exponent)[-1]
    np.testing.assert_allclose(shares, power_shares(exponent, STEPS), rtol=1e-9, atol=1e-15)
    times = np.arange(1, STEPS + 1) - 0.5
    mean = (shares * times).sum()
    assert np.sqrt((shares * (times - mean) ** 2).sum()) / STEPS == pytest.approx(0.1, rel=1e-3)


def test_overlap_is_the_integral_of_the_product():
    one, other = Profile(6.94, 1200), Profile(16.97, 2000)
    dense = np.zeros(2000 * 50)
    first, second = dense.copy(), power_shares(other.exponent, len(dense))
    first[: 1200 * 50] = power_shares(one.exponent, 1200 * 50)
    assert overlap(one, other) == overlap(other, one) == pytest.approx((first * second).sum() * 50, rel=1e-3)


def test_a_length_that_was_not_kept_is_made_from_those_that_were():
    kept = {length: tracked(exponent_of(length)) for length in (0.05, 0.1)}
    stored = [(length, step) for step in range(250, STEPS + 1, 250) for length in kept]
    profiles = [Profile(exponent_of(length), step) for length, step in stored]
    for length in (0.05, 0.06, 0.08, 0.15):
        wanted = Profile(exponent_of(length), STEPS)
        factors = factors_of(profiles, wanted)
        made = sum(factor * kept[a][step - 1] for factor, (a, step) in zip(factors, stored, strict=True))
        true = tracked(wanted.exponent)[-1]
        off = np.linalg.norm(made - true) / np.linalg.norm(true)
        assert off < 0.04
        assert off == pytest.approx(distance(profiles, factors, wanted), abs=2e-3)
        nearest = min(np.linalg.norm(kept[a][-1] - true) / np.linalg.norm(true) for a in kept)
        assert length == 0.05 or off < nearest / 10


def test_checkpoints_give_an_average_that_training_did_not_keep(tmp_path):
    """Weights on a random walk; each checkpoint stores what training would have kept."""
    walk = torch.from_numpy(np.random.default_rng(0).normal(size=(STEPS, 6)).cumsum(0))
    for step in range(250, STEPS + 1, 250):
        writers = {"manifest.json": json_writer({"ema": {"power": [0.05, 0.1]}, "fingerprints": {}})}
        for length in (0.05, 0.1):
            shares = torch.from_numpy(power_shares(exponent_of(length), step))
            writers[f"ema_{length:.3f}.safetensors"] = tensor_writer({"w": shares @ walk[:step]})
        CheckpointStore(tmp_path / "run", keep=99).publish(step, writers)
    store = CheckpointStore(tmp_path / "run")
    folder, off = synthesize([store.open(step) for step in store.steps()], tmp_path / "made", 0.08)
    true = torch.from_numpy(power_shares(exponent_of(0.08), STEPS)) @ walk
    found = CheckpointStore(tmp_path / "made").newest().tensors("ema")["w"]
    nearest = torch.from_numpy(power_shares(exponent_of(0.1), STEPS)) @ walk
    assert (found - true).norm() < 0.05 * (nearest - true).norm()
    assert off < 0.02
    said = json.loads((folder / "manifest.json").read_text())["average"]
    assert (said["length"], len(said["factors"])) == (0.08, 16)


@pytest.mark.parametrize("power", [[0.0], [0.3], [0.1, 0.1]])
def test_lengths_that_cannot_be_are_refused(power):
    with pytest.raises(ValueError, match=r"ema\.power"):
        EMAConfig(power=power)


def test_checkpoints_without_averages_say_what_to_train_with(tmp_path):
    writers = {"manifest.json": json_writer({"ema": {"decay": 0.9}}), "ema.safetensors": tensor_writer({})}
    checkpoint = CheckpointStore(tmp_path / "run").publish(1, writers)
    with pytest.raises(ValueError, match=r"ema\.power=\[0\.05,0\.1\]"):
        synthesize([checkpoint], tmp_path / "made", 0.1)
