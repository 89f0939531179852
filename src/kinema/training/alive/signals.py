"""What asks a run to save or to stop: signals of people and schedulers, and the end of a job's time."""

import enum
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from types import FrameType

from kinema.exits import Exit


class Warned(enum.Enum):
    """What SIGUSR1 does: the signal by which schedulers warn (`sbatch --signal=B:USR1@120`)."""

    stop = "stop"
    """Save, and end with status 75."""
    save = "save"
    """Save, and go on: what comes after it is lost if the job then ends."""


@dataclass
class SignalsConfig:
    """How the run meets the end of its time."""

    usr1: Warned = Warned.stop
    """stop or save, on SIGUSR1."""
    grace_seconds: float = 30.0
    """Time between SIGTERM and SIGKILL where the run is; you are told when a step and a save take longer."""
    before_end_seconds: float = 120.0
    """Stop so long before the end of a Slurm job's time, or earlier if saving takes longer."""
    requeue: bool = False
    """After such a stop, ask Slurm to queue the job again (`scontrol requeue`)."""
    restarts_without_progress: int = 3
    """How often a launcher may start the run again from the same checkpoint before that is the end."""

    def __post_init__(self) -> None:
        if self.grace_seconds <= 0:
            raise ValueError(
                f"signals.grace_seconds={self.grace_seconds:g} must be above 0: the seconds that the scheduler gives."
            )
        for name in ("before_end_seconds", "restarts_without_progress"):
            if getattr(self, name) < 0:
                raise ValueError(f"signals.{name}={getattr(self, name)} must be at least 0.")


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ANSWER_SECONDS = 20.0
IMPATIENT_SECONDS = 5.0
"""A second signal after so long is of somebody who cannot wait; one before, of a launcher that passes it on."""


class Signals:
    """Signals that this rank has got, and how much time there is; what is done about them all ranks decide together."""

    def __init__(self, config: SignalsConfig) -> None:
        self.config = replace(config)  # all of it counts as read: it is in force, also where no signal ever comes
        self.asked_to_stop: str | None = None
        """What asked for it, for people."""
        self.asked_to_save = False
        self._since = 0.0
        self._job_end: float | None = None
        self._needed_seconds = 0.0
        self._told = False

    def catch(self) -> None:
        """From now on signals are remembered, and end no step."""
        for number in (*STOPPING, signal.SIGUSR1):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1 and self.config.usr1 is Warned.save:
            self.asked_to_save = True
        elif self.asked_to_stop and number in STOPPING and time.monotonic() - self._since > IMPATIENT_SECONDS:
            os.write(sys.stderr.fileno(), b"a second signal: leaving at once; the last published checkpoint is whole\n")
            os._exit(Exit.preempted)
        elif not self.asked_to_stop:
            self.asked_to_stop, self._since = signal.Signals(number).name, time.monotonic()

    def find_end(self) -> str | None:
        """Learn when the time of this Slurm job is over, for `look_at_clock`; what that is, in words."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        end = os.environ.get("SLURM_JOB_END_TIME", "")  # Slurm 22.05, for one, does not set it
        if not end.isdigit():
            end = _ask_slurm(["squeue", "--noheader", "--job", job, "--format", "%e"])
        try:
            self._job_end = float(end) if end.isdigit() else datetime.fromisoformat(end).timestamp()
        except ValueError:
            return f"job {job} has no end that is known ({end}): the run stops before it only when it is sent a signal"
        return f"job {job} ends at {datetime.fromtimestamp(self._job_end):%Y-%m-%d %H:%M:%S}"

    def look_at_clock(self) -> None:
        """Ask to stop when the time of the Slurm job is nearly over."""
        if not self.asked_to_stop and self._job_end is not None:
            margin = max(self.config.before_end_seconds, 2 * self._needed_seconds)
            if time.time() + margin > self._job_end:
                self.asked_to_stop, self._since = f"the end of the job's time in {margin:.0f} s", time.monotonic()

    def took(self, step_seconds: float, save_seconds: float) -> str | None:
        """Note how long a stop takes, a step and a save; what to say, once, when the grace is too short for it."""
        self._needed_seconds = max(self._needed_seconds, step_seconds + save_seconds)
        if self._told or self._needed_seconds <= self.config.grace_seconds:
            return None
        self._told = True
        return (
            f"a stop takes {self._needed_seconds:.0f} s (a step {step_seconds:.0f} s, a save {save_seconds:.0f} s), "
            f"more than signals.grace_seconds={self.config.grace_seconds:g}: killed before that, the run continues "
            "from the checkpoint before. Ask the scheduler for more (sbatch --signal=B:USR1@SECONDS, KillWait, "
            "terminationGracePeriodSeconds), and type it here."
        )

    def requeue(self) -> str | None:
        """Queue the job again, if that is configured; what came of it, in words."""
        job = os.environ.get("SLURM_JOB_ID")
        if not self.config.requeue:
            return None
        if job is None:
            return "signals.requeue=true, but this is no Slurm job (no SLURM_JOB_ID): start it again."
        return f"scontrol requeue {job}: {_ask_slurm(['scontrol', 'requeue', job]) or 'done'}"


def _ask_slurm(words: list[str]) -> str:
    """What a command of Slurm answers, or why it does not."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer: {error}"
    return f"{done.stdout}{done.stderr}".strip()
