"""`kinema checkpoint convert`: the same state in one file or in the parts of many ranks, or weights alone, smaller."""

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor

from kinema.training.checkpoints.save import sets_in
from kinema.training.checkpoints.store import CONFIG, Checkpoint
from kinema.training.run_folder import checkpoint_of
from kinema.training.verbs.found import add_path
from kinema.training.verbs.remade import documents_of, remake

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = "optimizer"
"""The one set of tensors that only training needs."""


def convert(
    source: Checkpoint, to: Path, *, ranks: int = 1, dtype: str = "float32", weights_only: bool = False
) -> Path:
    """Write `source` into the new run folder `to` as `ranks` ranks would; returns the new checkpoint's folder.

    All that the checkpoint holds goes along. Anything but float32 is for sampling: no run may go on from rounded
    weights, so that its state is left out.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} must be at least 1.")
    weights_only = weights_only or dtype != "float32"
    kept = [name for name in sets_in(source) if name != STATE or not weights_only]
    documents = tuple(name for name in documents_of(source) if name == CONFIG or not weights_only)

    def cast(name: str) -> dict[str, Tensor]:
        tensors = source.tensors(name)
        return {key: value.to(DTYPES[dtype]) if value.is_floating_point() else value for key, value in tensors.items()}

    tensors = {name: functools.partial(cast, name) for name in kept}
    return remake(source, to, tensors, ranks=ranks, documents=documents, note={"converted": {"dtype": dtype}}).folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_path(parser)
    parser.add_argument("--to", type=Path, required=True, help="new run folder that will hold the checkpoint")
    parser.add_argument("--ranks", type=int, default=1, help="in the parts of so many ranks; 1, one file of each kind")
    parser.add_argument("--weights-only", action="store_true", help="leave out what only training needs")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: weights only")


def run(arguments: argparse.Namespace) -> int:
    """Convert the checkpoint, the newest of a run."""
    a = arguments
    source = checkpoint_of(str(a.path), "path")
    made = convert(source, a.to, ranks=a.ranks, dtype=a.dtype, weights_only=a.weights_only)
    print(f"READY: {made} holds {source.folder.name} of {source.folder.parent.parent}")
    return 0
