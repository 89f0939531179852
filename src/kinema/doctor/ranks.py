"""Whether ranks reach each other, compute the right sums, and how fast."""

import os
import queue
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kinema.distributed.process import free_port
from kinema.doctor.finding import Finding, graded

MESSAGE_MIB = 16
ROUNDS = 4
PATIENCE_SECONDS = 120.0
SLOW_MIB = 50.0
"""A second; below, the step waits for its gradients."""


def check_collectives(ranks: int = 2) -> Finding:
    """all_reduce and all_to_all, over the ranks that a launcher started or over processes of this machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = _join(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available(), "env://")
        return judge(found, f"{os.environ['WORLD_SIZE']} ranks of the launcher")
    return judge(_on_this_machine(ranks), f"{ranks} ranks on this machine")


def judge(found: dict[str, Any], who: str) -> Finding:
    """The finding of measured collectives."""
    wrong = [name for name in ("all_reduce", "all_to_all") if found[f"{name}_wrong"]]
    rates = ", ".join(f"{name} {found[name]:,.0f} MiB/s" for name in ("all_reduce", "all_to_all"))
    slowest = min(found["all_reduce"], found["all_to_all"])
    return graded(
        "collectives",
        f"{who}, {found['backend']}: {rates}",
        fail=f"{' and '.join(wrong)} gave wrong numbers: do not train here; look at network and drivers."
        if wrong
        else "",
        warn="slow: look at the network, or GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME." if slowest < SLOW_MIB else "",
    )


def measure_ranks() -> dict[str, Any]:
    """Rates in MiB of each rank's message a second, and whether the numbers were right; a collective."""
    device, rank, size = _device(), dist.get_rank(), dist.get_world_size()
    elements = MESSAGE_MIB * 2**18 // size * size
    result: dict[str, Any] = {"backend": dist.get_backend()}

    def timed(name: str, run: Any) -> None:
        run()  # connects
        _settle(device)
        began = time.perf_counter()
        for _ in range(ROUNDS):
            run()
        _settle(device)
        result[name] = ROUNDS * elements * 4 / 2**20 / (time.perf_counter() - began)

    summed = torch.full((elements,), float(rank + 1), device=device)
    dist.all_reduce(summed)
    result["all_reduce_wrong"] = bool((summed != size * (size + 1) / 2).any())
    sent = torch.full((elements,), float(rank), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    expected = torch.arange(size, device=device).repeat_interleave(elements // size)
    result["all_to_all_wrong"] = bool((received != expected).any())
    timed("all_reduce", lambda: dist.all_reduce(sent))
    timed("all_to_all", lambda: dist.all_to_all_single(received, sent))
    return result


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _settle(device: torch.device) -> None:
    """Wait for this device and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _on_this_machine(ranks: int) -> dict[str, Any]:
    context = mp.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=_rank, args=(rank, ranks, port, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        return answers.get(timeout=PATIENCE_SECONDS)
    except queue.Empty:
        raise ValueError(
            f"{ranks} processes did not reach each other in {PATIENCE_SECONDS:g} s: look at the firewall."
        ) from None
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _rank(rank: int, size: int, port: int, answers: Any) -> None:
    torch.set_num_threads(1)
    several_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
    found = _join(rank, several_gpus, f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    if rank == 0:
        answers.put(found)


def _join(device: int, on_gpu: bool, address: str, **place: int) -> dict[str, Any]:
    """Join the other ranks, measure with them, and leave."""
    if on_gpu:
        torch.cuda.set_device(device)
    patience = timedelta(seconds=PATIENCE_SECONDS)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=address, timeout=patience, **place)
    try:
        return measure_ranks()
    finally:
        dist.destroy_process_group()
