"""Which clips of a data set can be used, at which size, and why the others are not."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kinema.data.geometry import ClipShape, Geometry, assign_shape
from kinema.data.plan import PlannedClip
from kinema.data.rights import RightsPolicy
from kinema.data.shards import DatasetIndex


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
    cost: Callable[[int], float] = float,
) -> tuple[list[PlannedClip], KeepReport]:
    """Give every usable clip its shape, tokens and cost, and count the others by reason.

    `cost` maps a clip's tokens to the work of training on it. Raises ValueError for an illegal shape (with
    the nearest legal ones), and when no clip remains.
    """
    legal = [geometry.check(shape) for shape in shapes]
    tokens = {shape: geometry.num_tokens(shape) for shape in legal}
    report = KeepReport(total=len(index.entries))
    clips: list[PlannedClip] = []
    for number, entry in enumerate(index.entries):
        record = entry.record
        shape = assign_shape(record, legal, fps)
        reason = None
        if rights is not None and (refusal := rights.refusal(record)):
            reason = refusal
        elif require_captions and not record.caption.strip():
            reason = "no caption"
        elif shape is None:
            reason = "too short"
        elif shape.frames > 1 and record.fps < 0.95 * fps:  # frames would be shown twice; 23.976 passes for 24
            reason = "frame rate below data.fps"
        if reason is None and max_clips is not None and len(clips) >= max_clips:
            reason = "beyond data.max_clips"
        if reason is None and shape is not None:
            clips.append(PlannedClip(number, shape, tokens[shape], cost(tokens[shape])))
        else:
            report.dropped[str(reason)] += 1
            report.dropped_by_source[record.source] += 1
    report.kept = len(clips)
    if not clips:
        raise ValueError(_nothing_left(index, legal, fps, report))
    return clips, report


def _nothing_left(index: DatasetIndex, shapes: Sequence[ClipShape], fps: float, report: KeepReport) -> str:
    longest = max((entry.record.duration_seconds for entry in index.entries), default=0.0)
    fastest = max((entry.record.fps for entry in index.entries), default=0.0)
    fewest = min(shape.frames for shape in shapes)
    return (
        f"No clip of {index.folder} can be used: {report.line()}. The shortest of data.shapes needs {fewest} "
        f"frames at data.fps={fps}, {fewest / fps:.2f} s; the longest clip lasts {longest:.2f} s and the "
        f"fastest has {fastest:g} frames a second. Type fewer frames, another data.fps, or other data."
    )
