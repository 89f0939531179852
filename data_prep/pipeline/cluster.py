"""Stages on a Ray cluster: an actor for each worker, and in it a process of its own for the rows, as on one machine."""

import logging
import os
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.pipeline.engines import Crew, Engine
from data_prep.pipeline.isolation import START_SECONDS, IsolatedStage
from data_prep.pipeline.journal import Result
from data_prep.pipeline.rows import Row
from data_prep.pipeline.stage import Place, Stage


@dataclass
class RayEngine(Engine):
    """Actors on a Ray cluster.

    Every node needs this repository and its packages at the same path, and sees input, working folder and data set
    at the same paths. Rows of a node that goes away are given to the others.
    """

    address: str = "auto"
    """Of a running cluster, such as 10.0.0.1:6379; `auto` finds that of this machine, `local` starts one on it."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    """A fraction shares a GPU."""
    max_lost_workers: int = 8
    """That may go away together with their nodes before the run stops."""
    connect_seconds: float = 10.0
    """An address that does not answer in this time is an error."""

    @contextmanager
    def crew(self) -> Iterator[Crew]:
        """Join the cluster and start the actors, which stay from stage to stage."""
        import ray

        see_that_it_answers(self.address, self.connect_seconds)
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
        ray.init(
            address=self.address,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            yield RayCrew(self, self._count(ray.cluster_resources())).run
        finally:
            ray.shutdown()

    def _count(self, resources: dict[str, float]) -> int:
        fits = int(resources.get("CPU", 0) / self.cpus_per_worker)
        if self.gpus_per_worker:
            fits = min(fits, int(resources.get("GPU", 0) / self.gpus_per_worker))
        if fits < 1:
            raise ValueError(
                f"engine.cpus_per_worker={self.cpus_per_worker} engine.gpus_per_worker={self.gpus_per_worker} is more "
                f"than the cluster has: {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs."
            )
        return min(self.workers or fits, fits)


def see_that_it_answers(address: str, seconds: float) -> None:
    """Raises ValueError where nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return  # auto, local: Ray looks on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"engine.address={address}: no Ray cluster answers there ({error}). Start one there "
            f"(ray start --head --port {port}), or type engine.address=local."
        ) from error


class RayCrew:
    """The actors, and what each of them is at. An actor is lost only with its node: the rows have processes of their
    own.
    """

    def __init__(self, engine: RayEngine, count: int) -> None:
        import ray

        actor: Any = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus_per_worker)(IsolatedStage)
        self.engine, self.lost = engine, 0
        self.make_actor = lambda: actor.remote(engine.attempts, engine.max_memory_gib)
        self.actors = [self.make_actor() for _ in range(count)]

    def run(self, stage: Stage, place: Place, rows: Iterator[Row]) -> Generator[Result, None, None]:
        """Give each actor a row, and the next one as soon as it is done; a lost actor's row goes to another."""
        import ray

        busy: dict[Any, tuple[Any, Row | None]] = {}  # without a row, an actor is getting ready
        again, idle = list[Row](), list[Any]()

        def make_ready(actor: Any) -> None:
            busy[actor.prepare.remote(stage, place)] = actor, None

        for actor in self.actors:
            make_ready(actor)
        while True:
            while idle and (row := again.pop() if again else next(rows, None)) is not None:
                actor = idle.pop()
                busy[actor.run.remote(row, self.engine.timeout(row))] = actor, row
            if idle and not any(row for _, row in busy.values()):
                return
            done = ray.wait(list(busy), timeout=START_SECONDS)[0]
            if not done and not any(row for _, row in busy.values()):
                raise ValueError(f"engine.address={self.engine.address}: no worker was ready in {START_SECONDS:g} s.")
            for ref in done:
                actor, row = busy.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayActorError:
                    make_ready(self._replace(actor))
                    again += [] if row is None else [row]
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error  # without Ray's own account of it
                idle.append(actor)
                if row is not None:
                    yield result

    def _replace(self, gone: Any) -> Any:
        self.lost += 1
        if self.lost > self.engine.max_lost_workers:
            raise ValueError(
                f"engine.max_lost_workers={self.engine.max_lost_workers}: more workers went away with their nodes. "
                "Look at the cluster; the same command goes on where this one stopped."
            )
        self.actors[self.actors.index(gone)] = new = self.make_actor()
        return new
