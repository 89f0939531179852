"""One of two ranks stops moving: both are ended soon, and the log names the rank, its phase and where it stands."""

import signal
import time

import pytest

from tests.end_to_end.commands import VAE, common, dit_command, records
from tests.warm import warm_process

pytestmark = pytest.mark.slow
LIMIT = 5.0
OPTIONS = ["checkpoint.every_steps=2", "validation.every_steps=0", "task.samples.every_steps=0", "data.num_workers=1",
           f"watchdog.floor_seconds={LIMIT}", "watchdog.factor=1", "watchdog.first_seconds=60"]  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    with warm_process() as warm:
        yield warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("hangs")
    toy = ["data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "24", "--heldout", "0", "--sizes", "64x64"]
    vae = ["train.py", *common(folder, "vae", 1), *VAE, "validation.every_steps=0", "data.num_workers=0"]
    for name, command in (("toy", toy), ("vae", vae)):
        job = warm.start(command, folder / f"{name}.log")
        assert job.wait() == [0], job.output[-3000:]
    return folder


def train(warm, folder, how, *options, steps=1000):
    command = ["tests/faults/hanging_train.py", *dit_command(folder, how, steps, *OPTIONS, *options)[1:]]
    return warm.start(command, folder / f"{how}.log", 2, HANG=how)


def reached(folder, name, step):
    metrics = folder / "runs" / name / "metrics.jsonl"
    return metrics.exists() and f'"step": {step}, "event": "checkpoint"' in metrics.read_text()


def ended(job, folder, how, limit=LIMIT):
    """What the log says, once both ranks have ended in time."""
    job.wait_for(lambda: reached(folder, how, 2))
    since = time.monotonic()
    statuses = job.wait(timeout=60)
    assert time.monotonic() - since < limit + 15, "a loaded machine needs some of this to reach the step"
    return statuses, job.output


@pytest.mark.parametrize(
    ("how", "guilty", "phase", "stack"),
    [
        ("lock", -9, "forward", 'hanging_train.py", line 23 in micro_step'),
        ("absent", 71, "between", "in train_step"),
        pytest.param("worker", 71, "data", "in fit", marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_does_not_move_is_named_with_its_phase_and_stack(warm, folder, how, guilty, phase, stack):
    statuses, output = ended(train(warm, folder, how), folder, how)
    assert statuses == [71, guilty], output[-3000:]
    assert f"rank 1, in phase {phase}, is not moving, and the others wait for it" in output
    assert output.count("of step 4 for") == 2
    assert stack in output.partition("stacks of rank 1")[2]
    assert "stacks of rank 0" in output


def test_a_stopped_rank_is_named_and_killed_and_the_run_continues(warm, folder):
    job = train(warm, folder, "stopped")
    job.wait_for(lambda: reached(folder, "stopped", 2))
    job.send(signal.SIGSTOP, rank=1)
    statuses, output = ended(job, folder, "stopped")
    assert statuses == [71, -9], output[-3000:]
    assert "rank 1" in output.partition("error: a hang on")[2].partition("is not moving")[0]
    assert "stacks of rank 1: none, it is stopped" in output
    before = max(records(folder, "stopped", "train"))
    job = train(warm, folder, "stopped", "allow_config_change=true", steps=before + 2)
    assert job.wait() == [0, 0], job.output[-3000:]
