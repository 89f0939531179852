"""What a rank keeps, sends and computes in a training step of the DiT on a pack that some ranks share.

torchrun --nproc-per-node 2 -m benchmarks.sequence [--steps 5]
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.packs import CHANNELS, MODELS, PACKS, TEXT, step
from benchmarks.saved import saved_bytes
from kinema.distributed.process import start_process, stop_process
from kinema.distributed.sequence import Ulysses
from kinema.models.dit import DiT

HEADER = (
    "| model | tokens | ranks | kept by a rank, MiB | sent by a rank, MiB | CPU time of a rank, s |\n"
    "|---|---|---|---|---|---|"
)
MIB = 2**20


@contextmanager
def sent_bytes() -> Iterator[list[int]]:
    """Bytes that this rank sends to others in all-to-all exchanges, one entry for each."""
    sent: list[int] = []
    real = dist.all_to_all_single

    def counting(**named: Any) -> Any:
        given, ranks = named["input"], named["group"].size()
        sent.append(given.numel() * given.element_size() * (ranks - 1) // ranks)
        return real(**named)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = real


def measure(name: str, steps: int, group: Ulysses | None) -> str:
    """One row: forward and backward of the mixed pack."""
    torch.manual_seed(0)
    model, clips = DiT(MODELS[name], CHANNELS, TEXT), PACKS["mixed"]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if group is not None:
        model.share_tokens(group)
    run = step(model, clips, [range(len(clips))])
    kept = saved_bytes(run, model)
    with sent_bytes() as sent:
        run()
    seconds = []
    for _ in range(steps):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    ranks = 1 if group is None else group.size
    tokens = sum(t * h * w // 4 for (t, h, w), _ in clips)
    figures = f"{kept / MIB:.1f} | {sum(sent) / MIB:.2f} | {statistics.median(seconds):.2f}"
    return f"| {name} | {tokens:,} | {ranks} | {figures} |"


def main() -> None:
    """Print a table on the first of the ranks, which are one group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    process = start_process(600.0, sequence_degree=int(os.environ.get("WORLD_SIZE", "1")))
    group = Ulysses(process.mesh) if process.mesh.sequence_group is not None else None
    rows = [measure(name, arguments.steps, group) for name in MODELS]
    if process.is_main:
        print("\n".join([HEADER, *rows]), flush=True)
    stop_process()


if __name__ == "__main__":
    main()
