"""Ranks that die, hang or are told to stop: at most the steps since the last checkpoint are done again."""

import os
import signal
import time

import pytest

from kinema.training.checkpoints.store import verify
from tests.end_to_end.killing import descendants
from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import KILLED, MOST_LOST, STEPS, Shown, said

pytestmark = pytest.mark.faults

ENGINE = "kinema.distributed.engine:Engine"
DIED = [
    # Two lanes a step: the seventh call on one rank, and the fourth on each of two, lie in step 4.
    ("A1", "kill -9 of the only rank in a backward pass", Harm(f"{ENGINE}.backward", "kill", 7), 1),
    ("A1", "kill -9 of rank 1 of 2 in a backward pass", Harm(f"{ENGINE}.backward", "kill", 4, rank=1), 2),
    ("A1", "kill -9 of rank 0 of 2 in the optimiser's step", Harm(f"{ENGINE}.step", "kill", 4), 2),
    ("A1", "segmentation fault of rank 1 of 2", Harm(f"{ENGINE}.step", "segfault", 5, rank=1), 2),
    ("A12", "an exception in one rank only", Harm(f"{ENGINE}.backward", "bug", 4, rank=1), 2),
    ("A14", "out of memory in one rank only", Harm(f"{ENGINE}.backward", "out of memory", 4, rank=1), 2),
]


@pytest.mark.parametrize(("number", "fault", "harm", "ranks"), DIED, ids=[row[1] for row in DIED])
def test_a_rank_that_dies_costs_the_steps_since_the_last_checkpoint(scene, show, number, fault, harm, ranks):
    name = f"died-{DIED.index((number, fault, harm, ranks))}"
    job = scene.start(name, ranks=ranks, harm=harm)
    statuses = job.wait()
    assert all(statuses)
    sees = {"bug": "RuntimeError: a bug on purpose", "out of memory": "MemoryError: cannot allocate"}
    line = said(job, sees.get(harm.what, "(closed by peer|Connection reset)")) if ranks > 1 else KILLED
    recovery, lost = scene.continues(name, ranks=ranks)
    assert lost <= MOST_LOST
    show(number, fault, Shown(line, str(statuses[harm.rank]), recovery, lost))


def test_a_power_cut_takes_all_processes_at_once(scene, show):
    job = scene.start("power", ranks=2)
    scene.wait_for_step(job, "power", 3)
    job.power_cut()
    job.wait()
    recovery, lost = scene.continues("power", ranks=2)
    assert lost <= MOST_LOST
    show("A3", "power cut: all processes at once", Shown("(nothing)", "-9", recovery, lost))


STOPPED = [("A5", "SIGTERM", "term"), ("A6", "SIGTERM twice", "term twice"), ("A8", "Ctrl-C (SIGINT)", "interrupt")]


@pytest.mark.parametrize(("number", "fault", "deed"), STOPPED, ids=[row[1] for row in STOPPED])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_told_to_stop_saves_and_loses_nothing(scene, show, number, fault, deed, ranks):
    name = f"stopped-{deed.replace(' ', '-')}-{ranks}"
    job = scene.start(name, "checkpoint.every_steps=1000", ranks=ranks, harm=Harm(f"{ENGINE}.backward", deed, 4))
    scene.finish(job, 75)
    recovery, lost = scene.continues(name, "checkpoint.every_steps=1000", ranks=ranks)
    assert lost == 0
    show(number, f"{fault}, {ranks} rank(s)", Shown(said(job, "stopped by SIG"), "75", recovery, lost))


def test_a_grace_period_shorter_than_the_save_costs_no_checkpoint(scene, show):
    name = "graceless"
    slow = Harm("kinema.training.checkpoints.store:crc32", "slow", times=1000)
    job = scene.start(name, harm=slow)
    scene.wait_for_step(job, name, 3)
    job.send(signal.SIGTERM)
    time.sleep(0.3)
    job.power_cut()
    job.wait()
    store = scene.store(name)
    assert all(verify(store.folder / f"step-{step:08d}") is None for step in store.steps())
    recovery, lost = scene.continues(name)
    show("A9", "killed 0.3 s after SIGTERM, in the middle of the save", Shown("(nothing)", "-9", recovery, lost))


def test_data_workers_do_not_outlive_a_killed_rank(scene, show):
    name = "orphans"
    job = scene.start(name, "data.num_workers=2")
    scene.wait_for_step(job, name, 2)
    workers = descendants(job.pids[0])
    assert workers
    job.send(signal.SIGKILL)
    job.wait()
    left, deadline = workers, time.monotonic() + 10
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if os.path.exists(f"/proc/{pid}") and _state(pid) != "Z"]
        time.sleep(0.05)
    assert not left
    recovery, lost = scene.continues(name, "data.num_workers=2")
    show(
        "A17",
        "kill -9 of a rank with data workers: none is left",
        Shown(KILLED, "-9", recovery, lost),
    )


def test_a_run_that_is_started_twice_is_refused_once(scene, show):
    name = "twice"
    job = scene.start(name, harm=Harm(f"{ENGINE}.step", "slow", times=1000))
    scene.wait_for_step(job, name, 1)
    second = scene.start(name)
    assert second.wait() == [64]
    show("B15", "a second job on the same run folder", Shown(said(second, "another job is writing"), "64"))
    scene.finish(job)
    scene.check_as_undisturbed(name)


def test_ranks_and_workers_may_change_between_starts(scene, show):
    name, allow = "changing", "allow_config_change=true"
    job = scene.start(name, allow, ranks=2, harm=Harm(f"{ENGINE}.step", "kill", 6))
    job.wait()
    job = scene.start(name, allow, "data.num_workers=0", harm=Harm(f"{ENGINE}.step", "kill", 5))
    job.wait()
    assert 0 < scene.last_step(name) < STEPS
    recovery, lost = scene.continues(name, allow, "parallel.zero_stage=3", "data.num_workers=2", ranks=2, exact=False)
    show(
        "B17",
        "2 ranks, killed; 1 rank, killed; 2 ranks at ZeRO 3",
        Shown(said(job, "resume: from"), "-9", recovery, lost),
    )


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
