"""Where shards lie: a folder, or an address of which only manifest and indexes are brought here."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kinema.data.address import Address
from kinema.data.locking import locked
from kinema.data.member_cache import MemberCache
from kinema.data.remote import RemoteStore, StorageConfig, Unreadable
from kinema.data.shards import index_name, write_aside
from kinema.data.store import MANIFEST, StoredFolder

CONCURRENT_INDEXES = 16


def resolve_folder(path: str, cache_folder: str | Path, settings: StorageConfig | None = None) -> Path | StoredFolder:
    """Where to load a data set from: `path` itself, or for an address, e.g. https://HOST/FOLDER, a folder of
    cache_folder that gets its manifest and indexes.

    They are checked against their sha256; indexes that are there already stay, and a data set that changed at its
    address gets a folder of its own. Members of shards are read from the address by ranges as they are needed. Raises
    ValueError for a scheme outside REMOTE_SCHEMES, an address without a data set, a file that arrives damaged or a
    shard that is cut short; StoreDown for an address that does not answer.
    """
    address = Address.parse(path)
    if address is None:
        return Path(path)
    settings, cache_folder = settings or StorageConfig(), Path(cache_folder).expanduser()
    store = RemoteStore(address, "", settings, None)
    content = store.fetch_first(MANIFEST)
    shards, data_hash = _shards_of(content, address)
    folder = cache_folder / f"{address.name}-{hashlib.sha256(content).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):  # one process of the machine fetches, the others find the files
        missing = [shard for shard in shards if not (folder / index_name(shard["file"])).is_file()]
        with ThreadPoolExecutor(CONCURRENT_INDEXES) as pool:
            list(pool.map(lambda shard: _fetch_index(store, shard, folder), missing))
        write_aside(folder / MANIFEST, content)
    limit = int(settings.cache_gib * 2**30)
    cache = MemberCache(cache_folder / "members", limit) if limit else None
    return StoredFolder(folder, RemoteStore(address, data_hash, settings, cache))


def _shards_of(content: bytes, address: Address) -> tuple[list[dict[str, Any]], str]:
    """The manifest's shards, and the hash of the data."""
    try:
        manifest = json.loads(content)
        names = [shard["file"] for shard in manifest["shards"]]
        facts = manifest["shards"], manifest["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.path={address}: {MANIFEST} at that address is no manifest ({error!r}).") from error
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"data.path={address}: its manifest names the file {name!r}, which is not a plain name.")
    return facts


def _fetch_index(store: RemoteStore, shard: dict[str, Any], folder: Path) -> None:
    """Bring one shard's index here, once the shard itself was seen to lie there whole."""
    name = index_name(shard["file"])
    if not store.reaches(shard["file"], shard["bytes"]):
        raise ValueError(
            f"data.path={store.address}: {shard['file']} is missing there or shorter than the {shard['bytes']} bytes "
            "of the manifest. Copy it there again, or build the data set again."
        )
    try:
        content = store.fetch(name)
    except Unreadable as error:
        raise ValueError(f"data.path={store.address}: {name} cannot be read there ({error}).") from error
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ValueError(f"data.path={store.address}: {name} is not the index that the manifest knows (sha256).")
    write_aside(folder / name, content)  # under its name only when whole
