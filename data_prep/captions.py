"""Captions and shot lists for a folder of videos, from the places where people keep them."""

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kinema.data.dataset.sample import SPLITS

GUARD = "guard"
"""Split of a clip that is left out, because it lies between train and held-out stretches of one video."""
VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
RIGHTS = {"source", "source_url", "license", "consent", "attribution", "collected", "generated", "generator"}
"""What a list may state of a video, and captions beside videos may not."""
KEY_BYTES = 200
"""Of a key at most, as file names that are made of it may have 255."""
OVERLAP_SECONDS = 1e-6
"""Below this two shots do not overlap: their times are rounded."""


@dataclass(frozen=True)
class Shot:
    """A stretch of one video, seconds from its first frame, that becomes one clip."""

    start_seconds: float
    end_seconds: float
    caption: str = ""
    split: str | None = None
    """`train`, `heldout` or `guard`; None when the data set's rule decides."""


@dataclass(frozen=True)
class Video:
    """One source file. Without `shots` they are searched, and all get `caption`."""

    path: Path
    name: str
    """Path inside its folder."""
    caption: str = ""
    shots: tuple[Shot, ...] | None = None


def as_key(name: str) -> str:
    """A name as a clip key may hold it: letters and digits of any script, `_` and `-`; anything else is one `-`."""
    key = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name)).strip("-") or "video"
    return key if len(key.encode()) <= KEY_BYTES else hashed_key(key, name)


def hashed_key(key: str, label: str) -> str:
    """The key, cut to KEY_BYTES, with eight hex digits that tell `label` from others."""
    short = key.encode()[: KEY_BYTES - 9].decode(errors="ignore")  # a letter that the cut parts goes as a whole
    return f"{short}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class CaptionLine:
    """What one place says about one video, or about one shot of it."""

    file: str
    caption: str
    where: str
    """For messages: file and line."""
    shot: Shot | None = None


def find_videos(folder: Path) -> list[str]:
    """Names of all videos under a folder, sorted; hidden ones are not seen. Raises ValueError if none."""
    if not folder.is_dir():
        raise ValueError(f"input={folder} is not a folder. Give the folder that holds the videos.")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise ValueError(f"input={folder} holds no video ({' '.join(VIDEO_SUFFIXES)}).")
    return names


def read_captions(folder: Path, names: Sequence[str], file: Path | None = None) -> list[CaptionLine]:
    """Every caption line for the videos `names` of `folder`: from `file` alone, or from all usual places."""
    if file is not None:
        videos = file.with_name("videos.txt")
        return _read_jsonl(file) if file.suffix == ".jsonl" else _read_pair(videos, file)
    lines: list[CaptionLine] = []
    for name in ("metadata.jsonl", "captions.jsonl"):
        if (folder / name).exists():
            lines += _read_jsonl(folder / name)
    for name in ("prompt.txt", "prompts.txt"):
        if (folder / name).exists() and (folder / "videos.txt").exists():
            lines += _read_pair(folder / "videos.txt", folder / name)
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if beside.exists():
            lines.append(CaptionLine(name, " ".join(beside.read_text(encoding="utf-8").split()), str(beside)))
    return lines


def describe_videos(folder: Path, names: Sequence[str], lines: Sequence[CaptionLine]) -> list[Video]:
    """Join videos and caption lines.

    Raises ValueError for a line about a video that is not there, and for two different captions of one video or
    overlapping shots.
    """
    by_file = defaultdict(list)
    for line in lines:
        by_file[line.file].append(line)
    unknown = [f"{line.file} ({line.where})" for line in lines if line.file not in set(names)]
    if unknown:
        raise ValueError(f"Captions for videos that are not in {folder}: {some_of(unknown)}.")
    return [_describe(folder / name, name, by_file[name]) for name in names]


def parse_shot(values: dict[str, object], where: str) -> Shot:
    """A shot from `start_seconds`, `end_seconds`, `caption` and perhaps `split`; raises ValueError."""
    start, end, split = values.get("start_seconds"), values.get("end_seconds"), values.get("split")
    caption = next((values[name] for name in ("caption", "text") if name in values), None)
    if not isinstance(caption, str):
        raise ValueError(f'{where} must have "caption" (or "text") as a string.')
    if not isinstance(start, int | float) or not isinstance(end, int | float) or not 0 <= start < end:
        raise ValueError(f"{where}: start_seconds={start!r} must be from 0 and before end_seconds={end!r}.")
    if split is not None and split not in (*SPLITS, GUARD):
        raise ValueError(f"{where}: split={split!r} must be {', '.join((*SPLITS, GUARD))}, or absent.")
    return Shot(start, end, caption.strip(), str(split) if split else None)


def read_json_lines(path: Path) -> list[tuple[dict[str, object], str]]:
    """(object, place for messages) of each line that is not empty; raises ValueError."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not json: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{number} must be a json object, not {type(values).__name__}.")
        lines.append((values, f"{path}:{number}"))
    return lines


def some_of(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _read_jsonl(path: Path) -> list[CaptionLine]:
    lines = []
    for values, where in read_json_lines(path):
        file = next((values[name] for name in ("file", "file_name", "video") if name in values), None)
        if not isinstance(file, str):
            raise ValueError(f'{where} must have "file" (or "file_name") as a string.')
        timed = "start_seconds" in values or "end_seconds" in values
        if stated := sorted(RIGHTS.intersection(values)):
            raise ValueError(f"{where} states {', '.join(stated)}: give input={path}, which reads it as a list.")
        shot = parse_shot(values if timed else {**values, "start_seconds": 0, "end_seconds": 1}, where)
        if not timed and shot.split:
            raise ValueError(f"{where}: split={shot.split!r} is for shots: give start_seconds and end_seconds.")
        lines.append(CaptionLine(file, shot.caption, where, shot if timed else None))
    return lines


def _read_pair(videos: Path, prompts: Path) -> list[CaptionLine]:
    if not videos.exists() or not prompts.exists():
        raise ValueError(f"{prompts} and {videos} must both exist: line n captions the video of line n.")
    names, captions = (path.read_text(encoding="utf-8").splitlines() for path in (videos, prompts))
    if len(names) != len(captions):
        raise ValueError(f"{videos} has {len(names)} lines, {prompts} has {len(captions)}: they go in pairs.")
    pairs = enumerate(zip(names, captions, strict=True), 1)
    return [CaptionLine(n.strip(), c.strip(), f"{prompts}:{i}") for i, (n, c) in pairs if n.strip()]


def _describe(path: Path, name: str, lines: list[CaptionLine]) -> Video:
    timed = sorted((line for line in lines if line.shot), key=lambda line: line.shot.start_seconds)  # type: ignore[union-attr]
    shots = tuple(line.shot for line in timed if line.shot)
    for (before, after), line in zip(pairwise(shots), timed[1:], strict=True):
        if after.start_seconds < before.end_seconds - OVERLAP_SECONDS:
            raise ValueError(f"{line.where}: its shot overlaps the one that begins at {before.start_seconds} s.")
    captions = {line.caption for line in lines if line.shot is None}
    if len(captions) > 1 or (captions and shots):
        raise ValueError(f"{name} has several captions: {some_of([line.where for line in lines])}. Keep one.")
    return Video(path, name, next(iter(captions), ""), shots or None)
