"""Shards at an address (HTTP, S3, ...): read by ranges, tried again when the network fails, kept on the local disk."""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from kinema.data.storage.address import Address
from kinema.data.storage.member_cache import MemberCache
from kinema.data.storage.store import MANIFEST, Member, StoreDown, WrongBytes, checked
from kinema.data.storage.transient import LONGEST_PAUSE_SECONDS, is_refusal, is_transient, pause_seconds

SLOWEST_BYTES_PER_SECOND = 2**18
"""A transfer slower than this counts as stalled."""
COUNTED = ("bytes", "requests", "retries", "cache_hits", "cache_misses", "cache_errors")
Result = TypeVar("Result")


@dataclass
class StorageConfig:
    """How shards at an address are read; a local folder needs none of it."""

    retries: int = 4
    """Times that a failed read is tried again: resets, stalls, 5xx, 429, short or damaged answers."""
    backoff_seconds: float = 0.5
    """Longest pause before the first new try; it doubles with each, and the pause is drawn below it."""
    connect_timeout_seconds: float = 5.0
    timeout_seconds: float = 15.0
    """Longest silence in the middle of an answer."""
    cache_gib: float = 50.0
    """Most bytes of members that all processes of this machine keep in data.cache_folder; 0 keeps none."""
    concurrent_reads: int = 4
    """Reads that each worker has under way for the pack it is at; 1 reads one after the other."""

    def __post_init__(self) -> None:
        for name in ("retries", "cache_gib", "backoff_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.storage.{name}={getattr(self, name)} must be at least 0.")
        for name in ("connect_timeout_seconds", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.storage.{name}={getattr(self, name)} must be above 0.")
        if self.concurrent_reads < 1:
            raise ValueError(f"data.storage.concurrent_reads={self.concurrent_reads} must be at least 1.")

    @property
    def patience_seconds(self) -> float:
        """Longest that a silent store is waited for before the run stops: every try of a read, and the look whether
        anything answers.
        """
        pauses = sum(self.longest_pause(failures) for failures in range(1, self.retries + 1))
        return (self.retries + 3) * (self.connect_timeout_seconds + self.timeout_seconds) + pauses

    def longest_pause(self, failures: int) -> float:
        """Seconds before the next try, at most, after so many failed ones."""
        return min(LONGEST_PAUSE_SECONDS, self.backoff_seconds * 2 ** (failures - 1))


class Unreadable(OSError):
    """A file at an address cannot be read: it was `refused`, or every try failed."""

    def __init__(self, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class RemoteStore:
    """A data set at an address. Connections belong to the process that opened them: a forked worker opens its own."""

    def __init__(
        self,
        address: Address,
        identity: str,
        settings: StorageConfig,
        cache: MemberCache | None,
        landmark: str = MANIFEST,
    ) -> None:
        """`identity` names the data set's bytes (its hash) in the cache, whatever address they come from.

        `landmark` is a file by which to tell a store that is down from a file that is missing.
        """
        self.address, self.identity, self.settings, self.cache = address, identity, settings, cache
        self.landmark = landmark
        self._lines: _Lines | None = None

    def read(self, shard: str, member: Member) -> bytes:
        """The member's bytes, checked: expected before, of the cache, or by a range request."""
        expected = self.lines.expected.pop((shard, member), None)
        return self._read(shard, member) if expected is None else expected.result()

    def expect(self, wanted: list[tuple[str, Member]]) -> None:
        """Begin to fetch members in the background, and forget what was expected before."""
        lines = self.lines
        if self.settings.concurrent_reads > 1:
            for forgotten in lines.expected.values():
                forgotten.cancel()
            lines.expected = {place: lines.pool.submit(self._read, *place) for place in wanted}

    def fetch(self, file: str) -> bytes:
        """A whole small file, not cached. Raises Unreadable, and StoreDown where the store does not answer."""
        return self._persist(lambda: self._cat(file), file)

    def fetch_first(self, file: str) -> bytes:
        """The file that the data set begins with: ValueError if it cannot be had, StoreDown if nobody answers."""
        content = self._first(lambda: self._cat(file), file)
        self.check_ranges(file)
        return content

    def check_ranges(self, file: str) -> None:
        """Raise ValueError unless the server answers with the part that it is asked for; errors as `fetch_first`."""
        if len(self._first(lambda: self._cat(file, 0, 1), file)) != 1:
            raise ValueError(
                f"data.path={self.address}: the server sends whole files where a part is asked for (no range "
                "requests). Serve the folder with a program that knows them, e.g. nginx, or copy it to this machine."
            )

    def has(self, file: str) -> bool:
        """Whether the file is there; StoreDown if nobody answers."""
        try:
            self._first(lambda: self._cat(file, 0, 1), file)
        except ValueError:
            return False
        return True

    def names(self, pattern: str) -> list[str]:
        """Names of the files in the folder that match; none where the server does not list them."""
        try:
            found = self._first(lambda: self.lines.filesystem.glob(self.address.of(pattern)), pattern)
        except ValueError:
            return []
        return sorted(name.partition("?")[0].rsplit("/", 1)[-1] for name in found)

    def size(self, file: str) -> int:
        """Bytes of a file; errors as `fetch`."""
        return self._persist(lambda: self._size(file), file)

    def read_range(self, file: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, not cached; errors as `fetch`."""
        return self._persist(lambda: self._cat(file, start, end), file)

    def reaches(self, file: str, size: int) -> bool:
        """Whether the file has at least so many bytes; errors as `fetch`."""
        try:
            return len(self._try(lambda: self._cat(file, size - 1, size))) == 1
        except Unreadable as error:
            self._check_answers(file, error)
            return False

    def __str__(self) -> str:
        return str(self.address)

    def take_counts(self) -> dict[str, float]:
        """Totals of this process since the last call: requests, bytes that came, retries, cache."""
        return self.lines.take_counts()

    @property
    def lines(self) -> "_Lines":
        """This process's connections."""
        if self._lines is None or self._lines.pid != os.getpid():
            self._lines = _Lines(self.address, self.settings)
        return self._lines

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lines": None}

    def _read(self, shard: str, member: Member) -> bytes:
        name = f"{self.identity}/{shard}/{member.offset}/{member.size}/{member.crc32}"
        kept = self._cached(name, member)
        if kept is not None:
            return kept
        end = member.offset + member.size
        payload = self._persist(lambda: checked(self._cat(shard, member.offset, end), member), shard)
        self._try_cache(lambda cache: cache.put(name, payload))
        return payload

    def _cached(self, name: str, member: Member) -> bytes | None:
        if self.cache is None:
            return None
        kept = self._try_cache(lambda cache: cache.get(name))
        try:
            content = None if kept is None else checked(kept, member)
        except WrongBytes:
            self.lines.count("cache_errors")
            self._try_cache(lambda cache: cache.drop(name))
            content = None
        self.lines.count("cache_misses" if content is None else "cache_hits")
        return content

    def _try_cache(self, use: Callable[[MemberCache], Result]) -> Result | None:
        """A disk that fails or is full costs speed, not the run: it is counted."""
        try:
            return None if self.cache is None else use(self.cache)
        except OSError:
            self.lines.count("cache_errors")
            return None

    def _size(self, file: str) -> int:
        self.lines.count("requests")
        try:
            size = self.lines.filesystem.info(self.address.of(file))["size"]
        except FileNotFoundError as error:
            if isinstance(error.__cause__, Exception) and is_transient(error.__cause__):
                raise error.__cause__ from None  # fsspec calls every failure so
            raise
        if size is None:
            raise ValueError(f"data.path={self.address}: the server does not tell the size of {file}.")
        return size

    def _cat(self, file: str, start: int | None = None, end: int | None = None) -> bytes:
        lines = self.lines
        lines.count("requests")
        payload = lines.cat(self.address.of(file), start, end)
        lines.count("bytes", len(payload))
        return payload

    def _first(self, attempt: Callable[[], Result], file: str) -> Result:
        """As `_persist`, before anything is known of the address."""
        try:
            return self._try(attempt)
        except Unreadable as error:
            kind = ValueError if error.refused else StoreDown
            raise kind(f"data.path={self.address}: {file} cannot be read there ({error}).") from None

    def _persist(self, attempt: Callable[[], Result], file: str) -> Result:
        """Try until it succeeds or cannot; then find out whether the file or the store is at fault."""
        try:
            return self._try(attempt)
        except Unreadable as error:
            self._check_answers(file, error)
            raise

    def _try(self, attempt: Callable[[], Result], retries: int | None = None) -> Result:
        """Try again while it may help; raises Unreadable, or WrongBytes if it was that every time."""
        retries = self.settings.retries if retries is None else retries
        for failures in itertools.count(1):
            try:
                return attempt()
            except Exception as error:
                refused = is_refusal(error)
                if not refused and not is_transient(error):
                    raise
                if refused or failures > retries:
                    times = f" (tried {failures} times)" if failures > 1 else ""
                    if isinstance(error, WrongBytes):
                        raise WrongBytes(f"{error}{times}") from None
                    raise Unreadable(self.address.scrub(f"{type(error).__name__} {error}{times}"), refused) from None
                self.lines.count("retries")
                time.sleep(pause_seconds(self.settings.longest_pause(failures), error))
        raise AssertionError("it returns or raises")

    def _check_answers(self, file: str, error: "Unreadable") -> None:
        """Raise StoreDown if not even the file that the data set began with can be read."""
        try:
            self._try(lambda: self._cat(self.landmark, 0, 1), retries=1)
        except Unreadable:
            raise StoreDown(
                f"data.path={self.address} does not answer any more: neither {file} nor {self.landmark} can be read "
                f"({error}). No clip was quarantined for it. Start the same command again when the store answers; "
                "data.storage.retries and data.storage.timeout_seconds make it wait longer."
            ) from None


class _Lines:
    """What one process has open to a store, and its counts."""

    def __init__(self, address: Address, settings: StorageConfig) -> None:
        self.pid = os.getpid()
        self.filesystem = open_filesystem(address, settings)
        self.timeout_seconds = settings.connect_timeout_seconds + settings.timeout_seconds
        self.pool = ThreadPoolExecutor(settings.concurrent_reads, thread_name_prefix="range-reads")
        self.expected: dict[tuple[str, Member], Future[bytes]] = {}
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def cat(self, address: str, start: int | None, end: int | None) -> bytes:
        longest: dict[str, float] = {}
        if self.filesystem.async_impl:  # those take a limit for the whole transfer
            size = 0 if start is None or end is None else end - start
            longest = {"timeout": self.timeout_seconds + size / SLOWEST_BYTES_PER_SECOND}
        return self.filesystem.cat_file(address, start=start, end=end, **longest)

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[what] += amount

    def take_counts(self) -> dict[str, float]:
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return {f"storage_{name}": float(taken[name]) for name in COUNTED}


def open_filesystem(address: Address, settings: StorageConfig, key: str = "data.path") -> Any:
    """fsspec's file system of the scheme, without retries of its own: those would not be counted. `key` names the
    option in errors.
    """
    import aiohttp
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if address.scheme in ("http", "https"):
        connect, silence = settings.connect_timeout_seconds, settings.timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=silence)
        headers = {"Accept-Encoding": "identity"}  # a packed range could not be unpacked
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": headers}
        options["encoded"] = "%" in address.text
    elif address.scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": settings.connect_timeout_seconds,
            "read_timeout": settings.timeout_seconds,
            "retries": {"max_attempts": 0},
        }
    try:
        filesystem = fsspec.filesystem(address.scheme, **options)
    except ImportError as error:
        raise ValueError(f"{key}={address} needs another package: {error}.") from error
    if address.scheme == "s3":
        filesystem.retries = 1
    return filesystem
