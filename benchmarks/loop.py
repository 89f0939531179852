"""`Trainer.fit` with all that a default run has on, beside a bare PyTorch loop of the same maths on the same packs.

python -m benchmarks.loop [--blocks 12] [--folder DIR] [WORDS ...]

Both run in turn in one process, a step of one and a step of the other, and must find the same losses. A pair is ten
steps of each, of which one writes metrics. WORDS are words of train.py, for example model.width=64 for a smaller step:
what one step costs more, in milliseconds, hardly depends on the step.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import sub, truediv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kinema.build import build_dit, start_run
from kinema.config import Config, compose_training, register_schemas
from kinema.data.packs.pack import Pack
from kinema.distributed.process import start_process, stop_process
from kinema.models.dit import make_denoiser
from kinema.sampling.denoiser import Denoiser
from kinema.training.dit_task import DiTTask
from kinema.training.loop import Trainer
from tests.end_to_end.runs import run, train_vae

BLOCK = 10
"""Steps of a pair: as many as a line of the metrics holds."""
WARM_UP = 5
"""Steps that are not counted; the live checks of a start are made in the first two."""
HEADER = "| a step | bare loop, s | Kinema, s | times (quartiles) | more, ms |\n|---|---|---|---|---|"
SAME = 1e-5
"""Largest relative difference of the losses."""
WORDS = [
    "name=loop", "model=wan_tiny", "model.depth=4", "data.clips_per_step=4", "data.lanes=2", "data.num_workers=0",
    "data.shapes=[[9,64,64]]", "validation.every_steps=0", "task.samples.every_steps=0",
    "checkpoint.every_steps=100000", "logging.wandb=disabled",
]  # fmt: skip


class Times(NamedTuple):
    """Seconds by the clock and on a core."""

    wall: float
    cpu: float

    def __sub__(self, other: "Times") -> "Times":
        return Times(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Times:
    """Both clocks."""
    return Times(time.perf_counter(), time.process_time())


class Bare:
    """What a person would write: forward, backward, clipping, AdamW, EMA."""

    def __init__(self, config: Config, task: DiTTask) -> None:
        self.config, self.task = config, task
        self.model = make_denoiser(config.model, task.vae.config.latent_channels, task.text_encoder.width)
        self.model.load_state_dict(task.engine.module.state_dict())
        self.denoiser = Denoiser(self.model, task.geometry.patch_size[0])
        self.optimizer = config.optim.build(self.model)
        self.weights = list(self.model.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        self.step = 0

    def train(self, packs: list[Pack], learning_rate: float) -> float:
        """One step; its loss."""
        total, found = sum(float(pack.weights.sum()) for pack in packs), 0.0
        for pack in packs:
            drawn = self.task.prepare(pack)
            losses = self.task.objective.loss(
                self.denoiser, drawn.latents, drawn.conditions, drawn.timesteps, drawn.noise, drawn.tokens,
                [condition.num_frames for condition in drawn.conditions],
            )  # fmt: skip
            loss = (losses * pack.weights).sum() / total
            loss.backward()
            found += loss.item()
        nn.utils.clip_grad_norm_(self.weights, self.config.optim.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1.0 - self.config.ema.decay_at(self.step))
        return found


@dataclass
class InTurn:
    """The packs of a run, and before each step of the run the same step of the bare loop."""

    trainer: Trainer
    bare: Bare
    source: Callable[[int, int], Iterator[list[Pack]]]
    spent: dict[str, list[Times]] = field(default_factory=lambda: {"bare": [], "kinema": []})
    losses: list[float] = field(default_factory=list)

    def load(self, first_step: int, num_steps: int) -> Iterator[list[Pack]]:
        """As `Trainer.load`."""
        for step, packs in enumerate(self.source(first_step, num_steps), first_step):
            began = now()
            self.losses.append(self.bare.train(packs, self.trainer.learning_rate(step)))
            self.spent["bare"].append(now() - began)
            began = now()
            yield packs
            self.spent["kinema"].append(now() - began)

    def check(self) -> None:
        """Both have computed the same."""
        for step, (bare, ours) in enumerate(zip(self.losses, self.trainer.progress.losses, strict=True), 1):
            if not math.isclose(bare, ours, rel_tol=SAME):
                raise SystemExit(f"step {step}: the bare loop's loss is {bare}, Kinema's {ours}")

    def rows(self) -> list[str]:
        """Lines of the table: by the clock, and by CPU seconds."""
        return [self.row(kind, number) for number, kind in enumerate(("wall", "CPU"))]

    def row(self, kind: str, number: int) -> str:
        """A line of the table."""
        ours, bare = (self.blocks(name, number) for name in ("kinema", "bare"))
        low, middle, high = statistics.quantiles(map(truediv, ours, bare), n=4, method="inclusive")
        more = 1e3 / BLOCK * statistics.median(map(sub, ours, bare))
        seconds = " | ".join(f"{statistics.median(each) / BLOCK:.4f}" for each in (bare, ours))
        return f"| {kind} | {seconds} | **{middle:.3f}** ({low:.3f} to {high:.3f}) | {more:.2f} |"

    def blocks(self, name: str, number: int) -> list[float]:
        """Seconds of each block of steps after those that warm up."""
        seconds = [times[number] for times in self.spent[name][WARM_UP:]]
        whole = len(seconds) // BLOCK * BLOCK
        return [sum(seconds[place : place + BLOCK]) for place in range(0, whole, BLOCK)]


def prepared(folder: Path) -> Path:
    """A folder with toy clips and a VAE for them; what is there already is taken."""
    if not (folder / "toy").exists():
        run("data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "24", "--heldout", "4", "--sizes", "64x64")
    if not (folder / "runs" / "vae").exists():
        train_vae(folder, "vae", 4)
    return folder


def measure(folder: Path, words: list[str], blocks: int) -> InTurn:
    """Train both for so many blocks of steps."""
    steps = WARM_UP + blocks * BLOCK + 1  # the last one saves
    with tempfile.TemporaryDirectory() as runs:
        places = [f"data.path={folder}/toy", f"vae.path={folder}/runs/vae", f"run_root={runs}", f"steps={steps}"]
        config = compose_training([*WORDS, *places, *words])
        process = start_process(config.parallel.timeout_seconds)
        with start_run(config, "", process) as opened:
            trainer = build_dit(config, opened, process, unread_keys=lambda: None)
            assert isinstance(trainer.task, DiTTask)
            both = InTurn(trainer, Bare(config, trainer.task), trainer.load)
            trainer.load = both.load
            trainer.fit()
        both.check()
        stop_process()
    return both


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keeps the clips and the VAE for the next time")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    register_schemas()
    with tempfile.TemporaryDirectory() as made:
        both = measure(prepared(given.folder or Path(made)), given.words, given.blocks)
    print(HEADER, *both.rows(), sep="\n")


if __name__ == "__main__":
    main()
