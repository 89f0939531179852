"""Which checkpoints a path on the command line stands for, whole or not."""

import argparse
from pathlib import Path

from kinema.training.checkpoint import SEAL, Checkpoint, CheckpointError, CheckpointStore


def add_path(parser: argparse.ArgumentParser) -> None:
    """The argument that `found` reads."""
    parser.add_argument("path", type=Path, help="a run folder, or one checkpoint in it")


def found(path: Path) -> list[Checkpoint]:
    """All checkpoints of a run folder, oldest first, or the one that the path names; nothing is verified."""
    if (path / SEAL).exists() or path.name.startswith("step-"):
        return [Checkpoint(path)]
    store = CheckpointStore(path)
    if not store.steps():
        raise CheckpointError(f"{path} holds no checkpoints. Name a run folder, or a checkpoint in it.")
    return [store.at(step) for step in store.steps()]
