"""More ranks, another ZeRO stage, sequence parallelism, accumulation, checkpointing, packing: the same numbers."""

import json
import time
from pathlib import Path

import pytest

from tests.distributed.parity_cells import Cell, Result, all_cells, covering_cells, run_cells
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
LARGEST = 1e-5
DOCS = Path(__file__).parents[2] / "docs"
TABLE, PAGE = DOCS / "scaling_parity.json", DOCS / "scaling.md"


def measured(cells: list[Cell], timeout_seconds: float = 240) -> dict[Cell, Result]:
    """Four ranks, two of them where a pack is not shared."""
    found = {}
    for ranks in (2, 4):
        if chosen := [cell for cell in cells if (cell.sequence_degree == 1) == (ranks == 2)]:
            results = run_ranks(run_cells, ranks, chosen, timeout_seconds=timeout_seconds)[0]
            found |= dict(zip(chosen, results, strict=True))
    return {cell: found[cell] for cell in cells}


def check(found: dict[Cell, Result]) -> None:
    bad = {cell: result for cell, result in found.items() if not max(result) <= LARGEST}
    assert not bad, f"{len(bad)} of {len(found)}: {dict(list(bad.items())[:10])}"


def test_cells_of_every_value_equal_plain_pytorch_on_one_process():
    check(measured(covering_cells()))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", dict.fromkeys(cell[:3] for cell in all_cells()), ids=str)
def test_the_whole_matrix_equals_plain_pytorch_on_one_process(part):
    """A part of it, of one model, ZeRO stage and sequence degree; its cells take their places in the docs."""
    started = time.monotonic()
    cells = [cell for cell in all_cells() if cell[:3] == part]
    found = measured(cells, timeout_seconds=3600)
    print(f"{len(found)} cells in {time.monotonic() - started:.0f} s")
    check(found)
    enter(found)


def test_the_table_in_the_docs_is_of_cells_of_the_matrix_and_the_page_sums_it_up():
    known = tabled()
    assert list(known) == [cell for cell in all_cells() if cell in known]
    check(known)
    assert summary(known) in PAGE.read_text()


def test_the_covering_cells_hold_every_value_of_every_dimension():
    for values, whole in zip(zip(*covering_cells(), strict=True), zip(*all_cells(), strict=True), strict=True):
        assert set(values) == set(whole)


def enter(found: dict[Cell, Result]) -> None:
    """Write results into the table and the page of the docs, in the place of older ones."""
    before = tabled()
    known = {cell: result for cell in all_cells() if (result := found.get(cell, before.get(cell)))}
    rows = [
        cell._asdict() | {name: float(f"{value:.2e}") for name, value in result._asdict().items()}
        for cell, result in known.items()
    ]
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    PAGE.write_text(PAGE.read_text().replace(summary(before), summary(tabled())))


def tabled() -> dict[Cell, Result]:
    """The cells of the table in the docs."""
    rows = json.loads(TABLE.read_text())
    return {Cell(*(row[k] for k in Cell._fields)): Result(*(row[k] for k in Result._fields)) for row in rows}


def summary(found: dict[Cell, Result]) -> str:
    """Markdown: the largest differences of all cells that have a value."""
    lines = [f"| | | {len(found)} cells | loss | gradient norm | gradients |", "|---|---|---|---|---|---|"]
    for place, key in enumerate(Cell._fields):
        for value in dict.fromkeys(cell[place] for cell in found):
            results = [result for cell, result in found.items() if cell[place] == value]
            worst = " | ".join(f"{max(differences):.1e}" for differences in zip(*results, strict=True))
            lines.append(f"| {key} | {value} | {len(results)} | {worst} |")
    return "\n".join(lines)
