"""What the weights of a checkpoint have seen, in its own run and before that."""

from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from kinema.data.account.ledger import Ledger
from kinema.data.account.sightings import SeenKeys
from kinema.training.checkpoints.store import Checkpoint, Writer, tensor_writer

KEYS = "seen.safetensors"
"""File of a checkpoint; the ledgers stand in its training.json."""


@dataclass(frozen=True)
class Seen:
    """The data of one training: accounts by source and licence, and how often each key was shown."""

    ledger: Ledger = field(default_factory=Ledger)
    keys: SeenKeys = field(default_factory=SeenKeys)

    def plus(self, other: "Seen") -> "Seen":
        """Both together."""
        whole = Ledger()
        for ledger in (self.ledger, other.ledger):
            whole.merge(ledger)
        return Seen(whole, self.keys.plus(other.keys))

    def times_of(self, key: str) -> int:
        """How often a clip was shown; its key, or in a mixture NAME/KEY for that of one data set and KEY for all."""
        parts = {shard.rpartition("/")[0] for shard in self.ledger.shards if "/" in shard}
        return sum(self.keys.times_of(name) for name in (key, *(f"{part}/{key}" for part in parts)))

    @property
    def keys_are_complete(self) -> bool:
        """Whether the keys are all that the ledger counts: not so in a run that began before they were kept."""
        return int(self.keys.times.sum()) == self.ledger.total.decoded


@dataclass(frozen=True)
class Start:
    """The weights that a run started from."""

    origin: str = ""
    """The folder they came from; empty for fresh weights."""
    is_known: bool = True
    """False for published weights, which do not say what they were trained on."""
    seen: Seen = field(default_factory=Seen)

    @classmethod
    def of(cls, base: Checkpoint) -> "Start":
        """The start of a run that takes the weights of this checkpoint."""
        own, before = seen_by(base)
        if own is None:
            return cls(str(base.folder), is_known=False)
        return cls(str(base.folder), before.is_known, before.seen.plus(own))

    def to_dict(self) -> dict[str, Any]:
        """All but the keys, ready for json."""
        return {"origin": self.origin, "is_known": self.is_known, "ledger": self.seen.ledger.to_dict()}


def seen_by(checkpoint: Checkpoint) -> tuple[Seen | None, Start]:
    """What the run of a checkpoint had shown by then (None where nobody wrote it down), and where it started."""
    path = checkpoint.folder / "training.json"
    training = checkpoint.document("training") if path.exists() else {}
    if "ledger" not in training:
        return _seen_by_manifest(checkpoint)
    keys = checkpoint.folder / KEYS
    tables = _tables(load_file(keys)) if keys.exists() else {}
    own = Seen(Ledger.from_dict(training["ledger"]), tables.get("run", SeenKeys()))
    if "start" not in training:
        return own, Start(is_known=False)
    start = training["start"]
    before = Seen(Ledger.from_dict(start["ledger"]), tables.get("start", SeenKeys()))
    return own, Start(start["origin"], start["is_known"], before)


def _seen_by_manifest(checkpoint: Checkpoint) -> tuple[Seen | None, Start]:
    """As `seen_by`, of weights that were exported without their training: sums alone, and no keys."""
    path = checkpoint.folder / "manifest.json"
    data = checkpoint.document("manifest").get("data", {}) if path.exists() else {}
    if "seen" not in data:
        return None, Start(is_known=False)
    start = data.get("start", {"origin": "", "is_known": True, "seen": {}})
    before = Seen(Ledger.of_shown(start["seen"]))
    return Seen(Ledger.of_shown(data["seen"])), Start(start["origin"], start["is_known"], before)


def keys_writer(run: SeenKeys, start: SeenKeys) -> Writer:
    """Writes the keys that `seen_by` reads again."""
    tables = {"run": run.to_tensors(), "start": start.to_tensors()}
    return tensor_writer({f"{part}/{name}": value for part, table in tables.items() for name, value in table.items()})


def data_seen(ledger: dict[str, Any], start: Start) -> dict[str, Any]:
    """What a manifest says of the clips that its weights were shown, in this run and before it."""
    before = {"origin": start.origin, "is_known": start.is_known, "seen": start.seen.ledger.shown()}
    return {"seen": Ledger.from_dict(ledger).shown(), **({"start": before} if start.origin else {})}


def _tables(tensors: dict[str, Tensor]) -> dict[str, SeenKeys]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        parts.setdefault(part, {})[own] = tensor
    return {part: SeenKeys.from_tensors(table) for part, table in parts.items()}
