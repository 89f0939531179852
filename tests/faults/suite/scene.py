"""One tiny data set, one tiny VAE, a run that nothing disturbs, and what a disturbed one must still be."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import torch

from kinema.training.checkpoints.store import Checkpoint, CheckpointStore
from tests.end_to_end.commands import STATE, checkpoint, dit_command, losses, same_state, vae_command
from tests.faults.suite.harm import Harm
from tests.warm import Job, Warm

STEPS = 8
EVERY = 2
MOST_LOST = 2 * EVERY
"""Steps since the last published checkpoint: training goes on while the next is written, until one more is due."""
KILLED = "(the shell says) Killed"


@dataclass(frozen=True)
class Shown:
    """One row of the table: what a user sees of a fault, and what it cost."""

    sees: str
    status: str
    recovery_seconds: float | None = None
    """From the start of the same command to its first new step, without the time of imports."""
    steps_lost: int | None = None
    """Steps done before the fault that had to be done again."""


@dataclass
class Scene:
    """Where faults happen. Runs are named after them."""

    warm: Warm
    folder: Path
    undisturbed: dict[str, str] = field(default_factory=dict)
    starts: Iterator[int] = field(default_factory=count)

    @classmethod
    def build(cls, warm: Warm, folder: Path) -> "Scene":
        """Make the data set, and train its VAE for two steps."""
        scene = cls(warm, folder)
        clips = ["--clips", "24", "--heldout", "4", "--sizes", "64x64"]
        scene.finish(warm.start(["data_prep/toy.py", "--out", f"{folder}/toy", *clips], folder / "toy.log"))
        scene.finish(warm.start(vae_command(folder, "vae", 2), folder / "vae.log"))
        return scene

    def command(self, name: str, *extra: str, script: str = "train.py") -> list[str]:
        """A run of the DiT that saves every second step; `script` may be one that runs `train.py` its own way."""
        usual = [f"checkpoint.every_steps={EVERY}", "validation.every_steps=0", "logging.wandb=disabled"]
        given = {override.split("=")[0] for override in extra}
        usual = [one for one in usual if one.split("=")[0] not in given]
        return [script, *dit_command(self.folder, name, STEPS, *usual, *extra)[1:]]

    def start(
        self,
        name: str,
        *extra: str,
        ranks: int = 1,
        harm: Harm | None = None,
        script: str = "train.py",
        **variables: str,
    ) -> Job:
        """Start the run, or go on with it; it may come to harm."""
        log = self.folder / f"{name}-{next(self.starts)}.log"
        if harm:
            variables["KINEMA_TEST_HARM"] = json.dumps(asdict(harm))
        return self.warm.start(self.command(name, *extra, script=script), log, ranks, **variables)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def store(self, name: str) -> CheckpointStore:
        """Its checkpoints."""
        return CheckpointStore(self.run(name))

    def last_step(self, name: str) -> int:
        """The last step that its metrics tell of."""
        metrics = self.run(name) / "metrics.jsonl"
        return max(losses(self.folder, name), default=0) if metrics.exists() else 0

    def finish(self, job: Job, status: int = 0) -> Job:
        """Wait for a job that must end with this status on every rank."""
        assert set(job.wait()) == {status}, (job.statuses, job.output[-4000:])
        return job

    def whole(self, *extra: str, ranks: int = 1) -> str:
        """The name of the undisturbed run of this kind."""
        key = f"{ranks} {' '.join(extra)}"
        if key not in self.undisturbed:
            self.undisturbed[key] = name = f"whole-{len(self.undisturbed)}"
            self.finish(self.start(name, *extra, ranks=ranks))
        return self.undisturbed[key]

    def copy_of_whole(self, name: str, steps: int | None = None) -> Path:
        """A run folder as the undisturbed run leaves it, to be damaged; with a step, as it was after that one."""
        source = self.whole()
        shutil.copytree(self.run(source), self.run(name), ignore=shutil.ignore_patterns(".lock"))
        config = self.run(name) / "config.yaml"
        config.write_text(config.read_text().replace(f"name: {source}\n", f"name: {name}\n"))
        for step in self.store(name).steps():
            if steps is not None and step > steps:
                shutil.rmtree(checkpoint(self.folder, name, step))
        return self.run(name)

    def continues(self, name: str, *extra: str, ranks: int = 1, exact: bool = True) -> tuple[float, int]:
        """The same command again ends as if nothing had happened: recovery seconds and steps lost."""
        reached = self.last_step(name)
        job = self.start(name, *extra, ranks=ranks)
        first = self._first_new_step(job, name)
        self.finish(job)
        resumed = re.findall(r"resume: from step-0*(\d+)", job.output)
        self.check_as_undisturbed(name, *extra, ranks=ranks, exact=exact)
        return first - job.started, reached - (int(resumed[-1]) if resumed else 0)

    def check_as_undisturbed(self, name: str, *extra: str, ranks: int = 1, exact: bool = True) -> None:
        """Losses, weights, averages and moments are those of the run that nothing disturbed; nothing is left over."""
        ours, theirs = losses(self.folder, name), losses(self.folder, self.whole(*extra, ranks=ranks))
        assert ours.keys() == theirs.keys()
        worst = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
        assert worst == 0 if exact else worst < 1e-4, worst
        if exact:
            assert same_state(self.newest(name), self.newest(self.whole(*extra, ranks=ranks)))
        assert not list((self.run(name) / "checkpoints").glob(".writing*"))

    def newest(self, name: str) -> Checkpoint:
        """The newest whole checkpoint, which must be that of the last step."""
        found = self.store(name).newest()
        assert found is not None
        assert found.step == STEPS
        return found

    def all_finite(self, name: str) -> bool:
        """Whether every number in every checkpoint of a run is finite."""
        store = self.store(name)
        states = [store.open(step).tensors(kind) for step in store.steps() for kind in STATE]
        return all(bool(torch.isfinite(value.float()).all()) for state in states for value in state.values())

    def wait_for_step(self, job: Job, name: str, step: int) -> None:
        """Until the run's metrics tell of a step."""
        job.wait_for(lambda: self.last_step(name) >= step)

    def _first_new_step(self, job: Job, name: str) -> float:
        job.wait_for(lambda: "resume: from" in job.output or self.last_step(name) == 1)
        resumed = re.findall(r"resume: from step-0*(\d+)", job.output)
        first = int(resumed[-1]) + 1 if resumed else 1
        job.wait_for(lambda: self.last_step(name) >= first)
        return time.monotonic()


def said(job: Job, pattern: str) -> str:
    """The line of a job's output that a user would read; it must be there."""
    for line in job.output.splitlines():
        if re.search(pattern, line):
            return tidy(line)
    raise AssertionError(f"no line says {pattern!r}:\n{job.output[-4000:]}")


def tidy(line: str) -> str:
    """A line without what differs from run to run, and not too long for a table."""
    line = re.sub(r"^.*?\| \d+/\d+ \[[^]]*\]", "", line.rsplit("\r", maxsplit=1)[-1])  # another rank's progress bar
    line = re.sub(r"(/[\w.\-]+)+/(?=[\w.\-]+)", "", line).strip()
    return line if len(line) <= 180 else line[:177] + "..."


Damage = Callable[[Path], object]
