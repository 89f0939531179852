"""Lists of videos that people keep: CSV, Parquet or JSON lines with a path in each row, and tars of samples."""

import csv
import difflib
import json
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_prep.captions import VIDEO_SUFFIXES, read_json_lines
from data_prep.pipeline.rows import RowFailed

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("path", "file", "file_name", "video", "video_path")
CAPTION_COLUMNS = ("caption", "text")
NEAR = 0.85
"""Likeness of two names from which one is taken for a slip of the other; caption_en and video_id are below."""
Line = tuple[dict[str, Any], str]
"""A row's values by column, without empty ones, and the place for messages."""


def read_list(path: Path) -> list[Line]:
    """All rows of a list; raises ValueError for a file that is no such list."""
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    lines = [({name: value for name, value in row.items() if value not in (None, "")}, n) for n, row in enumerate(rows)]
    return [(_numbers(values), f"{path}, row {number + 1}") for values, number in lines]


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """CSV knows only strings; the two times are numbers."""
    for name in ("start_seconds", "end_seconds"):
        if isinstance(values.get(name), str):
            try:
                values = {**values, name: float(values[name])}
            except ValueError:
                continue  # whoever reads it says what is wrong, and where
    return values


def refuse_near_misses(path: Path, lines: list[Line], known: Collection[str], meant: Collection[str]) -> None:
    """See that no column is a known one in other letters, unless that is there too or the name is in `meant`.

    Raises ValueError that names the column.
    """
    columns = {name for values, _ in lines for name in values}
    for name in sorted(columns - {*known, *meant}):
        near = near_miss(name, known)
        if near and near not in columns:
            raise ValueError(
                f"{path}: column {name} is unknown. Did you mean {near}? Rename it, or type "
                f"'ingest.listed=[{name}]' if it shall stay as it is."
            )


def near_miss(name: str, known: Collection[str]) -> str | None:
    """The known name that was meant: much like it (Licence), or its letters in another order (lisence).

    A number at the end is no slip.
    """
    plain = name.strip().lower()
    mixed = [one for one in known if sorted(one) == sorted(plain)]
    found = difflib.get_close_matches(plain, known, n=1, cutoff=NEAR) or mixed
    return found[0] if found and not plain[-1:].isdigit() else None


def take_column(values: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The first of the columns that is there, or None, and the others without any of them."""
    found = next((values[name] for name in names if name in values), None)
    return found, {name: value for name, value in values.items() if name not in names}


def read_tar(path: Path) -> Iterator[tuple[str, str, bytes | None, dict[str, Any]]]:
    """(key, suffix, video, what json and txt say) of each sample of a WebDataset tar, as video2dataset writes them.

    A sample whose download failed has None for its video. Raises RowFailed for a damaged tar.
    """
    videos: dict[str, tarfile.TarInfo] = {}
    about: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, dot, suffix = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or not dot:
                    continue
                if f".{suffix.lower()}" in VIDEO_SUFFIXES:
                    videos[key] = member
                elif suffix in ("json", "txt"):
                    file = tar.extractfile(member)
                    assert file is not None
                    _note(about.setdefault(key, {}), suffix, file.read(), f"{path}:{member.name}")
            for key in sorted({*videos, *about}):
                file = tar.extractfile(videos[key]) if key in videos else None
                suffix = videos[key].name.rpartition(".")[2].lower() if key in videos else ""
                yield key, suffix, file.read() if file else None, about.get(key, {})
    except (tarfile.TarError, EOFError) as error:
        raise RowFailed(f"is no whole tar: {error}") from error


def _note(about: dict[str, Any], suffix: str, content: bytes, where: str) -> None:
    if suffix == "txt":
        about.setdefault("caption", content.decode("utf-8", errors="replace").strip())
        return
    try:
        values = json.loads(content)
    except ValueError as error:
        raise RowFailed(f"holds json that is none: {where}: {error}") from error
    about.update({name: value for name, value in values.items() if value is not None})
