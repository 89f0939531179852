"""Histograms as small inline SVG, coloured by the CSS variables of the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

HALF, WIDE, HEIGHT, FLOOR, SIDE = 480, 1080, 150, 26, 8
"""Pixels of the viewBox; `FLOOR` is left under the bars for the axis."""
BINS = 40
TICKS = 5


def histogram_of(values: NDArray[np.float64], bins: int = BINS) -> dict[str, Any] | None:
    """`edges` (n + 1,) and `counts` (n,) of the values (N,); None without values. Whole numbers get whole bins."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if (values == np.rint(values)).all():
        step = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low, high + step + 1, step) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, _ = np.histogram(values, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def histogram_svg(
    found: dict[str, Any], label: str, bounds: Sequence[float] = (), rule: str = "", *, width: int = HALF
) -> Markup:
    """Bars over an axis; with `bounds` a line at each, and bars that `rule` (`at least`, `at most`) removes in red."""
    edges, counts = np.asarray(found["edges"], float), np.asarray(found["counts"], float)
    scale = (width - 2 * SIDE) / (edges[-1] - edges[0])
    ends = SIDE + scale * (edges - edges[0])
    tops = (HEIGHT - FLOOR - 8) * counts / max(counts.max(), 1)
    middles = (edges[1:] + edges[:-1]) / 2
    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for left, right, top, middle, count in zip(ends, ends[1:], tops, middles, counts, strict=False):
        if count:
            colour = "s5" if _outside(middle, bounds, rule) else "s1"
            size = f'width="{max(right - left - 1, 0.8):.1f}" height="{max(top, 1.2):.1f}"'
            place = f'x="{left:.1f}" y="{HEIGHT - FLOOR - max(top, 1.2):.1f}"'
            parts.append(f'<rect {place} {size} rx="1" fill="var(--{colour})"><title>{count:,.0f}</title></rect>')
    parts.append(_line(SIDE, width - SIDE, HEIGHT - FLOOR, "grid"))
    parts += _axis(edges, scale, width)
    parts += [_bound(SIDE + scale * (bound - edges[0])) for bound in bounds]
    return Markup("".join([*parts, "</svg>"]))  # numbers only, and an escaped label


def _outside(value: float, bounds: Sequence[float], rule: str) -> bool:
    if not bounds:
        return False
    low = -np.inf if rule.startswith("at most") else bounds[0]
    high = np.inf if rule.startswith("at least") else bounds[-1]
    return not low <= value <= high


def _axis(edges: NDArray[np.float64], scale: float, width: int) -> list[str]:
    from matplotlib.ticker import MaxNLocator

    whole = bool((edges % 1 == 0.5).all())  # bins of whole numbers begin and end between them
    ticks = MaxNLocator(TICKS * width // HALF, integer=whole).tick_values(edges[0], edges[-1])
    places = [(SIDE + scale * (tick - edges[0]), tick) for tick in ticks if edges[0] <= tick <= edges[-1]]
    style = 'font-size="12" fill="var(--soft)" text-anchor="middle"'
    return [
        f'<text x="{min(max(x, 16), width - 18):.1f}" y="{HEIGHT - 8}" {style}>{tick:g}</text>' for x, tick in places
    ]


def _bound(x: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{HEIGHT - FLOOR + 4}" stroke="var(--ink)" stroke-width="1.4" '
        'stroke-dasharray="4 3"/>'
    )


def _line(left: float, right: float, y: float, colour: str) -> str:
    return f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="var(--{colour})"/>'
