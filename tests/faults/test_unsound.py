"""Numbers that are not sound: the run leaves out what is to blame, and trains on as if it had never been shown."""

import json

import pytest

from kinema.training.alive.skips import SKIPPED
from kinema.training.records.journal import read_journal
from tests.end_to_end.commands import losses, records, same_state

pytestmark = pytest.mark.slow
STEPS, EVERY = 8, 3
OPTIONS = [f"checkpoint.every_steps={EVERY}", "validation.every_steps=0", "logging.keys=true",
           "task.samples.every_steps=0", "data.num_workers=0"]  # fmt: skip
UNSOUND = "tests/faults/unsound_train.py"


@pytest.fixture(scope="module", autouse=True)
def clean_run(scene):
    """A run that nothing spoils."""
    train(scene, "clean")


def train(scene, name, spoil=None, ranks=1, options=(), expect=0, steps=STEPS):
    """The run as it ended, and what it said."""
    script, variables = ("train.py", {}) if spoil is None else (UNSOUND, {"UNSOUND": json.dumps(spoil)})
    job = scene.start(name, *OPTIONS, *options, f"steps={steps}", ranks=ranks, script=script, **variables)
    return scene.finish(job, expect).output


def shown_in(scene, step):
    """Keys of a step of the clean run."""
    return [key for (at, _), line in read_journal(scene.run("clean")).items() if at == step for key in line["keys"]]


def same_end(scene, one, other):
    return same_state(*(scene.store(name).open(STEPS) for name in (one, other)))


def skipped(scene, name):
    return [json.loads(line) for line in (scene.run(name) / SKIPPED).read_text().splitlines()]


def told_to_skip(scene, name, lines, **more):
    """A run that knew of these from its start, and met nothing unsound."""
    scene.run(name).mkdir(parents=True)
    (scene.run(name) / SKIPPED).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return train(scene, name, **more)


def test_a_clip_with_a_loss_that_is_no_number_is_left_out_as_if_it_had_never_been_shown(scene):
    key = shown_in(scene, 5)[1]
    output = train(scene, "clip", {"kind": "loss", "keys": [key]})
    found = skipped(scene, "clip")
    assert [(line["key"], line["reason"]) for line in found] == [(key, "its loss was nan")]
    assert "the loss (nan) of step 5 is not finite: nothing has moved" in output
    assert key in output
    told_to_skip(scene, "clip_known", found)
    assert same_end(scene, "clip", "clip_known")
    before = {step: loss for step, loss in losses(scene.folder, "clean").items() if step < 5}
    assert {step: losses(scene.folder, "clip")[step] for step in before} == before
    assert losses(scene.folder, "clip")[5] != losses(scene.folder, "clean")[5]
    ledger = json.loads((scene.run("clip") / "ledger.json").read_text())
    assert ledger["withdrawn"] == {"its loss was nan": 2}, "it comes again in the second epoch"


def test_two_ranks_agree_under_zero_and_a_resumed_run_leaves_out_the_same(scene):
    """One rank meets the clip; stopped after it and continued on one rank without ZeRO."""
    spoil = {"kind": "loss", "keys": [shown_in(scene, 5)[1]]}
    train(scene, "ranks", spoil, ranks=2, options=["parallel.zero_stage=2", "allow_config_change=true"], steps=6)
    train(scene, "ranks", options=["allow_config_change=true"])
    assert losses(scene.folder, "ranks") == pytest.approx(losses(scene.folder, "clip"), rel=1e-4)
    assert skipped(scene, "ranks") == skipped(scene, "clip")


@pytest.mark.soak
def test_a_gradient_nobody_can_be_blamed_for_costs_its_step(scene):
    output = train(scene, "gradient", {"kind": "gradient", "steps": [4]})
    assert skipped(scene, "gradient") == [{"step": 4, "reason": "the gradient of step 5 is not finite"}]
    assert "the whole step" in output
    assert 5 not in records(scene.folder, "gradient", "train")
    told_to_skip(scene, "gradient_known", skipped(scene, "gradient"))
    assert same_end(scene, "gradient", "gradient_known")


def test_the_same_step_twice_goes_back_to_the_checkpoint_and_three_times_is_the_end(scene):
    first, second = shown_in(scene, 5)[:2]
    output = train(scene, "again", {"kind": "loss", "steps": [4], "times": 2, "one": True})
    assert "back at the newest checkpoint" in output
    lines = skipped(scene, "again")
    assert [line["key"] for line in lines] == [first, second]
    told_to_skip(scene, "again_known", lines)
    assert same_end(scene, "again", "again_known")

    output = train(scene, "no-end", {"kind": "gradient", "steps": list(range(4, 8))}, expect=70)
    assert "guard.max_incidents=3" in output
    assert scene.store("no-end").steps() == [3]
    assert scene.all_finite("no-end")


@pytest.mark.soak
def test_a_spike_goes_back_to_the_checkpoint_and_on_without_its_step(scene):
    options = ["guard.spike.action=rollback", "guard.spike.window=10", "guard.spike.deviations=20"]
    output = train(scene, "spike", {"kind": "spike", "steps": [7]}, options=options)
    assert "of step 8 lies" in output
    assert "back at the newest checkpoint" in output
    assert [line["step"] for line in skipped(scene, "spike")] == [7]
    told_to_skip(scene, "spike_known", skipped(scene, "spike"), options=options)
    assert same_end(scene, "spike", "spike_known")
