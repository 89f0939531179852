"""What a run leaves out because its numbers were not sound: a file of the run folder, obeyed by every later start."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.pack import Failure, Pack

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class SkippedClip:
    """A clip whose own loss was not finite: it has weight 0 from this position of the plan on."""

    key: str
    position: int
    reason: str


@dataclass(frozen=True)
class SkippedStep:
    """A step that moves nothing: no clip of it could be blamed, or all of it was."""

    step: int
    reason: str


@dataclass
class Skips:
    """Clips and steps that are left out. The plan stays what it was; these keep their places, with weight 0."""

    clips: dict[str, SkippedClip] = field(default_factory=dict)
    steps: dict[int, SkippedStep] = field(default_factory=dict)

    @classmethod
    def read(cls, run_folder: Path) -> "Skips":
        """What earlier starts of this run wrote down; a last line that a crash cut short is left out."""
        skips, path = cls(), run_folder / SKIPPED
        if path.is_file():
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                values = json.loads(line)
                skips.add(SkippedClip(**values) if "key" in values else SkippedStep(**values))
        return skips

    def add(self, skipped: SkippedClip | SkippedStep) -> None:
        """Leave this out from now on."""
        if isinstance(skipped, SkippedStep):
            self.steps[skipped.step] = skipped
        else:
            self.clips[skipped.key] = skipped

    def reasons(self, pack: Pack) -> dict[int, str]:
        """Why rows of a pack are left out."""
        return {row: reason for row in range(len(pack.keys)) if (reason := self._reason(pack, row))}

    def _reason(self, pack: Pack, row: int) -> str | None:
        if pack.step in self.steps:
            return self.steps[pack.step].reason
        clip = self.clips.get(pack.keys[row])
        return clip.reason if clip and pack.positions[row] >= clip.position else None


def write_skips(run_folder: Path, skipped: Sequence[SkippedClip | SkippedStep]) -> None:
    """Append these, on the disk before anything is done again without them."""
    with (run_folder / SKIPPED).open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(asdict(one)) + "\n" for one in skipped)
        handle.flush()
        os.fsync(handle.fileno())


def without(pack: Pack, reasons: dict[int, str], index: DatasetIndex) -> Pack:
    """The pack with these rows withdrawn: zeros and weight 0. Clips that failed already have both."""
    rows = {row for row in reasons if pack.weights[row]}
    weights = pack.weights.clone()
    weights[list(rows)] = 0.0
    frames, latents = pack.frames, pack.latents
    if frames is not None:
        frames = [torch.zeros_like(clip) if row in rows else clip for row, clip in enumerate(frames)]
    if latents is not None:
        zero = torch.zeros_like
        latents = [(zero(mean), zero(var)) if row in rows else (mean, var) for row, (mean, var) in enumerate(latents)]
    left_out = [Failure(pack.keys[row], index.entries[pack.entries[row]].shard, reasons[row]) for row in sorted(rows)]
    return replace(pack, weights=weights, frames=frames, latents=latents, withdrawn=[*pack.withdrawn, *left_out])
