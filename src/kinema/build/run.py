"""The run folder that a run is put together in."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kinema.config import Config, changed_keys
from kinema.distributed.collectives import from_main
from kinema.distributed.process import Process, seed_everything
from kinema.training.checkpoints.mirror import Mirror
from kinema.training.checkpoints.store import CheckpointStore
from kinema.training.records.outputs import Outputs
from kinema.training.run_folder import check_changes, open_run_folder, remove_refused


@dataclass(frozen=True)
class Run:
    """The run folder and what goes beside its checkpoints."""

    outputs: Outputs
    store: CheckpointStore
    config_yaml: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.outputs.run_dir


@contextmanager
def start_run(config: Config, config_yaml: str, process: Process) -> Iterator[Run]:
    """Open the run folder on the main rank, check it against the configuration, which is kept once the run goes on.

    Of a run that is refused while it is built, no folder is left.
    """
    seed_everything(config.seed)
    run_dir = Path(config.run_root) / config.name
    outputs = Outputs(run_dir, process.is_main, tracker=None)
    problem, lock = None, None
    if process.is_main:
        try:
            lock = open_run_folder(run_dir)
            stored = run_dir / "config.yaml"
            if config.checkpoint.remote is not None:
                told = functools.partial(outputs.event, 0, "resume")
                Mirror.below(config.checkpoint.remote, run_dir).restore(told)
            began = stored.exists() and bool(CheckpointStore(run_dir).steps())  # a failed start binds nobody
            differences = changed_keys(stored.read_text(), config_yaml) if began else []
            check_changes(run_dir, differences, config.allow_config_change)
            for line in differences:
                outputs.event(0, "configuration changed", line)
        except ValueError as error:
            problem = str(error)
    if problem := from_main(problem):
        raise ValueError(problem)
    try:
        yield Run(outputs, CheckpointStore(run_dir, config.checkpoint.keep, config.checkpoint.keep_every), config_yaml)
    except ValueError:
        if lock:
            remove_refused(run_dir)
        raise
    finally:
        if lock:
            lock.close()
