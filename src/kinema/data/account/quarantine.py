"""The file of a run that lists its failed clips: what a person reads, and what a resumed run need not try again."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from kinema.data.account.ledger import QUARANTINE
from kinema.data.packs.pack import Failure


def write_failures(run_folder: Path, step: int, failures: Iterable[Failure]) -> None:
    """Append one line for each clip that failed in this step."""
    with (run_folder / QUARANTINE).open("a", encoding="utf-8") as handle:
        for failure in failures:
            handle.write(json.dumps({"step": step, **asdict(failure)}) + "\n")


def condemned_clips(run_folder: Path) -> dict[str, str]:
    """Keys of the clips that killed a decoding process or had to be killed, with the reason; {} for a new run.

    A last line that a crash cut short is left out: its clip is tried once more.
    """
    path = run_folder / QUARANTINE
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return {line["key"]: line["reason"] for line in map(json.loads, lines) if line.get("fatal")}
