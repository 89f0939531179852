"""The words of the real commands, at the smallest size that is still all there, and what their runs have left."""

import json
import os
from pathlib import Path

import torch

from kinema.training.checkpoints.store import Checkpoint

ROOT = Path(__file__).parents[2]
VAE = ["task=vae", "vae.width=8", "vae.decoder_width=8", "vae.width_multipliers=[1,1,1]", "vae.pixel_patch=8",
       "task.loss.reconstruction=0", "task.loss.squared=1", "task.statistics_clips=4", "task.strips=1",
       "optim.learning_rate=1e-3", "schedule.warmup_steps=0"]  # fmt: skip
DIT = ["model.width=32", "model.depth=1", "model.num_heads=2", "model.rope_axes=[8,4,4]", "schedule=constant",
       "schedule.warmup_steps=2", "optim.learning_rate=1e-3", "task.samples.num_steps=2",
       "task.samples.guidance_scale=2"]  # fmt: skip
SHAPES = "data.shapes=[[5,32,32],[9,32,32]]"
STATE = ("model", "ema", "optimizer")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "KINEMA_TRACEBACK": "1", "WANDB_MODE": "offline"}


def common(folder: Path, name: str, steps: int) -> list[str]:
    return [f"name={name}", f"run_root={folder}/runs", f"steps={steps}", f"data.path={folder}/toy", SHAPES,
            "data.clips_per_step=4", "data.lanes=2", "data.num_workers=1", "logging=file", "logging.every_steps=1",
            "checkpoint.every_steps=2", "checkpoint.keep=20", "validation.every_steps=3",
            "validation.clips=4"]  # fmt: skip


def vae_command(folder: Path, name: str, steps: int, *extra: str) -> list[str]:
    return ["train.py", *common(folder, name, steps), *VAE, *extra]


def dit_command(folder: Path, name: str, steps: int, *extra: str) -> list[str]:
    return ["train.py", *common(folder, name, steps), *DIT, f"vae.path={folder}/runs/vae", *extra]


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


def same_checkpoint(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return same_state(Checkpoint(a), Checkpoint(b))


def same_state(a: Checkpoint, b: Checkpoint) -> bool:
    for name in STATE:
        one, other = a.tensors(name), b.tensors(name)
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return True


def frames(path: Path) -> torch.Tensor:
    """(t, h, w, 3) of a video, as bytes."""
    import av

    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])
