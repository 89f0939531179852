"""`kinema checkpoint verify`: read every byte of a run's checkpoints, and say whether they are as they were written."""

import argparse
import time

from kinema.training.checkpoints.pieces import PieceError
from kinema.training.checkpoints.save import sets_in
from kinema.training.checkpoints.store import Checkpoint, read_seal, verify
from kinema.training.verbs.found import add_path, found

EXIT_DAMAGED = 66
"""That of a run which finds no checkpoint to go on from, too."""


def problem_in(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint: a changed byte, a missing piece, a number that is not finite."""
    if damage := verify(checkpoint.folder):
        return damage
    for name in sets_in(checkpoint):
        try:
            with checkpoint.stored(name) as stored:
                for key in stored.shapes:
                    tensor = stored.full(key)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        return f"{key} in {checkpoint.files(name)[0].name} holds a number that is not finite"
        except PieceError as error:
            return str(error)
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_path(parser, afar=True)


def run(arguments: argparse.Namespace) -> int:
    """One line a checkpoint; PASS if all are whole."""
    number = damaged = 0
    for checkpoint in found(arguments.path):
        number += 1
        began = time.perf_counter()
        if problem := problem_in(checkpoint):
            damaged += 1
            print(f"{checkpoint.folder.name}: DAMAGED: {problem}")
            continue
        files = read_seal(checkpoint.folder)["files"].values()
        mib, seconds = sum(entry["bytes"] for entry in files) / 2**20, time.perf_counter() - began
        print(f"{checkpoint.folder.name}: whole, {len(files)} files, {mib:.1f} MiB, {mib / seconds:.0f} MiB/s")
    print(f"{'FAIL' if damaged else 'PASS'}: {number - damaged} of {number} are whole")
    return EXIT_DAMAGED if damaged else 0
