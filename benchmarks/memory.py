"""Memory and time of a forward and backward with each kind of activation checkpointing, beside what `kinema plan` says.

python -m benchmarks.memory [--preset wan_tiny] [--grid 8 16 16] [--clips 2] [--seconds 5]

On a GPU the measured peak is the allocator's (`--preset wan_1_3b --grid 21 30 52 --clips 1`); on a CPU, what is alive.
"""

import argparse
import time
from functools import partial
from math import prod
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.footprint import GIB, LiveBytes, activations
from kinema.models.dit import DiT, DiTConfig
from kinema.models.dit.segments import Grid

LATENTS, TEXT_WIDTH, WORDS = 16, 4096, 512
KINDS = [kind for kind in ActivationCheckpointing if kind is not ActivationCheckpointing.every]


def load(preset: str) -> DiTConfig:
    """A configuration of configs/model."""
    values = OmegaConf.load(Path("configs/model") / f"{preset}.yaml")
    del values["defaults"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DiTConfig), values))
    assert isinstance(config, DiTConfig)
    return config


def loss(grid: Grid, clips: int, device: str, model: nn.Module) -> Tensor:
    """Of a pack of random clips, in bfloat16."""
    assert isinstance(model, DiT)
    size = [count * patch for count, patch in zip(grid, model.config.patch_size, strict=True)]
    latents = [torch.randn(LATENTS, *size, device=device) for _ in range(clips)]
    text = [torch.randn(WORDS, TEXT_WIDTH, device=device) for _ in range(clips)]
    with torch.autocast(device, torch.bfloat16):
        found = model(latents, torch.rand(clips, device=device), text)
    return torch.stack([clip.float().square().mean() for clip in found]).sum()


def measured_peak(model: nn.Module, grid: Grid, clips: int, device: str) -> int:
    """Bytes beside weights and gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(grid, clips, device, model).backward()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        loss(grid, clips, device, model).backward()
    return live.peak


def seconds(model: nn.Module, grid: Grid, clips: int, device: str, least: float) -> float:
    """The fastest of the steps that fit into `least` seconds, two at least."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < least:
        started = time.perf_counter()
        loss(grid, clips, device, model).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan_tiny")
    parser.add_argument("--grid", type=int, nargs=3, default=[8, 16, 16], help="tokens of a clip in time and space")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="time for the steps of one row")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid: Grid = (arguments.grid[0], arguments.grid[1], arguments.grid[2])
    config, clips = load(arguments.preset), arguments.clips
    make = partial(DiT, config, LATENTS, TEXT_WIDTH)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{arguments.preset}, {clips} x {prod(grid)} tokens, bfloat16, {name}, torch {torch.__version__}")
    print("| kind | foretold peak, GiB | measured | seconds | of none |\n|---|---|---|---|---|")
    first = None
    for kind in KINDS:
        foretold = activations(make, partial(loss, grid, clips, "cpu"), DiT.all_blocks, kind).peak
        model = make().to(device)
        keep_less(model.all_blocks(), kind)
        peak, taken = measured_peak(model, grid, clips, device), seconds(model, grid, clips, device, arguments.seconds)
        first = first or taken
        row = f"{foretold / GIB:.3f} | {peak / GIB:.3f} | {taken:.3f} | {taken / first:.2f}"
        print(f"| {kind.value} | {row} |", flush=True)


if __name__ == "__main__":
    main()
