"""What the model really saw, by shard and by source, and the limit on what may be damaged."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from kinema.data.candidates import KeepReport
from kinema.data.entry import ClipEntry
from kinema.data.pack import Pack
from kinema.data.shards import DatasetIndex


class DataBudgetError(Exception):
    """More clips are damaged than data.max_failed_fraction allows."""


@dataclass
class Account:
    """Totals of one shard or one source."""

    decoded: int = 0
    failed: int = 0
    repeated: int = 0
    """Of the decoded, those of a second or later epoch."""
    dropped: int = 0
    """Left out before the first step: too short, no caption, ..."""
    seconds: float = 0.0
    """Of video shown to the model."""
    licenses: Counter[str] = field(default_factory=Counter)
    """Decoded clips by licence."""

    @property
    def clips(self) -> int:
        """Clips that were asked for."""
        return self.decoded + self.failed

    def add(self, other: "Account") -> None:
        """Add the other's totals to these."""
        for name in ("decoded", "failed", "repeated", "dropped", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.licenses.update(other.licenses)


class Ledger:
    """Accounts by shard and by source, and the reasons of failures; plain values for checkpoints and for
    ranks to add.
    """

    def __init__(self) -> None:
        self.shards: dict[str, Account] = {}
        self.sources: dict[str, Account] = {}
        self.reasons: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()  # clips by `decord -> pyav: reason`; they are decoded
        self._index: DatasetIndex | None = None
        self._entries: dict[str, ClipEntry] = {}

    def record(self, pack: Pack, index: DatasetIndex) -> None:
        """Enter one pack that the model has trained on."""
        if index is not self._index:
            self._index, self._entries = index, {entry.record.key: entry for entry in index.entries}
        for key, shape, weight, epoch in zip(pack.keys, pack.shapes, pack.weights.tolist(), pack.epochs, strict=True):
            entry = self._entries[key]
            if weight > 0:
                seconds, licenses = shape.frames / pack.fps, Counter({entry.record.license: 1})
                account = Account(decoded=1, repeated=int(epoch > 0), seconds=seconds, licenses=licenses)
            else:
                account = Account(failed=1)
            self._account(self.shards, entry.shard).add(account)
            self._account(self.sources, entry.record.source).add(account)
        self.reasons.update(failure.reason for failure in pack.failures)
        self.fallbacks.update(fallback.cause() for fallback in pack.fallbacks)

    def record_kept(self, report: KeepReport) -> None:
        """Enter, once, the clips that were left out before the first step."""
        for source, count in report.dropped_by_source.items():
            self._account(self.sources, source).add(Account(dropped=count))

    @property
    def total(self) -> Account:
        """All sources together."""
        total = Account()
        for account in self.sources.values():
            total.add(account)
        return total

    def merge(self, other: "Ledger") -> None:
        """Add another rank's entries to these."""
        for mine, theirs in ((self.shards, other.shards), (self.sources, other.sources)):
            for name, account in theirs.items():
                self._account(mine, name).add(account)
        self.reasons.update(other.reasons)
        self.fallbacks.update(other.fallbacks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for json."""
        return {
            "shards": {name: _plain(account) for name, account in sorted(self.shards.items())},
            "sources": {name: _plain(account) for name, account in sorted(self.sources.items())},
            "reasons": dict(self.reasons),
            "fallbacks": dict(self.fallbacks),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        """The ledger that gave these values."""
        ledger = cls()
        ledger.shards = {name: _account_from(account) for name, account in values["shards"].items()}
        ledger.sources = {name: _account_from(account) for name, account in values["sources"].items()}
        ledger.reasons = Counter(values["reasons"])
        ledger.fallbacks = Counter(values.get("fallbacks", {}))
        return ledger

    @staticmethod
    def _account(accounts: dict[str, Account], name: str) -> Account:
        return accounts.setdefault(name, Account())


@dataclass(frozen=True)
class Quarantine:
    """The limit on damaged clips: they are counted and skipped until there are too many."""

    max_failed_fraction: float
    min_failed_clips: int
    """So many may always fail, lest the first damaged clip of a run stop it."""
    max_fallback_fraction: float = 1.0
    """Of the clips, that another decoder may read than the first one."""

    def check(self, ledger: Ledger) -> None:
        """Raise DataBudgetError, with the commonest reasons, when the ledger's failures or fallbacks exceed a limit."""
        total = ledger.total
        self._check_fallbacks(ledger.fallbacks, total.clips)
        if total.failed <= max(self.min_failed_clips, self.max_failed_fraction * total.clips):
            return
        reasons = "; ".join(f"{count} x {reason}" for reason, count in ledger.reasons.most_common(5))
        worst = sorted(ledger.shards.items(), key=lambda named: -named[1].failed)[:3]
        shards = ", ".join(f"{name} ({account.failed})" for name, account in worst)
        raise DataBudgetError(
            f"{total.failed} of {total.clips} clips ({total.failed / total.clips:.1%}) are damaged, more "
            f"than data.max_failed_fraction={self.max_failed_fraction:g} allows. Reasons: {reasons}. "
            f"Worst shards: {shards}. Run `kinema data check` on the data set, or raise the limit on purpose."
        )

    def _check_fallbacks(self, fallbacks: Counter[str], clips: int) -> None:
        if fallbacks.total() <= max(self.min_failed_clips, self.max_fallback_fraction * clips):
            return
        causes = "; ".join(f"{count} x {cause}" for cause, count in fallbacks.most_common(5))
        raise DataBudgetError(
            f"{fallbacks.total()} times in {clips} clips another decoder had to step in, more than "
            f"data.max_fallback_fraction={self.max_fallback_fraction:g} allows: {causes}. Type the decoder that can "
            "read them as data.decoder, or raise the limit on purpose."
        )


def _plain(account: Account) -> dict[str, Any]:
    return {**asdict(account), "licenses": dict(account.licenses)}


def _account_from(values: dict[str, Any]) -> Account:
    return Account(**{**values, "licenses": Counter(values["licenses"])})
