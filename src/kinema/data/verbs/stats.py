"""`kinema data stats`: what a data set holds, from its index alone."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from kinema.data.account.licenses import is_known
from kinema.data.dataset.opened import opened
from kinema.data.dataset.sample import CONSENT
from kinema.data.dataset.shards import ClipEntry, DatasetIndex
from kinema.data.decode.images import media_of

MOST_LINES = 12
"""Values of one fact that the table shows; json has them all."""
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


def statistics(index: DatasetIndex) -> dict[str, Any]:
    """Counts, sums and quantiles, ready for json."""
    records = [entry.record for entry in index.entries]
    licenses = Counter(record.license for record in records)
    return {
        "name": index.manifest["name"],
        "hash": index.hash,
        "shards": len(index.manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in index.manifest["shards"]),
        "clips": len(records),
        "seconds": round(sum(record.duration_seconds for record in records), 3),
        "quantiles": {
            "seconds": _quantiles([record.duration_seconds for record in records]),
            "frames": _quantiles([record.num_frames for record in records]),
            "fps": _quantiles([record.fps for record in records]),
            "width": _quantiles([record.width for record in records]),
            "height": _quantiles([record.height for record in records]),
            "mp4 kilobytes": _quantiles([_media_bytes(entry) / 1000 for entry in index.entries]),
            "caption characters": _quantiles([len(record.caption) for record in records]),
        },
        "counts": {
            "split": _sorted(Counter(record.split for record in records)),
            "size": _sorted(Counter(f"{record.width}x{record.height}" for record in records)),
            "license": _sorted(licenses),
            "source": _sorted(Counter(record.source for record in records)),
            "consent": _sorted(Counter(record.consent for record in records)),
            "generated": _sorted(Counter(record.generated for record in records)),
            "generator": _sorted(Counter(record.generator for record in records if record.generator)),
            "attribution": _sorted(Counter(record.attribution for record in records if record.attribution)),
            "member": _sorted(Counter(ext for entry in index.entries for ext in entry.members)),
        },
        "odd": {
            "without caption": sum(not record.caption.strip() for record in records),
            "license not stated": licenses["unknown"],
            "license not SPDX": sum(count for name, count in licenses.items() if not is_known(name)),
            "left out by the index": sum(index.manifest.get("refused", {}).values()),
            "consent not a known word": sum(record.consent not in CONSENT for record in records),
        },
    }


def table(stats: dict[str, Any]) -> str:
    """The statistics in plain text."""
    lines = [f"{stats['name']}, hash {stats['hash'][:12]}", ""]
    lines.append(f"{'':<20}" + "".join(f"{name:>10}" for name in QUANTILES))
    for fact, numbers in stats["quantiles"].items():
        lines.append(f"{fact:<20}" + "".join(f"{number:>10.4g}" for number in numbers.values()))
    for fact, counts in stats["counts"].items():
        if counts:
            lines += ["", fact, *_first([f"{count:>10}  {name}" for name, count in counts.items()])]
    lines += ["", "odd", *(f"{count:>10}  {what}" for what, count in stats["odd"].items())]
    return "\n".join(lines)


def verdict(stats: dict[str, Any]) -> str:
    """One line: how much there is, and how many clips are odd in which way."""
    odd = [f"{what} {count}" for what, count in stats["odd"].items() if count]
    return (
        f"COUNTED {stats['clips']} clips in {stats['shards']} shard(s), {stats['seconds'] / 60:.1f} minutes, "
        f"{stats['bytes'] / 1e6:.1f} MB; {', '.join(odd) or 'nothing odd'}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("path", help="folder or address of a data set, or of any WebDataset tars")
    parser.add_argument("--json", action="store_true", help="print one json object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the statistics and the verdict."""
    with opened(arguments.path) as index:
        stats = statistics(index)
    if arguments.json:
        print(json.dumps({**stats, "verdict": verdict(stats)}, ensure_ascii=False))
    else:
        print(table(stats))
        print(verdict(stats))
    return 0


def _media_bytes(entry: ClipEntry) -> int:
    media = media_of(entry.members)
    return entry.members[media].size if media in entry.members else 0


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values())) if values else np.zeros(len(QUANTILES))
    return dict(zip(QUANTILES, found.round(4).tolist(), strict=True))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"{'':>10}  ... and {more} more"]
