"""The reference band: the range in which the loss of a healthy run of an experiment lies."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.report.run_folder import Record, Series, keys_of, read_run, series

BANDS = Path(__file__).parent / "bands"
POINTS = 60
"""Points of a band; the loss is smoothed before, so more would say nothing new."""
WIDTH_IN_DEVIATIONS = 4.0
LEAST_WIDTH = 0.05
"""Half-width as a fraction of the middle that a band never goes below: other hardware rounds differently."""
ALLOWED_OUTSIDE = 0.05
"""Fraction of the judged points that may lie outside before the run counts as outside."""


@dataclass(frozen=True)
class Judgement:
    """Where a curve lies against its band."""

    judged: int
    above: int
    below: int
    first_outside: int | None
    """The step of the first point outside."""

    @property
    def inside(self) -> bool:
        """Whether at most `ALLOWED_OUTSIDE` of the judged points lie outside."""
        return self.judged > 0 and (self.above + self.below) <= ALLOWED_OUTSIDE * self.judged

    def __str__(self) -> str:
        if not self.judged:
            return "too few steps to judge"
        if not self.above and not self.below:
            return f"inside at all {self.judged} points"
        parts = [f"{n} {where}" for n, where in ((self.above, "above"), (self.below, "below")) if n]
        return f"{' and '.join(parts)} of {self.judged} points, first at step {self.first_outside}"


def running_median(curve: Series, at: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """Median of the values within window/2 steps of each point of `at` (n,); NaN where there is none."""
    steps, values = curve
    first = np.searchsorted(steps, at - window / 2, side="left")
    last = np.searchsorted(steps, at + window / 2, side="right")
    return np.array([np.median(values[i:j]) if j > i else np.nan for i, j in zip(first, last, strict=True)])


def default_window(steps: NDArray[np.float64]) -> float:
    """Window of the running median in steps: a thirtieth of the run, but at least 7 records."""
    if len(steps) < 2:
        return 1.0
    spacing = float(np.median(np.diff(steps)))
    return max(7 * spacing, float(steps[-1] - steps[0]) / 30)


def make_band(runs: Sequence[Path | list[Record]]) -> dict[str, Any]:
    """Reference band of one or several healthy runs of the same experiment.

    runs: run folders, or the train records themselves ({"step", "loss", "loss_by_noise"}). The middle is the
    median over runs of the running median; the half-width is four deviations, made of the scatter between the
    runs and the error of the running median inside a run. Steps after the shortest run's end are left out.
    Errors: ValueError without a run, or when a run has fewer than 20 losses.
    """
    if not runs:
        raise ValueError("make_band: runs=[] is empty; give at least one finished run.")
    records = [run if isinstance(run, list) else read_run(run).train for run in runs]
    curves = [series(train, "loss") for train in records]
    for run, (steps, _) in zip(runs, curves, strict=True):
        if len(steps) < 20:
            name = "records" if isinstance(run, list) else run
            raise ValueError(f"make_band: run={name} has {len(steps)} losses; a band needs at least 20.")
    first = max(steps[0] for steps, _ in curves)
    last = min(steps[-1] for steps, _ in curves)
    at = np.unique(np.linspace(first, last, POINTS).round()).astype(np.float64)
    window = max(default_window(steps) for steps, _ in curves)

    by_noise = {}
    for name in keys_of(records[0], "loss_by_noise"):
        bins = [series(train, "loss_by_noise", name) for train in records]
        if all(len(steps) >= 20 for steps, _ in bins):
            by_noise[name] = _band_of(bins, at, window)
    return {
        "format": 1,
        "runs": len(runs),
        "window": window,
        "steps": [int(step) for step in at],
        **_band_of(curves, at, window),
        "by_noise": by_noise,
    }


def judge(curve: Series, band: Record, name: str | None = None) -> Judgement:
    """Compares a raw curve, smoothed as the band was, with the band of the loss or of the noise level `name`.

    A run shorter than the band is judged up to half a window before its end: there its median still looks to
    both sides, as the band's did.
    """
    limits = band if name is None else band["by_noise"][name]
    at, low, high = (np.asarray(values, dtype=np.float64) for values in (band["steps"], limits["low"], limits["high"]))
    if not len(curve[0]):
        return Judgement(0, 0, 0, None)
    last = curve[0][-1]
    reach = at <= (last if last >= at[-1] else last - band["window"] / 2)
    smooth = running_median(curve, at, band["window"])
    known = reach & np.isfinite(smooth) & np.isfinite(low) & np.isfinite(high)
    above, below = known & (smooth > high), known & (smooth < low)
    outside = at[above | below]
    return Judgement(int(known.sum()), int(above.sum()), int(below.sum()), int(outside[0]) if len(outside) else None)


def load_band(name: str) -> Record | None:
    """The band `name`: a file by path (ending in .json) or one that ships with the project, else None.

    Errors: ValueError when the path does not exist or holds no band.
    """
    path = Path(name) if name.endswith(".json") else BANDS / f"{name}.json"
    if not path.exists():
        if name.endswith(".json"):
            raise ValueError(f"band={name} does not exist; shipped bands: {shipped_bands() or 'none'}.")
        return None
    band = json.loads(path.read_text(encoding="utf-8"))
    missing = {"steps", "mid", "low", "high", "window", "by_noise"} - set(band)
    if missing:
        raise ValueError(f"band={name} lacks {sorted(missing)}; write it with `kinema report RUN --make-band NAME`.")
    return dict(band)


def shipped_bands() -> list[str]:
    """Names of the bands inside the package."""
    return sorted(path.stem for path in BANDS.glob("*.json"))


def write_band(band: Record, name: str) -> Path:
    """Writes a band into the package, where the report finds it by the name of the experiment."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"make-band={name}: use lower-case letters, digits, - and _, for example demo_dit.")
    BANDS.mkdir(exist_ok=True)
    path = BANDS / f"{name}.json"
    path.write_text(json.dumps(band, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _band_of(curves: list[Series], at: NDArray[np.float64], window: float) -> dict[str, list[float | None]]:
    smooth = np.stack([running_median(curve, at, window) for curve in curves])  # (runs, points)
    mid = np.median(smooth, axis=0)
    errors = np.stack([_median_error(curve, at, window) for curve in curves])
    variance = _calm(np.mean(errors**2, axis=0))
    if len(curves) > 1:
        variance = variance + np.var(smooth, axis=0, ddof=1)
    variance = variance * (1 + 1 / len(curves))  # the middle is uncertain too, the more the fewer the runs
    half = np.maximum(WIDTH_IN_DEVIATIONS * np.sqrt(variance), LEAST_WIDTH * np.abs(mid))
    return {"mid": _numbers(mid), "low": _numbers(mid - half), "high": _numbers(mid + half)}


def _median_error(curve: Series, at: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """Standard error of the running median: 1.2533 sigma / sqrt(n), sigma from the median deviation."""
    steps, values = curve
    errors = []
    for center in at:
        inside = values[np.abs(steps - center) <= window / 2]
        if not len(inside):
            errors.append(np.nan)
            continue
        sigma = 1.4826 * np.median(np.abs(inside - np.median(inside)))
        errors.append(1.2533 * sigma / np.sqrt(len(inside)))
    return np.array(errors)


def _calm(variance: NDArray[np.float64], reach: int = 4) -> NDArray[np.float64]:
    """Median over neighbouring points: the scatter inside one window of a few records says little alone."""
    windows = (variance[max(0, i - reach) : i + reach + 1] for i in range(len(variance)))
    return np.array([np.nanmedian(window) if np.isfinite(window).any() else np.nan for window in windows])


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
