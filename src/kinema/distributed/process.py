"""Starting one rank: devices, the process group, and DeepSpeed's compiled communication op."""

import fcntl
import io
import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kinema.distributed.mesh import Mesh, make_mesh
from kinema.distributed.parent import end_with_launcher
from kinema.distributed.rendezvous import check_rendezvous


class RanksMissing(RuntimeError):
    """The ranks of this job did not find each other."""


@dataclass(frozen=True)
class Process:
    """One rank of the job: who it is and which device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: Mesh

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and talks to the user."""
        return self.rank == 0


def strip_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the `deepspeed` launcher adds and Hydra would refuse; sets LOCAL_RANK from it."""
    kept = []
    for argument in argv:
        if argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        else:
            kept.append(argument)
    return kept


def start_process(timeout_seconds: float, sequence_degree: int = 1) -> Process:
    """Join the process group that `torchrun`, `deepspeed` or Slurm describes in the environment; alone without one.

    So many ranks next to each other work on each pack together.
    """
    end_with_launcher()
    check_rendezvous()
    if not torch.cuda.is_available():  # DeepSpeed would find the same, with a warning above every message of ours
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed calls collectives by the names that torch 2.13 deprecates, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        load_cpu_communication_op()
    try:
        with redirect_stdout(io.StringIO()):  # it prints that its op was built, which is no news to anybody
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
                verbose=False,
                auto_mpi_discovery=False,
            )
    except dist.DistError as error:
        raise RanksMissing(_why_missing(str(error).splitlines()[0], timeout_seconds)) from error
    # What DeepSpeed starts `numactl` for, again and again, under ZeRO 3 on a CPU; its CPU messages are set up by now.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Process(dist.get_rank(), local_rank, dist.get_world_size(), device, make_mesh(sequence_degree))


def _why_missing(reason: str, timeout_seconds: float) -> str:
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason:
        return (
            f"MASTER_PORT={port} is taken on {address}: another job listens there, or one that was killed has left "
            "processes behind. End it, or choose another port."
        )
    return (
        f"rank {rank} of {size} met no other at MASTER_ADDR={address}, MASTER_PORT={port} within "
        f"parallel.timeout_seconds={timeout_seconds:g} ({reason}). Start all {size} ranks, and let their hosts reach "
        "that address."
    )


def stop_process() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def extension_folder() -> Path:
    """Where compiled ops live: `TORCH_EXTENSIONS_DIR`, or `.cache/` of the project, never the user's shared cache."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    project = Path(__file__).resolve().parents[3]
    root = project if (project / "pyproject.toml").exists() else Path.home() / ".cache" / "kinema"
    return root / ".cache" / "torch_extensions"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock that the kernel drops when its owner dies, unlike the lock file that torch leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kinema.flock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def remove_stale_locks(folder: Path) -> list[Path]:
    """Delete lock files of builds that were killed; call only inside `exclusive(folder)`.

    torch guards a build with a file named `lock` and waits for it without limit: a killed build would make
    every later run hang for ever.
    """
    stale = sorted(folder.glob("**/lock"))
    for lock in stale:
        lock.unlink()
        print(f"removed a stale build lock: {lock}", file=sys.stderr, flush=True)
    return stale


def load_cpu_communication_op(build: Callable[[], object] | None = None) -> None:
    """Load DeepSpeed's shared-memory op, compiling it into `extension_folder()` the first time (1 to 2 minutes)."""
    folder = extension_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja is installed beside the interpreter, which need not be on PATH (`.venv/bin/python train.py`).
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with exclusive(folder):
        remove_stale_locks(folder)
        (build or _build_shared_memory_op)()


def _build_shared_memory_op() -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if not list(extension_folder().glob("**/deepspeed_shm_comm.so")):
        print(
            "compiling DeepSpeed's CPU communication op, once (1 to 2 minutes) ...",
            file=sys.stderr,
            flush=True,
        )
    builder.load(verbose=False)


def seed_everything(seed: int) -> None:
    """Fix the global generators; training draws keyed noise and never depends on their state."""
    random.seed(seed)
    torch.manual_seed(seed)


def seed_default(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, of what this device draws from: that one takes a stack for each kind that is missing."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


if __name__ == "__main__":  # set-up: compile now, so that no run has to
    if not torch.cuda.is_available():
        load_cpu_communication_op()
