"""The process beside a rank that ends it when it hangs: `python -m kinema.training.watcher PID RANK FOLDER`.

A process of its own, because a rank that is stopped, or holds Python's lock, could not watch itself. When the phase
of any rank of this machine is overdue, one watcher says where every rank is and whom the others wait for; each has
its rank print its Python stacks and ends it.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from kinema.exits import Exit
from kinema.launching import leave_status
from kinema.training.heartbeat import Beat, Heartbeat

POLL_SECONDS = 0.2
TURN_SECONDS = 0.3
"""For each rank of the machine to print its stacks before the next one does."""
LAST_SECONDS = 3.0
"""For a rank to end by itself."""
STACKS = signal.SIGUSR2


def watch(pid: int, rank: int, folder: Path) -> None:
    """Until the rank is gone, or a hang has been dealt with."""
    own, hang = Heartbeat(folder / f"rank-{rank}"), folder / "hang"
    overdue: Beat | None = None
    while os.getppid() == pid:
        beat = own.read()
        if is_overdue(beat) and beat == overdue:  # twice the same: no reading in the middle of a writing
            with suppress(FileExistsError):
                hang.touch(exist_ok=False)
                print(report(folder), file=sys.stderr, flush=True)
        overdue = beat if is_overdue(beat) else None
        if hang.exists():
            end(pid, rank, own, folder)
            break
        time.sleep(POLL_SECONDS)
    leave(own.path, hang)


def is_overdue(beat: Beat) -> bool:
    """Whether the phase has lasted longer than it may."""
    return 0 < beat.deadline < time.monotonic()


def report(folder: Path) -> str:
    """Where every rank of this machine is, and whom the others wait for."""
    beats = {rank: Heartbeat(folder / f"rank-{rank}").read() for rank in ranks_in(folder)}
    now = time.monotonic()
    lines = [
        f"  rank {rank} (process {beat.pid}{', stopped' if is_stopped(beat.pid) else ''}): phase {beat.phase} of step "
        f"{beat.step + 1} for {now - beat.since:.0f} s"
        for rank, beat in beats.items()
    ]
    return "\n".join([f"error: a hang on {os.uname().nodename}: {verdict(beats)}", *lines])


def verdict(beats: dict[int, Beat]) -> str:
    """The guilty ranks by name: those that are stopped, or else those that are furthest behind the others."""
    guilty = [rank for rank, beat in beats.items() if is_stopped(beat.pid)]
    behind = min((beat.step, beat.entries) for beat in beats.values())
    guilty = guilty or [rank for rank, beat in beats.items() if (beat.step, beat.entries) == behind]
    if len(guilty) == len(beats) > 1:
        return (
            "all its ranks are in the same phase: either they wait for another machine, the network or the device, or "
            "one of them does something else, as its stack below tells"
        )
    named = " and ".join(f"rank {rank}, in phase {beats[rank].phase}" for rank in guilty)
    return f"{named}, is not moving" + (", and the others wait for it" if len(beats) > 1 else "")


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


def leave(path: Path, hang: Path) -> None:
    """Take the rank's file away, and the folder with the last one."""
    path.unlink(missing_ok=True)
    with suppress(OSError):
        if not ranks_in(hang.parent):
            hang.unlink(missing_ok=True)
            hang.parent.rmdir()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank deals with these
    watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
