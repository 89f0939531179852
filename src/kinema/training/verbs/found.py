"""Which checkpoints a path or an address on the command line stands for, whole or not."""

import argparse
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.data.storage.address import Address
from kinema.data.storage.store import StoreDown
from kinema.training.checkpoints.mirror import Mirror, run_address
from kinema.training.checkpoints.store import SEAL, Checkpoint, CheckpointError, CheckpointStore


def add_path(parser: argparse.ArgumentParser, afar: bool = False) -> None:
    """The argument that `found` reads; `afar` lets it be an address."""
    more = ", or a run at an address (s3://BUCKET/FOLDER/NAME)" if afar else ""
    parser.add_argument("path", type=str if afar else _local, help=f"a run folder, or one checkpoint in it{more}")


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address; first: kinema checkpoint fetch {text} --to runs/NAME")
    return Path(text)


@contextmanager
def answering() -> Iterator[None]:
    """For work at an address: StoreDown when nobody answers there."""
    try:
        yield
    except OSError as error:
        raise StoreDown(str(error)) from error


def found(path: str, only: Collection[str] | None = None) -> Iterator[Checkpoint]:
    """All checkpoints of a run, oldest first, or the one that the path names; nothing is verified.

    Those at an address are copied here one after the other, `only` these files of them if so, and are gone when the
    next one comes.
    """
    if Address.parse(path, "path") is not None:
        yield from _found_afar(path, only)
        return
    folder = Path(path)
    if (folder / SEAL).exists() or folder.name.startswith("step-"):
        yield Checkpoint(folder)
        return
    store = CheckpointStore(folder)
    if not store.steps():
        raise CheckpointError(f"{path} holds no checkpoints. Name a run folder, or a checkpoint in it.")
    yield from map(store.at, store.steps())


def _found_afar(path: str, only: Collection[str] | None) -> Iterator[Checkpoint]:
    address = run_address(path, "path")
    with answering():
        steps = Mirror(address, Path()).steps()
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoints. Name the folder of one run: checkpoint.remote/NAME.")
    for step in steps:
        with tempfile.TemporaryDirectory() as folder:
            with answering():
                checkpoint = Mirror(address, Path(folder)).bring(step, only)
            yield checkpoint
