"""Saving a run and going on from what was saved: all that the loop knows of checkpoints."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.data.plan import Plan
from kinema.distributed.collectives import from_main
from kinema.distributed.process import Process
from kinema.identity import fingerprint
from kinema.training.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointError,
    CheckpointStore,
    json_writer,
    tensor_writer,
    text_writer,
    write_json,
)
from kinema.training.ema import EMA
from kinema.training.journal import KeyJournal
from kinema.training.outputs import Outputs
from kinema.training.progress import Progress
from kinema.training.seen import KEYS, data_seen, keys_writer, seen_by
from kinema.training.start import check_same_data
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
    _failed_saves: int = 0
    _saved_step: int = -1

    def save(self, *, must: bool) -> None:
        """Publish the state after the step that the run is at; a collective. Nothing happens if it is saved already.

        A failed save is counted and limited; one that `must` succeed (nothing comes after it) ends the run.
        """
        step = self.progress.step
        if step == self._saved_step:
            return
        engines = self.task.engines()
        model = self.task.finished_weights(dict(engines["model"].gather()))
        average = self.task.finished_weights(self.ema.full())
        optimizer: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for name, engine in engines.items():
            for state in engine.state_names:
                optimizer.update({f"{name}/{state}/{k}": v for k, v in engine.gather_state(state)})
            if name != "model":
                extra.update({f"{name}/{k}": v for k, v in engine.gather()})
        seen = self.progress.enter_distinct(self.process.is_main)
        training: dict[str, Any] = {
            "step": step,
            "plan": self.plan.state(step),
            "optimizer_steps": {name: engine.optimizer_step() for name, engine in engines.items()},
            "ledger": self.progress.whole_ledger().to_dict(),
            "start": self.progress.start.to_dict(),
        }
        problem = None
        if self.process.is_main:
            manifest = {
                **self.manifest,
                "data": {**self.manifest["data"], **data_seen(training["ledger"], self.progress.start)},
                "step": step,
                "fingerprints": {"raw": fingerprint(model), "ema": fingerprint(average)},
            }
            try:
                self.store.publish(
                    step,
                    {
                        "model.safetensors": tensor_writer(model),
                        "ema.safetensors": tensor_writer(average),
                        "optimizer.safetensors": tensor_writer({**optimizer, **extra}),
                        KEYS: keys_writer(seen, self.progress.start.seen.keys),
                        "training.json": json_writer(training),
                        "manifest.json": json_writer(manifest),
                        "config.yaml": text_writer(self.config_yaml),
                    },
                )
                write_json(self.outputs.run_dir / "ledger.json", training["ledger"])
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        self._after_save(from_main(problem), must)

    def _after_save(self, problem: str | None, must: bool) -> None:
        step = self.progress.step
        if problem is None:
            self._failed_saves = 0
            self._saved_step = step
            self.outputs.event(step, "checkpoint", "published")
            return
        self._failed_saves += 1
        limit = self.config.max_failed_saves
        self.outputs.event(step, "checkpoint failed", f"{problem} ({self._failed_saves} of {limit} in a row)")
        if self._failed_saves >= limit or must:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {problem}. Earlier ones are intact: "
                f"{self.store.steps()}."
            )

    def resume(self, last_step: int, journal: KeyJournal, *, weights: bool = False) -> bool:
        """Continue from the newest whole checkpoint, which the main rank chooses for all; a collective.

        False if there is none. What later steps wrote is taken out of metrics and `journal`. `weights` also brings
        the weights back, which a starting run has loaded before (`initial_weights`). ValueError if it lies behind
        `last_step`, or if the data is not the same.
        """
        found: Checkpoint | None = None
        if self.process.is_main:
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
        step = self._saved_step = found.document("training")["step"]
        own, start = seen_by(found) if self.process.is_main else (None, self.progress.start)
        self.progress.go_on(step, own, start)
        self.outputs.event(step, "resume", f"from {found.folder.name} on {self.process.world_size} rank(s)")
        return True

    def _check(self, found: Checkpoint, last_step: int) -> None:
        """Refuse to go on where another run would come of it."""
        check_same_data(found, self.manifest["data"]["hash"])
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
        training, tensors = found.document("training"), found.tensors("optimizer")
        for name, engine in self.task.engines().items():
            for state in engine.state_names:
                engine.load_state(state, {k: tensors[f"{name}/{state}/{k}"] for k in engine.parameters_with(state)})
            engine.set_optimizer_step(training["optimizer_steps"][name])
        self.ema.load(found.tensors("ema"))


def initial_weights(store: CheckpointStore, process: Process, module: torch.nn.Module, name: str = "model") -> None:
    """Give `module` its weights of the newest whole checkpoint, if there is one, before an engine clones them.

    `name` is the engine's: the model's weights have a file of their own, the others' lie with the optimiser.
    """
    found = from_main(store.newest(report=lambda line: None) if process.is_main else None)
    if found is None:
        return
    tensors = found.tensors("model" if name == "model" else "optimizer")
    prefix = "" if name == "model" else f"{name}/"
    own = {f"{prefix}{key}": parameter for key, parameter in module.named_parameters()}
    if missing := sorted(key for key, parameter in own.items() if parameter.requires_grad and key not in tensors):
        raise ValueError(
            f"{found.folder} lacks weights of this {name}, for example {missing[:3]}: it is another model's."
        )
    with torch.no_grad():
        for key in sorted(own.keys() & tensors.keys()):  # adapters come without their base
            parameter = own[key]
            if parameter.shape != tensors[key].shape:
                raise ValueError(
                    f"{found.folder} holds {key} of shape {list(tensors[key].shape)}, this configuration makes "
                    f"{list(parameter.shape)}: it is another model's. Give the run another name."
                )
            parameter.copy_(tensors[key])
