"""Ranks that do not move, or move slowly: named with their phase, and ended so that a launcher can start them again."""

import pytest

from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import MOST_LOST, STEPS, Shown, said

pytestmark = pytest.mark.faults

BACKWARD = "kinema.distributed.engine:Engine.backward"
ENCODE = "kinema.training.dit_task:DiTTask.encode"
WATCHED = ["watchdog.floor_seconds=6", "watchdog.factor=1", "watchdog.first_seconds=60"]
HANGS = [
    ("A10", "rank 1 of 2 is stopped (SIGSTOP)", Harm(BACKWARD, "freeze", 4, rank=1)),
    ("A10", "rank 1 of 2 sleeps while it encodes", Harm(ENCODE, "sleep", 4, rank=1)),
    ("A10", "rank 1 of 2 never lets go of Python's lock", Harm(BACKWARD, "hold the interpreter", 4, rank=1)),
    ("A10", "rank 0 of 2 is stopped (SIGSTOP)", Harm(BACKWARD, "freeze", 4)),
]


@pytest.mark.parametrize(("number", "fault", "harm"), HANGS, ids=[row[1] for row in HANGS])
def test_a_rank_that_hangs_is_named_and_the_job_ends(scene, show, number, fault, harm):
    name = f"hang-{HANGS.index((number, fault, harm))}"
    job = scene.start(name, *WATCHED, ranks=2, harm=harm)
    statuses = job.wait(90)
    assert set(statuses) <= {71, -9}
    assert 71 in statuses
    line = said(job, f"rank {harm.rank}.* is not moving|all ranks are in the same phase")
    assert f"stacks of rank {harm.rank}" in job.output
    recovery, lost = scene.continues(name, *WATCHED, ranks=2)
    assert lost <= MOST_LOST
    show(number, fault, Shown(line, "71", recovery, lost))


def test_a_slow_rank_is_named(scene, show):
    name = "slow"
    slow = Harm(ENCODE, "slow", times=1000, rank=1)
    job = scene.finish(scene.start(name, "steps=24", ranks=2, harm=slow))
    assert scene.last_step(name) > STEPS
    show("A11", "rank 1 of 2 is several times slower", Shown(said(job, "straggler"), "-", None, 0))
