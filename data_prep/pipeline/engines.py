"""Who works on the rows: processes on this machine, or on the machines of a Ray cluster."""

import logging
import os
import queue
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from data_prep.pipeline.isolation import IsolatedStage, work_on
from data_prep.pipeline.journal import Result
from data_prep.pipeline.rows import Row
from data_prep.pipeline.stage import Place, Stage

QUEUED = 4
"""Rows handed out for each worker, so that none waits for its next one."""


@dataclass
class Engine:
    """What every way to work on rows has in common."""

    workers: int | None = None
    """Rows worked on at once; null takes one for each CPU."""
    timeout_seconds: float = 120.0
    """A row may take this long, and for each second of its video ..."""
    timeout_seconds_per_video_second: float = 20.0
    """... this much longer. A row that takes more is quarantined, and its process replaced."""
    attempts: int = 2
    """How often a row is tried that kills its process."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"engine.workers={self.workers} must be at least 0, or null for one for each CPU.")
        if self.attempts < 1:
            raise ValueError(f"engine.attempts={self.attempts} must be at least 1.")
        for name in ("timeout_seconds", "timeout_seconds_per_video_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"engine.{name}={getattr(self, name)} must be above 0.")

    def run(self, stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
        """The result of every row, in whatever order they come."""
        raise NotImplementedError

    def timeout(self, row: Row) -> float:
        """Seconds that a row may take."""
        return self.timeout_seconds + self.timeout_seconds_per_video_second * row.get("duration_seconds", 0.0)


@dataclass
class LocalEngine(Engine):
    """Processes on this machine. `workers=0` works in this very process, to debug a stage: nothing is isolated."""

    def run(self, stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
        """The result of every row, in whatever order they come."""
        if self.workers == 0:
            stage.start()
            yield from (work_on(stage, row, place) for row in rows)
        else:
            yield from self._run_isolated(stage, place, rows, self.workers or os.cpu_count() or 1)

    def _run_isolated(self, stage: Stage, place: Place, rows: Iterator[Row], count: int) -> Iterator[Result]:
        workers = [IsolatedStage(stage, place, self.attempts) for _ in range(count)]
        idle = queue.SimpleQueue[IsolatedStage]()
        for worker in workers:
            idle.put(worker)

        def work(row: Row) -> Result:
            worker = idle.get()
            try:
                return worker.run(row, self.timeout(row))
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(count) as pool:
            try:
                waiting = set[Future[Result]]()
                for row in rows:
                    waiting.add(pool.submit(work, row))
                    if len(waiting) >= QUEUED * count:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.stop()
        for worker in workers:
            worker.kill()


@dataclass
class RayEngine(Engine):
    """Actors on a Ray cluster, each with a process of its own for the rows, as on one machine.

    Every node needs this repository and its packages at the same path, and input, working folder and data set on
    storage that all of them see. Rows of a node that goes away are given to others.
    """

    address: str = "auto"
    """Of a running cluster, such as `10.0.0.1:6379`; `auto` finds the one of this machine, `local` starts one."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    """A fraction shares a GPU."""
    max_lost: int = 8
    """Workers that may be lost together with their nodes before the stage stops."""

    def run(self, stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
        """The result of every row, in whatever order they come."""
        import ray

        if not ray.is_initialized():
            here = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}}
            ray.init(address=self.address, runtime_env=here, log_to_driver=False, logging_level=logging.ERROR)
        with RayWorkers(self, stage, place) as workers:
            yield from workers.run(rows)

    def count(self) -> int:
        """How many workers the cluster is asked for."""
        import ray

        resources = ray.cluster_resources()
        fits = int(resources.get("CPU", 0) / self.cpus_per_worker)
        if self.gpus_per_worker:
            fits = min(fits, int(resources.get("GPU", 0) / self.gpus_per_worker))
        if fits < 1:
            raise ValueError(
                f"engine.cpus_per_worker={self.cpus_per_worker} engine.gpus_per_worker={self.gpus_per_worker} is more "
                f"than the cluster has: {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs."
            )
        return min(self.workers or fits, fits)


class RayWorkers:
    """The actors of one stage; a context manager."""

    def __init__(self, engine: RayEngine, stage: Stage, place: Place) -> None:
        import ray

        self.engine, self.lost = engine, 0
        actor: Any = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus_per_worker)(IsolatedStage)
        self.make = lambda: actor.remote(stage, place, engine.attempts)
        self.starting: dict[Any, Any] = {}
        self.busy: dict[Any, tuple[Any, Row]] = {}

    def __enter__(self) -> "RayWorkers":
        for _ in range(self.engine.count()):
            self._start_one()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in [*self.starting.values(), *(actor for actor, _ in self.busy.values())]:
            ray.kill(actor)

    def run(self, rows: Iterator[Row]) -> Iterator[Result]:
        """Give each worker a row, and the next one as soon as it is done."""
        import ray

        again, rest = list[Row](), iter(rows)
        idle = list[Any]()
        while True:
            while idle and (row := again.pop() if again else next(rest, None)) is not None:
                actor = idle.pop()
                self.busy[actor.run.remote(row, self.engine.timeout(row))] = actor, row
            if not self.busy and not again and idle:
                for actor in idle:
                    ray.kill(actor)
                return
            done, _ = ray.wait([*self.busy, *self.starting], timeout=60.0)
            for ref in done:
                actor, row = self.busy.pop(ref, None) or (self.starting.pop(ref), None)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayActorError:
                    self._replace(again, row)
                    continue
                idle.append(actor)
                if row is not None:
                    yield result

    def _start_one(self) -> None:
        actor = self.make()
        self.starting[actor.start.remote()] = actor

    def _replace(self, again: list[Row], row: Row | None) -> None:
        """Its own process is isolated from the actor: an actor is lost only with its node."""
        self.lost += 1
        if self.lost > self.engine.max_lost:
            raise ValueError(f"engine.max_lost={self.engine.max_lost}: more workers were lost with their nodes.")
        if row is not None:
            again.append(row)
        self._start_one()
