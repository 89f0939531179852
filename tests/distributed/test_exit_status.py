"""How ranks leave: each with its own status, whatever libraries do while a process is taken down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.distributed.process import free_port
from kinema.exits import Exit

pytestmark = pytest.mark.distributed

SCRIPT = """
import atexit, ctypes, os, signal, sys, time
from datetime import timedelta

import torch.distributed as dist

from kinema.console import fail, leave_with_status
from kinema.exits import Exit

library = ctypes.CDLL(None)  # one that aborts when it is taken down, as one does whose thread nobody joined
library.__cxa_atexit(ctypes.cast(library.abort, ctypes.c_void_p), None, None)
atexit.register(lambda: print("python's own", end=""))  # stays in the buffer unless it is flushed


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        dist.barrier()
        match sys.argv[1]:
            case "refused":
                fail("model.width=3 is odd", Exit.configuration)
            case "broken":
                raise RuntimeError("a bug")
            case "stopped":
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    finally:
        dist.destroy_process_group()


leave_with_status(main)
"""


def leave(folder: Path, *ways: str) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of ranks that end in these ways."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    shared = {"WORLD_SIZE": str(len(ways)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), way],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, way in enumerate(ways)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_a_rank_that_finishes_is_not_aborted_and_one_that_is_refused_says_so(tmp_path):
    finished, refused = leave(tmp_path, "finished", "refused")
    assert finished[:2] == (0, "python's own")
    assert refused[:2] == (Exit.configuration, "python's own")
    assert refused[2].endswith("error (rank 1): model.width=3 is odd\n")


def test_a_bug_keeps_its_traceback_and_a_signal_its_status(tmp_path):
    broken, stopped = leave(tmp_path, "broken", "stopped")
    assert broken[:2] == (1, "python's own")
    assert "Traceback (most recent call last)" in broken[2]
    assert broken[2].endswith("RuntimeError: a bug\n")
    assert stopped[:2] == (75, "python's own")


def test_a_killed_rank_looks_killed(tmp_path):
    assert [status for status, _, _ in leave(tmp_path, "finished", "killed")] == [0, -9]


def test_one_rank_alone_ends_as_any_script(tmp_path):
    """So this library aborts it: the other tests would notice."""
    assert leave(tmp_path, "finished")[0][:2] == (-6, "python's own")
