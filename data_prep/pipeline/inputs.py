"""The inputs of a command as rows of the first stage."""

from collections.abc import Iterable
from pathlib import Path

from data_prep.captions import find_videos
from data_prep.pipeline.rows import Row, row_digest, write_rows
from data_prep.pipeline.run import INPUT


def input_rows(inputs: Iterable[str]) -> list[Row]:
    """The inputs as the first stage gets them, each with what tells when it changed; a folder of tars is one input
    each. Raises ValueError for one that is not there.
    """
    return [row for given in inputs for row in _rows_of(given)]


def write_inputs(work: Path, rows: list[Row]) -> None:
    """Lay the inputs where the first stage looks for its rows."""
    work.mkdir(parents=True, exist_ok=True)
    write_rows(work / INPUT, rows)


def _rows_of(given: str) -> list[Row]:
    path = Path(given).resolve()
    if not path.exists():
        raise ValueError(f"input={given} does not exist.")
    paths = sorted(path.glob("*.tar")) if path.is_dir() else []
    if path.is_dir() and not paths:
        find_videos(path)  # raises for a folder without any
    return [{"key": path.name, "path": str(path), "changed": _last_change(path)} for path in paths or [path]]


def _last_change(path: Path) -> str:
    """Names, sizes and times of a file, or of all files under a folder, as a short hash."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return row_digest({"files": facts})
