"""One line of `kinema doctor`: what was looked at, what was found, and what to do about it."""

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


class Level(enum.Enum):
    """How a check ended; FAIL alone keeps a job from starting."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to type or change; empty for PASS."""

    def lines(self) -> str:
        """As it is printed."""
        told = f"{self.level.value}  {self.name:<14} {self.found}"
        return f"{told}\n      -> {self.advice}" if self.advice else told


Check = tuple[str, Callable[[], Finding]]
"""A name, and the function that finds out; one that raises has failed."""


def graded(name: str, found: str, *, warn: str = "", fail: str = "") -> Finding:
    """A finding whose level is that of the advice that is given; FAIL goes before WARN."""
    level = Level.FAIL if fail else Level.WARN if warn else Level.PASS
    return Finding(name, level, found, fail or warn)


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Make the checks one after the other; what one of them raises is its finding."""
    for name, check in checks:
        try:
            yield check()
        except Exception as error:  # a check that cannot be made is a FAIL with its reason, and the others go on
            cause = " ".join(str(error).split()) or type(error).__name__
            yield Finding(name, Level.FAIL, "cannot be checked" if not isinstance(error, ValueError) else "", cause)
