"""Crash-safe checkpoints: written aside, checksummed, published by one rename, pointed to last.

Layout of `checkpoints/step-00000200/`:

    model.safetensors, ema.safetensors, optimizer.safetensors   float32 tensors by parameter name
    training.json    step, plan position, ledger: what the loop continues from
    seen.safetensors how often each clip was shown
    manifest.json    what the weights are: the sampler and the exporter obey it
    config.yaml      the resolved configuration
    seal.json        size and CRC-32 of every other file; written last, so a folder without it is no checkpoint

Nothing in it is a pickle, and nothing depends on the number of ranks or the ZeRO stage.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT_VERSION = 1
SEAL = "seal.json"


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 500
    """Steps between checkpoints; the last step and a stop signal always write one."""
    keep: int = 3
    """How many of the newest stay; older ones are deleted after a newer one is published."""
    max_failed_saves: int = 3
    """Saves in a row that may fail (full disk) before the run stops."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 1.")


class CheckpointError(ValueError):
    """No checkpoint that is whole; the message lists each with its damage."""


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, verified when it was opened."""

    folder: Path

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return int(self.folder.name.removeprefix("step-"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `model`, `ema` or `optimizer`."""
        return safetensors.torch.load_file(self.folder / f"{name}.safetensors")

    def document(self, name: str) -> dict[str, Any]:
        """A JSON document: `training` or `manifest`."""
        return json.loads((self.folder / f"{name}.json").read_text())


Writer = Callable[[Path], object]


class CheckpointStore:
    """The checkpoints of one run folder. Only the main rank writes."""

    def __init__(self, run_dir: Path, keep: int = 3) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def publish(self, step: int, writers: dict[str, Writer]) -> Checkpoint:
        """Write each file with its writer, seal, and publish; on failure nothing changes but an OSError.

        Order: every file is fsynced, then the seal, then the rename, then the folder, then `latest`.
        """
        target = self.folder / folder_name(step)
        aside = self.folder / f".writing-{target.name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            seal: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "files": {}}
            for name, write in writers.items():
                write(aside / name)
                _fsync(aside / name)
                seal["files"][name] = {"bytes": (aside / name).stat().st_size, "crc32": crc32(aside / name)}
            seal["crc32"] = zlib.crc32(json.dumps(seal).encode())
            write_json(aside / SEAL, seal)
            _fsync(aside / SEAL)
            _fsync(aside)
            if target.exists():  # a damaged one of the same step: resuming fell back behind it
                shutil.rmtree(target)
            os.rename(aside, target)
            _fsync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        replace_text(self.folder / "latest", target.name + "\n")
        self._rotate()
        return Checkpoint(target)

    def steps(self) -> list[int]:
        """Steps of all published folders, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified; ValueError with the damage otherwise."""
        folder = self.folder / folder_name(step)
        if not folder.exists():
            raise CheckpointError(f"checkpoint={step} is not in {self.folder}; there are {self.steps()}.")
        if damage := verify(folder):
            raise CheckpointError(f"{folder} is damaged: {damage}")
        return Checkpoint(folder)

    def newest(self, report: Callable[[str], object] = print) -> Checkpoint | None:
        """The newest whole checkpoint, None when there is none at all; `latest` is only a hint for people.

        Falling back past a damaged one is reported; if all are damaged the run must not start from zero.
        """
        damages: list[str] = []
        for step in reversed(self.steps()):
            folder = self.folder / folder_name(step)
            damage = verify(folder)
            if damage is None:
                for line in damages:
                    report(f"skipped a damaged checkpoint: {line}")
                return Checkpoint(folder)
            damages.append(f"{folder}: {damage}")
        if damages:
            raise CheckpointError("every checkpoint of this run is damaged:\n  " + "\n  ".join(damages))
        return None

    def _rotate(self) -> None:
        """Delete all but the newest `keep`; called only after a newer one has been published."""
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / folder_name(step))


def verify(folder: Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint folder, or with some of its files; None when every byte is as it was written."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        own = seal.pop("crc32")
        version, step, files = seal["format_version"], seal["step"], seal["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read ({error})"
    if zlib.crc32(json.dumps(seal).encode()) != own:
        return f"{SEAL} has changed since it was written (CRC-32)"
    if version != FORMAT_VERSION:
        return f"it has format version {version}; this Kinema reads {FORMAT_VERSION}"
    if folder.name != folder_name(step):
        return f"it was written at step {step} and has been renamed"
    for name, expected in files.items():
        if only is not None and name not in only:
            continue
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if crc32(path) != expected["crc32"]:
            return f"{name} has changed since it was written (CRC-32)"
    return None


def folder_name(step: int) -> str:
    """The folder of the checkpoint of a step, inside `checkpoints/`."""
    return f"step-{step:08d}"


def crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as handle:
        while piece := handle.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def tensor_writer(tensors: dict[str, Tensor]) -> Writer:
    """Writes tensors as safetensors; a disk that cannot take them is an OSError, as for any other file."""

    def write(path: Path) -> None:
        try:
            safetensors.torch.save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(f"{path.name}: {error}") from error

    return write


def link_writer(source: Path) -> Writer:
    """A second name for a file that nobody changes, or a copy where the disk is another."""

    def write(path: Path) -> None:
        try:
            path.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, path)

    return write


def json_writer(document: dict[str, Any]) -> Writer:
    """Writes a JSON document."""
    return lambda path: write_json(path, document)


def text_writer(text: str) -> Writer:
    """Writes text as it is."""
    return lambda path: path.write_text(text)


def write_json(path: Path, document: Any) -> None:
    """Indented JSON, for people and for `git diff`."""
    path.write_text(json.dumps(document, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new, never half."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    _fsync(aside)
    os.replace(aside, path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
