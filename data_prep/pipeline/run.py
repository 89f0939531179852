"""Runs stages one after the other over all rows: journaled, counted, and stopped by limits."""

import fcntl
import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.pipeline.engines import Crew, Engine, work_here
from data_prep.pipeline.journal import Journal, Result
from data_prep.pipeline.rows import (
    Dropped,
    Row,
    bundled,
    cause,
    members,
    read_rows,
    row_digest,
    write_json,
    write_rows,
)
from data_prep.pipeline.stage import Place, Stage
from kinema.data.account.ledger import DataBudgetError

SHOWN = 10
"""Failures that are named on the screen; all are in FAILED."""
INPUT = "input.jsonl"
ROWS, DROPPED, FAILED, REPORT, JOURNAL = "rows.jsonl", "dropped.jsonl", "failed.jsonl", "report.json", "journal.jsonl"


@dataclass
class Limits:
    """When a stage stops instead of going on with what is left."""

    max_failed_fraction: float = 0.05
    """More of a stage's rows than this share, and more than min_failed, stop it: damaged files, rows that kill or hang
    their process.
    """
    min_failed: int = 3
    min_kept: int = 1
    """Rows that every stage must leave."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"limits.max_failed_fraction={self.max_failed_fraction} must be from 0 to 1.")
        if self.min_failed < 0:
            raise ValueError(f"limits.min_failed={self.min_failed} must be at least 0, e.g. 3.")

    def allow(self, failed: int, given: int, few_may_fail: bool) -> bool:
        """Whether a stage of `given` rows goes on after so many failures; where all failed, few are too many."""
        few = few_may_fail and failed <= self.min_failed and failed < given
        return few or failed <= self.max_failed_fraction * given


@dataclass
class Report:
    """What a stage did with its rows; `report.json`, and a line of the keep table."""

    stage: str
    identity: str
    settings: dict[str, Any]
    input_sha256: str
    given: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows by reason."""
    failed: dict[str, int] = field(default_factory=dict)
    """Rows by cause."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Rows that were kept and are worth a word, by that word."""
    seconds: float = 0.0
    """Of the run that finished the stage."""

    def line(self) -> str:
        """`split 6 -> 155, dropped 3 (too short 3)`."""
        parts = [f"{self.stage} {self.given} -> {self.kept}"]
        for what, counts in (("dropped", self.dropped), ("failed", self.failed), ("of them", self.remarks)):
            if counts:
                reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                parts.append(f"{what} {sum(counts.values())} ({reasons})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Pipeline:
    """Stages by name, in their order, and where they work."""

    stages: Mapping[str, Stage]
    work: Path
    engine: Engine
    limits: Limits
    retry_failed: bool = False
    """Work once more on rows that failed before."""

    def place(self, name: str) -> Place:
        """Where a stage works, such as WORK/04-cut."""
        folders = [f"{number:02d}-{stage}" for number, stage in enumerate(self.stages, 1)]
        number = list(self.stages).index(name)
        return Place(self.work, folders[number], tuple(folders[:number]))

    def run(self, names: Iterable[str], show: bool = True) -> list[Report]:
        """Run these stages, each on what the one before it left; those that are done already only report."""
        reports = []
        with alone_in(self.work), self.engine.crew() as crew:
            for name in names:
                reports.append(self._run_stage(name, crew, show))
                if show:
                    print(reports[-1].line(), *self._failures(name), sep="\n  ", flush=True)
        return reports

    def _failures(self, name: str) -> list[str]:
        """A line for each of the first rows that failed in a stage."""
        failed = read_rows(self.place(name).folder / FAILED)
        return [f"failed: {failure_line(row)}" for row in itertools.islice(failed, SHOWN)]

    def _run_stage(self, name: str, crew: Crew, show: bool) -> Report:
        given = self._input_of(name)
        report = Report(name, self.stages[name].identity(name), self.stages[name].settings(), _sha256(given))
        before = read_report(self.place(name))
        done = before and (before.identity, before.input_sha256) == (report.identity, report.input_sha256)
        if before and done and not (self.retry_failed and before.failed):
            return before
        return StageRun(self, name, given, report).run(crew, show)

    def _input_of(self, name: str) -> Path:
        names = list(self.stages)
        if name == names[0]:
            return self.work / INPUT
        earlier = names[names.index(name) - 1]
        rows = self.place(earlier).folder / ROWS
        if not rows.exists():
            raise ValueError(f"stages=[{name}]: stage {earlier} is not done. Run it first: stages=[{earlier},{name}].")
        return rows


class StageRun:
    """One run of one stage."""

    def __init__(self, pipeline: Pipeline, name: str, given: Path, report: Report) -> None:
        self.stage, self.place = pipeline.stages[name], pipeline.place(name)
        self.limits, self.retry_failed = pipeline.limits, pipeline.retry_failed
        self.given, self.report = given, report
        self.failures: list[Row] = []

    def run(self, crew: Crew, show: bool) -> Report:
        """Work on the rows that the journal lacks, then put everything in the order of the input."""
        started = time.monotonic()
        self._open_folder()
        self.report.given = sum(1 for _ in read_rows(self.given))
        with Journal(self.place.folder / JOURNAL) as journal:
            if self.retry_failed:
                journal.forget_failures()
            self._work(journal, work_here if self.stage.light else crew, show)
            self._collect(journal)
        self.report.seconds = round(time.monotonic() - started, 2)
        write_json(self.place.folder / REPORT, asdict(self.report))
        return self.report

    def _open_folder(self) -> None:
        """Work done with other settings is done anew; work on other rows stays, since rows are told apart."""
        folder, identity = self.place.folder, self.place.folder / "identity.json"
        mine = {"stage": self.report.stage, "identity": self.report.identity, "settings": self.stage.settings()}
        if identity.exists() and json.loads(identity.read_text()) != json.loads(json.dumps(mine)):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).unlink(missing_ok=True)
        write_json(identity, mine)

    def _rows(self) -> Iterator[Row]:
        """What `apply` gets, one after the other."""
        return bundled(read_rows(self.given), self.stage.bundle)

    def _work(self, journal: Journal, crew: Crew, show: bool) -> None:
        done = 0
        for row in self._rows():
            if row_digest(row) in journal:
                done += len(members(row))
                self._check(journal[row_digest(row)])
        if done == self.report.given:
            return
        todo = (row for row in self._rows() if row_digest(row) not in journal)
        bar = tqdm(total=self.report.given, initial=done, unit="row", desc=self.report.stage, disable=not show)
        with bar, closing(crew(self.stage, self.place, todo)) as results:
            for result in results:
                journal.add(result)
                self._check(result)
                bar.update(result.get("members", 1))

    def _check(self, result: Result) -> None:
        """Stop as soon as too many rows have failed."""
        if "failed" not in result:
            return
        failed = {"key": result["key"], "path": result.get("path"), "reason": result["failed"]}
        self.failures += [failed] * result["members"]
        if not self.limits.allow(len(self.failures), self.report.given, self.stage.few_may_fail):
            limits, named = self.limits, "\n".join(f"  {failure_line(row)}" for row in self.failures[:SHOWN])
            least = f" and limits.min_failed={limits.min_failed}" if self.stage.few_may_fail else ""
            raise DataBudgetError(
                f"{self.report.stage}: {len(self.failures)} of {self.report.given} rows failed, more than "
                f"limits.max_failed_fraction={limits.max_failed_fraction}{least} allow:\n{named}\n"
                "Mend or remove them, go on without them (limits.max_failed_fraction=0.5, or 1 whatever fails), "
                "or try them again (retry_failed=true)."
            )

    def _collect(self, journal: Journal) -> None:
        dropped: list[Row] = []
        failed: list[Row] = []
        remarks = Counter[str]()

        def kept() -> Iterator[Row]:
            for row in self._rows():
                result = journal[row_digest(row)]
                if "failed" in result:
                    failed.extend({"reason": result["failed"], **member} for member in members(row))
                    continue
                dropped.extend(result["dropped"])
                yield from result["rows"]

        def finished() -> Iterator[Row]:
            for outcome in self.stage.finish(kept(), self.place):
                if isinstance(outcome, Dropped):
                    dropped.append({"reason": outcome.reason, **outcome.row})
                else:
                    remarks[self.stage.remark(outcome)] += 1
                    yield outcome

        folder, report = self.place.folder, self.report
        report.kept = write_rows(folder / ROWS, finished())
        write_rows(folder / DROPPED, dropped)
        write_rows(folder / FAILED, failed)
        report.dropped = dict(sorted(Counter(row["reason"] for row in dropped).items()))
        report.failed = dict(sorted(Counter(cause(row["reason"]) for row in failed).items()))
        report.remarks = {remark: count for remark, count in sorted(remarks.items()) if remark}
        if report.kept < self.limits.min_kept:
            raise ValueError(f"{report.line()}: fewer rows are left than limits.min_kept={self.limits.min_kept}.")


def failure_line(row: Row) -> str:
    """`cat (/videos/cat.mp4): cut short: ...`."""
    return f"{row['key']}{' (' + row['path'] + ')' if row.get('path') else ''}: {row['reason']}"


@contextmanager
def alone_in(work: Path) -> Iterator[None]:
    """See that no other command works in this folder at the same time; raises ValueError."""
    with open(work / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"work={work}: another command works there. Wait, or give another work=.") from error
        yield


def read_report(place: Place) -> Report | None:
    """The report of a stage that is done, else None."""
    path = place.folder / REPORT
    return Report(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
