"""Pictures and videos of a run as data URIs, so that the page is one file."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif"}
LARGEST_PAGE_MIB = 48


@dataclass(frozen=True)
class Media:
    """A picture or video on the page; without `uri` it is shown by the reason why not."""

    name: str
    uri: str = ""
    missing: str = ""


@dataclass
class MediaShelf:
    """Embeds files of one run folder until the page is full; what no longer fits is named, not dropped."""

    folder: Path
    left: int = LARGEST_PAGE_MIB * 2**20
    refused: list[str] = field(default_factory=list)

    def embed(self, name: str) -> Media:
        """name: a path relative to the run folder, as metrics.jsonl has it."""
        path = self.folder / name
        kind = MEDIA_TYPES.get(path.suffix.lower())
        if not path.resolve().is_relative_to(self.folder.resolve()):
            return Media(name, missing="lies outside the run folder")
        if kind is None:
            return Media(name, missing="no known picture or video")
        if not path.is_file():
            return Media(name, missing="file missing")
        size = path.stat().st_size * 4 // 3
        if size > self.left:
            self.refused.append(name)
            return Media(name, missing="left out: the page is full")
        self.left -= size
        return Media(name, uri=f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}")
