"""Where shards lie: a folder, or an address whose files are brought here."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from kinema.data.shards import MANIFEST, index_name, write_aside

REMOTE_SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
"""Address schemes that data.path may have; never `pipe`, which runs commands."""


def resolve_folder(path: str, cache_folder: str | Path) -> Path:
    """The local folder of a data set: `path` itself, or a copy of the address it names, e.g.
    https://HOST/FOLDER.

    Shards and indexes are copied whole and checked against the manifest's sha256; those that are there
    already stay. A data set that changed at its address gets a folder of its own. Raises ValueError for a
    scheme outside REMOTE_SCHEMES, an address that does not answer, or a file that arrives damaged.
    """
    scheme, colon, _ = path.partition(":")
    if not colon:
        return Path(path)
    if scheme not in REMOTE_SCHEMES:
        raise ValueError(f"data.path={path} must be a folder, or begin with one of {', '.join(REMOTE_SCHEMES)}.")
    address = path.rstrip("/")
    content = _fetch(f"{address}/{MANIFEST}")
    name = f"{address.rsplit('/', 1)[-1]}-{hashlib.sha256(content).hexdigest()[:16]}"
    folder = Path(cache_folder).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shards = json.loads(content)["shards"]
        files = [(shard["file"], shard["sha256"]) for shard in shards]
        files += [(index_name(shard["file"]), shard["index_sha256"]) for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.path={path}: {MANIFEST} at that address is no manifest ({error!r}).") from error
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine copies, the others find the files
        for file, digest in files:
            _copy(address, file, digest, folder)
        write_aside(folder / MANIFEST, content)
    return folder


def _copy(address: str, file: str, digest: str, folder: Path) -> None:
    if Path(file).name != file:
        raise ValueError(f"data.path={address}: its manifest names the file {file!r}, which is not a plain name.")
    target = folder / file
    if target.is_file():  # written aside and checked before it took its name
        return
    content = _fetch(f"{address}/{file}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{address}/{file} arrived damaged: {len(content)} bytes of another sha256. Try again.")
    write_aside(target, content)


def _fetch(address: str) -> bytes:
    """All bytes at an address, through WebDataset's `gopen`."""
    from webdataset.gopen import gopen, gopen_schemes

    gopen_schemes.setdefault("s3", _open_s3)
    try:
        if address.startswith("file:"):  # gopen would open it as well, but not where WDS_SECURE is set
            return Path(url2pathname(urlparse(address).path)).read_bytes()
        with gopen(address) as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"data.path: {address} cannot be read ({error}).") from error


def _open_s3(address: str, mode: str, bufsize: int) -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise ValueError(f"data.path={address} needs the s3 extra: pip install 'kinema[s3]'.") from error
    return s3fs.S3FileSystem().open(address, mode)
