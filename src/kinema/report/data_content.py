"""What the data page shows: numbers, tables and pictures out of the index and the records of the preparation."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex
from kinema.report.content import duration
from kinema.report.histogram import HALF, WIDE, histogram_of, histogram_svg
from kinema.report.media import MediaShelf

PREPARATION, KEEP, HISTORY = "preparation", "keep.json", "prepare.json"
"""Beside the shards: folder and file of what the filters did, and the file with what every stage did."""
MOST_ROWS = 12
WORDS_SHOWN = 6


@dataclass(frozen=True)
class Preparation:
    """What data preparation left beside the shards; empty for a data set that was made otherwise."""

    folder: Path
    stages: list[dict[str, Any]]
    keep: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Preparation":
        """From the folder of a data set."""
        history, keep = folder / HISTORY, folder / PREPARATION / KEEP
        stages = json.loads(history.read_text(encoding="utf-8"))["stages"] if history.exists() else []
        return cls(folder / PREPARATION, stages, json.loads(keep.read_text(encoding="utf-8")) if keep.exists() else {})


def cards(index: DatasetIndex) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top."""
    records = [entry.record for entry in index.entries]
    seconds = np.array([record.duration_seconds for record in records])
    sizes = Counter((record.width, record.height) for record in records)
    rates = Counter(record.fps for record in records)
    shard_bytes = sum(shard["bytes"] for shard in index.manifest["shards"])
    (width, height), _ = sizes.most_common(1)[0]
    splits = Counter(record.split for record in records)
    return [
        ("clips", f"{len(records):,}", ", ".join(f"{count:,} {name}" for name, count in splits.most_common())),
        ("footage", duration(float(seconds.sum())), f"median clip {duration(float(np.median(seconds)))}"),
        ("picture", f"{width} \u00d7 {height}", "all clips" if len(sizes) == 1 else f"most, of {len(sizes)} sizes"),
        (
            "frame rate",
            f"{rates.most_common(1)[0][0]:g} fps",
            "all clips" if len(rates) == 1 else f"most, of {len(rates)}",
        ),
        ("shards", f"{len(index.manifest['shards']):,}", f"{shard_bytes / 2**20:,.1f} MiB"),
    ]


def funnel(stages: Sequence[dict[str, Any]], written: int) -> list[dict[str, Any]]:
    """What every stage was given, kept and took out, and why; the bars are relative to the longest."""
    longest = max([written, *(stage["kept"] for stage in stages)], default=1) or 1
    rows = []
    for stage in stages:
        lost = [(reason, count) for what in ("dropped", "failed") for reason, count in stage[what].items()]
        why = [f"{count:,} {reason}" for reason, count in sorted(lost, key=lambda item: -item[1])]
        why += [f"{count:,} {remark} (kept)" for remark, count in stage.get("remarks", {}).items()]
        rows.append({**stage, "share": stage["kept"] / longest, "why": "; ".join(why)})
    return rows


def distributions(records: Sequence[ClipRecord]) -> list[tuple[str, Markup, str]]:
    """Title, plot and caption of the histograms of all clips."""
    values: list[tuple[str, str, Callable[[ClipRecord], float]]] = [
        ("Duration", "seconds", lambda record: record.duration_seconds),
        ("Frames", "frames a clip", lambda record: record.num_frames),
        ("Aspect ratio", "width over height", lambda record: record.width / record.height),
        ("Shorter side", "pixels", lambda record: min(record.width, record.height)),
    ]
    plots = []
    for title, unit, value in values:
        found = np.array([value(record) for record in records], float)
        plot = histogram_of(found)
        if plot and found.min() < found.max():
            plots.append((title, histogram_svg(plot, title), f"{unit}; {_range(found)}"))
    return plots


def share_tables(records: Sequence[ClipRecord]) -> list[tuple[str, list[tuple[str, int, str, float]]]]:
    """Title and rows (name, clips, footage, share of the footage) of everything a clip states about itself."""
    columns: list[tuple[str, Callable[[ClipRecord], str]]] = [
        ("Licence", lambda record: record.license),
        ("Source", lambda record: record.source),
        ("Consent", lambda record: record.consent),
        ("Generated", lambda record: record.generated),
        ("Size", lambda record: f"{record.width} \u00d7 {record.height}"),
        ("Frame rate", lambda record: f"{record.fps:g} fps"),
    ]
    return [(title, _shares(records, name)) for title, name in columns]


def captions(records: Sequence[ClipRecord]) -> dict[str, Any]:
    """How long the captions are, which are empty or occur more than once, and the shortest and the longest."""
    texts = [record.caption.strip() for record in records]
    spoken = [text for text in texts if text]
    words = np.array([len(text.split()) for text in spoken], float)
    repeated = [(text, count) for text, count in Counter(spoken).most_common() if count > 1]
    plot = histogram_of(words)
    ordered = sorted(set(spoken), key=lambda text: (len(text.split()), text))
    return {
        "empty": len(texts) - len(spoken),
        "distinct": len(set(spoken)),
        "in_copies": sum(count for _, count in repeated),
        "repeated": repeated[:MOST_ROWS],
        "plot": histogram_svg(plot, "words a caption") if plot else None,
        "range": _range(words) if len(words) else "",
        "characters": max(map(len, spoken), default=0),
        "shortest": ordered[:WORDS_SHOWN],
        "longest": ordered[::-1][:WORDS_SHOWN],
        "common": _common_words(spoken),
    }


def filters(preparation: Preparation, shelf: MediaShelf) -> list[dict[str, Any]]:
    """The keep table: each line with its plot and the pictures of what it removed and of what just stayed."""
    lines = []
    for line in preparation.keep.get("filters", []):
        plot = line["histogram"] and histogram_svg(
            line["histogram"], line["name"], line["bounds"], line["rule"], width=WIDE if line["after"] else HALF
        )
        shown = {side: [_shown(clip, shelf) for clip in line[side]] for side in ("removed", "inside")}
        lines.append({**line, **shown, "plot": plot})
    return lines


def other_scores(preparation: Preparation) -> list[tuple[str, Markup, str]]:
    """Histograms of the scores that no filter looks at."""
    filtered = {line["name"] for line in preparation.keep.get("filters", [])}
    scores = preparation.keep.get("scores", {})
    return [
        (name, histogram_svg(score["histogram"], name), score["unit"])
        for name, score in scores.items()
        if name not in filtered and score["histogram"]
    ]


def _shown(clip: dict[str, Any], shelf: MediaShelf) -> dict[str, Any]:
    of = {"of": _shown(clip["of"], shelf)} if "of" in clip else {}
    return {**clip, "media": shelf.embed(clip["picture"]), **of}


def _shares(records: Sequence[ClipRecord], name: Callable[[ClipRecord], str]) -> list[tuple[str, int, str, float]]:
    clips, seconds = Counter[str](), Counter[str]()
    for record in records:
        clips[name(record)] += 1
        seconds[name(record)] += record.duration_seconds  # type: ignore[assignment]
    total = sum(seconds.values()) or 1
    rows = [(key, clips[key], duration(value), value / total) for key, value in seconds.most_common()]
    if len(rows) > MOST_ROWS:
        rest = rows[MOST_ROWS:]
        left = sum(seconds[key] for key, *_ in rest)
        rows = [*rows[:MOST_ROWS], (f"{len(rest):,} more", sum(row[1] for row in rest), duration(left), left / total)]
    return rows


def _common_words(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Words of more than three letters, by the number of captions that have them."""
    counts = Counter(word for text in texts for word in {part.strip(".,;:!?\"'()").lower() for part in text.split()})
    return [(word, count) for word, count in counts.most_common(200) if len(word) > 3][:24]


def _range(values: np.ndarray) -> str:
    low, middle, high = values.min(), np.median(values), values.max()
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"
