"""Plots of a run as inline SVG, coloured by the CSS variables of the page: they follow light and dark."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from kinema.report.band import running_median
from kinema.report.run_folder import Record, Series

# Matplotlib knows no CSS variables: a colour that nobody would choose stands for each until the SVG is text.
SENTINELS = {
    name: f"#fe01{index:02x}" for index, name in enumerate(("ink", "soft", "grid", "s1", "s2", "s3", "s4", "s5", "s6"))
}
INK, SOFT, GRID = (SENTINELS[name] for name in ("ink", "soft", "grid"))
COLOURS = [SENTINELS[f"s{i}"] for i in range(1, 7)]

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the page's own font, selectable
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0,
}

WIDE = (1040, 300)
HALF = (500, 250)


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its points, and which of the six colours it has."""

    label: str
    curve: Series
    colour: int = 0
    points: bool = False
    """Drawn with a mark at each value: few measurements rather than a stream."""


def loss_plot(train: Series, band: Record | None, validation: Sequence[Line], resumes: Sequence[int], log: bool) -> str:
    """Raw and smoothed training loss over the band, with the validation losses and a mark at each resume."""
    with _figure("loss", WIDE) as (figure, out):
        axes = figure.subplots()
        _draw_band(axes, band, band)
        _draw_smoothed(axes, train, band, COLOURS[0], "training, smoothed")
        for line in validation:
            axes.plot(
                *line.curve,
                color=COLOURS[line.colour],
                marker="o",
                markersize=4,
                linewidth=1.2,
                label=line.label,
            )
        for index, step in enumerate(resumes):
            axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (3, 3)), label=None if index else "resumed")
        _limit(axes, [train, *(line.curve for line in validation)], log)
        _finish(axes, "step")
        _legend(axes)
    return out[0]


def noise_plot(curves: dict[str, Series], band: Record | None, log: bool) -> str:
    """Loss by noise level, one panel each, with a shared axis: levels differ by factors."""
    with _figure("noise", (WIDE[0], 230)) as (figure, out):
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            limits = band["by_noise"].get(name) if band else None
            _draw_band(axes, band, limits)
            _draw_smoothed(axes, curve, band, COLOURS[0], "training")
            axes.set_title(f"timestep {name}", color=INK)
            _finish(axes, "step", ticks=4)
        _limit(panels[0], list(curves.values()), log)
    return out[0]


def lines_plot(name: str, lines: Sequence[Line], unit: str = "", log: bool = False, zero: bool = False) -> str:
    """Curves over the step in half width; `unit` is written above the axis."""
    with _figure(name, HALF) as (figure, out):
        axes = figure.subplots()
        for line in lines:
            style = {"marker": "o", "markersize": 4} if line.points else {}
            axes.plot(*line.curve, color=COLOURS[line.colour % 6], linewidth=1.6, label=line.label, **style)  # type: ignore[arg-type]
        _limit(axes, [line.curve for line in lines], log)
        if zero:
            axes.set_ylim(bottom=0, top=1.08 * max(line.curve[1].max() for line in lines))
        _finish(axes, "step")
        axes.set_title(unit, color=SOFT)
        if len(lines) > 1:
            _legend(axes)
    return out[0]


def stream_plot(name: str, curve: Series, *, log: bool = False, zero: bool = False, colour: int = 0) -> str:
    """A noisy stream in half width: raw faint, running median bold."""
    with _figure(name, HALF) as (figure, out):
        axes = figure.subplots()
        _draw_smoothed(axes, curve, None, COLOURS[colour], name)
        _limit(axes, [curve], log)
        if zero:
            axes.set_ylim(0, 1.15 * float(np.quantile(curve[1], 0.98)))
        _finish(axes, "step")
    return out[0]


def phases_plot(phases: dict[str, Series], colours: dict[str, int]) -> str:
    """Seconds of a step, stacked by phase (`colours`: which of the six), over up to 100 stretches."""
    steps = np.unique(np.concatenate([curve[0] for curve in phases.values()]))
    edges = np.unique(np.linspace(0, len(steps), min(100, len(steps)) + 1).astype(int))
    table = np.zeros((len(phases), len(steps)))
    for row, (at, values) in enumerate(phases.values()):
        table[row, np.searchsorted(steps, at)] = values
    means = np.stack([table[:, i:j].mean(1) for i, j in pairwise(edges)], axis=1)
    with _figure("phases", HALF) as (figure, out):
        axes = figure.subplots()
        at_edges = np.append(steps[edges[:-1]], steps[-1])
        low = np.zeros(means.shape[1] + 1)
        for row, name in enumerate(phases):
            high = low + np.append(means[row], means[row, -1])
            axes.fill_between(at_edges, low, high, step="post", color=COLOURS[colours[name]], linewidth=0, alpha=0.9)
            low = high
        axes.set_ylim(0, 1.15 * float(np.quantile(means.sum(0), 0.97)) or 1)
        _finish(axes, "step")
        axes.set_title("seconds a step", color=SOFT)
    return out[0]


def timesteps_plot(edges: Sequence[float], counts: Sequence[float], sampler: Sequence[float]) -> str:
    """Density of the timesteps trained on, over the points at which the sampler asks the model."""
    with _figure("timesteps", (WIDE[0], 210)) as (figure, out):
        axes = figure.subplots()
        widths = np.diff(np.asarray(edges, dtype=float))
        density = np.asarray(counts, dtype=float) / max(float(np.sum(counts)), 1) / widths
        axes.bar(edges[:-1], density, widths * 0.92, align="edge", color=COLOURS[0], alpha=0.55, linewidth=0)
        top = float(density.max()) or 1.0
        axes.set_ylim(-0.11 * top, 1.08 * top)
        if len(sampler):
            axes.plot(sampler, np.full(len(sampler), -0.055 * top), "|", color=COLOURS[1], markersize=9, mew=1.4)
        axes.set_xlim(0, 1)
        _finish(axes, "timestep: 0 data, 1 noise", integer=False)
        axes.yaxis.set_major_locator(MaxNLocator(4, prune="lower"))
    return out[0]


def psnr_plot(clips: Sequence[Sequence[float]]) -> str:
    """PSNR of each frame, one curve a clip."""
    with _figure("psnr", HALF) as (figure, out):
        axes = figure.subplots()
        for index, clip in enumerate(clips):
            axes.plot(range(len(clip)), clip, color=COLOURS[index % 6], linewidth=1.6, marker="o", markersize=3)
        _finish(axes, "frame")
        axes.set_title("dB", color=SOFT)
    return out[0]


def events_plot(events: Mapping[str, Sequence[int]], last_step: int) -> str:
    """When each kind of event happened, one row a kind."""
    with _figure("events", (WIDE[0], 62 + 22 * len(events))) as (figure, out):
        axes = figure.subplots()
        for row, (name, steps) in enumerate(events.items()):
            axes.axhline(row, color=GRID, linewidth=1)
            axes.plot(steps, [row] * len(steps), "o", color=COLOURS[row % 6], markersize=6, label=name)
        axes.set_yticks(range(len(events)), list(events))
        axes.set_ylim(len(events) - 0.5, -0.5)
        axes.set_xlim(-0.01 * last_step - 0.5, 1.01 * last_step + 0.5)
        axes.grid(False)
        _finish(axes, "step")
    return out[0]


@contextmanager
def _figure(name: str, size: tuple[int, int]) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of `size` CSS pixels; after the block its SVG is the one item of the list."""
    out: list[str] = []
    # The salt keeps clip paths of different plots apart inside one page, and the same over two builds.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    out.append(_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, sized by the page, coloured by its variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{name}">',
        svg,
        count=1,
    )
    svg = re.sub(r' id="[A-Za-z0-9]+(\.\w+)?_\d+"', "", svg)  # figure_1, axes_1: the same in every plot
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for variable, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{variable})")
    return svg


def _draw_band(axes: Axes, band: Record | None, limits: Record | None) -> None:
    if not band or not limits:
        return
    steps, low, high, mid = (
        np.asarray(v, float) for v in (band["steps"], *(limits[k] for k in ("low", "high", "mid")))
    )
    axes.fill_between(steps, low, high, color=COLOURS[2], alpha=0.22, linewidth=0, label="reference band")
    axes.plot(steps, mid, color=COLOURS[2], linewidth=1, alpha=0.8)


def _draw_smoothed(axes: Axes, curve: Series, band: Record | None, colour: str, label: str) -> None:
    """Raw values faint and the running median bold: over the band's window, or a fortieth of the run."""
    steps, values = curve
    if not len(steps):
        axes.text(0.5, 0.5, "not recorded", color=SOFT, ha="center", va="center", transform=axes.transAxes)
        return
    raw_at, raw = _thin(steps, values)
    axes.plot(raw_at, raw, color=colour, alpha=0.3, linewidth=0.8)
    spacing = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    window = band["window"] if band else max((steps[-1] - steps[0]) / 40, spacing)
    at = steps if len(steps) <= 240 else np.linspace(steps[0], steps[-1], 240)
    smooth = running_median(curve, at, window)
    known = np.isfinite(smooth)
    axes.plot(at[known], smooth[known], color=colour, linewidth=1.9, label=label)


def _thin(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """At most about 1200 points that keep every spike: the least and the greatest value of each stretch."""
    if len(steps) <= 1200:
        return steps, values
    chunks = np.array_split(np.arange(len(steps)), 600)
    keep = np.unique([pick for c in chunks for pick in (c[values[c].argmin()], c[values[c].argmax()])])
    return steps[keep], values[keep]


def _limit(axes: Axes, curves: Sequence[Series], log: bool) -> None:
    """Vertical limits from the bulk of the values: a spike leaves the frame, not flattens the curve."""
    values = np.concatenate([curve[1] for curve in curves]) if curves else np.zeros(0)
    if log:
        axes.set_yscale("log")
        values = values[values > 0]
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not len(values):
        return
    low, high = np.quantile(values, 0.002), np.quantile(values, 0.998)
    if log:
        axes.set_ylim(low / 1.25, high * 1.25)
    elif high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def _finish(axes: Axes, label: str, ticks: int = 8, integer: bool = True) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=integer, steps=[1, 2, 5, 10]))
    if integer:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.01)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1.01), ncols=len(labels), columnspacing=1.4)
