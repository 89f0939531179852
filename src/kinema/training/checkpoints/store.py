"""Crash-safe checkpoints: written aside, checksummed, published by one rename, pointed to last.

Layout of `checkpoints/step-00000200/`:

    model.safetensors, ema.safetensors, optimizer.safetensors   float32 tensors by parameter name; of several ranks
                     each writes its part: model-00001-of-00004.safetensors, ...
    training.json    step, plan position, ledger: what the loop continues from
    seen.safetensors how often each clip was shown
    manifest.json    what the weights are: the sampler and the exporter obey it
    config.yaml      the resolved configuration
    seal.json        size and CRC-32 of every other file; written last, so a folder without it is no checkpoint

Nothing in it is a pickle. Any number of ranks, under any ZeRO stage, reads what any other wrote.
"""

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from zlib_ng import zlib_ng

from kinema.training.checkpoints.pieces import StoredTensors

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""In version 1 every tensor was whole."""
SEAL = "seal.json"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
CARRIED = ("vae", "base")
"""What a run folder holds beside its checkpoints, as checkpoints too, and the sampler needs."""
ASIDE = ".writing-"


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 500
    """Steps between checkpoints; the last step and a stop signal always write one."""
    keep: int = 3
    """How many of the newest stay; older ones are deleted after a newer one is published."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay for ever; 0 lets none."""
    remote: str | None = None
    """Folder at an address, for example s3://BUCKET/FOLDER, where each published checkpoint is copied to, too."""
    max_failed_saves: int = 3
    """Saves in a row that may fail (full disk) before the run stops."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 1.")
        if self.keep_every < 0:
            raise ValueError(f"checkpoint.keep_every={self.keep_every} must be at least 0.")


class CheckpointError(ValueError):
    """No checkpoint that is whole; the message lists each with its damage."""


class NotSavedError(CheckpointError):
    """A checkpoint could not be written; earlier ones are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, verified when it was opened."""

    folder: Path

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return int(self.folder.name.removeprefix("step-"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `model`, `ema` or `optimizer`, whole."""
        with self.stored(name) as stored:
            return {key: stored.full(key) for key in stored.shapes}

    def stored(self, name: str) -> StoredTensors:
        """The same, to be read tensor by tensor or in parts; for a `with` block."""
        return StoredTensors(self.files(name))

    def files(self, name: str) -> list[Path]:
        """The files that hold the tensors of `model`, `ema` or another average, or `optimizer`.

        CheckpointError if there are none.
        """
        own = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        found = sorted(file for file in read_seal(self.folder)["files"] if own.fullmatch(file))
        if not found:
            raise CheckpointError(f"{self.folder} holds no {name}.safetensors.")
        return [self.folder / file for file in found]

    def document(self, name: str) -> dict[str, Any]:
        """A JSON document: `training` or `manifest`."""
        return json.loads((self.folder / f"{name}.json").read_text())


Writer = Callable[[Path], object]


class FileSum(NamedTuple):
    """Size and CRC-32 of a file."""

    num_bytes: int
    crc32: int


class CheckpointStore:
    """The checkpoints of one run folder. Only the main rank writes."""

    def __init__(self, run_dir: Path, keep: int = 3, keep_every: int = 0) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.keep_every = keep_every

    def publish(self, step: int, writers: dict[str, Writer]) -> Checkpoint:
        """Write each file with its writer, seal, and publish; on failure nothing changes but an OSError.

        Order: every file is fsynced, then the seal, then the rename, then the folder, then `latest`.
        """
        aside = self.aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            files = {name: write_synced(aside / name, write) for name, write in writers.items()}
            self.seal(aside, step, files)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return self.announce(step)

    def aside(self, step: int, token: str = "") -> Path:
        """Where the files of a save are written before it is published; `token` tells attempts apart."""
        return self.folder / f"{ASIDE}{folder_name(step)}{token and f'-{token}'}"

    def clear_asides(self) -> None:
        """Delete what saves left behind that were killed or failed; nobody may be saving meanwhile."""
        for path in self.folder.glob(f"{ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def seal(self, aside: Path, step: int, files: dict[str, FileSum]) -> None:
        """Write down what the folder must hold, and publish it by one rename; every file is synced already."""
        seal: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "files": {name: {"bytes": found.num_bytes, "crc32": found.crc32} for name, found in files.items()},
        }
        seal["crc32"] = zlib.crc32(json.dumps(seal).encode())
        write_json(aside / SEAL, seal)
        self._publish(aside, step)

    def adopt(self, aside: Path, step: int, bring: Callable[[str], object]) -> None:
        """Publish what another place holds: `bring` puts each file that the seal in `aside` names beside it.

        CheckpointError if it is not what the seal says; nothing is left of it then.
        """
        try:
            for name, expected in read_seal(aside, step)["files"].items():
                bring(name)
                if found := damage_of(aside / name, expected):
                    raise CheckpointError(found)
                fsync(aside / name)
            self._publish(aside, step)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _publish(self, aside: Path, step: int) -> None:
        fsync(aside / SEAL)
        fsync(aside)
        target = self.folder / folder_name(step)
        if target.exists():  # a damaged one of the same step: resuming fell back behind it
            shutil.rmtree(target)
        os.rename(aside, target)
        fsync(self.folder)

    def announce(self, step: int, report: Callable[[str], object] = print) -> Checkpoint:
        """Point to a checkpoint that has just been published, and delete old ones; trouble with these is reported."""
        replace_text(self.folder / "latest", folder_name(step) + "\n")
        self._rotate(report)
        return self.at(step)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, not verified."""
        return Checkpoint(self.folder / folder_name(step))

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

    def _rotate(self, report: Callable[[str], object]) -> None:
        """Delete all but the newest `keep` and every `keep_every`-th, once a newer one has been read back whole."""
        steps = self.steps()
        old = [step for step in steps[: -self.keep] if not (self.keep_every and step % self.keep_every == 0)]
        if not old:
            return
        newer = [step for step in reversed(steps) if step > old[-1]]
        damages = list(itertools.takewhile(bool, (verify(self.at(step).folder) for step in newer)))
        if len(damages) == len(newer):
            report(f"nothing was deleted: no checkpoint after step {old[-1]} is whole ({damages[0]})")
            return
        for step in old:
            shutil.rmtree(self.at(step).folder)


def verify(folder: Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint folder, or with some of its files; None when every byte is as it was written."""
    try:
        seal = read_seal(folder)
    except CheckpointError as error:
        return str(error)
    for name, expected in seal["files"].items():
        if only is not None and name not in only:
            continue
        if damage := damage_of(folder / name, expected):
            return damage
    return None


def damage_of(path: Path, expected: dict[str, int]) -> str | None:
    """What is wrong with a file, of which a seal says `expected`."""
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if crc32(path) != expected["crc32"]:
        return f"{path.name} has changed since it was written (CRC-32)"
    return None


def read_seal(folder: Path, expected_step: int | None = None) -> dict[str, Any]:
    """What the folder must hold; CheckpointError if it does not say so in a way that can be trusted.

    It must be of `expected_step`, by default the one that the folder is named after.
    """
    try:
        seal = json.loads((folder / SEAL).read_text())
        own = seal.pop("crc32")
        version, step, files = seal["format_version"], seal["step"], seal["files"]
        strange = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{SEAL} cannot be read ({error})") from error
    if zlib.crc32(json.dumps(seal).encode()) != own:
        raise CheckpointError(f"{SEAL} has changed since it was written (CRC-32)")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(f"it has format version {version}; this Kinema reads {READABLE_VERSIONS}")
    if (folder.name if expected_step is None else folder_name(expected_step)) != folder_name(step):
        raise CheckpointError(f"it was written at step {step} and has been renamed")
    if strange:
        raise CheckpointError(f"{SEAL} names files outside of the folder: {strange[:3]}")
    return seal


def write_synced(path: Path, write: Writer) -> FileSum:
    """Write a file, and see it safely on the disk."""
    write(path)
    fsync(path)
    return FileSum(path.stat().st_size, crc32(path))


def folder_name(step: int) -> str:
    """The folder of the checkpoint of a step, inside `checkpoints/`."""
    return f"step-{step:08d}"


def crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as handle:
        while piece := handle.read(1 << 24):
            value = zlib_ng.crc32(piece, value)
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
    fsync(aside)
    os.replace(aside, path)


def fsync(path: Path) -> None:
    """See a file or a folder's entries safely on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
