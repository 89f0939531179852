"""WebDataset tars that someone else made: streamed through once from first to last byte, and indexed on the way."""

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.sample import ClipRecord
from kinema.data.decode.decoders.video import DecodeError
from kinema.data.decode.images import IMAGES, probe_image
from kinema.data.decode.probe import probe_video
from kinema.data.storage.store import Member

VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
CAPTION_FIELDS = ("caption", "text", "txt", "cap")
CAPTIONS = ("txt", "text", "caption", "cap")
"""Members, and fields of the json, that hold a caption; the json goes first."""
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "dill", "joblib")
"""Members that other loaders run as programs. Their bytes are passed over."""
MAX_MEMBER_BYTES = 2**31
NAMED = 3


@dataclass
class ForeignOptions:
    """How the samples of foreign tars become clips."""

    fields: dict[str, str] = field(default_factory=dict)
    """Where the json has a field of the record: {"caption": "long_caption", "license": "meta.license"}."""
    max_refused_fraction: float = 0.1
    """More samples than this share that cannot serve are an error."""

    def __post_init__(self) -> None:
        known = ClipRecord.__dataclass_fields__.keys() - {"key", "sha256", "extra"}
        if unknown := sorted(self.fields.keys() - known):
            raise ValueError(f"data.foreign.fields: {unknown[0]} is not a field of a clip: {', '.join(sorted(known))}.")
        if not 0 <= self.max_refused_fraction <= 1:
            raise ValueError(f"data.foreign.max_refused_fraction={self.max_refused_fraction} must lie in 0 to 1.")


class Refused(Exception):
    """A sample that cannot serve; the message is a short cause that is counted."""


@dataclass
class Refusals:
    """What of foreign tars was passed over, by cause, with the first names of each."""

    samples: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def sample(self, cause: str, name: str) -> None:
        """Count a sample that is left out."""
        self.samples[cause] += 1
        self._name(cause, name)

    def member(self, cause: str, name: str) -> None:
        """Count a member that is left out; the rest of its sample stays."""
        self.members[cause] += 1
        self._name(cause, name)

    def _name(self, cause: str, name: str) -> None:
        first = self.names.setdefault(cause, [])
        if len(first) < NAMED:
            first.append(name)

    def line(self) -> str:
        """`no video 2 (a, b)`, ..., or nothing."""
        counts = [*self.samples.items(), *((f"member {cause}", count) for cause, count in self.members.items())]
        named = {cause: ", ".join(self.names[cause.removeprefix("member ")]) for cause, _ in counts}
        return ", ".join(f"{cause} {count} ({named[cause]})" for cause, count in counts)


@dataclass(frozen=True)
class Streamed:
    """What one pass over a tar gives."""

    entries: list[ClipEntry]
    bytes: int
    sha256: str


def stream_shard(name: str, stream: BinaryIO, options: ForeignOptions, refusals: Refusals, seen: set[str]) -> Streamed:
    """Read a tar from its first to its last byte, and make an entry of each sample that can serve.

    `seen` holds the keys of the data set so far. The others are counted in `refusals`. Raises ValueError for a tar
    that is damaged or ends too early.
    """
    counted = _Counted(stream)
    entries = []
    for key, members in _samples(name, counted, refusals):
        try:
            entry = _entry(name, key, members, options)
            if entry.record.key in seen:
                raise Refused("key seen before")
        except Refused as refused:
            refusals.sample(str(refused), f"{name}:{key}")
            continue
        seen.add(entry.record.key)
        entries.append(entry)
    while counted.read(2**20):  # what lies behind the end of the archive counts in the sha256
        pass
    counted.check_end(name)
    return Streamed(entries, counted.size, counted.digest.hexdigest())


class _Counted(io.RawIOBase):
    """A stream that knows how many bytes came, their sha256, and whether a tar in it ends as tars do."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.size, self.digest = stream, 0, hashlib.sha256()
        self.end_of_members = self.end_of_content = 0

    def read(self, size: int = -1) -> bytes:
        part = self.stream.read(size)
        if content := len(part.rstrip(b"\0")):
            self.end_of_content = self.size + content
        self.size += len(part)
        self.digest.update(part)
        return part

    def passed(self, info: tarfile.TarInfo) -> None:
        """Note where a member ends, rounded up to a whole block."""
        self.end_of_members = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def check_end(self, name: str) -> None:
        """Raise ValueError unless two empty blocks, and nothing else, follow the last member: `tarfile` takes any
        header that it cannot read for the end.
        """
        if self.end_of_content > self.end_of_members or self.size < self.end_of_members + 2 * tarfile.BLOCKSIZE:
            raise ValueError(f"{name} is not a whole tar file (no end after its last member). Copy it again.")


_Members = dict[str, tuple[Member, bytes]]


def _samples(name: str, stream: _Counted, refusals: Refusals) -> Iterator[tuple[str, _Members]]:
    """Neighbouring members of one key, as WebDataset groups them, by extension."""
    key, members = "", _Members()
    for info, payload in _files(name, stream, refusals):
        this, ext = split_name(info.name)
        if this != key and members:
            yield key, members
            members = {}
        key = this
        if ext in members:
            refusals.member("named twice", f"{name}:{info.name}")
            continue
        members[ext] = Member(info.offset_data, info.size, zlib.crc32(payload)), payload
    if members:
        yield key, members


def _files(name: str, stream: _Counted, refusals: Refusals) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The tar's files that are what they seem, each with its bytes; nothing is written, decoded or unpickled."""
    try:
        with tarfile.open(fileobj=cast(Any, stream), mode="r|") as archive:
            for info in archive:
                stream.passed(info)
                if info.isdir():
                    continue
                if cause := _suspicious(info):
                    refusals.member(cause, f"{name}:{info.name}")
                    continue
                content = archive.extractfile(info)
                assert content is not None, "it is a file"
                payload = content.read()
                if len(payload) != info.size:
                    raise ValueError(f"{name} ends inside {info.name}: it was cut short. Copy it again.")
                yield info, payload
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{name} is not a whole tar file ({error}). Copy it again.") from error


def _suspicious(info: tarfile.TarInfo) -> str | None:
    """Why a member is passed over, or None."""
    if not info.isfile():
        return "link or device"
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name:
        return "path out of the tar"
    if split_name(info.name)[1].endswith(PICKLES):
        return "pickle"
    return "too large" if info.size > MAX_MEMBER_BYTES else None


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file's base name."""
    base = name.rsplit("/", 1)[-1]
    stem, _, ext = base.partition(".")
    return name[: len(name) - len(base)] + stem, ext.lower()


def _entry(shard: str, key: str, members: _Members, options: ForeignOptions) -> ClipEntry:
    video = next((ext for ext in VIDEOS if ext in members), None)
    if video is None:
        video = next((ext for ext in IMAGES if ext in members), None)
    if video is None:
        raise Refused("no video")
    place, content = members[video]
    stated = _stated(members, options)
    facts = {
        **(_probe_still(content) if video in IMAGES else _probe(content)),
        "source": shard,
        "license": "unknown",
        "consent": "unknown",
        "split": "train",
        **stated,
        "key": key.replace("/", "_").replace(" ", "_"),
        "caption": stated.get("caption") or _caption(members),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        record = ClipRecord.from_dict(facts, allow_missing_caption=True)
        record.caption.encode()  # json can hold halves of characters
    except ValueError as error:
        fact = str(error).partition(": ")[2].partition("=")[0]  # behind `Clip key=...: `
        raise Refused(f"impossible {fact}" if fact.isidentifier() else "impossible facts") from error
    others = {ext: member for ext, (member, _) in members.items() if ext != video}
    # One name for the video, whatever its container.
    return ClipEntry(record, shard, {**others, video if video in IMAGES else "mp4": place})


def _stated(members: _Members, options: ForeignOptions) -> dict[str, Any]:
    """Fields of the record that the json states, by its own names or those of the options."""
    if "json" not in members:
        return {}
    try:
        values = json.loads(members["json"][1].decode())
    except ValueError as error:  # of UTF-8, too
        raise Refused("json that does not parse") from error
    if not isinstance(values, dict):
        raise Refused("json that is no object")
    caption = next((values[name] for name in CAPTION_FIELDS if values.get(name) is not None), None)
    names = ClipRecord.__dataclass_fields__.keys() - {"extra", "caption"}
    stated = {name: values[name] for name in names if name in values}
    stated |= {} if caption is None else {"caption": caption}
    for name, path in options.fields.items():
        value = _at(values, path)
        stated |= {} if value is None else {name: value}
    return stated


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _caption(members: _Members) -> str:
    for ext in CAPTIONS:
        if ext in members:
            try:
                return members[ext][1].decode().strip()
            except UnicodeDecodeError as error:
                raise Refused("caption that is not UTF-8") from error
    return ""


def _probe_still(content: bytes) -> dict[str, Any]:
    try:
        return probe_image(content)
    except DecodeError as error:
        raise Refused("image that does not open") from error


def _probe(video: bytes) -> dict[str, Any]:
    import av

    try:
        return probe_video(video)
    except (av.error.FFmpegError, DecodeError, ValueError) as error:
        raise Refused("video that cannot be opened") from error
