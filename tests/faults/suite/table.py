"""The table of faults that `make faults` writes into the docs."""

import platform
from typing import NamedTuple

from tests.faults.suite.scene import Shown

HEAD = """# What happens when things break

Each row is a fault that `make faults` brings about in a real run, on real processes, with what a user sees of it.
That command writes this page; do not edit it.

- **exit** is the status of the run that met the fault; `-` says that it went on to its end.
- **recovery** is the time from starting the same command again to its first new step, without the imports of Python.
- **lost** counts steps that were done before the fault and had to be done again; checkpoints are two steps apart here.

Of {faults} faults {failed} ended otherwise than they must. A hang, a damaged checkpoint that is loaded, another status
or message than this fault's, and other numbers are failures: where a run continues, its losses, weights, averages and
moments are compared with those of a run that nothing disturbed, bit for bit on the same ranks, to 1e-4 on others.
Measured on {machine}.

| | fault | what the user sees | exit | recovery | lost |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """A fault by its number in the catalogue, with what was seen of it."""

    number: str
    fault: str
    shown: Shown


def render(rows: list[Row], failed: int) -> str:
    """The page as Markdown."""
    machine = f"{platform.system()} {platform.machine()}, 2 cores, no GPU"
    return HEAD.format(faults=len(rows), failed=failed or "none", machine=machine) + "".join(
        map(_line, sorted(rows, key=_place))
    )


def _place(row: Row) -> tuple[str, int, str]:
    return row.number[0], int(row.number[1:]), row.fault


def _line(row: Row) -> str:
    shown = row.shown
    seconds = "" if shown.recovery_seconds is None else f"{shown.recovery_seconds:.1f} s"
    lost = "" if shown.steps_lost is None else shown.steps_lost
    sees = shown.sees.replace("|", "\\|")
    return f"| {row.number} | {row.fault} | {sees} | {shown.status} | {seconds} | {lost} |\n"
