"""The process beside a rank that ends it when it hangs: `python -m kinema.training.alive.watcher`, then
PID RANK OF FOLDER SHARED.

A process of its own, because a rank that is stopped, or holds Python's lock, could not watch itself. When the phase
of any rank of this machine is overdue, one watcher says where every rank is and whom the others wait for; each has
its rank print its Python stacks and ends it. FOLDER holds the heartbeats of this machine; where the OF ranks have
several machines, these tell one another in SHARED, which lies in the run folder.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kinema.exits import Exit
from kinema.launching import leave_status
from kinema.training.alive.heartbeat import Beat, Heartbeat

POLL_SECONDS = 0.2
TURN_SECONDS = 0.3
"""For each rank of the machine to print its stacks before the next one does."""
LAST_SECONDS = 3.0
"""For a rank to end by itself."""
STACKS = signal.SIGUSR2
ASKED_SECONDS = 2.0
"""How often a machine looks whether another has found a hang and asks where its ranks are."""
OTHERS_SECONDS = 8.0
"""How long it is given to answer, through a file system that hosts share."""


class Place(NamedTuple):
    """Where a rank is, as its machine tells others."""

    host: str
    pid: int
    step: int
    entries: int
    phase: str
    seconds: float
    """Since the phase began."""
    stopped: bool


def watch(pid: int, rank: int, ranks: int, folder: Path, shared: Path) -> None:
    """Until the rank is gone, or a hang has been dealt with."""
    own, hang = Heartbeat(folder / f"rank-{rank}"), folder / "hang"
    overdue: Beat | None = None
    asked = time.monotonic()
    while os.getppid() == pid:
        beat = own.read()
        if is_overdue(beat) and beat == overdue:  # twice the same: no reading in the middle of a writing
            with suppress(FileExistsError):
                (folder / "finder").touch(exist_ok=False)
                print(report(places_everywhere(folder, shared, ranks), ranks), file=sys.stderr, flush=True)
                hang.touch()
        overdue = beat if is_overdue(beat) else None
        if hang.exists():
            end(pid, rank, own, folder)
            break
        if rank == ranks_in(folder)[0] and time.monotonic() - asked > ASKED_SECONDS:
            asked = time.monotonic()
            if shared.exists():
                tell(folder, shared)
        time.sleep(POLL_SECONDS)
    leave(own.path)


def is_overdue(beat: Beat) -> bool:
    """Whether the phase has lasted longer than it may."""
    return 0 < beat.deadline < time.monotonic()


def places(folder: Path) -> dict[int, Place]:
    """Where every rank of this machine is."""
    beats = {rank: Heartbeat(folder / f"rank-{rank}").read() for rank in ranks_in(folder)}
    host, now = os.uname().nodename, time.monotonic()
    return {
        rank: Place(host, beat.pid, beat.step, beat.entries, beat.phase, now - beat.since, is_stopped(beat.pid))
        for rank, beat in beats.items()
    }


def places_everywhere(folder: Path, shared: Path, ranks: int) -> dict[int, Place]:
    """Where every rank is, of all machines that answer in time."""
    found = places(folder)
    deadline = time.monotonic() + OTHERS_SECONDS
    if len(found) < ranks:
        with suppress(OSError):  # a full or lost file system must not keep this machine from ending its ranks
            shared.mkdir(parents=True, exist_ok=True)
            tell(folder, shared)
    while len(found) < ranks and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        found = told(shared) | places(folder)
    return dict(sorted(found.items()))


def tell(folder: Path, shared: Path) -> None:
    """Write down where the ranks of this machine are, for others."""
    here = places(folder)
    path = shared / f"ranks-{min(here)}.json"
    with suppress(OSError):
        path.with_suffix(".part").write_text(json.dumps(here))
        path.with_suffix(".part").rename(path)


def told(shared: Path) -> dict[int, Place]:
    """What all machines have written down."""
    found: dict[int, Place] = {}
    with suppress(OSError):
        for path in shared.glob("ranks-*.json"):
            found |= {int(rank): Place(*place) for rank, place in json.loads(path.read_text()).items()}
    return found


def report(found: dict[int, Place], ranks: int) -> str:
    """Where every rank is, and whom the others wait for."""
    lines = [
        f"  rank {rank} (process {place.pid} on {place.host}{', stopped' if place.stopped else ''}): "
        f"phase {place.phase} of step {place.step + 1} for {place.seconds:.0f} s"
        for rank, place in found.items()
    ]
    missing = sorted(set(range(ranks)) - set(found))
    if missing:
        lines.append(f"  rank {', '.join(map(str, missing))}: on machines that did not say where they are")
    return "\n".join([f"error: a hang on {os.uname().nodename}: {verdict(found, missing)}", *lines])


def verdict(found: dict[int, Place], missing: Iterable[int] = ()) -> str:
    """The guilty ranks by name: those that are stopped, or else those that are furthest behind the others."""
    guilty = [rank for rank, place in found.items() if place.stopped]
    behind = min((place.step, place.entries) for place in found.values())
    guilty = guilty or [rank for rank, place in found.items() if (place.step, place.entries) == behind]
    if len(guilty) == len(found) and missing:
        return "all its ranks are in the same phase, and other machines do not answer: look there, and at the network"
    if len(guilty) == len(found) > 1:
        return (
            "all ranks are in the same phase: either they wait for the network or the device, or one of them does "
            "something else, as its stack below tells"
        )
    named = " and ".join(f"rank {rank}, in phase {found[rank].phase}" for rank in guilty)
    return f"{named}, is not moving" + (", and the others wait for it" if len(found) > 1 else "")


def end(pid: int, rank: int, own: Heartbeat, folder: Path) -> None:
    """Have the rank print its stacks in its turn, then end it: by itself if it can, for its exit status."""
    ranks = ranks_in(folder)
    turn = ranks.index(rank)
    time.sleep(turn * TURN_SECONDS)
    stopped = is_stopped(pid)
    print(f"stacks of rank {rank}:{' none, it is stopped' if stopped else ''}", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):
        if not stopped:
            os.kill(pid, STACKS)
        time.sleep((len(ranks) - turn) * TURN_SECONDS)
        own.order_end()
        deadline = time.monotonic() + (0 if stopped else LAST_SECONDS)
        while time.monotonic() < deadline and os.getppid() == pid:
            time.sleep(0.05)
        if os.getppid() == pid:
            leave_status(Exit.hang)
            os.kill(pid, signal.SIGKILL)


def ranks_in(folder: Path) -> list[int]:
    """Ranks of this machine."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("rank-*"))


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def leave(path: Path) -> None:
    """Take the rank's file away, and the folder with the last one."""
    path.unlink(missing_ok=True)
    with suppress(OSError):
        if not ranks_in(path.parent):
            for mark in ("finder", "hang"):
                (path.parent / mark).unlink(missing_ok=True)
            path.parent.rmdir()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank deals with these
    watch(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
