"""The real commands in real processes, at the smallest size that is still all there."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VAE = ["task=vae", "vae.width=8", "vae.decoder_width=8", "vae.width_multipliers=[1,1,1]", "vae.pixel_patch=8",
       "task.loss.reconstruction=0", "task.loss.squared=1", "task.statistics_clips=4", "task.strips=1",
       "optim.learning_rate=1e-3", "schedule.warmup_steps=0"]  # fmt: skip
DIT = ["model.width=32", "model.depth=1", "model.num_heads=2", "model.rope_axes=[8,4,4]", "schedule=constant",
       "schedule.warmup_steps=2", "optim.learning_rate=1e-3", "task.samples.num_steps=2",
       "task.samples.guidance_scale=2"]  # fmt: skip
SHAPES = "data.shapes=[[5,32,32],[9,32,32]]"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "KINEMA_TRACEBACK": "1", "WANDB_MODE": "offline"}


def run(*command: str, expect: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess:
    answer = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if expect is not None:
        assert answer.returncode == expect, f"{' '.join(command)}\n{answer.stdout[-3000:]}\n{answer.stderr[-5000:]}"
    return answer


def common(folder: Path, name: str, steps: int) -> list[str]:
    return [f"name={name}", f"run_root={folder}/runs", f"steps={steps}", f"data.path={folder}/toy", SHAPES,
            "data.clips_per_step=4", "data.lanes=2", "data.num_workers=1", "logging=file", "logging.every_steps=1",
            "checkpoint.every_steps=2", "checkpoint.keep=20", "validation.every_steps=3",
            "validation.clips=4"]  # fmt: skip


def train_vae(folder: Path, name: str = "vae", steps: int = 4, *extra: str) -> subprocess.CompletedProcess:
    return run("train.py", *common(folder, name, steps), *VAE, *extra)


def dit_command(folder: Path, name: str, steps: int, *extra: str) -> list[str]:
    return ["train.py", *common(folder, name, steps), *DIT, f"vae.path={folder}/runs/vae", *extra]


def other_data_set(folder: Path) -> Path:
    """A smaller one than `folder/toy`, of other clips."""
    path = folder / "other"
    if not path.exists():
        run("data_prep/toy.py", "--out", f"{path}", "--clips", "10", "--heldout", "2", "--sizes", "64x64,64x48",
            "--seed", "1")  # fmt: skip
    return path


def mixture(command: list[str], **members: str) -> list[str]:
    """The command with several data sets: of each, by name, what its place in `data.mixture` holds."""
    named = ",".join(f"{name}:{{{member}}}" for name, member in members.items())
    return [*(word for word in command if not word.startswith("data.path=")), f"+data.mixture={{{named}}}"]


def torchrun(ranks: int) -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]


def records(folder: Path, name: str, kind: str) -> dict[int, dict]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if record["kind"] == kind}


def losses(folder: Path, name: str) -> dict[int, float]:
    return {step: record["loss"] for step, record in records(folder, name, "train").items()}


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return folder / "runs" / name / "checkpoints" / f"step-{step:08d}"
