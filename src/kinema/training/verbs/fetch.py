"""`kinema checkpoint fetch`: a run at an address becomes a run folder, to be sampled, converted or continued."""

import argparse
from pathlib import Path

from kinema.training.checkpoints.mirror import Mirror, run_address
from kinema.training.checkpoints.store import CheckpointError, CheckpointStore
from kinema.training.verbs.found import answering


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("address", help="a run at an address: checkpoint.remote/NAME")
    parser.add_argument("--to", type=Path, required=True, help="run folder for it, without checkpoints so far")
    parser.add_argument("--step", type=int, help="of which checkpoint; by default the newest that is whole")


def run(arguments: argparse.Namespace) -> int:
    """Fetch the checkpoint and what it needs, every byte verified."""
    to: Path = arguments.to
    if there := CheckpointStore(to).steps():
        raise ValueError(f"--to {to} holds checkpoints already, of steps {there}; name another folder.")
    mirror = Mirror(run_address(arguments.address, "address"), to)
    with answering():
        there, step = mirror.steps(), arguments.step
        if not there or step not in (None, *there):
            raise CheckpointError(f"{arguments.address} holds no such checkpoint; there are {there}.")
        to.mkdir(parents=True, exist_ok=True)
        found = mirror.fetch_newest(print) if step is None else mirror.fetch(step)
    assert found is not None
    print(f"READY: {found.folder} of {arguments.address}")
    return 0
