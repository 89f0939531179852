"""Captions that were paid for once, by clip and captioner."""

from pathlib import Path

from kinema.data.dataset.shards import write_aside


class CaptionCache:
    """One small file for each answer: any number of workers, also on several machines, may share the folder."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder / identity

    def read(self, sha256: str) -> str | None:
        """What the captioner said about the clip with these bytes; None if it was not asked."""
        path = self._path(sha256)
        return path.read_text(encoding="utf-8") if path.exists() else None

    def write(self, sha256: str, caption: str) -> None:
        """Keep an answer, also an empty one."""
        path = self._path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, caption.encode())

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / f"{sha256}.txt"
