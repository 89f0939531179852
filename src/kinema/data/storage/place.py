"""Where shards lie: a folder, or an address of which only manifest and indexes are brought here."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from kinema.data.dataset.foreign import ForeignOptions
from kinema.data.dataset.indexing import open_remote, write_indexes
from kinema.data.dataset.shards import index_name, load_manifest, write_aside
from kinema.data.decode.probe import PROBE_VERSION
from kinema.data.storage.address import Address
from kinema.data.storage.locking import locked
from kinema.data.storage.member_cache import MemberCache
from kinema.data.storage.remote import RemoteStore, StorageConfig, Unreadable
from kinema.data.storage.store import MANIFEST, LocalStore, StoredFolder

CONCURRENT_INDEXES = 16


def resolve_folder(
    path: str,
    cache_folder: str | Path,
    settings: StorageConfig | None = None,
    *,
    options: ForeignOptions | None = None,
) -> Path | StoredFolder:
    """Where to load a data set from: `path` itself, or a folder of cache_folder with the manifest and the indexes of
    an address, e.g. https://HOST/FOLDER.

    They are checked against their sha256; indexes that are there already stay, and a data set that changed at its
    address gets a folder of its own. Members of shards are read from the address by ranges as they are needed. Tars
    without an index (a folder, or an address such as https://HOST/FOLDER/part-{000..099}.tar) are streamed through
    once and indexed in cache_folder, by `options`. Raises ValueError for a scheme outside REMOTE_SCHEMES, an address
    without a data set, a file that arrives damaged or a shard that is cut short; StoreDown for an address that does
    not answer.
    """
    address, cache_folder = Address.parse(path), Path(cache_folder).expanduser()
    settings, options = settings or StorageConfig(), options or ForeignOptions()
    if address is None:
        return _local(Path(path), cache_folder, options)
    limit = int(settings.cache_gib * 2**30)
    cache = MemberCache(cache_folder / "members", limit) if limit else None
    address, tars = address.split_tars()
    probe = RemoteStore(address, "", settings, None)
    if not tars and not probe.has(MANIFEST):
        tars = probe.names("*.tar")
    if tars:
        return _stream_remote(address, tars, cache_folder, settings, options, cache)
    return _mirrored(address, MANIFEST, cache_folder, settings, cache)


def resolve_cache(
    path: str, manifest: str, cache_folder: str | Path, settings: StorageConfig, named: str
) -> Path | StoredFolder:
    """As `resolve_folder`, for a folder of cached values whose shards another file than a data set's names.

    Errors begin with the key that it is `named` by.
    """
    address, cache_folder = Address.parse(path, named), Path(cache_folder).expanduser()
    if address is None:
        return Path(path)
    limit = int(settings.cache_gib * 2**30)
    cache = MemberCache(cache_folder / "members", limit) if limit else None
    return _mirrored(address, manifest, cache_folder, settings, cache)


def _mirrored(
    address: Address, manifest: str, cache_folder: Path, settings: StorageConfig, cache: MemberCache | None
) -> StoredFolder:
    """A folder here with the manifest and the indexes of an address."""
    probe = RemoteStore(address, "", settings, None, landmark=manifest)
    content = probe.fetch_first(manifest)
    shards, data_hash = _shards_of(content, address)
    local = cache_folder / f"{address.name}-{hashlib.sha256(content).hexdigest()[:16]}"
    local.mkdir(parents=True, exist_ok=True)
    with locked(local / ".lock"):  # one process of the machine fetches, the others find the files
        missing = [shard for shard in shards if not (local / index_name(shard["file"])).is_file()]
        with ThreadPoolExecutor(CONCURRENT_INDEXES) as pool:
            list(pool.map(lambda shard: _fetch_index(probe, shard, local), missing))
        write_aside(local / manifest, content)
    return StoredFolder(local, RemoteStore(address, data_hash, settings, cache, landmark=manifest))


def _local(folder: Path, cache_folder: Path, options: ForeignOptions) -> Path | StoredFolder:
    """The folder, or where the index of its foreign tars lies."""
    tars = sorted(folder.glob("*.tar"))
    if (folder / MANIFEST).exists() or not tars:
        return folder
    sizes = {tar.name: tar.stat().st_size for tar in tars}
    changed = [tar.stat().st_mtime_ns for tar in tars]
    name = f"{folder.resolve().name}-{_digest(str(folder.resolve()), sizes, changed, options)}"
    aside = _indexed(cache_folder / name, list(sizes), lambda tar: (folder / tar).open("rb"), str(folder), options)
    return StoredFolder(aside, LocalStore(folder))


def _stream_remote(
    address: Address,
    tars: list[str],
    cache_folder: Path,
    settings: StorageConfig,
    options: ForeignOptions,
    cache: MemberCache | None,
) -> StoredFolder:
    store = RemoteStore(address, "", settings, None, landmark=tars[0])
    store.check_ranges(tars[0])
    sizes = {tar: store.size(tar) for tar in tars}
    name = f"{address.name}-{_digest(str(address), sizes, options)}"
    aside = _indexed(cache_folder / name, tars, lambda tar: open_remote(store, tar, sizes[tar]), str(address), options)
    data_hash = load_manifest(aside)["hash"]
    return StoredFolder(aside, RemoteStore(address, data_hash, settings, cache, landmark=tars[0]))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr((PROBE_VERSION, *parts)).encode()).hexdigest()[:16]


def _indexed(
    aside: Path, tars: list[str], open_tar: Callable[[str], BinaryIO], shown: str, options: ForeignOptions
) -> Path:
    """The folder with the index of tars, which one process of the machine makes, the others waiting for it."""
    aside.mkdir(parents=True, exist_ok=True)
    with locked(aside / ".lock"):
        if not (aside / MANIFEST).exists():
            write_indexes(aside, tars, open_tar, shown, f"kinema data index {shown}", options)
    return aside


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
