"""Numbers that are not sound: the run leaves out what is to blame, and trains on as if it had never been shown."""

import json

import pytest
import safetensors.torch
import torch

from kinema.training.journal import read_journal
from kinema.training.skips import SKIPPED
from tests.end_to_end.commands import VAE as VAE_OPTIONS
from tests.end_to_end.commands import checkpoint, common, dit_command, losses, records
from tests.warm import warm_process

pytestmark = pytest.mark.slow
STEPS, EVERY = 8, 3
OPTIONS = [f"checkpoint.every_steps={EVERY}", "validation.every_steps=0", "logging.keys=true",
           "task.samples.every_steps=0", "data.num_workers=0"]  # fmt: skip
UNSOUND = "tests/faults/unsound_train.py"


@pytest.fixture(scope="module")
def warm():
    with warm_process() as warm:
        yield warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("unsound")
    toy = ["data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "24", "--heldout", "4", "--sizes", "64x64"]
    vae = ["train.py", *common(folder, "vae", 1), *VAE_OPTIONS, "validation.every_steps=0", "data.num_workers=0"]
    for name, command in (("toy", toy), ("vae", vae), ("clean", dit_command(folder, "clean", STEPS, *OPTIONS))):
        job = warm.start(command, folder / f"{name}.log")
        assert job.wait() == [0], job.output[-3000:]
    return folder


def train(warm, folder, name, spoil=None, ranks=1, options=(), expect=0, steps=STEPS):
    """The run as it ended, and what it said."""
    script, environment = ("train.py", {}) if spoil is None else (UNSOUND, {"UNSOUND": json.dumps(spoil)})
    command = [script, *dit_command(folder, name, steps, *OPTIONS, *options)[1:]]
    job = warm.start(command, folder / f"{name}.log", ranks, **environment)
    assert set(job.wait()) == {expect}, job.output[-3000:]
    return job.output


def shown_in(folder, step):
    """Keys of a step of the clean run."""
    return [key for (at, _), line in read_journal(folder / "runs/clean").items() if at == step for key in line["keys"]]


def end_of(folder, name, step=STEPS):
    return {
        (part, key): value
        for part in ("model", "ema", "optimizer")
        for key, value in safetensors.torch.load_file(checkpoint(folder, name, step) / f"{part}.safetensors").items()
    }


def same_end(folder, one, other):
    a, b = end_of(folder, one), end_of(folder, other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def skipped(folder, name):
    return [json.loads(line) for line in (folder / "runs" / name / SKIPPED).read_text().splitlines()]


def told_to_skip(warm, folder, name, lines, **more):
    """A run that knew of these from its start, and met nothing unsound."""
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / SKIPPED).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return train(warm, folder, name, **more)


def test_a_clip_with_a_loss_that_is_no_number_is_left_out_as_if_it_had_never_been_shown(warm, folder):
    key = shown_in(folder, 5)[1]
    output = train(warm, folder, "clip", {"kind": "loss", "keys": [key]})
    found = skipped(folder, "clip")
    assert [(line["key"], line["reason"]) for line in found] == [(key, "its loss was nan")]
    assert "the loss (nan) of step 5 is not finite: nothing has moved" in output
    assert key in output
    told_to_skip(warm, folder, "clip_known", found)
    assert same_end(folder, "clip", "clip_known")
    before = {step: loss for step, loss in losses(folder, "clean").items() if step < 5}
    assert {step: losses(folder, "clip")[step] for step in before} == before
    assert losses(folder, "clip")[5] != losses(folder, "clean")[5]
    ledger = json.loads((folder / "runs/clip/ledger.json").read_text())
    assert ledger["withdrawn"] == {"its loss was nan": 2}, "it comes again in the second epoch"


def test_two_ranks_agree_under_zero_and_a_resumed_run_leaves_out_the_same(warm, folder):
    """One rank meets the clip; stopped after it and continued on one rank without ZeRO."""
    spoil = {"kind": "loss", "keys": [shown_in(folder, 5)[1]]}
    train(warm, folder, "ranks", spoil, ranks=2, options=["parallel.zero_stage=2", "allow_config_change=true"], steps=6)
    train(warm, folder, "ranks", options=["allow_config_change=true"])
    assert losses(folder, "ranks") == pytest.approx(losses(folder, "clip"), rel=1e-4)
    assert skipped(folder, "ranks") == skipped(folder, "clip")


@pytest.mark.soak
def test_a_gradient_nobody_can_be_blamed_for_costs_its_step(warm, folder):
    output = train(warm, folder, "gradient", {"kind": "gradient", "steps": [4]})
    assert skipped(folder, "gradient") == [{"step": 4, "reason": "the gradient of step 5 is not finite"}]
    assert "the whole step" in output
    assert 5 not in records(folder, "gradient", "train")
    told_to_skip(warm, folder, "gradient_known", skipped(folder, "gradient"))
    assert same_end(folder, "gradient", "gradient_known")


def test_the_same_step_twice_goes_back_to_the_checkpoint_and_three_times_is_the_end(warm, folder):
    first, second = shown_in(folder, 5)[:2]
    output = train(warm, folder, "twice", {"kind": "loss", "steps": [4], "times": 2, "one": True})
    assert "back at the newest checkpoint" in output
    lines = skipped(folder, "twice")
    assert [line["key"] for line in lines] == [first, second]
    told_to_skip(warm, folder, "twice_known", lines)
    assert same_end(folder, "twice", "twice_known")

    output = train(warm, folder, "hopeless", {"kind": "gradient", "steps": list(range(4, 8))}, expect=70)
    assert "guard.max_incidents=3" in output
    assert sorted(path.name for path in (folder / "runs/hopeless/checkpoints").glob("step-*")) == ["step-00000003"]
    assert all(value.isfinite().all() for value in end_of(folder, "hopeless", 3).values())


@pytest.mark.soak
def test_a_spike_goes_back_to_the_checkpoint_and_on_without_its_step(warm, folder):
    options = ["guard.spike.action=rollback", "guard.spike.window=10", "guard.spike.deviations=20"]
    output = train(warm, folder, "spike", {"kind": "spike", "steps": [7]}, options=options)
    assert "of step 8 lies" in output
    assert "back at the newest checkpoint" in output
    assert [line["step"] for line in skipped(folder, "spike")] == [7]
    told_to_skip(warm, folder, "spike_known", skipped(folder, "spike"), options=options)
    assert same_end(folder, "spike", "spike_known")
