"""A rank whose launcher is killed ends with it, instead of holding devices and ports for hours."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun and the deepspeed launcher give to the processes that they start."""


def end_with_launcher() -> None:
    """Have the kernel kill this process when its launcher ends; nothing for one that a person or a script started.

    SIGKILL: a rank that waits for another in a collective would hear of nothing softer.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHERS):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended a moment ago
        os.kill(os.getpid(), signal.SIGKILL)
