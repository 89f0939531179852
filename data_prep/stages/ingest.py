"""Stage ingest: which videos there are, with their captions and rights."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.captions import Video, describe_videos, find_videos, read_captions
from data_prep.pipeline.rows import Outcome, Row
from data_prep.pipeline.stage import Place, Stage

UNKNOWN = "unknown"


@dataclass
class Ingest(Stage):
    """Finds the videos of the input; what a list says about one of them goes before what is said here for all."""

    source: str | None = None
    """Where the videos come from; null takes the input's name."""
    license: str = UNKNOWN
    """SPDX identifier, e.g. CC-BY-4.0."""
    consent: str = UNKNOWN
    """Of the people seen: given, none-visible, synthetic, ..."""
    attribution: str = ""
    """The line that the licence asks for."""
    captions: str | None = None
    """A captions.jsonl, or a prompt.txt beside videos.txt; null looks in the usual places."""

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """One row for each video of one input."""
        folder = Path(row["path"])
        names = find_videos(folder)
        lines = read_captions(folder, names, Path(self.captions) if self.captions else None)
        for video in describe_videos(folder, names, lines, allow_missing=True):
            yield self.video_row(video, row["key"])

    def video_row(self, video: Video, source: str) -> Row:
        """All that is known of a video before it is opened."""
        about: dict[str, Any] = {"shots": [asdict(shot) for shot in video.shots]} if video.shots else {}
        return {
            "key": video.key,
            "video": video.name,
            "path": str(video.path.resolve()),
            "bytes": video.path.stat().st_size,
            "modified_ns": video.path.stat().st_mtime_ns,
            "caption": video.caption,
            "source": self.source or source,
            "license": self.license,
            "consent": self.consent,
            "attribution": self.attribution,
            **about,
        }

    def finish(self, rows: Iterator[Row], place: Place) -> Iterator[Outcome]:
        """Number the videos, and see that no two of them share a key."""
        names: dict[str, str] = {}
        for number, row in enumerate(rows):
            other = names.setdefault(row["key"], row["video"])
            if other != row["video"]:
                raise ValueError(f"{other} and {row['video']} give equal clip keys, {row['key']}. Rename one of them.")
            yield {**row, "number": number}
