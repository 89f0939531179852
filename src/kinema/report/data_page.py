"""`kinema data page PATH`: one self-contained HTML page of a data set."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kinema.data.dataset.opened import local_folder
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import ClipEntry, DamagedSample, DatasetIndex, read_member
from kinema.data.decode.decoding import DecodeError, Decoder, decode_clip
from kinema.data.geometry import ClipShape
from kinema.data.verbs.contact_sheet import strip_jpeg
from kinema.report import data_content as content
from kinema.report.media import LARGEST_PAGE_MIB, Media, MediaShelf
from kinema.report.page import Check, highlight, templates, version

SHEET_CLIPS = 24
STRIP_FRAMES = 5
STRIP_SIDE = 112
"""Longer side of a frame in pixels."""


@dataclass(frozen=True)
class Sheet:
    """Clips as the page shows them, and how many of those that were chosen could not be."""

    clips: list[dict[str, Any]]
    failed: list[str]


def build_data_page(folder: Path, out: Path | None = None, clips: int = SHEET_CLIPS) -> tuple[Path, list[Check]]:
    """Write the page of the data set in `folder` to `out` (default: FOLDER/page.html); returns its path and verdict.

    clips: how many are shown, evenly chosen. Errors: ValueError when the folder holds no data set, or no clip.
    """
    index = DatasetIndex.load(folder)
    if not index.entries:
        raise ValueError(f"{folder} has no clips: there is nothing to show.")
    records = [entry.record for entry in index.entries]
    preparation = content.Preparation.read(folder)
    shelf = MediaShelf(preparation.folder)
    captions = content.captions(records)
    sheet = contact_sheet(index, clips, shelf)
    checks = verdict(records, captions, sheet, preparation)
    context = {
        "name": index.manifest["name"],
        "hash": index.hash,
        "checks": checks,
        "cards": content.cards(index),
        "funnel": content.funnel(preparation.stages, len(records)),
        "keep": preparation.keep,
        "filters": content.filters(preparation, shelf),
        "other_scores": content.other_scores(preparation),
        "distributions": content.distributions(records),
        "tables": content.share_tables(records),
        "attributions": index.manifest.get("attributions", []),
        "captions": captions,
        "sheet": sheet,
        "settings": highlight(yaml.safe_dump(_settings(preparation), sort_keys=False)) if preparation.stages else None,
        "command": index.manifest.get("command", ""),
        "shelf": shelf,
        "page_limit_mib": LARGEST_PAGE_MIB,
        "version": version(),
    }
    page = out or folder / "page.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(templates().get_template("data_page.html").render(context), encoding="utf-8")
    return page, checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kinema data page`."""
    parser.add_argument("path", type=local_folder, help="folder with a data set, e.g. data/toy")
    parser.add_argument("--out", type=Path, help="where to write the page (default: PATH/page.html)")
    parser.add_argument("--clips", type=int, default=SHEET_CLIPS, help="clips to show (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Build the page; prints where it is and, last, the verdict."""
    if arguments.clips < 1:
        raise ValueError(f"--clips {arguments.clips} must be at least 1.")
    page, checks = build_data_page(arguments.path, arguments.out, arguments.clips)
    print(f"wrote {page}")
    print("; ".join(f"{check.title}: {check.text}" for check in checks))
    return 0


def contact_sheet(index: DatasetIndex, count: int, shelf: MediaShelf) -> Sheet:
    """Evenly chosen clips with a strip of frames each; one that cannot be decoded is named, not dropped."""
    numbers = np.unique(np.rint(np.linspace(0, len(index.entries) - 1, min(count, len(index.entries)))).astype(int))
    clips, failed = [], list[str]()
    for number in numbers:
        entry = index.entries[number]
        try:
            media = shelf.embed_bytes(f"{entry.record.key}.jpg", strip_of(index.folder, entry))
        except (DamagedSample, DecodeError) as error:
            media = Media(entry.record.key, missing=str(error))
            failed.append(entry.record.key)
        clips.append({"record": entry.record, "media": media})
    return Sheet(clips, failed)


def strip_of(folder: str | os.PathLike[str], entry: ClipEntry) -> bytes:
    """JPEG of a few frames of a clip side by side; raises DamagedSample or DecodeError."""
    record = entry.record
    factor = STRIP_SIDE / max(record.width, record.height)
    count = min(STRIP_FRAMES, record.num_frames)
    shape = ClipShape(count, max(1, round(record.height * factor)), max(1, round(record.width * factor)))
    fps = record.fps * max(1, count - 1) / max(1, record.num_frames - 1)  # the first frame to the last
    frames = decode_clip(read_member(folder, entry, "mp4"), shape, fps, 0.0, Decoder.pyav)
    return strip_jpeg(frames.numpy(), count)


def verdict(
    records: Sequence[ClipRecord], captions: dict[str, Any], sheet: Sheet, preparation: content.Preparation
) -> list[Check]:
    """The lines at the top: what a person should look at before training."""
    heldout = sum(record.split == "heldout" for record in records)
    unknown = sum(record.license.lower() == "unknown" for record in records)
    copies = captions["in_copies"]
    checks = [
        Check("Clips", "bad" if sheet.failed else "good", _decoded(sheet)),
        Check("Held out", "good" if heldout else "warn", f"{heldout:,}" if heldout else "none"),
        Check("Captions", *_caption_state(captions["empty"], len(records))),
        Check("Equal captions", "warn" if copies > len(records) / 2 else "plain", f"{copies:,} of {len(records):,}"),
        Check("Licence", "warn" if unknown else "good", f"{unknown:,} unknown" if unknown else "stated for all"),
    ]
    keep = preparation.keep
    if keep:
        share = keep["kept"] / keep["given"] if keep["given"] else 0
        text = f"kept {keep['kept']:,} of {keep['given']:,} ({share:.0%})"
        checks.append(Check("Filters", "good" if share >= 0.5 else "warn", text))
    return checks


def _decoded(sheet: Sheet) -> str:
    if sheet.failed:
        return f"{len(sheet.failed)} of {len(sheet.clips)} shown cannot be decoded: {', '.join(sheet.failed[:3])}"
    return f"all {len(sheet.clips)} shown were decoded; kinema data check decodes every one"


def _caption_state(empty: int, total: int) -> tuple[str, str]:
    return ("warn", f"{empty:,} of {total:,} empty") if empty else ("good", "none empty")


def _settings(preparation: content.Preparation) -> dict[str, Any]:
    return {stage["stage"]: stage.get("settings", {}) for stage in preparation.stages}
