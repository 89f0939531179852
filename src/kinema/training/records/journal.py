"""Which clips each step showed, lane by lane, as each rank saw it: the proof that a resumed run goes on exactly."""

import json
from collections.abc import Sequence
from pathlib import Path

from kinema.data.packs.pack import Pack
from kinema.training.records.metrics import LineFile

FOLDER = "keys"


class KeyJournal:
    """`keys/rank-00000.jsonl` of a run folder: one line for each lane of each step that this rank has finished."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._folder = run_dir / FOLDER
        self._file = LineFile(self._folder / f"rank-{rank:05d}.jsonl")

    def write(self, step: int, packs: Sequence[Pack]) -> None:
        """Enter this rank's packs of a step, numbered as in the metrics: the first is 1."""
        self._folder.mkdir(exist_ok=True)
        for pack in packs:
            weights = [int(weight) for weight in pack.weights]  # 0: failed or withdrawn
            names = {"lane": pack.lane, "keys": pack.keys, "positions": pack.positions, "weights": weights}
            self._file.write({"step": step, **names})

    def truncate_after(self, step: int) -> None:
        """Forget, for all ranks that ever wrote, the steps that a resumed run will do again."""
        for path in self._folder.glob("rank-*.jsonl"):
            LineFile(path).truncate_after(step)


def read_journal(run_dir: Path) -> dict[tuple[int, int], dict]:
    """{(step, lane): line} of all ranks, in order; ValueError where a lane was entered twice."""
    lines: dict[tuple[int, int], dict] = {}
    for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            place = line["step"], line["lane"]
            if place in lines:
                raise ValueError(
                    f"{path}: step {place[0]} of lane {place[1]} was entered before, by this or another rank."
                )
            lines[place] = line
    return dict(sorted(lines.items()))
