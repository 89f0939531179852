"""The training loop: steps, checkpoints, validation, samples. What a pack costs is the task's business."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from kinema.data.account.ledger import DataBudgetError, Quarantine
from kinema.data.account.quarantine import write_failures
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.pack import Failure, Fallback, Pack
from kinema.data.steps.plan import Plan
from kinema.distributed.collectives import all_sum, from_main, gather_objects
from kinema.distributed.compiling import WARM_STEPS, Compilations
from kinema.distributed.process import Process
from kinema.exits import Exit
from kinema.training.alive.guard import Guard, NonFiniteLoss
from kinema.training.alive.restarts import NoProgress, count_restart
from kinema.training.alive.signals import Signals
from kinema.training.alive.skips import write_skips
from kinema.training.alive.stragglers import Stragglers
from kinema.training.alive.watchdog import Watchdog
from kinema.training.balance import Balance
from kinema.training.checkpoints.saving import Saver
from kinema.training.checkpoints.store import CheckpointConfig
from kinema.training.dit_task import noise_table
from kinema.training.ema import EMA
from kinema.training.preflight import Preflight
from kinema.training.records.journal import KeyJournal
from kinema.training.records.metrics import Clock, LoggingConfig
from kinema.training.records.outputs import Outputs
from kinema.training.records.progress import Progress
from kinema.training.records.window import Window
from kinema.training.task import Task

UPLOADS_SECONDS, UPLOADS_WHEN_STOPPED_SECONDS = 600.0, 5.0
"""How long the end of a run waits for checkpoints that are on their way to `checkpoint.remote`."""
TRACKER_SECONDS, TRACKER_WHEN_STOPPED_SECONDS = 60.0, 10.0
"""How long it then waits for Weights & Biases to take what is left: its first connection may take half a minute."""
LANE_PHASES = ("encode", "forward")
"""What a lane does without waiting for another, by phases of the clock; the backward of the last one waits."""


@dataclass
class ValidationConfig:
    """Loss on held-out clips with noise that never changes."""

    every_steps: int = 250
    """Steps between validations; 0 makes none."""
    clips: int = 64
    """How many held-out clips, rounded up to whole steps."""


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
    saver: Saver
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    logging: LoggingConfig
    outputs: Outputs
    quarantine: Quarantine
    progress: Progress
    guard: Guard
    preflight: Preflight
    signals: Signals
    watchdog: Watchdog
    sample_every_steps: int
    make_samples: SampleMaker | None
    unread_keys: Callable[[], str | None]
    """What is wrong with the configuration once the first step has read all it needs; the main rank's answer counts."""
    ideal_seconds: float
    """A step of the first step's clips on all ranks at their measured peak, for MFU; 0 but on the main rank."""

    final_check: Callable[[dict[str, Tensor]], tuple[bool, str]] | None = None
    """EMA weights -> passed, verdict; runs on the main rank after the last step."""
    _stop: str | None = None
    _save_now: bool = False

    def __post_init__(self) -> None:
        self._compilations, self._validations = Compilations(), 0
        self._journal = KeyJournal(self.outputs.run_dir, self.process.rank)

    @property
    def step(self) -> int:
        """How many steps have moved the weights."""
        return self.progress.step

    # The story

    def fit(self) -> int:
        """Train to the last step; the exit status: 0, or 75 when a signal stopped the run after a checkpoint."""
        self._resume()
        validation = self.load_validation() if self.load_validation and self.validation.every_steps else None
        self._tell_heldout_failures(validation or [])
        self.watchdog.start()
        hosts = gather_objects(os.uname().nodename)
        stragglers = Stragglers(self.watchdog.config.straggler_ratio, self.process.rank, hosts)
        clock, window = Clock(self.watchdog.enter), Window()
        bar = tqdm(
            total=self.steps, initial=self.step, desc=self.outputs.run_dir.name, unit="step",
            disable=not self.process.is_main, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        packs_of_steps = self.load(self.step, self.steps - self.step)
        while self.step < self.steps:
            self.watchdog.begin_step(self.step)
            stragglers.begin_step(clock)
            with clock.phase("data"):
                packs = self.guard.admit(next(packs_of_steps), self.index)
            stood = self.step
            totals = self._train_step(packs, clock, stragglers)
            if totals is None:
                packs_of_steps = self.load(self.step, self.steps - self.step)  # from here again
                window = window if self.step == stood else Window()
                bar.update(self.step - stood)
                continue
            window.add(totals)
            bar.update()
            bar.set_postfix_str(f"loss {totals.get('loss', math.nan):.4f}", refresh=False)
            first = window.first_of_run
            if first:
                self._check_configuration()
            if first or self.step % self.logging.every_steps == 0 or self.step == self.steps:
                self._log(window, clock)
            if validation and due(self.step, self.validation.every_steps, self.steps):
                with clock.phase("validate"):
                    self._validate(validation)
            if due(self.step, self.sample_every_steps, self.steps):  # a collective, whoever makes the pictures
                with clock.phase("sample"):
                    self._sample()
            if self._is_to_save():
                with clock.phase("checkpoint"):
                    self.saver.save(must=self.step == self.steps or self._stop is not None)
            if self._stop:
                bar.close()
                return self._leave_early(self._stop)
        bar.close()
        with clock.phase("sample"):
            passed = self._final_check()
        with clock.phase("checkpoint"):
            self.saver.tell_uploads(UPLOADS_SECONDS)
        self._finish("finished", TRACKER_SECONDS)
        return Exit.done if passed else Exit.failed_check

    def _resume(self) -> None:
        """Go to the newest checkpoint, and be ready to stop again."""
        self.saver.resume(self.steps, self._journal)
        self.saver.keep_config()
        self._first_step = self.step
        self.signals.catch()
        if self.process.is_main and (line := self.signals.find_end()):
            self.outputs.event(self.step, "slurm", line)
        self._count_restart()

    def _leave_early(self, why: str) -> Exit:
        """The end of a run that was asked to stop, and has been saved."""
        self.saver.tell_uploads(UPLOADS_WHEN_STOPPED_SECONDS)
        how = f"stopped by {why} at step {self.step}; the same command continues"
        self._finish(how, TRACKER_WHEN_STOPPED_SECONDS)
        if self.process.is_main and (line := self.signals.requeue()):  # last: Slurm then ends this job
            self.outputs.event(self.step, "requeue", line)
        return Exit.preempted

    def _is_to_save(self) -> bool:
        if self._stop or self._save_now or self.step == self.steps:
            return True
        return due(self.step, self.checkpoint.every_steps, self.steps) and not self.guard.troubled

    def _count_restart(self) -> None:
        problem = None
        if self.process.is_main:
            try:
                count_restart(self.outputs.run_dir, self.step, self.signals.config.restarts_without_progress)
            except NoProgress as error:
                problem = str(error)
        if problem := from_main(problem):
            raise NoProgress(problem)

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

    def _train_step(self, packs: list[Pack], clock: Clock, stragglers: Stragglers) -> dict[str, float] | None:
        """One optimiser step: this rank's packs, then weights, then the average. Returns totals over all ranks.

        None if numbers were not sound: the run then stands where it is to go on from.
        """
        counted = packs if self.process.mesh.counts else []  # what ranks with the same packs see is counted once
        total_weight = self._total_weight(packs, counted, clock)
        if total_weight == 0:
            return self._pass_over(counted)
        learning_rate = self.learning_rate(self.step)
        self.preflight.begin(packs)
        sums, balance = self._run_lanes(packs, total_weight, learning_rate, clock)
        totals, agreed = self._agree(packs, sums, balance, clock, stragglers)
        withheld = totals.pop("withheld") > 0
        if what := self.guard.trouble(self.step, totals["loss"], self.progress.losses, withheld=withheld):
            self._go_back(what, totals["loss"])
            return None
        with clock.phase("optimizer"):
            self.ema.update(self.step + 1)
        self.preflight.end()
        self._tell("straggler", stragglers.hear(agreed.seconds))
        if agreed.compiled:
            self._tell_compiled(again=self.step - self._first_step >= WARM_STEPS)
        self._tell("spike", self.guard.warnings)
        self._enter(counted, totals, clock, all_saved=agreed.saved == self.process.world_size)
        self._heed(agreed)
        totals["lanes/padding"] = totals.pop("padding_tokens") / totals["tokens"]
        totals["lr"] = learning_rate
        totals["grad_norm"] = self.task.engines()["model"].grad_norm()
        return totals

    def _total_weight(self, packs: list[Pack], counted: list[Pack], clock: Clock) -> float:
        """The weight of the whole step, known before its first backward: failed clips count 0 everywhere.

        0 if all that could be shown is left out; DataBudgetError if nothing could be.
        """
        weight = sum(float(pack.weights.sum()) for pack in counted)
        with clock.phase("sums"):
            total, left_out = all_sum([weight, self.guard.left_out])
        if total == 0 and not left_out:
            raise DataBudgetError(
                f"no clip of step {self.step} can be shown: {(packs[0].failures + packs[0].withdrawn)[:3]}. If "
                "data.rights withdrew them, start a new run from the last checkpoint: another name, and init_from."
            )
        return total

    def _agree(
        self, packs: list[Pack], sums: dict[str, float], balance: Balance, clock: Clock, stragglers: Stragglers
    ) -> tuple[dict[str, float], "Agreed"]:
        """The sums over all ranks and, in the same message, what each has to say besides."""
        sums["withheld"] = float(any(engine.moved is False for engine in self.task.engines().values()))
        sums["failures"] = float(sum(len(pack.failures) for pack in packs))
        sums["fallbacks"] = float(sum(len(pack.fallbacks) for pack in packs))
        wishes = [float(self.signals.asked_to_stop is not None), float(self.signals.asked_to_save)]
        own = [
            *wishes,
            self.saver.vote(),
            float(self._compilations.count()),
            *stragglers.own(clock, sum(pack.cost for pack in packs)),
        ]
        with clock.phase("sums"):
            over_ranks = all_sum([*own, *self._once([*sums.values(), *balance.values()])])
        (stop, save, saved, compiled, *seconds), over_ranks = over_ranks[: len(own)], over_ranks[len(own) :]
        totals = {**dict(zip(sums, over_ranks, strict=False)), **Balance.summary(over_ranks[len(sums) :])}
        return totals, Agreed(stop > 0, save > 0, int(saved), compiled > 0, seconds)

    def _enter(self, counted: list[Pack], totals: dict[str, float], clock: Clock, *, all_saved: bool) -> None:
        """The step is done: into the account of what was shown, the journal, and the quarantine; a collective."""
        self.guard.has_moved(self.step)
        self.signals.look_at_clock()
        self.progress.add(counted, totals["loss"])
        if all_saved:
            with clock.phase("checkpoint"):
                self.saver.advance()
        if self.logging.keys:
            self._journal.write(self.step, counted)
        if totals.pop("failures"):
            self._quarantine([failure for pack in counted for failure in pack.failures])
        if totals.pop("fallbacks"):
            self._tell_fallbacks([fallback for pack in counted for fallback in pack.fallbacks])

    def _heed(self, agreed: "Agreed") -> None:
        """What signals asked any rank for."""
        self._stop = next(filter(None, gather_objects(self.signals.asked_to_stop))) if agreed.stop else None
        self._save_now = agreed.save
        if agreed.save:
            self.signals.asked_to_save = False

    def _run_lanes(
        self, packs: list[Pack], total_weight: float, learning_rate: float, clock: Clock
    ) -> tuple[dict[str, float], Balance]:
        """This rank's packs, one after the other, the last of which moves the weights; what is to be summed of them."""
        sums = {f"data_sets/{name}": 0.0 for name in self.index.parts}  # on every rank, whatever it reads
        balance = Balance(self.plan.lanes, self.plan.balanced_lanes)
        for pack in packs:
            before = clock.spent(*LANE_PHASES)
            for key, value in self.task.micro_step(pack, total_weight, learning_rate, clock).items():
                sums[key] = sums.get(key, 0.0) + value
            self.guard.hear(pack, self.task.clip_losses)
            self.preflight.hear()
            balance.add(pack, clock.spent(*LANE_PHASES) - before)
            for key, value in pack.storage.items():
                sums[key] = sums.get(key, 0.0) + value
            for number in pack.entries if self.index.parts else ():
                sums[f"data_sets/{self.index.place(number)[0]}"] += 1
        return sums, balance

    def _pass_over(self, packs: list[Pack]) -> dict[str, float]:
        """A step that is left out: its clips count as failed, and nothing moves."""
        self.progress.add(packs)
        self._quarantine([failure for pack in packs for failure in pack.failures])
        return {}

    def _is_rescaled(self, loss: float) -> bool:
        """Whether a float16 gradient overflowed, and the step is done again with a lower loss scale."""
        scales = [engine.loss_scale for engine in self.task.engines().values() if engine.loss_scale is not None]
        if not math.isfinite(loss) or not any(scale.lowered for scale in scales):
            return False
        told = f"a float16 gradient overflowed, and the step is done again with a loss scale of {scales[0].value:g}"
        self.outputs.event(self.step, "loss scale", told)
        return True

    def _go_back(self, what: str, loss: float) -> None:
        """After numbers that were not sound: leave out what is to blame, and stand where the state is good."""
        if self._is_rescaled(loss):
            return
        suspects = [suspect for rank in gather_objects(self.guard.suspects) for suspect in rank]
        incident = self.guard.condemn(self.step, suspects, what)
        if self.process.is_main:
            write_skips(self.outputs.run_dir, incident.left_out)
        where = "nothing has moved, and the step is done again without"
        if incident.repeated or any(engine.moved for engine in self.task.engines().values()):
            if not self.saver.resume(self.steps, self._journal, weights=True):
                raise NonFiniteLoss(f"{incident.what}, and there is no checkpoint to go back to. Start again.")
            where = "back at the newest checkpoint, and on without"
        self.outputs.event(self.step, "withheld", f"{incident.what}: {where} {incident.told}")

    def _once(self, values: Iterable[float]) -> list[float]:
        """What this rank adds to sums over all ranks: nothing, where another rank of its sequence group does."""
        return [value if self.process.mesh.counts else 0.0 for value in values]

    # What happens between steps

    def _log(self, window: Window, clock: Clock) -> None:
        if not window.steps:
            return
        record = window.close()
        record.update(kind="train", step=self.step, seconds=clock.read(record.pop("steps")))
        if compiled := self._compilations.total():
            record["compiled"] = compiled
        record["mfu"] = self.ideal_seconds / sum(record["seconds"].values())
        self.outputs.write(record)
        if line := self.signals.took(sum(record["seconds"].values()), self.saver.seconds):
            self.outputs.event(self.step, "grace", line)

    def _validate(self, validation: list[list[Pack]]) -> None:
        totals: dict[str, float] = {}
        for packs in validation:
            for key, value in self.task.validate(packs).items():
                totals[key] = totals.get(key, 0.0) + value
        totals = dict(zip(totals, all_sum(self._once(totals.values())), strict=True))
        weight = totals.pop("weight")
        record: dict[str, Any] = {"kind": "validation", "step": self.step}
        if "noise_sum_0" in totals:
            record["loss_by_noise"] = noise_table(totals)
        record.update({key: value / weight for key, value in totals.items()})
        self.outputs.write(record)
        self._tell_compiled(again=self._validations > 0)
        self._validations += 1

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
        self.quarantine.check(self.progress.whole_ledger())

    def _tell(self, event: str, lines: list[str]) -> None:
        for line in lines:
            self.outputs.event(self.step, event, line)

    def _tell_compiled(self, *, again: bool) -> None:
        """What all ranks have compiled since the last time; later it takes time at every new kind of pack."""
        lines = [line for rank in gather_objects(self._compilations.lines()) for line in rank]
        if lines:
            self.outputs.event(self.step, "recompiled" if again else "compiled", f"{len(lines)}: {'; '.join(lines)}")

    def _tell_heldout_failures(self, validation: list[list[Pack]]) -> None:
        """Held-out clips are read once, before the first step; those that fail are missing from every validation."""
        counted = validation if self.process.mesh.counts else []
        failures = [failure for packs in counted for pack in packs for failure in pack.failures]
        for failure in (failure for rank in gather_objects(failures) for failure in rank):
            self.outputs.event(self.step, "held-out clip failed", f"{failure.key} in {failure.shard}: {failure.reason}")

    def _tell_fallbacks(self, fallbacks: list[Fallback]) -> None:
        """Show which decoders stepped in, once for each cause, and stop all ranks when it happens too often."""
        causes: dict[str, list[str]] = {}
        for fallback in (fallback for rank in gather_objects(fallbacks) for fallback in rank):
            causes.setdefault(fallback.cause(), []).append(fallback.key)
        for cause, keys in causes.items():
            self.outputs.event(self.step, "fallback", f"{len(keys)} clip(s), {cause} ({', '.join(keys[:5])})")
        self.quarantine.check(self.progress.whole_ledger())

    def _finish(self, how: str, tracker_seconds: float) -> None:
        self.watchdog.stop()
        self.outputs.event(self.step, "end", how)
        if tracker := self.outputs.tracker:
            tracker.close(tracker_seconds)
            if tracker.problem or tracker.dropped:
                detail = f"{tracker.problem or 'no error'}, {tracker.dropped} records dropped; metrics.jsonl has all"
                self.outputs.event(self.step, "tracker", detail)


class Agreed(NamedTuple):
    """What the ranks tell one another beside the sums of a step."""

    stop: bool
    save: bool
    saved: int
    """Ranks that wait for nobody but the others to go on with a save."""
    compiled: bool
    seconds: list[float]
    """Of all ranks, for `Stragglers.hear`."""


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps, and at the end, is due after `step`."""
    return every > 0 and (step % every == 0 or step == last)
