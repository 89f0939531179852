"""What a stage of data preparation is: settings, and a pure function from one row to rows."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.pipeline.rows import Outcome, Row


@dataclass(frozen=True)
class Place:
    """Where a stage may write: its own folder inside the working folder of the whole pipeline."""

    work: Path
    name: str
    """Of the stage's folder, such as `04-cut`."""
    earlier: tuple[str, ...] = ()
    """Names of the folders of the stages before."""

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.work / self.name

    def path_for(self, name: str) -> Path:
        """Where a file of this stage belongs; spread over sub-folders, as there may be millions."""
        path = self.folder / "files" / hashlib.sha256(name.encode()).hexdigest()[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def relative(self, path: Path) -> str:
        """A path as it goes into a row: relative to the working folder, which may be moved."""
        return path.relative_to(self.work).as_posix()

    def history(self) -> list[dict[str, Any]]:
        """What the stages before did, in order: name, settings and counts."""
        stages = []
        for name in self.earlier:
            report = json.loads((self.work / name / "report.json").read_text(encoding="utf-8"))
            stages.append({key: value for key, value in report.items() if key not in ("seconds", "input_sha256")})
        return stages

    def find(self, name: str) -> Path:
        """The file that a row names: relative to the working folder, or anywhere."""
        return self.work / name


@dataclass
class Stage:
    """One stage: the fields of its dataclass are its settings.

    `apply` runs in worker processes, maybe on other machines, in any order and perhaps twice: it must depend on
    nothing but the settings, the row and the files that the row names, and write files under fixed names, in one
    rename. `finish` runs once, over all rows in the order of the input.
    """

    version: ClassVar[int] = 1
    """Raise it with every change of code that changes results: work done by other versions is done anew."""
    light: ClassVar[bool] = False
    """`apply` only looks at the row: it needs no process of its own."""
    few_may_fail: ClassVar[bool] = True
    """`limits.min_failed` holds for its rows."""
    bundle: ClassVar[str | None] = None
    """Name of a value: rows in a row that share it come to `apply` as one, {"key": value, "members": [rows]}."""

    def start(self) -> None:
        """Load what `apply` needs, once in every worker process, such as a model; raises ValueError."""

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The rows that come of one row, kept or `Dropped`; raises RowFailed if it cannot be worked on."""
        raise NotImplementedError

    def finish(self, rows: Iterator[Row], place: Place) -> Iterable[Outcome]:
        """What only all rows together can tell, such as which are duplicates; by default they stay as they are."""
        del place
        return rows

    def remark(self, row: Row) -> str:
        """What is worth counting about a row that was kept, in words that are equal for equal causes; or nothing."""
        del row
        return ""

    def identity(self, name: str) -> str:
        """Changes whenever results may: by the stage's name, class, version and settings."""
        from kinema.identity import digest  # loads torch, which a worker process need not wait for

        return digest({"name": name, "version": self.version, **self.settings()})

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, with the class under `type`."""
        from kinema.identity import to_plain

        return to_plain(self)
