"""Stage ingest: which videos there are, with their captions and rights."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from data_prep.captions import (
    VIDEO_SUFFIXES,
    Shot,
    as_key,
    describe_videos,
    find_videos,
    hashed_key,
    parse_shot,
    read_captions,
    some_of,
)
from data_prep.lists import (
    CAPTION_COLUMNS,
    LIST_SUFFIXES,
    PATH_COLUMNS,
    Line,
    read_list,
    read_tar,
    refuse_near_misses,
    take_column,
)
from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from kinema.data.dataset.sample import CONSENT, check_rights

RIGHTS = ("source", "source_url", "license", "consent", "attribution", "collected", "generated", "generator")
TIMES = ("start_seconds", "end_seconds", "split")


@dataclass
class Ingest(Stage):
    """Finds the videos of the inputs. What a list says about one of them goes before what is said here for all."""

    version: ClassVar[int] = 2
    few_may_fail: ClassVar[bool] = False  # a row is a whole input, such as a list with a wrong line

    source: str | None = None
    """Where the videos come from; null takes the input's name."""
    license: str = "unknown"
    """SPDX identifier, e.g. CC-BY-4.0."""
    consent: str = "unknown"
    """Of the people seen: given, none-visible, synthetic, refused, unknown."""
    attribution: str = ""
    """The line that the licence asks for."""
    source_url: str = ""
    collected: str = ""
    """The day on which they were taken from there, as 2026-01-31."""
    generated: str = "unknown"
    """How much of them a generative model made: no, partly, fully, unknown."""
    generator: str = ""
    captions: str | None = None
    """For folders: a captions.jsonl, or a prompt.txt beside videos.txt; null looks in the usual places."""
    listed: list[str] = field(default_factory=list)
    """Columns of lists that are meant as they are spelled, though much like one that is known."""

    def __post_init__(self) -> None:
        check_rights(self, "ingest.")
        if self.consent not in CONSENT:
            raise ValueError(
                f"ingest.consent={self.consent} must be one of {', '.join(CONSENT)}. A word of your own stands in a "
                "list, in its column consent."
            )

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """A row for each video of one input: a folder, a video, a list, or a tar of samples."""
        path = Path(row["path"])
        if path.is_dir():
            return self.from_folder(path, find_videos(path), row["key"])
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return self.from_folder(path.parent, [path.name], row["key"])
        if path.suffix in LIST_SUFFIXES:
            return self.from_list(path)
        if path.suffix == ".tar":
            return self.from_tar(path, place)
        raise ValueError(f"input={path} must be a folder, a video, a list ({' '.join(LIST_SUFFIXES)}) or a .tar.")

    def from_folder(self, folder: Path, names: list[str], source: str) -> Iterator[Outcome]:
        """Videos with the captions that lie beside them."""
        lines = read_captions(folder, names, Path(self.captions) if self.captions else None)
        if len(names) == 1:  # a single file, whose folder's lists may tell of others
            lines = [line for line in lines if line.file in names]
        for video in describe_videos(folder, names, lines):
            about = {"shots": [asdict(shot) for shot in video.shots]} if video.shots else {}
            yield self.video_row(video.path, video.name, source, {"caption": video.caption, **about})

    def from_list(self, path: Path) -> Iterator[Outcome]:
        """The files that a list names, relative to the list; rows with times are shots of their video."""
        by_name: dict[str, list[Line]] = defaultdict(list)
        lines = read_list(path)
        refuse_near_misses(path, lines, (*PATH_COLUMNS, *CAPTION_COLUMNS, *RIGHTS, *TIMES), self.listed)
        for values, where in lines:
            name, rest = take_column(values, PATH_COLUMNS)
            if not isinstance(name, str):
                raise ValueError(f"{where} must have a path, in a column named {', '.join(PATH_COLUMNS)}.")
            by_name[name].append((rest, where))
        for name, lines in by_name.items():
            yield self.listed_row(path, name, lines)

    def listed_row(self, path: Path, name: str, lines: list[Line]) -> Outcome:
        """One video of a list."""
        caption, about = take_column(lines[0][0], CAPTION_COLUMNS)
        about = {key: value for key, value in about.items() if key not in TIMES}
        if "start_seconds" in lines[0][0]:
            shots = sorted((parse_shot({"caption": "", **values}, where) for values, where in lines), key=_start)
            about |= {"shots": [asdict(shot) for shot in shots], "caption": ""}
        elif len(lines) > 1:
            raise ValueError(f"{lines[1][1]}: {name} stands in the list twice. Give times to its shots, or keep one.")
        else:
            about["caption"] = caption or ""
        return self.video_row(path.parent / name, name, path.stem, about)

    def from_tar(self, path: Path, place: Place) -> Iterator[Outcome]:
        """The videos of a tar, laid into this stage's files."""
        for key, suffix, video, about in read_tar(path):
            name = f"{path.stem}-{as_key(key)}.{suffix}"
            if video is None:
                yield Dropped({"key": as_key(f"{path.stem}-{key}"), "listed": about}, "sample without a video")
                continue
            target = place.path_for(name)
            unfinished = target.with_name(f".{target.name}.part")
            unfinished.write_bytes(video)
            os.replace(unfinished, target)
            caption, about = take_column(about, CAPTION_COLUMNS)
            if "url" in about:
                about.setdefault("source_url", about["url"])
            yield self.video_row(target, name, path.stem, {**about, "caption": caption or ""})

    def video_row(self, path: Path, name: str, source: str, about: dict[str, Any]) -> Outcome:
        """All that is known of a video before it is opened; columns that no stage knows go under `listed`."""
        mine = {"source": self.source or source, **{right: getattr(self, right) for right in RIGHTS[1:]}}
        known = (*RIGHTS, "caption", "shots", "start_seconds", "end_seconds")
        listed = {key: value for key, value in about.items() if key not in known}
        rights = {name: str(about.get(name, value)) for name, value in mine.items()}
        check_rights(SimpleNamespace(**rights), f"{name}: ")  # now, not after days of scoring
        given: Row = {name: value for name, value in about.items() if name in ("caption", "shots")}
        row: Row = {
            "key": as_key(name.rpartition(".")[0]),
            "video": name,
            "path": str(path.resolve()),
            **rights,
            **given,
        }
        if listed:
            row["listed"] = listed
        if not path.is_file():
            return Dropped(row, "file is missing")
        return {**row, "bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}

    def finish(self, rows: Iterator[Row], place: Place) -> Iterator[Outcome]:
        """Number the videos, and tell those apart whose names give the same key."""
        taken = list(rows)
        if listed := sorted({name for row in taken for name in row.get("listed", {})}):
            print(f"columns that no stage knows go along under listed: {some_of(listed)}", flush=True)
        for number, row in enumerate(with_own_keys(taken)):
            yield {**row, "number": number}


def with_own_keys(rows: list[Row]) -> list[Row]:
    """The rows; every one whose key another has too gets a hash of its path behind it. Raises ValueError for one
    that is given twice.
    """
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_key[row["key"]].append(row)
    labels = {(row["key"], row["path"]): label for same in by_key.values() for row, label in told_apart(same)}
    return [_with_label(row, labels.get((row["key"], row["path"]))) for row in rows]


def _with_label(row: Row, label: str | None) -> Row:
    return row if label is None else {**row, "key": hashed_key(row["key"], label)}


def told_apart(rows: list[Row]) -> list[tuple[Row, str]]:
    """Rows of one key, if they are several, with a label each that is the same wherever the folders lie."""
    if len(rows) == 1:
        return []
    paths = [row["path"] for row in rows]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"input gives the same file twice: {some_of(twice)}. Take one of the inputs away.")
    labels = [row["video"] for row in rows]
    if len(set(labels)) < len(labels):  # several inputs
        labels = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    return list(zip(rows, labels, strict=True))


def _start(shot: Shot) -> float:
    return shot.start_seconds
