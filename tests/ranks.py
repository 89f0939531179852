"""Running a test function on several real ranks: processes, gloo, and a port of their own."""

import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from kinema.distributed.process import free_port, start_process, stop_process


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 240
) -> list[Any]:
    """Call `function(*arguments)` on `world_size` ranks; returns what each returned, or fails with its traceback."""
    context = _context()
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, arguments, rank, world_size, port, dict(os.environ), answers))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, problem = answers.get(timeout=timeout_seconds)
            if problem:
                raise AssertionError(f"rank {rank}:\n{problem}")
            results[rank] = value
    except queue.Empty:
        raise AssertionError(f"no answer from ranks {set(range(world_size)) - set(results)}") from None
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _context() -> Any:
    """Starts processes by forking one that has imported what every rank needs, which is most of a start.

    It lives as long as the tests. A process that has seen CUDA cannot be forked.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    return context


def _rank(
    function: Any, arguments: Any, rank: int, world_size: int, port: int, environment: dict[str, str], answers: Any
) -> None:
    os.environ.clear()  # the forked process has that of its own start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        start_process(60)
        value, problem = function(*arguments), None
        stop_process()
    except BaseException:
        value, problem = None, traceback.format_exc()
    answers.put((rank, value, problem))
