"""What is known about one clip: the json member beside its mp4."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from typing import Any

SPLITS = ("train", "heldout")
CONSENT = ("given", "none-visible", "synthetic", "refused", "unknown")
"""Words for `consent`: the people seen agreed, nobody can be seen, those seen do not exist, they did not agree, or
nobody stated it. Another word is allowed, and counted by `kinema data stats`."""
GENERATED = ("no", "partly", "fully", "unknown")
"""How much of the picture a generative model made; a rendered or drawn film is `no`."""


@dataclass
class ClipRecord:
    """One clip's facts, as they stand in the shard. The data config decides which licences are allowed."""

    key: str
    """Name of the clip in its data set; without dots, because WebDataset splits names at the first one."""
    caption: str
    fps: float
    num_frames: int
    width: int
    """Pixels, as displayed (after rotation)."""
    height: int
    duration_seconds: float
    source: str
    license: str
    """SPDX identifier where there is one, e.g. CC-BY-3.0; `unknown` when nobody stated it."""
    consent: str
    """Whether people seen agreed: `synthetic`, `none-visible`, `given`, ... or `unknown`."""
    sha256: str
    """Of the mp4 bytes."""
    split: str
    """`train` or `heldout`."""
    attribution: str = ""
    """The line that the licence asks to be shown."""
    source_url: str = ""
    """Where the video was found."""
    collected: str = ""
    """The day it was taken from there, as 2026-01-31."""
    generated: str = "unknown"
    """How much of it a generative model made: a word of GENERATED."""
    generator: str = ""
    """Name of that model."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything more (ground truth, scores); stays in the shard's json and out of the index."""

    def to_dict(self, *, with_extra: bool = True) -> dict[str, Any]:
        """Plain values, ready for json."""
        values = asdict(self)
        if not with_extra:
            del values["extra"]
        return values

    def to_json(self) -> str:
        """One line of json with sorted keys: equal records give equal bytes."""
        return json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, *, allow_missing_caption: bool = False) -> "ClipRecord":
        """Parse and check one record; raises ValueError naming the clip and the field."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"A clip record is not json: {error}. It begins {text[:60]!r}.") from error
        return cls.from_dict(values, allow_missing_caption=allow_missing_caption)

    @classmethod
    def from_dict(cls, values: Any, *, allow_missing_caption: bool = False) -> "ClipRecord":
        """Check plain values and make the record; raises ValueError naming the clip and the field.

        A missing or blank caption is an error unless `allow_missing_caption`; then it becomes "".
        """
        if not isinstance(values, dict):
            raise ValueError(f"A clip record must be a json object, not {type(values).__name__}.")
        values = dict(values)
        key = values.get("key", "<no key>")
        if allow_missing_caption and values.get("caption") is None:
            values["caption"] = ""
        _check_names(key, set(values))
        for record_field in _FIELDS:
            if record_field.name in values:
                values[record_field.name] = _typed(key, record_field, values[record_field.name])
        record = cls(**values)
        _check_values(record, allow_missing_caption)
        return record


_FIELDS = fields(ClipRecord)  # asked for once: an index has millions of records
_KNOWN = {f.name for f in _FIELDS}
_NEEDED = {f.name for f in _FIELDS if f.default is MISSING and f.default_factory is MISSING}


def _check_names(key: str, present: set[str]) -> None:
    missing = sorted(_NEEDED - present)
    if missing:
        raise ValueError(f"Clip key={key}: its json lacks {', '.join(missing)}. Write the shard with ShardWriter.")
    unknown = sorted(present - _KNOWN)
    if unknown:
        raise ValueError(f"Clip key={key}: its json has unknown fields {', '.join(unknown)}. Put them under 'extra'.")


def _typed(key: str, record_field: Any, value: Any) -> Any:
    """The value with the field's type; int counts as float, and bool as neither."""
    wanted = dict if record_field.name == "extra" else record_field.type
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(
            f"Clip key={key}: {record_field.name}={value!r} must be of type {wanted.__name__}, "
            f"not {type(value).__name__}."
        )
    return value


def _check_values(record: ClipRecord, allow_missing_caption: bool) -> None:
    key = record.key
    if not key or any(mark in key for mark in "./\\ \n"):
        raise ValueError(f"Clip key={key!r} must be a name without dots, slashes and blanks, e.g. clip-000001.")
    if not record.caption.strip() and not allow_missing_caption:
        raise ValueError(f"Clip key={key}: caption={record.caption!r} is empty. Write one, or drop the clip.")
    for name in ("fps", "num_frames", "width", "height", "duration_seconds"):
        value = getattr(record, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"Clip key={key}: {name}={value} must be finite and above 0.")
    if record.split not in SPLITS:
        raise ValueError(f"Clip key={key}: split={record.split!r} must be one of {', '.join(SPLITS)}.")
    if not record.source.strip():
        raise ValueError(f"Clip key={key}: source is empty. Type 'unknown' if nobody knows.")
    check_rights(record, f"Clip key={key}: ")


def check_rights(stated: Any, where: str) -> None:
    """The rules for license, consent, generated, generator and collected, of whatever has them.

    Raises ValueError that begins with `where` and the field's name.
    """
    for name in ("license", "consent"):
        if not getattr(stated, name).strip():
            raise ValueError(f"{where}{name} is empty. Type 'unknown' if nobody knows.")
    if stated.generated not in GENERATED:
        raise ValueError(f"{where}generated={stated.generated!r} must be one of {', '.join(GENERATED)}.")
    if stated.generator and stated.generated == "no":
        raise ValueError(f"{where}generator={stated.generator!r} made it, but generated=no. Which is it?")
    if stated.collected and not _is_day(stated.collected):
        raise ValueError(f"{where}collected={stated.collected!r} must be a day such as 2026-01-31, or empty.")


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
