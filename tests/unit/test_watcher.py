"""Ranks of two machines, one of which hangs: the machine that waits for it learns its name from the other."""

import subprocess
import sys

import pytest

from kinema.training.alive.watcher import Place, report

RANK = """
import faulthandler, os, subprocess, sys, time
from pathlib import Path
from kinema.training.alive.heartbeat import Beat, Heartbeat
from kinema.training.alive.watcher import STACKS
rank, folder, shared, phase, entries, allowed = int(sys.argv[1]), *map(Path, sys.argv[2:4]), *sys.argv[4:]
now = time.monotonic()
shown = Heartbeat(folder / f"rank-{rank}")
shown.write(Beat(os.getpid(), now, now + float(allowed), 3, int(entries), phase))
faulthandler.register(STACKS, all_threads=True)
words = [os.getpid(), rank, 4, folder, shared]
subprocess.Popen([sys.executable, "-m", "kinema.training.alive.watcher", *map(str, words)])
while not shown.is_ordered_to_end():
    time.sleep(0.1)
sys.exit(71)
"""


@pytest.fixture
def start(tmp_path):
    """Start a rank on a machine, which is a folder here, in a phase that it may be in for so many seconds."""
    ranks = []

    def started(rank: int, machine: str, phase: str, entries: int, allowed: float) -> subprocess.Popen:
        words = [rank, tmp_path / machine, tmp_path / "shared", phase, entries, allowed]
        command = [sys.executable, "-c", RANK, *map(str, words)]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return ranks[-1]

    yield started
    for process in ranks:
        process.kill()
        process.wait()


def test_a_machine_whose_ranks_wait_names_the_rank_of_another_that_hangs(start, tmp_path):
    elsewhere = [start(2, "second", "sums", 5, 60), start(3, "second", "encode", 2, 60)]
    here = [start(0, "first", "sums", 5, 2), start(1, "first", "sums", 5, 60)]
    told = "".join(process.communicate(timeout=30)[1] for process in here)
    assert "rank 3, in phase encode, is not moving, and the others wait for it" in told
    assert told.count("of step 4 for") == 4
    assert told.count("stacks of rank") == 2
    assert [process.returncode for process in here] == [71, 71]
    assert not (tmp_path / "first").exists()
    assert [process.poll() for process in elsewhere] == [None, None], "their own time is not over"


def test_machines_that_do_not_answer_are_named():
    waiting = {rank: Place("here", 1, 3, 5, "sums", 9.0, stopped=False) for rank in (0, 1)}
    told = report(waiting, 4)
    assert "other machines do not answer: look there, and at the network" in told
    assert "rank 2, 3: on machines that did not say where they are" in told
    assert "all ranks are in the same phase" in report(waiting, 2)
