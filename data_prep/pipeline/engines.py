"""Who works on the rows: processes on this machine, or those of a Ray cluster (cluster.py)."""

import os
import queue
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from data_prep.pipeline.isolation import IsolatedStage, work_on
from data_prep.pipeline.journal import Result
from data_prep.pipeline.rows import Row
from data_prep.pipeline.stage import Place, Stage

Crew = Callable[[Stage, Place, Iterator[Row]], Generator[Result, None, None]]
"""Works on all rows of one stage; results come in any order."""
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
    max_memory_gib: float | None = None
    """That a worker process may fill: a row that wants more fails. Linux only."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"engine.workers={self.workers} must be at least 0, or null for one for each CPU.")
        if self.attempts < 1:
            raise ValueError(f"engine.attempts={self.attempts} must be at least 1.")
        for name in ("timeout_seconds", "timeout_seconds_per_video_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"engine.{name}={getattr(self, name)} must be above 0.")

    def crew(self) -> AbstractContextManager[Crew]:
        """The workers, for as long as the context lasts."""
        raise NotImplementedError

    def timeout(self, row: Row) -> float:
        """Seconds that a row may take."""
        return self.timeout_seconds + self.timeout_seconds_per_video_second * row.get("duration_seconds", 0.0)


@dataclass
class LocalEngine(Engine):
    """Processes on this machine. `workers=0` works in this very process, to debug a stage: nothing is isolated."""

    @contextmanager
    def crew(self) -> Iterator[Crew]:
        """The workers; each stage gets fresh processes."""
        yield work_here if self.workers == 0 else self._run

    def _run(self, stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
        count = self.workers or os.cpu_count() or 1
        workers = [IsolatedStage(self.attempts, self.max_memory_gib, stage, place) for _ in range(count)]
        idle = queue.SimpleQueue[IsolatedStage]()
        for worker in workers:
            idle.put(worker)

        def work(row: Row) -> Result:
            worker = idle.get()
            try:
                return worker.run(row, self.timeout(row))
            finally:
                idle.put(worker)

        try:
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
        finally:
            for worker in workers:
                worker.kill()


def work_here(stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
    """A crew of one: this process."""
    stage.start()
    yield from (work_on(stage, row, place) for row in rows)
