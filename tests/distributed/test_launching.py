"""`kinema torchrun` over real torchrun: the status of the run comes through, and nothing starts again in vain."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinema.launching import cause
from tests.end_to_end.commands import ROOT
from tests.end_to_end.killing import children, command_of

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, signal, sys, time
from pathlib import Path

from kinema.console import fail, leave_with_status
from kinema.distributed.parent import end_with_launcher

folder, way, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
end_with_launcher()
with (folder / "starts").open("a") as starts:
    starts.write(os.environ["TORCHELASTIC_RESTART_COUNT"])


def main():
    if way == "refused" and rank == 1:
        fail("model.width=3 is odd", 64)
    if way == "dies once" and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while len((folder / "starts").read_text()) < 2:  # the other has started, too
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if way in ("stopped", "warned") or (way == "refused" and rank == 0):
        awaited = signal.SIGUSR1 if way == "warned" else signal.SIGTERM
        signal.signal(awaited, lambda *_: sys.exit(69 if way == "refused" else 75))
        (folder / f"ready-{rank}").touch()
        time.sleep(60)


leave_with_status(main)
"""


def launch(folder: Path, way: str) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT)
    words = ["--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1", "--rdzv-backend=c10d",
             "--rdzv-endpoint=127.0.0.1:0", str(folder / "script.py"), str(folder), way]  # fmt: skip
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "kinema.cli", "torchrun", *words], cwd=ROOT, stdout=log, stderr=log
        )


def ready(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


def test_the_status_of_the_run_comes_through_and_only_what_may_do_better_starts_again(tmp_path):
    expected = {"refused": (64, "0000"), "dies once": (0, "0011"), "stopped": (75, "00"), "warned": (75, None)}
    folders = {way: tmp_path / way.replace(" ", "-") for way in expected}
    for folder in folders.values():
        folder.mkdir()
    running = {way: launch(folder, way) for way, folder in folders.items()}
    for way, number in {"stopped": signal.SIGTERM, "warned": signal.SIGUSR1}.items():
        ready(folders[way])
        running[way].send_signal(number)
    for way, (status, starts) in expected.items():
        assert running[way].wait(timeout=90) == status, (way, (folders[way] / "log").read_text()[-3000:])
        if starts and way != "refused":
            assert "".join(sorted((folders[way] / "starts").read_text())) == starts


def test_ranks_end_with_their_killed_launcher(tmp_path):
    launcher = launch(tmp_path, "stopped")
    ready(tmp_path)
    ranks = [pid for pid in children(launcher.pid) if "script.py" in command_of(pid)]
    assert len(ranks) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 5
    while any("script.py" in command_of(pid) for pid in ranks):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.02)


def test_one_status_stands_for_all():
    assert cause([69, 71, -9]) == 71
    assert cause([69, 64]) == 64
    assert cause([1, 69]) == 1
    assert cause([-9, -15]) == 137
