"""More ranks, another ZeRO stage, sequence parallelism, accumulation, checkpointing, packing: the same numbers."""

import json
import time
from collections import defaultdict
from pathlib import Path

import pytest

from tests.distributed.parity_cells import Cell, Result, all_cells, covering_cells, run_cells
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
LARGEST = 1e-5
DOCS = Path(__file__).parents[2] / "docs"
TABLE = DOCS / "scaling_parity.json"


def measured(cells: list[Cell], timeout_seconds: float = 240) -> dict[Cell, Result]:
    """Four ranks, two of them where a pack is not shared."""
    found = {}
    for ranks in (2, 4):
        chosen = [cell for cell in cells if (cell.sequence_degree == 1) == (ranks == 2)]
        found |= dict(zip(chosen, run_ranks(run_cells, ranks, chosen, timeout_seconds=timeout_seconds)[0], strict=True))
    return {cell: found[cell] for cell in cells}


def check(found: dict[Cell, Result]) -> None:
    bad = {cell: result for cell, result in found.items() if not max(result) <= LARGEST}
    assert not bad, f"{len(bad)} of {len(found)}: {dict(list(bad.items())[:10])}"


def test_cells_of_every_value_equal_plain_pytorch_on_one_process():
    check(measured(covering_cells()))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_whole_matrix_equals_plain_pytorch_on_one_process():
    started = time.monotonic()
    found = measured(all_cells(), timeout_seconds=7200)
    TABLE.write_text(table(found))
    print(f"{len(found)} cells in {time.monotonic() - started:.0f} s")
    check(found)


def test_the_table_in_the_docs_is_of_cells_of_the_matrix_and_the_page_sums_it_up():
    rows = json.loads(TABLE.read_text())
    cells = [Cell(*(row[key] for key in Cell._fields)) for row in rows]
    assert len(set(cells)) == len(cells)
    assert set(cells) <= set(all_cells())
    assert max(max(row["loss"], row["norm"], row["gradient"]) for row in rows) <= LARGEST
    page = (DOCS / "scaling.md").read_text()
    assert f"{len(cells)} of its {len(all_cells())} cells" in page
    assert summary(rows) in page


def test_the_covering_cells_hold_every_value_of_every_dimension():
    for values, whole in zip(zip(*covering_cells(), strict=True), zip(*all_cells(), strict=True), strict=True):
        assert set(values) == set(whole)


def table(found: dict[Cell, Result]) -> str:
    """JSON, a cell a line."""
    rows = [
        cell._asdict() | {name: float(f"{value:.2e}") for name, value in result._asdict().items()}
        for cell, result in found.items()
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def summary(rows: list[dict]) -> str:
    """Markdown: the largest differences of all cells that have a value."""
    worst: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0])
    for row in rows:
        for key in Cell._fields:
            entry = worst[key, str(row[key])]
            entry[:] = [*(max(entry[i], row[k]) for i, k in enumerate(Result._fields)), entry[3] + 1]
    lines = [f"| {k} | {v} | {e[3]} | {e[0]:.1e} | {e[1]:.1e} | {e[2]:.1e} |" for (k, v), e in worst.items()]
    return "\n".join(["| | | cells | loss | gradient norm | gradients |", "|---|---|---|---|---|---|", *lines])
