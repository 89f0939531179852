"""Reading processes: what each is at, and what happens when one dies or hangs."""

import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kinema.data.packs.pack import Pack, flatten, unflatten
from kinema.data.packs.reader import ClipReader

POLL_SECONDS = 2.0
"""How often a waiting loader looks whether its workers live."""


class DataWorkerError(RuntimeError):
    """A reading process died or hung; names the clips that were being decoded."""


class StepsAndLanes(Iterable[tuple[int, int]]):
    """What to load, in order; not a list, as a run may have millions of steps."""

    def __init__(self, steps: range, lanes: list[int]) -> None:
        self.steps, self.lanes = steps, lanes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, lane) for step in self.steps for lane in self.lanes)

    def __len__(self) -> int:
        return len(self.steps) * len(self.lanes)


class Readers:
    """The worker processes of one loader: a crashed or hung one is replaced, its clip counted as failed."""

    def __init__(self, dataset: ClipReader, num_workers: int, prefetch: int, timeout_seconds: float) -> None:
        self.dataset, self.num_workers, self.prefetch = dataset, num_workers, prefetch
        self.timeout_seconds = timeout_seconds
        self.restarts_in_a_row = 0
        self._killed_at: set[str] = set()  # clips at which somebody else killed a worker once
        # Of each worker: its process, the entry that it decodes or -1, and since when (nanoseconds).
        dataset.progress = torch.full((num_workers, 3), -1, dtype=torch.int64).share_memory_()
        self.packs: Iterator[tuple[Pack, Tensor]] = iter(())

    def start(self, wanted: StepsAndLanes, skip: int) -> None:
        """Fork the workers, for all that is wanted after the first `skip` packs."""
        self.dataset.progress.fill_(-1)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Rest(wanted, skip),
            num_workers=self.num_workers,
            collate_fn=flatten,
            prefetch_factor=self.prefetch,
            timeout=min(POLL_SECONDS, self.timeout_seconds),
            worker_init_fn=self.dataset.start_worker,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        previous = signal.getsignal(signal.SIGCHLD)
        self.packs = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's own raises wherever training happens to be when a worker dies; `next` looks itself.
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)

    def next(self, wanted: StepsAndLanes, number: int) -> Pack:
        """Pack `number` of what is wanted."""
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                pack = unflatten(*next(self.packs))
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):  # a pack cannot be fetched from a worker that just died
                    time.sleep(0.2)
                dead = self._dead()
                hung = time.monotonic() >= max(deadline, self._last_start() + self.timeout_seconds) and not dead
                if not (dead or hung):
                    if "DataLoader timed out" in str(error):
                        continue
                    raise  # the worker's own exception
                self._condemn(dead, hung, error)
                self.stop()
                self.start(wanted, skip=number)
                deadline = time.monotonic() + self.timeout_seconds
                continue
            self.restarts_in_a_row = 0
            # Workers that are forked later need not find out for themselves.
            self.dataset.condemned.update({f.key: f.reason for f in pack.failures if f.fatal})
            return pack

    def stop(self) -> None:
        """End the workers, and kill those that do not end."""
        self.packs = iter(())  # PyTorch ends them when its iterator goes
        pids = set(self.dataset.progress[:, 0].tolist())
        for child in multiprocessing.active_children():
            if child.pid in pids:
                child.kill()
                child.join()

    def _last_start(self) -> float:
        """When a worker last began with a clip: a pack of many slow clips is not a hanging one."""
        return self.dataset.progress[:, 2].max().item() / 1e9

    def _dead(self) -> dict[int, int | None]:
        """{worker: exit code} of the workers that ended, None where it is unknown."""
        workers = getattr(self.packs, "_workers", [])
        return {number: process.exitcode for number, process in enumerate(workers) if not process.is_alive()}

    def _condemn(self, dead: dict[int, int | None], hung: bool, error: Exception) -> None:
        """Note the clips at fault so that nobody decodes them again; raise when no clip can be at fault."""
        self.restarts_in_a_row += 1
        if -signal.SIGBUS in dead.values():
            raise DataWorkerError(
                "A reading process ran out of shared memory (/dev/shm). Type a lower data.prefetch or "
                "data.num_workers, or give the machine or container more shared memory."
            ) from error
        now, condemned = time.monotonic_ns(), self.dataset.condemned
        before = len(condemned)
        for worker, (_, entry, since) in enumerate(self.dataset.progress.tolist()):
            if entry < 0:
                continue
            key = self.dataset.index.key(entry)
            if dead.get(worker) == -signal.SIGKILL and key not in self._killed_at:
                self._killed_at.add(key)  # once more: the kernel kills any process where memory is short
            elif worker in dead and dead[worker] != -signal.SIGTERM:  # that is the scheduler's doing, not the clip's
                condemned[key] = f"decoding it killed the process (exit code {dead[worker]})"
            elif hung and now - since > 0.5e9 * self.timeout_seconds:
                condemned[key] = f"decoding it takes over data.timeout_seconds={self.timeout_seconds:g}"
        if len(condemned) == before and self.restarts_in_a_row > 3:
            raise DataWorkerError(
                f"Reading processes ended or hung {self.restarts_in_a_row} times without a clip at fault "
                f"(exit codes {list(dead.values())}). Type data.num_workers=0 to see the cause."
            ) from error


class _Rest(Iterable[tuple[int, int]]):
    """What is wanted without the packs that were delivered."""

    def __init__(self, wanted: StepsAndLanes, skip: int) -> None:
        self.wanted, self.skip = wanted, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(self.wanted, self.skip, None)

    def __len__(self) -> int:
        return len(self.wanted) - self.skip
