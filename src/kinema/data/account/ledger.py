"""What the model really saw, by shard, source, licence and generation, and the limit on what may be damaged."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.pack import Pack
from kinema.data.steps.candidates import KeepReport

QUARANTINE = "quarantine.jsonl"
"""File of a run's folder that lists its failed clips."""


class DataBudgetError(Exception):
    """More clips are damaged than data.max_failed_fraction allows, or none of a step can be shown."""


@dataclass
class Account:
    """Totals of one shard, one source, one licence, ..."""

    decoded: int = 0
    """Times a clip was shown to the model."""
    failed: int = 0
    repeated: int = 0
    """Of the decoded, those of a second or later epoch."""
    dropped: int = 0
    """Left out before the first step: too short, no caption, ..."""
    seconds: float = 0.0
    """Of video shown to the model."""
    licenses: Counter[str] = field(default_factory=Counter)
    """Decoded clips by licence."""
    distinct: int = 0
    """Clips that were shown at least once; entered when a checkpoint is written."""
    withdrawn: int = 0
    """Left out of a step because data.rights has changed since the plan was made, or for what training on them did."""

    @property
    def clips(self) -> int:
        """Clips that were asked for and may be used."""
        return self.decoded + self.failed

    @property
    def epochs(self) -> float:
        """How often each of the distinct clips was shown, on average."""
        return self.decoded / self.distinct if self.distinct else 0.0

    def show(self, seconds: float, license: str, *, again: bool) -> None:
        """A clip was shown to the model once more."""
        self.decoded += 1
        self.repeated += again
        self.seconds += seconds
        self.licenses[license] += 1

    def add(self, other: "Account") -> None:
        """Add the other's totals to these."""
        for name in ("decoded", "distinct", "failed", "withdrawn", "repeated", "dropped", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.licenses.update(other.licenses)


BY: dict[str, Callable[[ClipEntry], str]] = {
    "shards": lambda entry: entry.shard,
    "sources": lambda entry: entry.record.source,
    "licenses": lambda entry: entry.record.license,
    "consent": lambda entry: entry.record.consent,
    "generated": lambda entry: entry.record.generated,
    "attributions": lambda entry: entry.record.attribution,
}
"""What the accounts are kept by."""
MOST_NAMES = 10_000
"""Accounts of one kind; what has another name after these goes into one account, so that a ledger stays small."""
OTHERS = f"(not among the first {MOST_NAMES} names)"


class Ledger:
    """Accounts by name, and the reasons of what was not shown; plain values for checkpoints and for ranks to add."""

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, Account]] = {kind: {} for kind in BY}
        self.reasons: Counter[str] = Counter()
        """Of failed clips."""
        self.left_out: Counter[str] = Counter()
        """Clips of the data set that the plan leaves out, by reason."""
        self.withdrawn: Counter[str] = Counter()
        """Times that a clip of the plan was left out of a step, by reason."""
        self.fallbacks: Counter[str] = Counter()
        """Decoded clips by `decord -> pyav: reason`."""
        self.damaged: Counter[str] = Counter()
        """Times that each clip failed, by key; a clip fails again in every epoch."""

    @property
    def damaged_clips(self) -> int:
        """Distinct clips that failed; those beyond a rank's first MOST_NAMES count at every showing."""
        return len(self.damaged) + max(0, self.damaged[OTHERS] - 1)

    @property
    def distinct_clips(self) -> int:
        """Distinct clips that were asked for: those shown in a first epoch, and those that failed."""
        total = self.total
        return total.decoded - total.repeated + self.damaged_clips

    @property
    def shards(self) -> dict[str, Account]:
        """Accounts by shard."""
        return self.accounts["shards"]

    @property
    def sources(self) -> dict[str, Account]:
        """Accounts by source."""
        return self.accounts["sources"]

    def record(self, pack: Pack, index: DatasetIndex) -> None:
        """Enter one pack that the model has trained on."""
        withdrawn = {left.key for left in pack.withdrawn}
        rows = zip(pack.entries, pack.keys, pack.shapes, pack.weights.tolist(), pack.epochs, strict=True)
        for number, key, shape, weight, epoch in rows:
            entry = index.entries[number]
            for account in self._accounts(entry):
                if weight > 0:
                    account.show(shape.frames / pack.fps, entry.record.license, again=epoch > 0)
                elif key in withdrawn:
                    account.withdrawn += 1
                else:
                    account.failed += 1
            if weight <= 0 and key not in withdrawn:
                self.damaged[key if key in self.damaged or len(self.damaged) < MOST_NAMES else OTHERS] += 1
        self.reasons.update(failure.reason for failure in pack.failures)
        self.withdrawn.update(left.reason for left in pack.withdrawn)
        self.fallbacks.update(fallback.cause() for fallback in pack.fallbacks)

    def record_kept(self, report: KeepReport) -> None:
        """Enter, once, the clips that were left out before the first step."""
        self.left_out.update(report.dropped)
        for source, count in report.dropped_by_source.items():
            self._account("sources", source).add(Account(dropped=count))

    def record_distinct(self, entries: Iterable[ClipEntry]) -> None:
        """Enter clips that were shown for the first time."""
        for entry in entries:
            for account in self._accounts(entry):
                account.distinct += 1

    @property
    def total(self) -> Account:
        """All sources together."""
        total = Account()
        for account in self.sources.values():
            total.add(account)
        return total

    def shown(self) -> dict[str, dict[str, dict[str, float]]]:
        """What manifests and model cards say of the data: {kind: {name: clips, times they were shown, seconds}}."""
        return {
            kind: {
                name: {"clips": account.distinct, "shown": account.decoded, "seconds": round(account.seconds, 3)}
                for name, account in sorted(self.accounts[kind].items())
                if account.decoded and name
            }
            for kind in ("licenses", "sources", "generated", "consent", "attributions")
        }

    @classmethod
    def of_shown(cls, shown: dict[str, dict[str, dict[str, float]]]) -> "Ledger":
        """What `shown` tells, as a ledger again: sums without failures, shards and repeats."""
        ledger = cls()
        for kind, rows in shown.items():
            for name, row in rows.items():
                account = Account(decoded=int(row["shown"]), distinct=int(row["clips"]), seconds=row["seconds"])
                ledger.accounts[kind][name] = account
        return ledger

    def merge(self, other: "Ledger") -> None:
        """Add another rank's entries to these."""
        for kind, accounts in other.accounts.items():
            for name, account in accounts.items():
                self._account(kind, name).add(account)
        for mine, theirs in zip(self._counters().values(), other._counters().values(), strict=True):
            mine.update(theirs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for json."""
        accounts = {
            kind: {name: _plain(account) for name, account in sorted(accounts.items())}
            for kind, accounts in self.accounts.items()
        }
        return {**accounts, **{name: dict(counts) for name, counts in self._counters().items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        """The ledger that gave these values; one from before an account was kept lacks it."""
        ledger = cls()
        for kind in BY:
            accounts = values.get(kind, {})
            ledger.accounts[kind] = {name: _account_from(account) for name, account in accounts.items()}
        for name, counts in ledger._counters().items():
            counts.update(values.get(name, {}))
        return ledger

    def _counters(self) -> dict[str, Counter[str]]:
        return {name: getattr(self, name) for name in ("reasons", "left_out", "withdrawn", "fallbacks", "damaged")}

    def _accounts(self, entry: ClipEntry) -> list[Account]:
        return [self._account(kind, name_of(entry)) for kind, name_of in BY.items()]

    def _account(self, kind: str, name: str) -> Account:
        accounts = self.accounts[kind]
        if name not in accounts:  # asked for each clip of each step, hence no needless Account
            name = name if len(accounts) < MOST_NAMES else OTHERS
            accounts.setdefault(name, Account())
        return accounts[name]


@dataclass(frozen=True)
class Quarantine:
    """The limit on damaged clips: distinct ones are counted and skipped until there are too many."""

    max_failed_fraction: float
    min_failed_clips: int
    """So many may always fail, lest the first damaged clip of a run stop it."""
    max_fallback_fraction: float = 1.0
    """Of the clips, that another decoder may read than the first one."""

    def check(self, ledger: Ledger) -> None:
        """Raise DataBudgetError, with the commonest reasons, when the ledger's failures or fallbacks exceed a limit."""
        self._check_fallbacks(ledger.fallbacks, ledger.total.clips)
        damaged, clips = ledger.damaged_clips, ledger.distinct_clips
        if damaged <= max(self.min_failed_clips, self.max_failed_fraction * clips):
            return
        reasons = "; ".join(f"{count} x {reason}" for reason, count in ledger.reasons.most_common(5))
        worst = sorted(ledger.shards.items(), key=lambda named: -named[1].failed)[:3]
        shards = ", ".join(f"{name} ({account.failed})" for name, account in worst)
        raise DataBudgetError(
            f"{damaged} of {clips} clips ({damaged / clips:.1%}) are damaged, more "
            f"than data.max_failed_fraction={self.max_failed_fraction:g} allows. Reasons, by showing: {reasons}. "
            f'Worst shards: {shards}. {QUARANTINE} in the run\'s folder names the clips; one with "fatal": true is '
            "tried again when its lines there are deleted. Run `kinema data check` on the data set, or raise the limit "
            "on purpose."
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
