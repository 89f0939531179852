"""The table that all faults fill."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.suite.scene import Shown
from tests.faults.suite.table import Row, render

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="write the table of all faults to this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def show(request) -> Callable[[str, str, Shown], None]:
    """Enter a fault in the table: its number in the catalogue, what it is, and what was seen."""

    def enter(number: str, fault: str, shown: Shown) -> None:
        request.config.stash[ROWS].append(Row(number, fault, shown))

    return enter


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    path, rows = config.getoption("--fault-table"), config.stash[ROWS]
    if path and rows:
        failed = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        path.write_text(render(rows, failed))
        terminalreporter.write_line(f"{len(rows)} faults, {failed} failed: {path}")
