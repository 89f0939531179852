"""Stage page: the HTML page of the data set that was written, with what the filters took out."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.pipeline.rows import Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.stages.filter import KEEP
from data_prep.stages.shown import PICTURES
from kinema.report.data_content import PREPARATION
from kinema.report.data_page import SHEET_CLIPS, build_data_page


@dataclass
class Page(Stage):
    """Puts keep table and pictures beside the shards, and writes `page.html` there."""

    light: ClassVar[bool] = True

    out: str = ""
    """Folder of the data set."""
    clips: int = SHEET_CLIPS
    """How many are shown, evenly chosen."""

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """Every row as it is."""
        return [row]

    def finish(self, rows: Iterator[Row], place: Place) -> Iterable[Outcome]:
        """Write the page; the rows stay as they are."""
        yield from rows
        found = [folder for name in place.earlier if (folder := place.work / name).joinpath(KEEP).exists()]
        if found:
            copy_preparation(found[-1], Path(self.out) / PREPARATION)
        page, _ = build_data_page(Path(self.out), clips=self.clips)
        print(f"page {page}", flush=True)


def copy_preparation(source: Path, target: Path) -> None:
    """Keep table and pictures of a filter stage, as they are, instead of those of an earlier run."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / PICTURES, target / PICTURES)
    shutil.copy2(source / KEEP, target / KEEP)
