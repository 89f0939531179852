"""Starting a rank: launcher arguments, and build locks of killed runs."""

import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

from kinema.distributed.process import exclusive, load_cpu_communication_op, strip_launcher_arguments

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, held: Event, seconds: float) -> None:
    with exclusive(folder):
        held.set()
        time.sleep(seconds)


def holder(folder: Path, seconds: float) -> BaseProcess:
    """Another process that holds the lock by now, and for so many seconds."""
    held = FORK.Event()
    other = FORK.Process(target=hold, args=(folder, held, seconds))
    other.start()
    assert held.wait(60)
    return other


def test_the_deepspeed_launchers_argument_is_taken_out_and_remembered(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert strip_launcher_arguments(["train.py", "--local_rank=3", "steps=2"]) == ["train.py", "steps=2"]
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")


def test_a_lock_left_by_a_killed_build_is_removed_instead_of_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    stale = tmp_path / "deepspeed_shm_comm" / "lock"
    stale.parent.mkdir()
    stale.touch()
    built = []
    load_cpu_communication_op(build=lambda: built.append(stale.exists()))
    assert built == [False]
    assert "stale build lock" in capsys.readouterr().err


def test_a_build_that_is_still_going_on_is_waited_for(tmp_path):
    other = holder(tmp_path, 0.5)
    began = time.monotonic()
    with exclusive(tmp_path):
        waited = time.monotonic() - began
    other.join()
    assert waited > 0.2


def test_a_killed_owner_gives_its_lock_back(tmp_path):
    other = holder(tmp_path, 60.0)
    other.kill()
    other.join()
    began = time.monotonic()
    with exclusive(tmp_path):
        assert time.monotonic() - began < 30
