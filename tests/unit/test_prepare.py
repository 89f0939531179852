"""Footage to shards: the engine's promises, on stages made for the purpose and on real videos."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.rows import RowFailed, read_rows, write_rows
from data_prep.pipeline.run import Limits, Pipeline, alone_in
from data_prep.pipeline.stage import Stage
from kinema.data.account.ledger import DataBudgetError
from tests.unit.made_stages import Square


def pipeline(work: Path, rows: Iterable[dict], engine=None, stage=None, **limits) -> Pipeline:
    work.mkdir(exist_ok=True)
    write_rows(work / "input.jsonl", rows)
    return Pipeline({"square": stage or Square()}, work, engine or LocalEngine(workers=2), Limits(**limits))


def numbers(count, **misbehave):
    return [{"key": f"row-{n}", "n": n, "misbehave": misbehave.get(f"row_{n}", "")} for n in range(count)]


def test_rows_come_out_in_the_order_of_the_input_and_are_counted(tmp_path):
    for workers in (0, 2):
        [report] = pipeline(tmp_path / str(workers), numbers(20), LocalEngine(workers)).run(["square"], show=False)
        assert (report.given, report.kept, report.dropped) == (20, 32, {"a five": 4})
        rows = list(read_rows(tmp_path / str(workers) / "01-square" / "rows.jsonl"))
        assert [row["key"] for row in rows] == [f"row-{n}-{part}" for n in range(20) if n % 5 < 4 for part in (0, 1)]
    for name in ("rows.jsonl", "dropped.jsonl"):
        assert len({(tmp_path / workers / "01-square" / name).read_bytes() for workers in ("0", "2")}) == 1


def test_rows_that_crash_hang_or_fail_are_named_and_the_others_go_on(tmp_path):
    given = numbers(12, row_1="segfault", row_3="hang", row_6="fail", row_8="bug", row_10="memory")
    engine = LocalEngine(workers=2, timeout_seconds=1.0, max_memory_gib=1.0)
    [report] = pipeline(tmp_path / "w", given, engine, max_failed_fraction=0.5).run(["square"], show=False)
    assert report.kept == 2 * (12 - 5 - 2)
    assert report.failed == {"killed its process": 1, "took too long": 1, "odd": 1, "KeyError": 1, "MemoryError": 1}
    failed = {row["key"]: row["reason"] for row in read_rows(tmp_path / "w" / "01-square" / "failed.jsonl")}
    assert failed["row-1"] == "killed its process: SIGSEGV, 2 times"
    assert failed["row-3"] == "took too long: over 1 s"


def test_too_many_failures_stop_the_stage_and_are_kept(tmp_path):
    given = [{**row, "path": "/v/3.mp4"} for row in numbers(10, row_2="fail", row_3="fail")]
    with pytest.raises(DataBudgetError, match=r"limits\.max_failed_fraction=0\.1(.|\n)*row-3 \(/v/3\.mp4\): odd"):
        pipeline(tmp_path, given, LocalEngine(0), max_failed_fraction=0.1, min_failed=1).run(["square"], show=False)
    assert not (tmp_path / "01-square" / "report.json").exists()


def test_a_few_failures_stop_no_small_stage(tmp_path, capsys):
    given = numbers(9, row_1="fail", row_2="fail", row_3="fail")
    [report] = pipeline(tmp_path, [{**row, "path": "/v"} for row in given], LocalEngine(0)).run(["square"])
    assert (report.failed, "failed: row-3 (/v): odd" in capsys.readouterr().out) == ({"odd": 3}, True)
    with pytest.raises(DataBudgetError, match=r"4 of 9 rows failed(.|\n)*limits\.max_failed_fraction=0\.5"):
        pipeline(tmp_path, numbers(9, **{f"row_{n}": "fail" for n in range(4)}), LocalEngine(0)).run(["square"])


def test_what_is_done_is_not_done_again(tmp_path):
    calls = tmp_path / "calls"
    stage = Square(str(calls))

    def run(count, stage=stage):
        calls.write_text("")
        pipeline(tmp_path / "w", numbers(count), LocalEngine(0), stage).run(["square"], show=False)
        return len(calls.read_text())

    assert run(6) == 6
    assert run(6) == 0
    assert run(9) == 3  # more rows: only these
    journal = tmp_path / "w" / "01-square" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])  # a crash in the middle of a line
    (journal.with_name("report.json")).unlink()
    assert run(9) == 1
    (journal.with_name("report.json")).unlink()
    assert run(9) == 0
    Square.version = 2
    try:
        assert run(9) == 9  # other code
    finally:
        Square.version = 1


def test_rows_that_failed_are_tried_again_when_asked(tmp_path):
    mended = tmp_path / "mended"

    @dataclass
    class Mendable(Stage):
        def apply(self, row, place):
            if row["n"] == 2 and not mended.exists():
                raise RowFailed("disk full")
            return [row]

    def run(**changes):
        given = pipeline(tmp_path / "w", numbers(4), LocalEngine(0), Mendable(), max_failed_fraction=0.5)
        return replace(given, **changes).run(["square"], show=False)[0]

    assert (run().kept, run().failed) == (3, {"disk full": 1})
    mended.touch()
    assert run().kept == 3
    assert (run(retry_failed=True).kept, run().failed) == (4, {})


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    one = pipeline(tmp_path, numbers(2), LocalEngine(0))
    with alone_in(tmp_path), pytest.raises(ValueError, match="another command works there"):
        one.run(["square"], show=False)
