"""`kinema checkpoint average`: weights made of several checkpoints' weights, as a checkpoint that the sampler loads.

The plain mean: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima. With `--length`, the average that the
run would have kept with another length, made of those that it did keep (`ema.power`): Karras et al. 2024, EDM2.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.training.checkpoints.store import Checkpoint, CheckpointError, CheckpointStore
from kinema.training.ema import average_name
from kinema.training.profiles import Profile, distance, exponent_of, factors_of
from kinema.training.run_folder import Weights
from kinema.training.verbs.remade import remake

Part = tuple[Checkpoint, str]
"""A set of weights: a checkpoint, and what it calls them (`model`, `ema`, `ema_0.050`)."""


def weighted_sum(parts: Sequence[Part], factors: Sequence[float]) -> dict[str, Tensor]:
    """The sum of several sets of weights, each times its factor, summed in float64.

    What is no number with a fraction (a counter) is the last one's. ValueError if they are of different models.
    """
    with ExitStack() as stack:
        stored = [stack.enter_context(source.stored(name)) for source, name in parts]
        for (source, _), one in zip(parts, stored, strict=True):
            if one.shapes != stored[0].shapes:
                raise ValueError(f"{source.folder} and {parts[0][0].folder} hold different models: no mean.")
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
    parts, factors = [(source, name) for source in sources], [1 / len(sources)] * len(sources)
    marks = {source.folder.name: source.document("manifest")["fingerprints"][weights.value] for source in sources}
    return _write(parts, factors, to, {"of": marks, "weights": weights.value})


def synthesize(sources: Sequence[Checkpoint], to: Path, length: float) -> tuple[Path, float]:
    """Write the average of this length at the last checkpoint into the new run folder `to`.

    Returns the new checkpoint's folder, and how far its profile is from the wanted one (0 is exact). ValueError if
    the checkpoints hold no averages to make it of.
    """
    parts, profiles = [], []
    for source in sources:
        for kept in source.document("manifest")["ema"].get("power", []):
            parts.append((source, average_name(kept)))
            profiles.append(Profile(exponent_of(kept), source.step))
    if not parts:
        raise ValueError(
            f"{sources[-1].folder} holds no averages to make others of: train with ema.power=[0.05,0.1], or leave "
            "--length out for the plain mean of checkpoints."
        )
    wanted = Profile(exponent_of(length, "--length"), sources[-1].step)
    factors = factors_of(profiles, wanted)
    of = [f"{source.folder.name}/{name}" for source, name in parts]
    made = _write(parts, factors.tolist(), to, {"of": of, "length": length})
    return made, distance(profiles, factors, wanted)


def _write(parts: Sequence[Part], factors: Sequence[float], to: Path, said: dict[str, Any]) -> Path:
    made = weighted_sum(parts, factors)
    note = {"average": {**said, "factors": list(factors)}}
    return remake(parts[-1][0], to, {part: lambda: made for part in ("model", "ema")}, note=note).folder


def chosen(run: Path, steps: Sequence[int], last: int | None, least: int = 2) -> list[Checkpoint]:
    """The checkpoints of a run that are to be averaged, each verified; ValueError unless there are `least` or more.

    CheckpointError names all that are damaged or not there, and says which to take.
    """
    store = CheckpointStore(run)
    wanted = sorted(set(steps)) or store.steps()[-(last or 0) :]
    if len(wanted) < least:
        raise ValueError(f"a mean takes two checkpoints or more; {run} has {store.steps()}. Type --steps or --last.")
    opened: dict[int, Checkpoint] = {}
    problems = []
    for step in wanted:
        try:
            opened[step] = store.open(step)
        except CheckpointError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        advice = (
            f"Type --steps {' '.join(map(str, opened))}, or --last N" if len(opened) >= least else "Too few are left"
        )
        raise CheckpointError(f"{'; '.join(problems)}. {advice}, for a mean of whole ones alone.")
    return list(opened.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, required=True, help="new run folder that will hold the mean")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", type=int, nargs="+", default=[], help="steps of the checkpoints; default: all")
    which.add_argument("--last", type=int, help="the newest so many")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--weights", choices=[one.value for one in Weights], default="ema", help="the plain mean of these"
    )
    what.add_argument("--length", type=float, help="an average of this share of all steps, e.g. 0.08, out of ema.power")


def run(arguments: argparse.Namespace) -> int:
    """Average, and say of what."""
    sources = chosen(arguments.run, arguments.steps, arguments.last, least=2 if arguments.length is None else 1)
    if arguments.length is not None:
        made, off = synthesize(sources, arguments.to, arguments.length)
        print(f"READY: {made} holds the average of length {arguments.length}, its profile {off:.2%} off")
        return 0
    made = average(sources, arguments.to, Weights(arguments.weights))
    print(f"READY: {made} holds the mean of {', '.join(source.folder.name for source in sources)}")
    return 0
