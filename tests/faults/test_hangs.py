"""One of two ranks stops moving: both are ended soon, and the log names the rank, its phase and where it stands."""

import signal
import time

import pytest

from tests.end_to_end.commands import records

pytestmark = pytest.mark.slow
LIMIT = 5.0
OPTIONS = ["checkpoint.every_steps=2", "validation.every_steps=0", "task.samples.every_steps=0", "data.num_workers=1",
           f"watchdog.floor_seconds={LIMIT}", "watchdog.factor=1", "watchdog.first_seconds=60"]  # fmt: skip


def train(scene, how, *options, steps=1000):
    script = "tests/faults/hanging_train.py"
    return scene.start(how, *OPTIONS, *options, f"steps={steps}", ranks=2, script=script, HANG=how)


def reached(scene, name, step):
    metrics = scene.run(name) / "metrics.jsonl"
    return metrics.exists() and f'"step": {step}, "event": "checkpoint"' in metrics.read_text()


def ended(job, scene, how, limit=LIMIT):
    """What the log says, once both ranks have ended in time."""
    job.wait_for(lambda: reached(scene, how, 2))
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
def test_a_rank_that_does_not_move_is_named_with_its_phase_and_stack(scene, how, guilty, phase, stack):
    statuses, output = ended(train(scene, how), scene, how)
    assert statuses == [71, guilty], output[-3000:]
    assert f"rank 1, in phase {phase}, is not moving, and the others wait for it" in output
    assert output.count("of step 4 for") == 2
    assert stack in output.partition("stacks of rank 1")[2]
    assert "stacks of rank 0" in output


def test_a_stopped_rank_is_named_and_killed_and_the_run_continues(scene):
    job = train(scene, "stopped")
    job.wait_for(lambda: reached(scene, "stopped", 2))
    job.send(signal.SIGSTOP, rank=1)
    statuses, output = ended(job, scene, "stopped")
    assert statuses == [71, -9], output[-3000:]
    assert "rank 1" in output.partition("error: a hang on")[2].partition("is not moving")[0]
    assert "stacks of rank 1: none, it is stopped" in output
    before = max(records(scene.folder, "stopped", "train"))
    job = train(scene, "stopped", "allow_config_change=true", steps=before + 2)
    assert job.wait() == [0, 0], job.output[-3000:]
