"""`kinema data show`: one clip, its record, its members, and its frames on a contact sheet."""

import argparse
import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinema.data.account.rights import contradiction
from kinema.data.dataset.opened import opened
from kinema.data.dataset.shards import ClipEntry, DamagedSample, DatasetIndex, read_member
from kinema.data.verbs.check import check_clip
from kinema.data.verbs.contact_sheet import contact_sheet

EXIT_SHOWN, EXIT_DATA_ERROR = 0, 65  # EX_DATAERR of sysexits.h


@dataclass(frozen=True)
class Shown:
    """What is known of one clip."""

    entry: ClipEntry
    stated: Any
    """The json beside it, as it stands in the tar; None if there is none, or it is damaged."""
    problems: list[str]
    suspected_cuts: list[int]
    sheet: Path | None
    """Where its frames are; None where none could be decoded."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for json."""
        members = {ext: asdict(member) for ext, member in self.entry.members.items()}
        facts = {"key": self.entry.record.key, "shard": self.entry.shard, "members": members}
        rest = {
            "problems": self.problems,
            "suspected_cuts": self.suspected_cuts,
            "sheet": self.sheet and str(self.sheet),
        }
        return {**facts, "record": self.entry.record.to_dict(with_extra=False), "json": self.stated, **rest}

    def lines(self) -> list[str]:
        """In plain text: the record of the index, then what else the json has, the members, and what is wrong."""
        record = self.entry.record.to_dict(with_extra=False)
        rest = {name: value for name, value in (self.stated or {}).items() if name not in record and value != {}}
        lines = [f"{name:<18}{value}" for name, value in record.items()]
        lines += [f"{name:<18}{json.dumps(value, ensure_ascii=False)}" for name, value in rest.items()]
        lines += [
            f"{'.' + ext:<18}{member.size} bytes at {member.offset}" for ext, member in self.entry.members.items()
        ]
        lines += [f"{'suspected cuts':<18}at frame {', '.join(map(str, self.suspected_cuts))}"] * bool(
            self.suspected_cuts
        )
        return lines

    def verdict(self) -> str:
        """SHOWN or DAMAGED."""
        where = f"{self.entry.record.key} of {self.entry.shard}"
        sheet = f", frames in {self.sheet}" if self.sheet else ""
        if self.problems:
            return f"DAMAGED {where}: {'; '.join(self.problems)}{sheet}"
        return f"SHOWN {where}{sheet}"


def show(index: DatasetIndex, key: str, sheet: Path) -> Shown:
    """Look at one clip; ValueError with the nearest keys if there is no such clip."""
    entry = find(index, key)
    report = check_clip(index.folder, entry, show=True)
    problems = [f"{report.problem.cause}, {report.problem.detail}"] if report.problem else []
    stated = None
    if "json" in entry.members:
        try:
            content = read_member(index.folder, entry, "json")
            problems += filter(None, [contradiction(entry.record, content)])
            stated = json.loads(content)
        except (DamagedSample, ValueError) as error:
            problems.append(f"its json cannot be read ({error})")
    if report.picture is None:
        return Shown(entry, stated, problems, report.cuts, None)
    contact_sheet([(report.picture, f"{key}: {entry.record.caption}")], sheet)
    return Shown(entry, stated, problems, report.cuts, sheet)


def find(index: DatasetIndex, key: str) -> ClipEntry:
    """The clip of this key."""
    for entry in index.entries:
        if entry.record.key == key:
            return entry
    near = difflib.get_close_matches(key, [entry.record.key for entry in index.entries], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Its first one is {index.entries[0].record.key}."
    raise ValueError(f"key={key} is not in {index.manifest['name']}. {hint}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("path", help="folder or address of a data set, or of any WebDataset tars")
    parser.add_argument("key", help="of the clip")
    parser.add_argument("--to", type=Path, help="picture to write (default: KEY.png here)")
    parser.add_argument("--json", action="store_true", help="print one json object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print the clip and the verdict; returns 0, or 65 if its bytes are not what its record says."""
    with opened(arguments.path) as index:
        shown = show(index, arguments.key, arguments.to or Path(f"{arguments.key}.png"))
    if arguments.json:
        print(json.dumps({**shown.to_dict(), "verdict": shown.verdict()}, ensure_ascii=False))
    else:
        print("\n".join([*shown.lines(), shown.verdict()]))
    return EXIT_DATA_ERROR if shown.problems else EXIT_SHOWN
