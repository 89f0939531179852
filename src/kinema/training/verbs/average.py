"""`kinema checkpoint average`: the mean of several checkpoints' weights, as a checkpoint that the sampler loads.

Averaging weights along a training run: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from kinema.training.checkpoint import Checkpoint, CheckpointStore
from kinema.training.run_folder import Weights
from kinema.training.verbs.remade import remake


def weighted_sum(sources: Sequence[Checkpoint], factors: Sequence[float], name: str) -> dict[str, Tensor]:
    """The sum of the tensors of `model` or `ema`, each times its checkpoint's factor, summed in float64.

    What is no number with a fraction (a counter) is the last checkpoint's. ValueError if they are of different models.
    """
    with ExitStack() as stack:
        stored = [stack.enter_context(source.stored(name)) for source in sources]
        for source, one in zip(sources, stored, strict=True):
            if one.shapes != stored[0].shapes:
                raise ValueError(f"{source.folder} and {sources[0].folder} hold different models: no mean.")
        result = {}
        for key in stored[0].shapes:
            last = stored[-1].full(key)
            if last.is_floating_point():
                whole = torch.zeros(last.shape, dtype=torch.float64)
                for one, factor in zip(stored, factors, strict=True):
                    whole.add_(one.full(key).double(), alpha=factor)
                last = whole.to(last.dtype)
            result[key] = last
        return result


def average(sources: Sequence[Checkpoint], to: Path, weights: Weights) -> Path:
    """Write the mean of the checkpoints' weights into the new run folder `to`; returns the new checkpoint's folder."""
    name = "model" if weights is Weights.raw else "ema"
    factors = [1 / len(sources)] * len(sources)
    mean = weighted_sum(sources, factors, name)
    marks = {source.folder.name: source.document("manifest")["fingerprints"][weights.value] for source in sources}
    note = {"average": {"of": marks, "weights": weights.value, "factors": factors}}
    return remake(sources[-1], to, {part: lambda: mean for part in ("model", "ema")}, note=note).folder


def chosen(run: Path, steps: Sequence[int], last: int | None) -> list[Checkpoint]:
    """The checkpoints of a run that are to be averaged, each verified; ValueError unless there are two or more."""
    store = CheckpointStore(run)
    wanted = sorted(set(steps)) or store.steps()[-(last or 0) :]
    if len(wanted) < 2:
        raise ValueError(f"a mean takes two checkpoints or more; {run} has {store.steps()}. Type --steps or --last.")
    return [store.open(step) for step in wanted]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, required=True, help="new run folder that will hold the mean")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", type=int, nargs="+", default=[], help="steps of the checkpoints; default: all")
    which.add_argument("--last", type=int, help="the newest so many")
    parser.add_argument("--weights", choices=[one.value for one in Weights], default="ema")


def run(arguments: argparse.Namespace) -> int:
    """Average, and say of what."""
    sources = chosen(arguments.run, arguments.steps, arguments.last)
    made = average(sources, arguments.to, Weights(arguments.weights))
    print(f"READY: {made} holds the mean of {', '.join(source.folder.name for source in sources)}")
    return 0
