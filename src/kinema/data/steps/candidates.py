"""Which clips of a data set can be used, at which size, and why the others are not."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.account.refusals import refused_rows
from kinema.data.account.rights import RightsPolicy
from kinema.data.dataset.columns import Columns
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.geometry import ClipShape, Geometry, assign_shapes
from kinema.data.steps.dealing import LargestStep

AT_A_TIME = 65_536
"""Clips that are made together where all are asked for, one after the other."""
STILL, TOO_SHORT, TOO_SLOW = "image, and data.shapes has none of one frame", "too short", "frame rate below data.fps"
"""Reasons to leave a clip out that another data.shapes or data.fps may take away."""


class PlannedClip(NamedTuple):
    """One clip as the plan sees it: where it stands in the index, its size and what it costs."""

    entry_index: int
    shape: ClipShape
    tokens: int
    cost: float
    """Work of a training step on this clip, in any unit, e.g. FLOPs; only ratios matter."""


@dataclass(frozen=True, eq=False)
class Candidates(Sequence[PlannedClip]):
    """The clips that a plan may use, a column for each fact: 12 bytes a clip, whatever the size of the index.

    Size, tokens and cost depend on the shape alone and stand once for each shape.
    """

    shapes: Sequence[ClipShape]
    shape_tokens: NDArray[np.int64]
    shape_costs: NDArray[np.float64]
    entry_index: NDArray[np.int32]
    shape_ids: NDArray[np.int32]
    """Of each clip, its place in `shapes`."""
    shards: NDArray[np.int32]
    """Of each clip, any number that tells its shard from others of the same source."""
    sources: tuple[str, ...] = ("",)
    """Names of the data sets that the clips come from."""
    source_ends: tuple[int, ...] = ()
    """The clips lie source by source: where each ends. Empty for a single source."""

    def __post_init__(self) -> None:
        for tokens, cost, shape in zip(self.shape_tokens, self.shape_costs, self.shapes, strict=True):
            if not (tokens > 0 and cost > 0):
                raise ValueError(f"Every planned clip must have tokens and a cost above 0, but {shape} has not.")

    @classmethod
    def of(cls, clips: Sequence[PlannedClip], shards: Sequence[int]) -> "Candidates":
        """Candidates from single clips, each with its shard."""
        kinds = list(dict.fromkeys((clip.shape, clip.tokens, clip.cost) for clip in clips))
        places = {kind: place for place, kind in enumerate(kinds)}
        return cls(
            [shape for shape, _, _ in kinds],
            np.array([tokens for _, tokens, _ in kinds], np.int64),
            np.array([cost for _, _, cost in kinds], np.float64),
            np.array([clip.entry_index for clip in clips], np.int32),
            np.array([places[clip.shape, clip.tokens, clip.cost] for clip in clips], np.int32),
            np.array(shards, np.int32),
        )

    @cached_property
    def shape_ranks(self) -> NDArray[np.int64]:
        """Of each shape, its place among them all by size: frames, then height, then width."""
        return np.lexsort(np.array(self.shapes).T[::-1]).argsort()

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of each clip."""
        return self.shape_tokens[self.shape_ids]

    @property
    def costs(self) -> NDArray[np.float64]:
        """Cost of each clip."""
        return self.shape_costs[self.shape_ids]

    @classmethod
    def join(cls, parts: Mapping[str, "Candidates"], first_entries: Sequence[int]) -> "Candidates":
        """The clips of several data sets, of the same shapes; `first_entries`: where each begins in the joint index."""
        one, *_ = parts.values()
        assert all(part.shapes == one.shapes for part in parts.values())
        entries = [part.entry_index + first for part, first in zip(parts.values(), first_entries, strict=True)]
        return cls(
            one.shapes,
            one.shape_tokens,
            one.shape_costs,
            np.concatenate(entries).astype(np.int32),
            np.concatenate([part.shape_ids for part in parts.values()]),
            np.concatenate([part.shards for part in parts.values()]),
            tuple(parts),
            tuple(np.cumsum([len(part) for part in parts.values()]).tolist()),
        )

    def source_rows(self, source: int) -> slice:
        """Where the clips of one source lie."""
        ends = (0, *(self.source_ends or (len(self),)))
        return slice(ends[source], ends[source + 1])

    @cached_property
    def shape_counts(self) -> NDArray[np.int64]:
        """Of each shape, its clips."""
        return np.bincount(self.shape_ids, minlength=len(self.shapes))

    @property
    def larger_is_dearer(self) -> bool:
        """Whether the cost never falls as tokens grow."""
        return bool((np.diff(self.shape_costs[np.lexsort((self.shape_costs, self.shape_tokens))]) >= 0).all())

    def largest_step(self, clips_per_step: int) -> LargestStep:
        """Bounds on steps of so many clips; the ends of two epochs, or several epochs, may meet in a step."""
        counts = np.zeros(len(self.shapes), np.int64)
        for source in range(len(self.sources)):
            rows = self.source_rows(source)
            clips = rows.stop - rows.start
            copies = 1 if clips >= 3 * clips_per_step else clips_per_step // clips + 2
            counts += copies * np.bincount(self.shape_ids[rows], minlength=len(self.shapes))
        tokens = np.repeat(self.shape_tokens, np.minimum(counts, clips_per_step))
        return LargestStep.of_clips(np.sort(tokens)[::-1][:clips_per_step])

    def __len__(self) -> int:
        return len(self.entry_index)

    def __getitem__(self, place: int) -> PlannedClip:  # type: ignore[override]  # no slices
        return self.take(np.array([place]))[0]

    def take(self, places: NDArray[np.int64]) -> list[PlannedClip]:
        """Some of the clips, by their places."""
        kinds, entries = self.shape_ids[places].tolist(), self.entry_index[places].tolist()
        return [PlannedClip(entry, *self._kinds[kind]) for entry, kind in zip(entries, kinds, strict=True)]

    def __iter__(self) -> Iterator[PlannedClip]:
        for first in range(0, len(self), AT_A_TIME):
            yield from self.take(np.arange(first, min(first + AT_A_TIME, len(self))))

    @cached_property
    def _kinds(self) -> list[tuple[ClipShape, int, float]]:
        """Each shape with its tokens and cost."""
        return list(zip(self.shapes, self.shape_tokens.tolist(), self.shape_costs.tolist(), strict=True))


@dataclass
class KeepReport:
    """How many clips of a data set are used, and why the others are not."""

    total: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Clips by reason."""
    dropped_by_source: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """One line, e.g. `kept 16/180 (9%): too short 150, no caption 14`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        share = f"kept {self.kept}/{self.total} ({self.kept / max(self.total, 1):.0%})"
        return f"{share}: {reasons}" if reasons else share


def plan_clips(
    index: DatasetIndex,
    shapes: Sequence[ClipShape],
    fps: float,
    geometry: Geometry,
    *,
    rights: RightsPolicy | None = None,
    require_captions: bool = True,
    max_clips: int | None = None,
    cost: Callable[[ClipShape], float] | None = None,
) -> tuple[Candidates, KeepReport]:
    """Give every usable clip its shape, tokens and cost, and count the others by reason.

    `cost` maps a clip's shape to the work of training on it; without it the tokens count. Raises ValueError
    for an illegal shape (with the nearest legal ones), and when no clip remains.
    """
    legal = [geometry.check(shape) for shape in shapes]
    columns = index.columns
    shape_ids = assign_shapes(columns, legal, fps)
    kept = np.ones(len(columns), np.bool_)
    report = KeepReport(total=len(columns))
    refusals = [*refused_rows(rights, index)] if rights else []
    if require_captions:
        refusals.append(("no caption", ~columns.captioned))
    refusals.append((STILL, (shape_ids < 0) & (columns.num_frames == 1)))
    refusals.append((TOO_SHORT, shape_ids < 0))
    moving = np.array([shape.frames > 1 for shape in legal])[shape_ids]
    # Frames would be shown twice; 23.976 passes for 24.
    refusals.append((TOO_SLOW, moving & (columns.fps < 0.95 * fps)))
    for reason, refused in refusals:  # a clip counts under the first that applies
        _drop(report, columns, reason, kept & refused)
        kept &= ~refused
    if max_clips is not None:
        beyond = kept & (np.cumsum(kept) > max_clips)
        _drop(report, columns, "beyond data.max_clips", beyond)
        kept &= ~beyond
    report.kept = int(kept.sum())
    if not report.kept:
        raise ValueError(_nothing_left(index, columns, legal, fps, report))
    tokens = [geometry.num_tokens(shape) for shape in legal]
    clips = Candidates(
        legal,
        np.array(tokens, np.int64),
        np.array([cost(shape) for shape in legal] if cost else tokens, np.float64),
        np.flatnonzero(kept).astype(np.int32),
        shape_ids[kept],
        columns.shard.codes[kept],
    )
    return clips, report


def _drop(report: KeepReport, columns: Columns, reason: str, rows: NDArray[np.bool_]) -> None:
    if rows.any():
        report.dropped[reason] += int(rows.sum())
        report.dropped_by_source.update(columns.source.count(rows))


def _nothing_left(
    index: DatasetIndex, columns: Columns, shapes: Sequence[ClipShape], fps: float, report: KeepReport
) -> str:
    refused = f"No clip of {index.folder} can be used: {report.line()}."
    if not report.dropped.keys() & {STILL, TOO_SHORT, TOO_SLOW}:
        return f"{refused} Change what these reasons name (data.rights, data.require_captions), or type other data."
    fewest = min(shape.frames for shape in shapes)
    return (
        f"{refused} The shortest of data.shapes needs {fewest} "
        f"frames at data.fps={fps}, {fewest / fps:.2f} s; the longest clip lasts "
        f"{columns.duration_seconds.max(initial=0.0):.2f} s and the fastest has {columns.fps.max(initial=0.0):g} "
        "frames a second. Type fewer frames, another data.fps, or other data."
    )
