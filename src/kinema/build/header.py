"""What a run says of itself before its first step."""

import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from kinema.build.run import Run
from kinema.config import Config
from kinema.data.storage.address import redacted
from kinema.distributed.engine import Engine
from kinema.distributed.process import Process
from kinema.identity import digest
from kinema.plan import states_of
from kinema.training.checkpoints.store import write_json
from kinema.training.records.metrics import WandbTracker


def describe_run(
    config: Config,
    run: Run,
    process: Process,
    engine: Engine,
    trained: str,
    whole: nn.Module,
    flops_per_step: float,
) -> float:
    """Write `run.json`, print the header (what runs, on what, with which identity), and start the tracker.

    Returns the seconds that a step takes on all ranks at their measured peak; 0 but on the main rank.
    """
    if not process.is_main:
        return 0.0
    peak = measure_peak_flops(process.device, getattr(torch, config.parallel.precision.value))
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    record = {
        "name": config.name,
        "task": "dit" if config.model is not None else "vae",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redacted(" ".join(sys.argv)),
        "steps": config.steps,
        "world_size": process.world_size,
        "device": device_name(process),
        "threads": torch.get_num_threads(),
        "versions": {
            **{name: version(name) for name in ("torch", "deepspeed", "kinema")},
            "python": platform.python_version(),
        },
        "parameters": parameters,
        "flops_per_step": flops_per_step,
        "peak_flops_measured": peak,
        "config_hash": digest(run.config_yaml),
        "git": git_revision(),
    }  # fmt: skip
    write_json(run.folder / "run.json", record)
    parallel = config.parallel
    tqdm.write(
        f"run {run.folder}: {parameters / 1e6:.2f} M parameters, config {record['config_hash'][:8]}, "
        f"{process.world_size} rank(s) on {process.device}, {parallel.line()}, "
        f"{engine.traffic.line(parallel.zero_stage)}"
    )
    tqdm.write(trained)
    tqdm.write(f"{states_of(config, whole, process.world_size).line()} (activations: kinema plan)")
    run.outputs.tracker = WandbTracker(config.logging, run.folder, {"config": run.config_yaml})
    rate, checkpoint, logging = config.optim.learning_rate, config.checkpoint, config.logging
    rates = [rate * config.schedule.factor(step, config.steps) for step in (0, config.steps // 2, config.steps - 1)]
    tqdm.write(
        f"steps {config.steps}, learning rate {rates[0]:.1e} first, {rates[1]:.1e} halfway, {rates[2]:.1e} last; "
        f"checkpoint every {checkpoint.every_steps} (keeps {checkpoint.keep}, "
        f"{checkpoint.max_failed_saves} saves may fail), "
        f"validation every {config.validation.every_steps} on {config.validation.clips} clips, "
        f"metrics every {logging.every_steps}, W&B {logging.wandb.value} ({logging.project})"
    )
    if config.schedule.warmup_steps > config.steps:
        tqdm.write(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is longer than steps={config.steps}: the learning "
            f"rate ends at {rates[2]:.1e} and never reaches optim.learning_rate={rate:g}. Type fewer warm-up steps."
        )
    return flops_per_step / (peak * process.world_size)


def device_name(process: Process) -> str:
    """The accelerator's or the processor's name."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    return platform.processor() or platform.machine()


def measure_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Floating-point operations a second of a matrix product of this type on this device: what MFU is measured against.

    On random numbers, of a size that fills a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def git_revision() -> str | None:
    """The commit of the code, with a mark if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None if answer.returncode == 0 else None
