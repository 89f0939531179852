"""One clip of an index: its record, and where its bytes lie."""

from dataclasses import dataclass

from kinema.data.dataset.sample import ClipRecord
from kinema.data.storage.store import Member


@dataclass(frozen=True)
class ClipEntry:
    """One clip of the index: its record (without `extra`), its shard's file name, members by extension."""

    record: ClipRecord
    shard: str
    members: dict[str, Member]
