"""Which clips stay, by thresholds on their scores, and the table that says what each threshold took."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.scores.measure import UNITS

KEY = "filter.thresholds"
"""Where the ranges stand in the config."""
BINS = 40
OUTLIERS = 1.0
"""Per cent of the values at either end that a histogram puts into its last bin, or one of them stretches it."""


@dataclass
class Range:
    """The values of a score with which a clip stays; without bounds, all."""

    min: float | None = None
    max: float | None = None
    allow_missing: bool = False
    """Keep clips that have no such value, as a single picture has no motion."""

    @property
    def active(self) -> bool:
        """Whether it has any bound."""
        return self.min is not None or self.max is not None

    def check(self, name: str) -> None:
        """Raise ValueError, naming the config key, for a range that no value lies in."""
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{KEY}.{name}.min={self.min} is above {KEY}.{name}.max={self.max}: no clip is left.")

    def reasons(self, name: str, values: NDArray[np.float64]) -> list[str]:
        """Why each clip goes, `` if it stays; values (N,) with NaN for none."""
        below = f"{name} below {self.min:g}" if self.min is not None else ""
        above = f"{name} above {self.max:g}" if self.max is not None else ""
        low = -np.inf if self.min is None else self.min
        high = np.inf if self.max is None else self.max
        missing = "" if self.allow_missing else f"{name} has no value"
        return [missing if np.isnan(v) else below if v < low else above if v > high else "" for v in values]


@dataclass
class FilterLine:
    """A row of the keep table."""

    name: str
    rule: str
    alone: int
    """Clips it would remove if it were the only filter."""
    after: int = 0
    """Clips it removed of those that the filters before it had left."""
    left: int = 0
    unit: str = ""
    bounds: list[float] = field(default_factory=list)
    histogram: dict[str, Any] | None = None


@dataclass
class KeepTable:
    """What all filters did, in their order."""

    given: int
    lines: list[FilterLine] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Of each clip: why it went, by the first filter that took it, or `` if it stays."""
    removed_by: list[str] = field(default_factory=list)
    """Of each clip: the name of that filter, or ``."""

    def __post_init__(self) -> None:
        self.reasons = self.reasons or [""] * self.given
        self.removed_by = self.removed_by or [""] * self.given

    @property
    def kept(self) -> int:
        """Clips that stay."""
        return self.removed_by.count("")

    def add(self, line: FilterLine, reasons: Sequence[str]) -> None:
        """Apply one filter: `reasons` (N,) as it gives them, of which only those of clips still there count."""
        taken = [i for i, reason in enumerate(reasons) if reason and not self.removed_by[i]]
        for i in taken:
            self.reasons[i], self.removed_by[i] = reasons[i], line.name
        self.lines.append(replace(line, after=len(taken), left=self.kept))

    def to_dict(self) -> dict[str, Any]:
        """For keep.json: without the clips."""
        return {"given": self.given, "kept": self.kept, "filters": [asdict(line) for line in self.lines]}

    def text(self) -> str:
        """The table in plain text, for the terminal."""
        width = max([len(line.name) for line in self.lines] + [6])
        rows = [f"{'filter':<{width}}  {'alone':>8}  {'removed':>8}  {'left':>8}  rule"]
        rows += [
            f"{line.name:<{width}}  {line.alone:>8,}  {line.after:>8,}  {line.left:>8,}  {line.rule}"
            for line in self.lines
        ]
        return "\n".join(rows)


def apply_filters(scores: Sequence[Mapping[str, float | None]], filters: Mapping[str, Range]) -> KeepTable:
    """The keep table of clips with these scores. Raises ValueError for a filter whose score no clip has."""
    table = KeepTable(len(scores))
    known = {name for one in scores for name in one}
    for name, allowed in filters.items():
        allowed.check(name)
        if not allowed.active:
            continue
        if scores and name not in known:
            raise ValueError(f"{KEY}.{name}: no clip has this score. There are {', '.join(sorted(known)) or 'none'}.")
        values = score_values(scores, name)
        reasons = allowed.reasons(name, values)
        bounds = [bound for bound in (allowed.min, allowed.max) if bound is not None]
        line = FilterLine(name, rule_text(allowed), alone=sum(map(bool, reasons)), unit=UNITS.get(name, ""))
        table.add(replace(line, bounds=bounds, histogram=histogram(values, bounds)), reasons)
    return table


def score_values(scores: Sequence[Mapping[str, float | None]], name: str) -> NDArray[np.float64]:
    """(N,) values of one score, NaN for clips without."""
    return np.array([np.nan if (value := one.get(name)) is None else value for one in scores], np.float64)


def rule_text(allowed: Range) -> str:
    """`0.01 to 0.8`, `at least 0.01` or `at most 0.8`."""
    if allowed.min is None:
        return f"at most {allowed.max:g}"
    return f"at least {allowed.min:g}" if allowed.max is None else f"{allowed.min:g} to {allowed.max:g}"


def histogram(values: NDArray[np.float64], bounds: Sequence[float] = ()) -> dict[str, Any] | None:
    """`edges` (n + 1,) and `counts` (n,) of all values, the outermost with what lies beyond; None without values.

    The bounds are always inside, so that they can be drawn.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [OUTLIERS, 100 - OUTLIERS])
    edges = bin_edges(min([low, *bounds]), max([high, *bounds]), sorted(bounds))
    low, high = edges[0], edges[-1]
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist(), "clips": len(values)}


def bin_edges(low: float, high: float, bounds: Sequence[float]) -> NDArray[np.float64]:
    """About `BINS` equal bins from low to high, and every bound is one of their edges: no bar is half inside."""
    step = (high - low) / BINS if high - low > 1e-9 else 1 / BINS
    if len(bounds) > 1 and bounds[1] > bounds[0]:
        step = (bounds[1] - bounds[0]) / max(1, round((bounds[1] - bounds[0]) / step))
    first = bounds[0] if bounds else low
    below, above = np.ceil((first - low) / step - 1e-9), np.ceil((high - first) / step - 1e-9)
    return first + step * np.arange(-below, max(above, 1 - below) + 1)


def all_histograms(scores: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """`unit` and `histogram` of every score that any clip has, by name."""
    names = sorted({name for one in scores for name in one})
    return {name: {"unit": UNITS.get(name, ""), "histogram": histogram(score_values(scores, name))} for name in names}


def nearest_inside(
    values: NDArray[np.float64], passed: Sequence[bool], bounds: Sequence[float], count: int
) -> list[int]:
    """Clips that one filter lets pass, nearest to one of its bounds first: where a threshold is judged."""
    distance = np.min([np.abs(values - bound) for bound in bounds], axis=0)
    order = np.argsort(np.where(np.asarray(passed) & np.isfinite(values), distance, np.inf), kind="stable")
    return [int(i) for i in order[:count] if passed[i] and np.isfinite(values[i])]


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly chosen, the first and the last among them."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i] for i in np.rint(np.linspace(0, len(numbers) - 1, count)).astype(int)]
