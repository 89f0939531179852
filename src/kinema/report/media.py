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
        if not path.resolve().is_relative_to(self.folder.resolve()):
            return Media(name, missing="lies outside the run folder")
        if path.suffix.lower() not in MEDIA_TYPES:
            return Media(name, missing="no known picture or video")
        if not path.is_file():
            return Media(name, missing="file missing")
        return self.embed_bytes(name, path.read_bytes())

    def embed_bytes(self, name: str, content: bytes) -> Media:
        """A picture or video that lies in no file; its name ends as a file's would."""
        kind = MEDIA_TYPES[Path(name).suffix.lower()]
        size = len(content) * 4 // 3
        if size > self.left:
            self.refused.append(name)
            return Media(name, missing="left out: the page is full")
        self.left -= size
        return Media(name, uri=f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}")
