"""Checks of this machine alone: versions, devices, compiled operations, shared memory, file descriptors."""

import os
import resource
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from kinema.distributed.process import extension_folder
from kinema.doctor.finding import Check, Finding, graded

GIB = 2**30
ENOUGH_FILES = 4096
"""Open files: data workers, shards, sockets between ranks."""
ENOUGH_SHARED_GIB = 1.0
"""Packs go from data workers to the training process through shared memory."""


def machine_checks() -> list[Check]:
    """All of them, in the order in which they are shown."""
    return [
        ("versions", check_versions),
        ("devices", check_devices),
        ("compiled ops", check_compiled_ops),
        ("shared memory", check_shared_memory),
        ("open files", check_open_files),
    ]


def check_versions(constraints: Path = Path("constraints.txt")) -> Finding:
    """What is installed, against what the package asks for and what the tests ran with."""
    python = f"Python {sys.version.split()[0]}"
    try:
        wanted = [Requirement(line) for line in requires("kinema") or []]
    except PackageNotFoundError:
        return graded("versions", f"{python}, kinema is not installed", warn='Type pip install -e ".[dev]".')
    wrong = [told for requirement in wanted if (told := _unmet(requirement))]
    pinned = _pins(constraints)
    here = {name: found for name in pinned if (found := _installed(name))}
    other = [f"{name} {found}, tested {pinned[name]}" for name, found in here.items() if found != pinned[name]]
    found = f"{python}, torch {_installed('torch')}, deepspeed {_installed('deepspeed')}"
    return graded(
        "versions",
        found,
        fail=f"{'; '.join(wrong)}. Type pip install -c constraints.txt -e ." if wrong else "",
        warn=f"The tests ran with others: {'; '.join(other[:5])}. Type make test." if other else "",
    )


def check_devices() -> Finding:
    """GPUs, or the CPU that stands in for them."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            advice = "nvidia-smi is here, but this torch sees no GPU: install the CUDA build of torch, or its driver."
            return graded("devices", f"torch {torch.__version__} sees no GPU", fail=advice)
        return graded("devices", f"no GPU, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found = "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards)
    old = [card.name for card in cards if card.major < 8]
    return graded("devices", found, warn=f"{', '.join(old)} has no bfloat16: parallel.precision=float32" if old else "")


def check_compiled_ops() -> Finding:
    """The operation that DeepSpeed compiles for ranks on CPUs."""
    if torch.cuda.is_available():
        return graded("compiled ops", "none needed on a GPU")
    if built := next(extension_folder().glob("**/deepspeed_shm_comm.so"), None):
        return graded("compiled ops", f"deepspeed_shm_comm in {built.parent}")
    if not (shutil.which("c++") or shutil.which("g++")):
        return graded("compiled ops", "none built, and no C++ compiler", fail="Install one: apt-get install g++.")
    return graded(
        "compiled ops", "none built", warn="Type python -m kinema.distributed.process, or wait 1 to 2 minutes."
    )


def check_shared_memory(folder: str = "/dev/shm") -> Finding:
    """Room for packs on their way from data workers."""
    if not Path(folder).is_dir():
        return graded("shared memory", f"no {folder}", warn="Type data.num_workers=0 if data workers fail.")
    free = shutil.disk_usage(folder).free / GIB
    small = f"Start the container with --shm-size={ENOUGH_SHARED_GIB * 8:.0f}g, or type data.num_workers=0."
    return graded("shared memory", f"{free:.1f} GiB free in {folder}", warn=small if free < ENOUGH_SHARED_GIB else "")


def check_open_files() -> Finding:
    """How many files and sockets a process may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < ENOUGH_FILES
    advice = f"Type ulimit -n {ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, 65536)}." if few else ""
    return graded("open files", f"{soft} a process", warn=advice)


def _unmet(requirement: Requirement) -> str:
    """How a requirement is not met, or nothing."""
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return ""
    found = _installed(requirement.name)
    if found and requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name}{requirement.specifier} is needed, {found or 'none'} is installed"


def _pins(constraints: Path) -> dict[str, str]:
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    pairs = [line.partition("#")[0].split(";")[0].strip().partition("==") for line in lines]
    return {name: pin for name, sign, pin in pairs if sign}


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""
