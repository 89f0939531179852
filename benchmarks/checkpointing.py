"""How long training waits for a save, beside DeepSpeed's synchronous `save_checkpoint` of the same state.

python -m benchmarks.checkpointing [--ranks 2] [--mib 400] [--stage 1] [--rounds 5] [--folder DIR]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kinema.distributed.engine import Engine, Precision
from kinema.distributed.mesh import Mesh
from kinema.distributed.process import Process, free_port, start_process, stop_process
from kinema.training.checkpoints.saving import Saver
from kinema.training.checkpoints.store import CheckpointConfig, CheckpointStore
from kinema.training.ema import EMA, EMAConfig
from kinema.training.records.outputs import Outputs
from kinema.training.records.progress import Progress

STATE_BYTES = 16
"""Of each parameter: weight, average and Adam's two moments; DeepSpeed writes weight, master and the moments."""
WIDTH = 1024


def engine_of(mib: int, stage: int) -> Engine:
    """Linear layers whose whole state has this size."""
    torch.manual_seed(0)
    layers = max(1, round(mib * 2**20 / (STATE_BYTES * WIDTH * (WIDTH + 1))))
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return Engine(
        module, optimizer, zero_stage=stage, precision=Precision.float32, accumulation=1, gradient_clipping=1.0
    )


def saver_of(engine: Engine, folder: Path) -> Saver:
    """What the loop saves with, of a task that is this engine alone."""
    task: Any = SimpleNamespace(engines=lambda: {"model": engine}, beside=lambda gather: {})
    plan: Any = SimpleNamespace(state=lambda step: {"cursor": step})
    index: Any = SimpleNamespace(entries=[], parts=[])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    process = Process(rank, rank, ranks, torch.device("cpu"), Mesh())
    return Saver(
        process=process, task=task, plan=plan, ema=EMA(EMAConfig(), engine), store=CheckpointStore(folder, keep=1),
        config=CheckpointConfig(), outputs=Outputs(folder, False, None), manifest={"data": {"hash": ""}},
        config_yaml="", progress=Progress(index),
    )  # fmt: skip


def step(engine: Engine, saver: Saver) -> None:
    """One training step, so that every number changes."""
    engine.backward(engine(torch.randn(4, WIDTH)).square().mean() / dist.get_world_size())
    engine.step(1e-3)
    saver.ema.update(1)
    saver.progress.step += 1


def memory_mib(what: str) -> float:
    """Resident memory of this process now (VmRSS), or its peak since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10


def forget_peak() -> None:
    """Let the kernel measure the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(rank: int, options: argparse.Namespace, port: int, folder: Path) -> None:
    """Rounds of one save each, in turn; the main rank prints."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    start_process(600)
    engine = engine_of(options.mib, options.stage)
    saver = saver_of(engine, folder / "kinema")
    stalls, totals, theirs, synced = [], [], [], []
    for number in range(options.rounds + 1):
        step(engine, saver)
        forget_peak()
        before = memory_mib("VmRSS")
        saver.save(must=False)
        save = saver._save
        assert save is not None
        step(engine, saver)  # before which it waits for the copy; a real one is longer, and waits less
        saver.settle(must=True)
        if number == 0:
            first, rise = save.stall_seconds, memory_mib("VmHWM") - before
        stalls.append(save.stall_seconds)
        totals.append(saver.seconds)
        dist.barrier()
        began = time.perf_counter()
        engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag=f"step{number}")
        theirs.append(time.perf_counter() - began)
        os.sync()  # it leaves its files to the system; ours are on the disk when they are published
        synced.append(time.perf_counter() - began)
        shutil.rmtree(folder / "deepspeed" / f"step{number - 1}", ignore_errors=True)
    if rank == 0:
        stall, total, peer, whole = (statistics.median(values[1:]) for values in (stalls, totals, theirs, synced))
        mib = save.num_bytes / 2**20
        print(
            f"ZeRO {options.stage}, {options.ranks} ranks, {mib:.0f} MiB, torch {torch.__version__}, "
            f"load {os.getloadavg()[0]:.0f}: training waits {stall:.3f} s (the first time {first:.3f}), "
            f"DeepSpeed's save takes {peer:.2f} s ({stall / peer:.1%}), {whole:.2f} s until it is on the disk "
            f"({stall / whole:.1%}). Until published "
            f"{total:.2f} s, {mib / total:.0f} MiB/s. Memory of the main rank rose by {rise:.0f} MiB at most; its part "
            f"of the state is {mib / options.ranks:.0f} MiB"
        )
    stop_process()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=400, help="size of the whole state")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; default: the system's temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mp.spawn(measure, (options, free_port(), Path(folder)), nprocs=options.ranks)


if __name__ == "__main__":
    main()
