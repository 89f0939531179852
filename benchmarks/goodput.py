"""A run of two ranks that comes to harm again and again: which share of the time went into steps that counted.

python -m benchmarks.goodput [--minutes 30] [--every 120] [--seed 0]

A launcher starts the ranks again where it can, and the same command is given again where it cannot, as a scheduler
does. An ideal run would spend all its time on steps, each as long as the median step here.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.commands import ROOT, checkpoint, dit_command, environment
from tests.end_to_end.killing import command_of, descendants
from tests.end_to_end.runs import run as run_command
from tests.end_to_end.runs import train_vae

HANG_SECONDS = 10
RUN = "goodput"
SIZE = ["model.width=192", "model.depth=4", "model.num_heads=4", "model.rope_axes=[16,16,16]"]
OPTIONS = ["checkpoint.every_steps=20", "checkpoint.keep=3", "validation.every_steps=0", "task.samples.every_steps=0",
           "logging.wandb=disabled", "data.clips_per_step=8", f"watchdog.floor_seconds={HANG_SECONDS}",
           "watchdog.first_seconds=120", "signals.restarts_without_progress=5"]  # fmt: skip


@dataclass
class Run:
    """The run, under its launcher, started again whenever it ends."""

    folder: Path
    launcher: subprocess.Popen | None = None
    starts: int = 0
    first_step: int = 0
    """Where the clock starts: compilers and caches have been."""
    start_seconds: float = 0.0
    """What one start takes that nothing disturbs, to its first step: processes, imports, building, reading."""
    harmed: list[tuple[float, str]] = field(default_factory=list)

    def keep_up(self) -> None:
        """Start it if it does not run."""
        if self.launcher is not None and self.launcher.poll() is None:
            return
        self.starts += 1
        ranks = ["-m", "kinema.cli", "torchrun", "--nproc-per-node", "2", "--max-restarts", "100",
                 "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
        command = dit_command(self.folder, RUN, 1_000_000, *SIZE, *OPTIONS)
        with (self.folder / "log.txt").open("a") as log:
            self.launcher = subprocess.Popen([sys.executable, *ranks, *command], cwd=ROOT, env=environment(),
                                             stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    def ranks(self) -> list[int]:
        """The processes that train, not those beside them."""
        assert self.launcher is not None
        below = [pid for pid in descendants(self.launcher.pid) if " train.py " in command_of(pid)]
        return [pid for pid in below if _parent(pid) == self.launcher.pid]

    def records(self) -> list[dict]:
        """Its metrics so far."""
        path = self.folder / "runs" / RUN / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_step(self) -> int:
        """Steps that have been done."""
        return max((record["step"] for record in self.records() if record["kind"] == "train"), default=0)


def kill_a_rank(run: Run, chance: random.Random) -> None:
    """One rank dies; its launcher starts all again."""
    os.kill(chance.choice(run.ranks()), signal.SIGKILL)


def stop_a_rank(run: Run, chance: random.Random) -> None:
    """One rank no longer moves; the watchdog ends the job."""
    os.kill(chance.choice(run.ranks()), signal.SIGSTOP)


def preempt(run: Run, chance: random.Random) -> None:
    """The scheduler wants the machines back."""
    assert run.launcher is not None
    run.launcher.send_signal(signal.SIGTERM)


def kill_the_launcher(run: Run, chance: random.Random) -> None:
    """The ranks are left without a launcher, and must not stay."""
    assert run.launcher is not None
    run.launcher.kill()


def cut_the_power(run: Run, chance: random.Random) -> None:
    """Everything is gone at once."""
    assert run.launcher is not None
    for pid in [run.launcher.pid, *descendants(run.launcher.pid)]:
        os.kill(pid, signal.SIGKILL)


def spoil_the_newest(run: Run, chance: random.Random) -> None:
    """A flipped bit in the newest checkpoint, found when a rank dies next."""
    steps = sorted(int(path.name[5:]) for path in (run.folder / "runs" / RUN / "checkpoints").glob("step-*"))
    files = [path for path in checkpoint(run.folder, RUN, steps[-1]).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    path.write_bytes(content)
    kill_a_rank(run, chance)


HARM: dict[str, Callable[[Run, random.Random], None]] = {
    "kill -9 of a rank": kill_a_rank,
    "SIGSTOP of a rank": stop_a_rank,
    "SIGTERM of the job": preempt,
    "kill -9 of the launcher": kill_the_launcher,
    "kill -9 of everything": cut_the_power,
    "a flipped bit in the newest checkpoint, then kill -9 of a rank": spoil_the_newest,
}


def main() -> None:
    """Print what happened, and the goodput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=120.0, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        clips = ["--clips", "64", "--heldout", "4", "--sizes", "64x64"]
        run_command("data_prep/toy.py", "--out", f"{folder}/toy", *clips)
        train_vae(run.folder, "vae", 2)
        disturb(run, options)
        print(summary(run, options.minutes * 60))


def disturb(run: Run, options: argparse.Namespace) -> None:
    """Keep the run up for its time, and do it harm in random ways at random moments."""
    chance = random.Random(options.seed)
    kinds: list[str] = []
    started = time.monotonic()
    run.keep_up()
    while not run.last_step():
        time.sleep(0.2)
    run.first_step, began = run.last_step(), time.monotonic()
    run.start_seconds = began - started
    next_harm = began + chance.uniform(0.5, 1.5) * options.every
    while (now := time.monotonic()) < began + options.minutes * 60:
        if now > next_harm and len(run.ranks()) == 2:
            kinds = kinds or chance.sample(sorted(HARM), len(HARM))
            kind = kinds.pop()
            run.harmed.append((now - began, kind))
            print(f"{now - began:6.0f} s, step {run.last_step()}: {kind}", flush=True)
            HARM[kind](run, chance)
            next_harm += chance.uniform(0.5, 1.5) * options.every
        run.keep_up()
        time.sleep(0.2)
    cut_the_power(run, chance)


def summary(run: Run, seconds: float) -> str:
    """Steps that counted against those of an ideal run, and the time between an end and the first new step."""
    train = [record for record in run.records() if record["kind"] == "train"]
    usual = statistics.median(sum(record["seconds"].values()) for record in train)
    done = (run.last_step() - run.first_step) * usual
    resumed = len(re.findall("resume: from", (run.folder / "log.txt").read_text()))
    left = seconds - resumed * run.start_seconds
    return (
        f"{len(run.harmed)} faults in {seconds / 60:.0f} min, {resumed} resumptions, {run.starts} starts by hand; "
        f"{run.last_step()} steps of {usual:.2f} s: goodput {done / seconds:.1%} of the whole time, "
        f"{done / left:.1%} of it without {run.start_seconds:.1f} s for each start"
    )


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    main()
