"""Stage borders: black bars around the picture are cut off, or the clips that have them dropped."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.clip_frames import read_frames, read_sample
from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.scores.borders import Borders, find_borders
from kinema.data.decode.encoding import write_video

ACTIONS = ("cut", "drop")


@dataclass
class CutBorders(Stage):
    """Clips without bars stay as they are, byte for byte; the others are written anew without them."""

    action: str = "cut"
    """`cut` or `drop`."""
    min_pixels: int = 2
    """Narrower bars are left alone: they are often a blurred edge."""
    crf: float = 18.0
    """x264's quality of clips that are written anew."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"borders.action={self.action} must be {' or '.join(ACTIONS)}.")
        if self.min_pixels < 1:
            raise ValueError(f"borders.min_pixels={self.min_pixels} must be at least 1.")

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row, of a clip without bars."""
        bars = find_borders(read_sample(place.find(row["clip"]), row["num_frames"], row["fps"]))
        bars = Borders(*(pixels if pixels >= self.min_pixels else 0 for pixels in bars))
        if not bars.any:
            return [row]
        found = {**row, "borders": bars._asdict()}
        return [Dropped(found, "has borders") if self.action == "drop" else self.without_bars(found, bars, place)]

    def without_bars(self, row: Row, bars: Borders, place: Place) -> Row:
        """Write the inside of the picture, one more line of it cut where its side would be odd."""
        height, width = row["height"] - bars.top - bars.bottom, row["width"] - bars.left - bars.right
        frames = read_frames(place.find(row["clip"]))
        inside = frames[:, bars.top : bars.top + height // 2 * 2, bars.left : bars.left + width // 2 * 2]
        path = place.path_for(f"{row['key']}.mp4")
        write_video(path, inside, row["fps"], crf=self.crf)
        return row | {
            "clip": place.relative(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "clip_bytes": path.stat().st_size,
            "height": inside.shape[1],
            "width": inside.shape[2],
        }
