"""Members of remote shards kept on this machine's disk: bounded, and shared by its processes."""

import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.data.storage.locking import locked

LEFT_OVER_SECONDS = 600
"""An unfinished file this old was left by a killed process."""
KEPT_SHARE = 0.9
"""Of the limit, after members were removed to make room."""
_serial = itertools.count()


class MemberCache:
    """Files of at most `limit_bytes` together; those used longest ago go first.

    A member is written aside and renamed, so that a reader finds it whole or not at all. Their total stands in a file
    that is changed under a lock; a process killed between the two leaves it too low until the next start, or the next
    removal, counts anew. Whoever reads checks the bytes.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Raises OSError if the folder cannot be made."""
        self.folder, self.limit_bytes = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked_total() as total:
            total.value = sum(size for _, size, _ in self._files())

    def get(self, name: str) -> bytes | None:
        """The bytes put under this name, or None. Raises OSError of a failing disk."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # it was used now
        except FileNotFoundError:
            return None
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep bytes, unless they alone are over the limit. Raises OSError if the disk takes no more."""
        if len(content) > self.limit_bytes:
            return
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}-{next(_serial)}.part")
        try:
            unfinished.write_bytes(content)
            with self._locked_total() as total:
                total.value += 0 if path.exists() else len(content)
                os.replace(unfinished, path)
                if total.value > self.limit_bytes:
                    total.value = self._make_room()
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def drop(self, name: str) -> None:
        """Forget a member, for example one whose bytes have changed on the disk."""
        with self._locked_total() as total:
            path = self._path(name)
            if path.exists():
                total.value -= path.stat().st_size
                path.unlink()

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of each file, left-overs of killed processes being removed on the way."""
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
                if path.suffix == ".part" and time.time() - facts.st_mtime > LEFT_OVER_SECONDS:
                    path.unlink()
                    continue
            except FileNotFoundError:  # its writer finished
                continue
            yield facts.st_mtime, facts.st_size, path

    def _make_room(self) -> int:
        """Remove what was used longest ago; returns the bytes that stay."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= KEPT_SHARE * self.limit_bytes:
                break
            if path.suffix != ".part":
                path.unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _locked_total(self) -> Iterator["_Total"]:
        with locked(self.folder / "total") as file:
            file.seek(0)
            total = _Total(int(file.read() or 0))
            yield total
            file.truncate(0)
            file.write(str(total.value))


class _Total:
    def __init__(self, value: int) -> None:
        self.value = value
