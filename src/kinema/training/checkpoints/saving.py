"""Saving a run and going on from what was saved: all that the loop knows of checkpoints."""

import itertools
import secrets
import shutil
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinema.data.steps.plan import Plan
from kinema.distributed.collectives import from_main, gather_objects, gather_to_main
from kinema.distributed.layout import Fill, Fragment
from kinema.distributed.process import Process
from kinema.training.checkpoints.mirror import Uploads
from kinema.training.checkpoints.pieces import Piece, PieceError, StoredTensors, share, whole
from kinema.training.checkpoints.save import Documents, Save, part_name, problem_of, write_part
from kinema.training.checkpoints.snapshot import HostMemory, owned
from kinema.training.checkpoints.store import Checkpoint, CheckpointConfig, CheckpointStore, NotSavedError
from kinema.training.ema import EMA
from kinema.training.records.journal import KeyJournal
from kinema.training.records.outputs import Outputs
from kinema.training.records.progress import Progress
from kinema.training.records.seen import data_seen, seen_by
from kinema.training.run_folder import keep_config
from kinema.training.start import check_averages, check_goes_on, check_same_data
from kinema.training.task import Task


@dataclass
class Saver:
    """Saves the state of a run after a step, and brings back that of its newest whole checkpoint."""

    process: Process
    task: Task
    plan: Plan
    ema: EMA
    store: CheckpointStore
    config: CheckpointConfig
    outputs: Outputs
    manifest: dict[str, Any]
    config_yaml: str
    progress: Progress
    """Where the run is; `resume` moves it."""
    uploads: Uploads | None = None
    """Of the main rank, where checkpoints are kept at an address, too."""
    _memory: HostMemory = field(default_factory=HostMemory)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "saving"))
    _save: "Save | None" = None
    """The one save that is not published yet."""
    seconds: float = 0.0
    """What the last save took, from the call to its publication."""
    _token: str = ""
    """Tells the files of this start from those that an earlier one, or a rank of it that lives on, leaves behind."""
    _failed_saves: int = 0
    _saved_step: int = -1

    # Saving. A thread copies what this rank owns while the next step computes its gradients: nothing moves before they
    # are there, and what is about to move waits for the copy (`hold_still`). Then it writes; when every rank has told
    # that its files are on the disk (`vote`, which travels with the step's sums), the main rank's seals and publishes.

    def save(self, *, must: bool) -> None:
        """Begin to save the state after the step that the run is at; a collective. Nothing if it is saved already.

        A save still under way is waited for. One that `must` succeed (nothing comes after it) is waited for, too, and
        if it fails the run ends; other failures are counted and limited.
        """
        step, called = self.progress.step, time.perf_counter()
        self.tell_uploads()
        if step != self._saved_step:
            self.settle(must=False)  # at most one at a time: it would need memory for a second copy
            waited = time.perf_counter() - called
            self._saved_step = step
            self._save = self._begin(step, called)
            self._save.waited_seconds = waited
            self._save.stall_seconds = time.perf_counter() - called
        if must:
            self.settle(must=True)

    def vote(self) -> float:
        """1 if a save is under way and this rank waits for nobody but the others."""
        return float(self._save is not None and self._save.work.done())

    def settle(self, *, must: bool) -> None:
        """Wait until the save under way is published or has failed; a collective."""
        while self._save is not None:
            futures.wait([self._save.work])
            self.advance(must=must)

    def advance(self, *, must: bool = False) -> None:
        """Once every rank has voted: publish what all have written, or tell how publishing went. A collective."""
        save = self._save
        assert save is not None, "nobody votes without a save"
        problems = [found for found in gather_objects(problem_of(save.work)) if found]
        if problems:
            self._save, self._saved_step = None, -1  # so that a stop signal at this very step tries again
            if self.process.is_main:
                shutil.rmtree(save.aside, ignore_errors=True)
            self._count_failure(save.step, problems[0], must)
        elif not save.is_written:
            save.is_written = True
            written = gather_to_main(save.work.result())
            if written is not None:
                save.work = self._thread.submit(save.publish, self.store, written, self.outputs.run_dir)
        else:
            self._save = None
            self._failed_saves = 0
            self._tell(save)

    def tell_uploads(self, wait_seconds: float = 0.0) -> None:
        """Tell what became of uploads; those under way are waited for, but not longer than this."""
        if self.uploads is None:
            return
        if wait_seconds:
            self.uploads.finish(wait_seconds)
        for event in self.uploads.take_events():
            self.outputs.event(**event)

    def hold_still(self) -> None:
        """Before weights, average or optimiser state move: wait until a save that has begun has copied them."""
        if self._save is not None and not self._save.copied.done():
            called = time.perf_counter()
            futures.wait([self._save.copied])
            self._save.stall_seconds += time.perf_counter() - called

    def _begin(self, step: int, called: float) -> "Save":
        """Let a thread copy what this rank owns, and write it beside what the main rank says of it."""
        self._token = self._token or from_main(secrets.token_hex(4))
        rank, ranks = self.process.rank, self.process.world_size
        aside = self.store.aside(step, self._token)
        parts = {part_name(name, rank, ranks): pieces for name, pieces in self._pieces().items()}
        for engine in self.task.engines().values():
            engine.before_move = self.hold_still
        self._memory.look_now()
        copied = self._thread.submit(self._memory.copy, parts)
        written = self._thread.submit(lambda: write_part(aside, copied.result()))
        return Save(step, aside, self._documents(step), copied, written, called)

    def _pieces(self) -> dict[str, list[Piece]]:
        """What this rank writes, by file."""
        engines, (rank, ranks) = self.task.engines(), (self.process.rank, self.process.world_size)
        model = engines["model"]
        optimizer: list[Piece] = []
        weights = {"model": model.shards(), **self.ema.averages}
        files: dict[str, list[Piece]] = {}
        for name, shards in weights.items():
            beside = self.task.beside(lambda shards=shards: dict(model.gather(shards)))  # type: ignore[misc]
            extra = share(itertools.starmap(whole, beside.items()), rank, ranks)
            files[name] = [*owned(model.layout, shards, model.names, rank, ranks), *extra]
        for name, engine in engines.items():
            for state in engine.state_names:
                names, prefix = engine.parameters_with(state), f"{name}/{state}/"
                optimizer += owned(engine.layout, engine.state(state), names, rank, ranks, prefix)
            if name != "model":
                optimizer += owned(engine.layout, engine.shards(), engine.names, rank, ranks, f"{name}/")
        return {**files, "optimizer": optimizer}

    def _documents(self, step: int) -> Documents:
        """What stands beside the tensors; a collective."""
        seen = self.progress.enter_distinct(self.process.is_main)
        training: dict[str, Any] = {
            "step": step,
            "plan": self.plan.state(step),
            "optimizer_steps": {name: engine.optimizer_step() for name, engine in self.task.engines().items()},
            "loss_scales": {name: e.loss_scale.state() for name, e in self.task.engines().items() if e.loss_scale},
            "ledger": self.progress.whole_ledger().to_dict(),
            "start": self.progress.start.to_dict(),
            "losses": self.progress.losses,
        }
        data = {**self.manifest["data"], **data_seen(training["ledger"], self.progress.start)}
        manifest = {**self.manifest, "data": data, "step": step}
        return Documents(training, manifest, seen, self.progress.start, self.config_yaml)

    def _tell(self, save: "Save") -> None:
        """How long a save took, in the metrics and on the console."""
        save.ended = save.ended or time.perf_counter()  # of ranks that do not publish
        record = save.record()
        self.seconds = record["seconds"]
        self.outputs.write(record)
        if self.uploads:
            self.uploads.offer(self.store.at(save.step))
        for warning in save.warnings:
            self.outputs.event(save.step, "checkpoint", warning)
        self.outputs.event(save.step, "checkpoint", save.line())

    def _count_failure(self, step: int, problem: str, must: bool) -> None:
        self._failed_saves += 1
        limit = self.config.max_failed_saves
        self.outputs.event(step, "checkpoint failed", f"{problem} ({self._failed_saves} of {limit} in a row)")
        if self._failed_saves >= limit or must:
            raise NotSavedError(
                f"the checkpoint of step {step} could not be written: {problem}. Earlier ones are intact: "
                f"{self.store.steps()}."
            )

    def resume(self, last_step: int, journal: KeyJournal, *, weights: bool = False) -> bool:
        """Continue from the newest whole checkpoint, which the main rank chooses for all; a collective.

        False if there is none. What later steps wrote is taken out of metrics and `journal`. `weights` also brings
        the weights back, which a starting run has loaded before (`initial_weights`). ValueError if it lies behind
        `last_step`, or if the data is not the same.
        """
        self.settle(must=False)
        found: Checkpoint | None = None
        if self.process.is_main:
            self.store.clear_asides()
            found = self.store.newest(report=lambda line: self.outputs.event(0, "resume", line))
            for lines in (self.outputs, journal):
                lines.truncate_after(found.document("training")["step"] if found else 0)
        found = from_main(found)
        if found is None:
            return False
        self._check(found, last_step)
        if weights:
            self._load_weights(found)
        self._load_tensors(found)
        training = found.document("training")
        step = self._saved_step = training["step"]
        own, start = seen_by(found) if self.process.is_main else (None, self.progress.start)
        self.progress.go_on(step, training.get("losses", []), own, start)
        if self.uploads:
            self.uploads.offer(found)
        self.outputs.event(step, "resume", f"from {found.folder.name} on {self.process.world_size} rank(s)")
        return True

    def keep_config(self) -> None:
        """Write the configuration into the run folder: after `resume`, so that a start that fails changes nothing."""
        if self.process.is_main:
            keep_config(self.outputs.run_dir, self.config_yaml)

    def _check(self, found: Checkpoint, last_step: int) -> None:
        """Refuse to go on where another run would come of it."""
        check_same_data(found, self.manifest["data"]["hash"])
        check_averages(found, self.ema)
        training = found.document("training")
        if training["step"] > last_step:
            raise ValueError(
                f"steps={last_step} lies before the newest checkpoint, step {training['step']}, of this run."
            )
        planned = self.plan.state(training["step"])
        if training["plan"] != planned:
            raise ValueError(
                f"the data or its plan has changed since the checkpoint: {training['plan']} was saved, {planned} is "
                "planned now. Give the run another name."
            )

    def _load_weights(self, found: Checkpoint) -> None:
        for name, engine in self.task.engines().items():
            tensors = found.tensors("model" if name == "model" else "optimizer")
            prefix = "" if name == "model" else f"{name}/"
            engine.load({key: tensors[f"{prefix}{key}"] for key in engine.names})

    def _load_tensors(self, found: Checkpoint) -> None:
        """Moments and average; the weights came before the engine was built (`initial_weights`)."""
        training = found.document("training")
        with found.stored("optimizer") as stored:
            for name, engine in self.task.engines().items():
                for state in engine.state_names:
                    engine.fill_state(state, reader(stored, f"{name}/{state}/"))
                engine.set_optimizer_step(training["optimizer_steps"][name])
                if engine.loss_scale is not None and name in training.get("loss_scales", {}):
                    engine.loss_scale.load(training["loss_scales"][name])
        for average in self.ema.averages:
            with found.stored(average) as stored:
                self.ema.fill(average, reader(stored))


def reader(stored: StoredTensors, prefix: str = "") -> Fill:
    """Gives an engine's fragments their elements; PieceError for numbers that are not finite."""

    def fill(fragment: Fragment, target: Tensor) -> None:
        stored.read(target, f"{prefix}{fragment.name}", fragment.start)
        if not target.isfinite().all():
            raise PieceError(f"{prefix}{fragment.name} holds a number that is not finite: delete this checkpoint")

    return fill


def initial_weights(store: CheckpointStore, process: Process, module: torch.nn.Module, name: str = "model") -> None:
    """Give `module` its weights of the newest whole checkpoint, if there is one, before an engine clones them.

    `name` is the engine's: the model's weights have a file of their own, the others' lie with the optimiser.
    """
    found = from_main(store.newest(report=lambda line: None) if process.is_main else None)
    if found is None:
        return
    check_goes_on(found)
    prefix = "" if name == "model" else f"{name}/"
    own = {f"{prefix}{key}": parameter for key, parameter in module.named_parameters()}
    with found.stored("model" if name == "model" else "optimizer") as stored, torch.no_grad():
        if missing := sorted(key for key, parameter in own.items() if parameter.requires_grad and key not in stored):
            raise ValueError(
                f"{found.folder} lacks weights of this {name}, for example {missing[:3]}: it is another model's."
            )
        for key in sorted(own.keys() & stored.shapes.keys()):  # adapters come without their base
            if own[key].shape != stored.shapes[key]:
                raise ValueError(
                    f"{found.folder} holds {key} of shape {list(stored.shapes[key])}, this configuration makes "
                    f"{list(own[key].shape)}: it is another model's. Give the run another name."
                )
            own[key].copy_(stored.full(key))
