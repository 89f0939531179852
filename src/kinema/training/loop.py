"""The training loop: steps, checkpoints, validation, samples. What a pack costs is the task's business."""

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from kinema.data.ledger import Ledger, Quarantine
from kinema.data.pack import Failure, Fallback, Pack
from kinema.data.plan import Plan
from kinema.data.quarantine import QUARANTINE, write_failures
from kinema.data.shards import DatasetIndex
from kinema.data.sightings import SeenKeys, Sightings
from kinema.distributed.collectives import all_sum, all_sum_array, from_main, gather_objects
from kinema.distributed.engine import MOMENTS, Engine
from kinema.distributed.process import Process
from kinema.identity import fingerprint
from kinema.training.balance import Balance
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
from kinema.training.dit_task import noise_table
from kinema.training.ema import EMA
from kinema.training.journal import KeyJournal
from kinema.training.metrics import Clock, LineFile, LoggingConfig, MetricsFile, WandbTracker
from kinema.training.seen import KEYS, Start, data_seen, keys_writer, seen_by
from kinema.training.start import check_same_data

EXIT_PREEMPTED = 75
"""Exit status of a run that a signal stopped after its checkpoint was written."""
EXIT_FAILED_CHECK = 1
"""Exit status of a run whose final check says FAIL."""


LANE_PHASES = ("encode", "forward")
"""What a lane does without waiting for another, by phases of the clock; the backward of the last one waits."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; nothing of that step was saved."""


class Task(Protocol):
    """What the loop needs from `task=dit` and `task=vae`."""

    def engines(self) -> dict[str, Engine]:
        """Engines by name; the first, `model`, is the one that is averaged and sampled."""
        ...

    def micro_step(self, pack: Pack, total_weight: float, learning_rate: float, clock: Clock) -> dict[str, float]:
        """Forward, backward and `engine.step` of one pack; values to be summed over packs and ranks."""
        ...

    def validate(self, packs: list[Pack]) -> dict[str, float]:
        """Sums over held-out packs: `loss`, `weight` and more."""
        ...

    def finished_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full weights of the model as a checkpoint holds them (the VAE adds its latent statistics)."""
        ...


@dataclass
class ValidationConfig:
    """Loss on held-out clips with noise that never changes."""

    every_steps: int = 250
    """Steps between validations; 0 makes none."""
    clips: int = 64
    """How many held-out clips, rounded up to whole steps."""


@dataclass
class Outputs:
    """What the main rank writes besides checkpoints. Other ranks hold the same object and write nothing."""

    run_dir: Path
    is_main: bool
    tracker: WandbTracker | None
    metrics: MetricsFile = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.run_dir)

    def write(self, record: dict[str, Any]) -> None:
        """One record to the metrics file and the tracker."""
        if self.is_main:
            self.metrics.write(record)
            if self.tracker:
                self.tracker.write(record)

    def truncate_after(self, step: int) -> None:
        """Forget what steps wrote that a resumed run will do again; clips not to be tried were read from it before."""
        for lines in (self.metrics, LineFile(self.run_dir / QUARANTINE)):
            lines.truncate_after(step)

    def event(self, step: int, event: str, detail: str) -> None:
        """Something a person should know of, on the console and in the metrics."""
        if self.is_main:
            tqdm.write(f"step {step}: {event}: {detail}")
            self.write({"kind": "event", "step": step, "event": event, "detail": detail})


SampleMaker = Callable[[int, dict[str, Tensor]], dict[str, Any] | None]
"""(step, EMA weights) -> a `sample` or `reconstruction` record; runs on the main rank."""


@dataclass
class Trainer:
    """One run. `fit` moves it to `steps`, from wherever its newest checkpoint stands."""

    process: Process
    task: Task
    plan: Plan
    index: DatasetIndex
    load: Callable[[int, int], Iterator[list[Pack]]]
    """(first step, number of steps) -> this rank's packs, step by step."""
    load_validation: Callable[[], list[list[Pack]]] | None
    learning_rate: Callable[[int], float]
    steps: int
    ema: EMA
    store: CheckpointStore
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    logging: LoggingConfig
    outputs: Outputs
    quarantine: Quarantine
    manifest: dict[str, Any]
    config_yaml: str
    sample_every_steps: int
    make_samples: SampleMaker | None
    unread_keys: Callable[[], str | None]
    """What is wrong with the configuration once the first step has read all it needs; the main rank's answer counts."""

    final_check: Callable[[dict[str, Tensor]], tuple[bool, str]] | None = None
    """EMA weights -> passed, verdict; runs on the main rank after the last step."""
    step: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    start: Start = field(default_factory=Start)
    """What the weights had seen before this run; the main rank's counts."""
    sightings: Sightings = field(init=False)
    _stop_signal: str | None = None
    _stop: str | None = None
    _failed_saves: int = 0
    _saved_step: int = -1

    def __post_init__(self) -> None:
        self._journal = KeyJournal(self.outputs.run_dir, self.process.rank)

    # The story

    def fit(self) -> int:
        """Train to the last step; the exit status: 0, or 75 when a signal stopped the run after a checkpoint."""
        self._resume()
        self._catch_signals()
        validation = self.load_validation() if self.load_validation and self.validation.every_steps else None
        self._tell_heldout_failures(validation or [])
        clock, window = Clock(), Window()
        bar = tqdm(
            total=self.steps, initial=self.step, desc=self.outputs.run_dir.name, unit="step",
            disable=not self.process.is_main, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        packs_of_steps = self.load(self.step, self.steps - self.step)
        while self.step < self.steps:
            with clock.phase("data"):
                packs = next(packs_of_steps)
            totals = self._train_step(packs, clock)
            window.add(totals)
            bar.update()
            bar.set_postfix_str(f"loss {totals['loss']:.4f}", refresh=False)
            first = window.first_of_run
            if first:
                self._check_configuration()
            if first or self.step % self.logging.every_steps == 0 or self.step == self.steps:
                self._log(window, clock)
            if validation and due(self.step, self.validation.every_steps, self.steps):
                self._validate(validation)
            if self.make_samples and due(self.step, self.sample_every_steps, self.steps):
                self._sample()
            if self._stop or due(self.step, self.checkpoint.every_steps, self.steps):
                self._save()
            if self._stop:
                bar.close()
                self._finish(f"stopped by {self._stop} at step {self.step}; the same command continues")
                return EXIT_PREEMPTED
        bar.close()
        passed = self._final_check()
        self._finish("finished")
        return 0 if passed else EXIT_FAILED_CHECK

    def _check_configuration(self) -> None:
        """Stop all ranks if a key was set that nothing has read by now."""
        if problem := from_main(self.unread_keys()):
            raise ValueError(problem)

    def _final_check(self) -> bool:
        weights = self.ema.full()
        passed = True
        if self.final_check:
            passed, verdict = self.final_check(self.task.finished_weights(weights))
            self.outputs.event(self.step, "check", verdict)
        return from_main(passed)

    def _train_step(self, packs: list[Pack], clock: Clock) -> dict[str, float]:
        """One optimiser step: this rank's packs, then weights, then the average. Returns totals over all ranks."""
        # The weight of the whole step must be known before the first backward: failed clips count 0 everywhere.
        total_weight = all_sum([sum(float(pack.weights.sum()) for pack in packs)])[0]
        if total_weight == 0:
            raise ValueError(
                f"no clip of step {self.step} can be shown: {(packs[0].failures + packs[0].withdrawn)[:3]}. If "
                "data.rights withdrew them, start a new run from the last checkpoint: another name, and init_from."
            )
        learning_rate = self.learning_rate(self.step)
        sums = {f"data_sets/{name}": 0.0 for name in self.index.parts}  # on every rank, whatever it reads
        balance = Balance(self.plan.lanes, self.plan.balanced_lanes)
        for pack in packs:
            before = clock.spent(*LANE_PHASES)
            for key, value in self.task.micro_step(pack, total_weight, learning_rate, clock).items():
                sums[key] = sums.get(key, 0.0) + value
            balance.add(pack, clock.spent(*LANE_PHASES) - before)
            for key, value in pack.storage.items():
                sums[key] = sums.get(key, 0.0) + value
            self.ledger.record(pack, self.index)
            for number in pack.entries if self.index.parts else ():
                sums[f"data_sets/{self.index.place(number)[0]}"] += 1
            self.sightings.add_shown(pack)
        with clock.phase("optimizer"):
            self.ema.update(self.step + 1)
        sums["failures"] = float(sum(len(pack.failures) for pack in packs))
        sums["fallbacks"] = float(sum(len(pack.fallbacks) for pack in packs))
        sums["stop_signals"] = float(self._stop_signal is not None)
        over_ranks = all_sum([*sums.values(), *balance.values()])
        totals = {**dict(zip(sums, over_ranks, strict=False)), **Balance.summary(over_ranks[len(sums) :])}
        if not math.isfinite(totals["loss"]):
            keys = [key for everyone in gather_objects([k for p in packs for k in p.keys]) for key in everyone]
            raise NonFiniteLoss(
                f"the loss of step {self.step} is {totals['loss']}. Clips: {keys}. The last checkpoint is intact."
            )
        self.step += 1
        if self.logging.keys:
            self._journal.write(self.step, packs)
        if totals.pop("failures"):
            self._quarantine([failure for pack in packs for failure in pack.failures])
        if totals.pop("fallbacks"):
            self._tell_fallbacks([fallback for pack in packs for fallback in pack.fallbacks])
        self._stop = next(filter(None, gather_objects(self._stop_signal))) if totals.pop("stop_signals") else None
        totals["lanes/padding"] = totals.pop("padding_tokens") / totals["tokens"]
        totals["lr"] = learning_rate
        totals["grad_norm"] = self._model_engine().grad_norm()
        return totals

    # What happens between steps

    def _log(self, window: "Window", clock: Clock) -> None:
        record = window.close()
        record.update(kind="train", step=self.step, seconds=clock.read(record.pop("steps")))
        self.outputs.write(record)

    def _validate(self, validation: list[list[Pack]]) -> None:
        totals: dict[str, float] = {}
        for packs in validation:
            for key, value in self.task.validate(packs).items():
                totals[key] = totals.get(key, 0.0) + value
        totals = dict(zip(totals, all_sum(list(totals.values())), strict=True))
        weight = totals.pop("weight")
        record: dict[str, Any] = {"kind": "validation", "step": self.step}
        if "noise_sum_0" in totals:
            record["loss_by_noise"] = noise_table(totals)
        record.update({key: value / weight for key, value in totals.items()})
        self.outputs.write(record)

    def _sample(self) -> None:
        """Samples from the averaged weights. All ranks gather; the main rank alone samples, the others wait."""
        weights = self.ema.full()
        if self.process.is_main and self.make_samples:
            record = self.make_samples(self.step, self.task.finished_weights(weights))
            if record is not None:
                self.outputs.write({"step": self.step, **record})

    def _quarantine(self, failures: list[Failure]) -> None:
        """Write damaged clips down, on the main rank, and stop all ranks together when there are too many."""
        everyone = [failure for rank in gather_objects(failures) for failure in rank]
        if self.process.is_main:
            write_failures(self.outputs.run_dir, self.step, everyone)
        for failure in everyone:
            self.outputs.event(self.step, "quarantine", f"{failure.key} in {failure.shard}: {failure.reason}")
        self.quarantine.check(self._whole_ledger())

    def _tell_heldout_failures(self, validation: list[list[Pack]]) -> None:
        """Held-out clips are read once, before the first step; those that fail are missing from every validation."""
        failures = [failure for packs in validation for pack in packs for failure in pack.failures]
        for failure in (failure for rank in gather_objects(failures) for failure in rank):
            self.outputs.event(self.step, "held-out clip failed", f"{failure.key} in {failure.shard}: {failure.reason}")

    def _tell_fallbacks(self, fallbacks: list[Fallback]) -> None:
        """Show which decoders stepped in, once for each cause, and stop all ranks when it happens too often."""
        causes: dict[str, list[str]] = {}
        for fallback in (fallback for rank in gather_objects(fallbacks) for fallback in rank):
            causes.setdefault(fallback.cause(), []).append(fallback.key)
        for cause, keys in causes.items():
            self.outputs.event(self.step, "fallback", f"{len(keys)} clip(s), {cause} ({', '.join(keys[:5])})")
        self.quarantine.check(self._whole_ledger())

    def _whole_ledger(self) -> Ledger:
        """The ledgers of all ranks added up; a collective."""
        whole = Ledger()
        for values in gather_objects(self.ledger.to_dict()):
            whole.merge(Ledger.from_dict(values))
        return whole

    def _enter_distinct(self) -> SeenKeys:
        """Enter what was shown for the first time in the ledger, and give all that was; a collective."""
        times = all_sum_array(self.sightings.times)
        if not self.process.is_main:
            return SeenKeys()
        self.ledger.record_distinct(self.sightings.new_clips(times, self.index))
        return self.sightings.seen(times)

    # Signals

    def _catch_signals(self) -> None:
        def remember(number: int, frame: FrameType | None) -> None:
            self._stop_signal = signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, remember)

    # Checkpoints

    def _model_engine(self) -> Engine:
        return self.task.engines()["model"]

    def _save(self) -> None:
        """Gather the state on all ranks, publish on the main one. A failed save is counted and limited."""
        if self.step == self._saved_step:
            return
        engines = self.task.engines()
        model = self.task.finished_weights(dict(engines["model"].gather()))
        average = self.task.finished_weights(self.ema.full())
        optimizer: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for name, engine in engines.items():
            for moment in MOMENTS:
                optimizer.update({f"{name}/{moment}/{k}": v for k, v in engine.gather(engine.moments(moment))})
            if name != "model":
                extra.update({f"{name}/{k}": v for k, v in engine.gather()})
        seen = self._enter_distinct()
        training: dict[str, Any] = {
            "step": self.step,
            "plan": self.plan.state(self.step),
            "optimizer_steps": {name: engine.optimizer_step() for name, engine in engines.items()},
            "ledger": self._whole_ledger().to_dict(),
            "start": self.start.to_dict(),
        }
        problem = None
        if self.process.is_main:
            manifest = {
                **self.manifest,
                "data": {**self.manifest["data"], **data_seen(training["ledger"], self.start)},
                "step": self.step,
                "fingerprints": {"raw": fingerprint(model), "ema": fingerprint(average)},
            }
            try:
                self.store.publish(
                    self.step,
                    {
                        "model.safetensors": tensor_writer(model),
                        "ema.safetensors": tensor_writer(average),
                        "optimizer.safetensors": tensor_writer({**optimizer, **extra}),
                        KEYS: keys_writer(seen, self.start.seen.keys),
                        "training.json": json_writer(training),
                        "manifest.json": json_writer(manifest),
                        "config.yaml": text_writer(self.config_yaml),
                    },
                )
                write_json(self.outputs.run_dir / "ledger.json", training["ledger"])
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        self._after_save(from_main(problem))

    def _after_save(self, problem: str | None) -> None:
        if problem is None:
            self._failed_saves = 0
            self._saved_step = self.step
            self.outputs.event(self.step, "checkpoint", "published")
            return
        self._failed_saves += 1
        limit = self.checkpoint.max_failed_saves
        self.outputs.event(self.step, "checkpoint failed", f"{problem} ({self._failed_saves} of {limit} in a row)")
        if self._failed_saves >= limit or self.step == self.steps or self._stop_signal:
            raise CheckpointError(
                f"the checkpoint of step {self.step} could not be written: {problem}. Earlier ones are intact: "
                f"{self.store.steps()}."
            )

    def _resume(self) -> None:
        """Continue from the newest whole checkpoint; the main rank chooses it for all."""
        found: Checkpoint | None = None
        self.sightings = Sightings(len(self.index.entries))
        if self.process.is_main:
            found = self.store.newest(report=lambda line: self.outputs.event(0, "resume", line))
            for lines in (self.outputs, self._journal):
                lines.truncate_after(found.document("training")["step"] if found else 0)
        found = from_main(found)
        if found is None:
            return
        check_same_data(found, self.manifest["data"]["hash"])
        training, tensors = found.document("training"), found.tensors("optimizer")
        self.step = self._saved_step = training["step"]
        if self.step > self.steps:
            raise ValueError(f"steps={self.steps} lies before the newest checkpoint, step {self.step}, of this run.")
        if training["plan"] != self.plan.state(self.step):
            raise ValueError(
                f"the data or its plan has changed since the checkpoint: {training['plan']} was saved, "
                f"{self.plan.state(self.step)} is planned now. Give the run another name."
            )
        for name, engine in self.task.engines().items():
            for moment in MOMENTS:
                full = {key: tensors[f"{name}/{moment}/{key}"] for key in engine.names}
                for shard, value in zip(engine.moments(moment), engine.scatter(full), strict=True):
                    shard.copy_(value)
            engine.set_optimizer_step(training["optimizer_steps"][name])
        self.ema.load(found.tensors("ema"))
        self.ledger = Ledger()  # the main rank goes on counting; the others start anew, and all are added up
        if self.process.is_main:
            own, self.start = seen_by(found)
            assert own is not None, "the loop writes a ledger into every checkpoint"
            self.ledger, self.sightings = own.ledger, Sightings(len(self.index.entries), own.keys)
        self.outputs.event(self.step, "resume", f"from {found.folder.name} on {self.process.world_size} rank(s)")

    def _finish(self, how: str) -> None:
        self.outputs.event(self.step, "end", how)
        if tracker := self.outputs.tracker:
            tracker.close()
            if tracker.problem or tracker.dropped:
                detail = f"{tracker.problem or 'no error'}, {tracker.dropped} records dropped; metrics.jsonl has all"
                self.outputs.event(self.step, "tracker", detail)


class Window:
    """Means of the steps since the last line of the metrics."""

    def __init__(self) -> None:
        self.first_of_run = False
        self._started = False
        self._totals: dict[str, float] = {}
        self._steps = 0

    def add(self, totals: dict[str, float]) -> None:
        """Add one step."""
        self.first_of_run = not self._started
        self._started = True
        self._steps += 1
        for key, value in totals.items():
            self._totals[key] = self._totals.get(key, 0.0) + value

    def close(self) -> dict[str, Any]:
        """A `train` record without its times; starts over. Clips and tokens are a step's, as are losses."""
        totals, steps = self._totals, self._steps
        self._totals, self._steps = {}, 0
        record: dict[str, Any] = {"steps": steps}
        if "noise_sum_0" in totals:
            record["loss_by_noise"] = noise_table(totals)
        for group, prefix in (("terms", "term_"), ("lanes", "lanes/"), ("data_sets", "data_sets/")):
            members = {key.removeprefix(prefix): totals.pop(key) for key in list(totals) if key.startswith(prefix)}
            if members:
                record[group] = {key: value / steps for key, value in members.items()}
        return {**record, **{key: value / steps for key, value in totals.items()}}


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps, and at the end, is due after `step`."""
    return every > 0 and (step % every == 0 or step == last)


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
