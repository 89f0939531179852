"""`kinema data ledger`: which checkpoints of a run have seen a source, a licence or a clip, and how often."""

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kinema.data.account.ledger import OTHERS, Account
from kinema.training.checkpoints.store import Checkpoint, verify
from kinema.training.records.seen import KEYS, Seen, seen_by

EXIT_ANSWERED, EXIT_NOT_KNOWN = 0, 65  # EX_DATAERR of sysexits.h
LEDGER_FILES = ("training.json", KEYS)
KINDS = {"source": "sources", "license": "licenses", "generated": "generated", "consent": "consent"}


@dataclass(frozen=True)
class Row:
    """What one checkpoint's run, or the weights that it started from, were shown of one thing."""

    weights: str
    """Name of the checkpoint, or where the run started."""
    what: str
    shown: int
    """Times that one of its clips was shown."""
    distinct: int | None = None
    """Clips that were shown; this and what follows is None where the ledger does not divide so finely."""
    epochs: float | None = None
    seconds: float | None = None
    failed: int | None = None
    withdrawn: int | None = None

    @classmethod
    def of(cls, weights: str, what: str, account: Account) -> "Row":
        """A whole account as a row."""
        a = account
        return cls(weights, what, a.decoded, a.distinct, round(a.epochs, 3), round(a.seconds, 3), a.failed, a.withdrawn)


@dataclass(frozen=True)
class Question:
    """What is asked of a run; nothing given asks for all that its newest checkpoint saw."""

    source: str | None = None
    license: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"--{' and --'.join(given)} were given. Ask for one of them at a time.")

    @property
    def what(self) -> str | None:
        """What is asked for, in words."""
        return next((f"{name} {value}" for name, value in vars(self).items() if value is not None), None)

    def rows(self, weights: str, seen: Seen) -> list[Row]:
        """The answer of one ledger."""
        accounts = seen.ledger.accounts
        if self.key is not None:
            times = seen.times_of(self.key)
            return [Row(weights, f"key {self.key}", times, int(times > 0))]
        asked = [(kind, value) for kind, value in vars(self).items() if value is not None]
        everything = [(kind, name) for kind, plural in KINDS.items() for name in accounts[plural]]
        return [
            Row.of(weights, f"{kind} {name}", accounts[KINDS[kind]].get(name, Account()))
            for kind, name in asked or everything
        ]

    def doubt(self, seen: Seen | None) -> str | None:
        """Why there may have been more of it than the rows say, or None."""
        if seen is None:
            return "what it was trained on is not written down"
        if self.key is not None and not seen.keys_are_complete:
            return "not all of its keys are kept"
        if any(OTHERS in seen.ledger.accounts[KINDS[kind]] for kind in ("source", "license") if getattr(self, kind)):
            return "the ledger had more names than it keeps"
        return None


@dataclass(frozen=True)
class Answer:
    """The table over a run's checkpoints."""

    question: Question
    checkpoints: list[str]
    """Those that were asked, oldest first."""
    rows: list[Row]
    doubts: list[str]

    @property
    def seeing(self) -> list[str]:
        """Checkpoints whose weights were shown it; all of them if their start was."""
        shown = {row.weights for row in self.rows if row.shown}
        return (
            self.checkpoints if shown - set(self.checkpoints) else [name for name in self.checkpoints if name in shown]
        )

    @property
    def is_known(self) -> bool:
        """Whether it was seen, or certainly was not."""
        return bool(self.seeing) or not self.doubts

    def table(self) -> str:
        """The rows in plain text; a dash where a number is not kept."""
        names = [f.name for f in fields(Row)]
        lines = [names, *([_cell(getattr(row, name)) for name in names] for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def verdict(self) -> str:
        """SEEN, NOT SEEN or NOT KNOWN; without a question, the sum of what was shown."""
        doubts = f" ({'; '.join(self.doubts)})" if self.doubts else ""
        if self.question.what is None:
            shown = sum(row.shown for row in self.rows if row.what.startswith("source "))
            return f"SEEN {shown} clips by {self.checkpoints[-1]}{doubts}"
        of = f"of {len(self.checkpoints)} checkpoint(s)"
        if self.seeing:
            most = sum(
                {row.weights: row.shown for row in self.rows if row.weights not in self.checkpoints[:-1]}.values()
            )
            times = f"{'at least ' if self.doubts else ''}{most} times by {self.checkpoints[-1]}"
            return f"SEEN {self.question.what}: by {len(self.seeing)} {of}, first {self.seeing[0]}, {times}{doubts}"
        return f"NOT {'KNOWN' if self.doubts else 'SEEN'} {self.question.what}: by none {of}{doubts}"


def answer(run: Path, question: Question) -> Answer:
    """Ask every checkpoint of a run, or one checkpoint; ValueError if there is none, or one is damaged."""
    found = _checkpoints(run)
    if question.what is None:
        found = found[-1:]
    rows: list[Row] = []
    doubts: list[str] = []
    for checkpoint in found:
        if damage := verify(checkpoint.folder, LEDGER_FILES):
            doubts += _named(checkpoint.folder.name, damage)
            continue
        own, start = seen_by(checkpoint)
        if start.origin and checkpoint is found[0]:
            rows += question.rows(f"start {start.origin}", start.seen)
        if start.origin or not start.is_known:
            doubts += _named(f"start {start.origin}".strip(), question.doubt(start.seen if start.is_known else None))
        rows += question.rows(checkpoint.folder.name, own) if own else []
        doubts += _named(checkpoint.folder.name, question.doubt(own))
    return Answer(question, [checkpoint.folder.name for checkpoint in found], rows, list(dict.fromkeys(doubts)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/demo_dit, or one of its checkpoints")
    parser.add_argument("--source", help="which checkpoints saw this source, and how often")
    parser.add_argument("--license", help="... this licence")
    parser.add_argument("--key", help="... the clip of this key")
    parser.add_argument("--json", action="store_true", help="print one json object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the table and the verdict; returns 0, or 65 where the question cannot be answered."""
    found = answer(arguments.run, Question(arguments.source, arguments.license, arguments.key))
    if arguments.json:
        values = {"verdict": found.verdict(), "checkpoints": found.checkpoints, "seen_by": found.seeing}
        rows = [asdict(row) for row in found.rows]
        print(json.dumps({**values, "doubts": found.doubts, "rows": rows}, ensure_ascii=False))
    else:
        print(found.table())
        print(found.verdict())
    return EXIT_ANSWERED if found.is_known else EXIT_NOT_KNOWN


def _checkpoints(run: Path) -> list[Checkpoint]:
    """All of a run, or the one, oldest first; their weights are not read."""
    folders = [run] if (run / "seal.json").exists() else sorted((run / "checkpoints").glob("step-*"))
    if not folders:
        raise ValueError(f"run={run} holds no checkpoint. Give a run folder, e.g. runs/demo_dit, or a checkpoint.")
    return [Checkpoint(folder) for folder in folders]


def _named(whose: str, doubt: str | None) -> list[str]:
    return [f"{whose}: {doubt}"] if doubt else []


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
