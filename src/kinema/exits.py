"""Exit statuses: one meaning each, for people, schedulers and launchers. Numbers as in sysexits.h where it has one."""

import enum


class Exit(enum.IntEnum):
    """How a process of Kinema ended. A scheduler may start `retryable` ones again as they are."""

    done = 0
    failed_check = 1
    """The run's final check says FAIL; also Python's own, for an error that is a bug."""
    configuration = 64
    """What was typed cannot be: the message says what to type."""
    data = 65
    """More clips are damaged than the run allows."""
    checkpoint = 66
    """No checkpoint can be loaded."""
    unavailable = 69
    """A server, another rank or another host does not answer."""
    unsound = 70
    """Numbers stayed infinite or not numbers, or the loss went away."""
    hang = 71
    """A rank did not move for longer than its phase may take."""
    preflight = 72
    """A check of the first steps failed: data, noise, losses or weights of the ranks are not what they must be."""
    io = 74
    """Something could not be written."""
    preempted = 75
    """Stopped by a signal or a time limit, after its checkpoint was written."""
    unsafe = 77
    """Refused because it could do harm."""

    @property
    def retryable(self) -> bool:
        """Whether the same command may do better later."""
        return self in {Exit.unavailable, Exit.hang, Exit.io, Exit.preempted}
