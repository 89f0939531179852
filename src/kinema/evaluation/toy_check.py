"""Does a clip show what its toy caption says? Vocabulary, held-out rule, and the vision check."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 44, 40),
    "green": (40, 196, 62),
    "blue": (52, 104, 248),
    "yellow": (246, 220, 48),
    "purple": (186, 60, 226),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y) in pixels; y grows downwards."""
SIZES: dict[str, float] = {"small": 0.32, "large": 0.44}
"""Diameter of the disc with the object's area, in short sides of the frame."""
SPEEDS: dict[str, float] = {"slowly": 0.15, "quickly": 0.30}
"""In short sides of the frame per second."""
NONE = "none"


@dataclass(frozen=True)
class Attributes:
    """What a caption says about one object."""

    size: str
    colour: str
    shape: str
    speed: str
    direction: str
    bounces: bool = False

    @property
    def phrase(self) -> str:
        """E.g. `a large red circle moves slowly right and bounces`."""
        ending = " and bounces" if self.bounces else ""
        return f"a {self.size} {self.colour} {self.shape} moves {self.speed} {self.direction}{ending}"


def is_heldout(colour: str, shape: str, direction: str) -> bool:
    """Whether this combination never occurs in the train split.

    With every word numbered by its place in the vocabulary: (colour + 2 shape + 3 direction) divisible by
    6. That is 12 of the 72 combinations: each colour misses one horizontal and one vertical direction of
    one shape, so that each word and each *pair* of words is still seen in training, and only the
    composition of three is new.
    """
    c, s, d = list(COLOURS).index(colour), SHAPES.index(shape), list(DIRECTIONS).index(direction)
    return (c + 2 * s + 3 * d) % 6 == 0


def combinations(*, heldout: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, direction) of one side of the rule, in vocabulary order."""
    return [c for c in product(COLOURS, SHAPES, DIRECTIONS) if is_heldout(*c) == heldout]


class HeldoutPrompt(NamedTuple):
    """One prompt of the measure, with what the check will look for."""

    prompt: str
    colour: str
    shape: str
    direction: str


def heldout_prompts(n: int = 64) -> list[HeldoutPrompt]:
    """`n` different single-object captions of combinations that training never shows, evenly over the 12 of
    them.

    Quick objects always bounce here: at the default frame size most of them have no room to cross the frame
    unhindered for the captioned time, so that training has few clips of the kind. Raises ValueError beyond
    72 prompts.
    """
    combos = combinations(heldout=True)
    variants = [
        (size, speed, bounces)
        for size, (speed, bounces) in product(SIZES, [("slowly", False), ("slowly", True), ("quickly", True)])
    ]
    if not 1 <= n <= len(combos) * len(variants):
        raise ValueError(f"n={n} must be from 1 to {len(combos) * len(variants)}, the number of different prompts.")
    prompts = []
    for i in range(n):
        round_, place = divmod(i, len(combos))
        colour, shape, direction = combos[place]
        size, speed, bounces = variants[(round_ + place) % len(variants)]  # shifted: words stay balanced for any n
        phrase = Attributes(size, colour, shape, speed, direction, bounces).phrase
        prompts.append(HeldoutPrompt(phrase, colour, shape, direction))
    return prompts


_PHRASE = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) "
    rf"moves ({'|'.join(SPEEDS)}) ({'|'.join(DIRECTIONS)})( and bounces)?"
)


_CAPTION = re.compile(rf"{_PHRASE.pattern}( and {_PHRASE.pattern}( and they collide)?)?")


def is_toy_caption(caption: str) -> bool:
    """Whether a caption is one of `data_prep/toy.py`, of one object or two."""
    return _CAPTION.fullmatch(caption.strip()) is not None


def parse_caption(caption: str) -> Attributes:
    """The one object of a caption; raises ValueError for other words, and for two objects."""
    match = _PHRASE.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"prompt={caption!r} is not a caption of one toy object. Type it like 'a large red circle moves "
            f"slowly right and bounces'. Colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
            f"directions: {', '.join(DIRECTIONS)}."
        )
    size, colour, shape, speed, direction, bounces = match.groups()
    return Attributes(size, colour, shape, speed, direction, bounces is not None)


# --- The vision check --------------------------------------------------------------------------------

MIN_CONTRAST = 70.0
"""Euclidean RGB distance from the background below which nothing counts as an object."""
MIN_GOOD_FRAMES = 0.75
"""Share of the frames that must show exactly one plausible object."""
MIN_TRAVEL = 0.08
"""Short sides the centroid must move before it has a direction."""
MAX_SOFTNESS = 3.3
"""Area above a quarter of the object's brightness over that above three quarters. A sharp object has 1, a
small disc under a blur of 2.5 pixels 2.4, and a Gaussian blob, which is no shape at all, 4.8."""


@dataclass(frozen=True)
class Finding:
    """What is seen in a clip; `none` where nothing is seen clearly."""

    colour: str = NONE
    shape: str = NONE
    direction: str = NONE
    bounces: bool = False
    reason: str = ""
    """Why something is `none`."""


@dataclass(frozen=True)
class ToyVerdict:
    """A finding beside what the caption says."""

    expected: Attributes
    found: Finding

    @property
    def colour_ok(self) -> bool:
        """Whether the colour is the caption's."""
        return self.found.colour == self.expected.colour

    @property
    def shape_ok(self) -> bool:
        """Whether the shape is the caption's."""
        return self.found.shape == self.expected.shape

    @property
    def direction_ok(self) -> bool:
        """Whether the first motion has the caption's direction."""
        return self.found.direction == self.expected.direction

    @property
    def ok(self) -> bool:
        """All three at once."""
        return self.colour_ok and self.shape_ok and self.direction_ok


def check_clip(frames: NDArray[np.uint8], prompt: str | Attributes) -> ToyVerdict:
    """Compare uint8 frames (T, H, W, 3) with the caption of one object. Nothing ambiguous is right."""
    expected = parse_caption(prompt) if isinstance(prompt, str) else prompt
    return ToyVerdict(expected, look(frames))


def pass_rates(verdicts: Sequence[ToyVerdict]) -> dict[str, float]:
    """Share of the verdicts that are right, for each attribute and for all at once."""
    if not verdicts:
        raise ValueError("No verdicts: there is no rate over zero clips.")
    names = ("colour", "shape", "direction")
    rates = {name: sum(getattr(v, f"{name}_ok") for v in verdicts) / len(verdicts) for name in names}
    return rates | {"all": sum(v.ok for v in verdicts) / len(verdicts)}


def look(frames: NDArray[np.uint8]) -> Finding:
    """Find colour, shape and direction of the one object in uint8 frames (T, H, W, 3) on a plain background.

    Colour by hue and saturation of the object's core; shape by its blur-invariant moments; direction by the
    first clear displacement of its centroid. Raises ValueError for another layout or fewer than 4 frames.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 4:
        raise ValueError(f"frames of type {frames.dtype} and shape {frames.shape} must be uint8 (T >= 4, H, W, 3).")
    pictures = frames.astype(np.float32)
    background = _plain_background(pictures)
    if background is None:
        return Finding(reason="no plain background")
    contrast = np.linalg.norm(pictures - background, axis=-1)  # (T, H, W)
    objects = [_find_object(c) for c in contrast]
    objects = _of_steady_size(objects)
    good = {t: mask for t, mask in enumerate(objects) if mask is not None}
    if len(good) < MIN_GOOD_FRAMES * len(frames):
        return Finding(reason=f"one clear object in only {len(good)} of {len(frames)} frames")

    cores = [_core(pictures[t], contrast[t], mask) for t, mask in good.items()]
    colour, purity = _majority([name for t, mask in good.items() for name in name_colours(pictures[t][_erode(mask)])])
    if purity < 0.7:
        colour = NONE
    measures = [
        _moments(pictures[t], background, core.mean(0), mask)
        for (t, mask), core in zip(good.items(), cores, strict=True)
    ]
    shape, agreement = _majority([name_shape(moments) for moments in measures])
    if agreement < 0.6 or name_shape(Moments(*np.median(measures, axis=0))) != shape:
        shape = NONE
    direction, bounces = name_motion(np.array(measures)[:, :2] / min(frames.shape[1:3]))
    unclear = [n for n, v in [("colour", colour), ("shape", shape), ("direction", direction)] if v == NONE]
    return Finding(colour, shape, direction, bounces, f"unclear {', '.join(unclear)}" if unclear else "")


def _majority(names: Sequence[str]) -> tuple[str, float]:
    """The commonest name and its share; `none` of no names."""
    if not names:
        return NONE, 0.0
    name, count = Counter(names).most_common(1)[0]
    return name, count / len(names)


def _plain_background(pictures: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The colour (3,) of the frame's rim; None if most of the rim is not of one dark colour."""
    rim = np.ones(pictures.shape[1:3], bool)
    rim[2:-2, 2:-2] = False
    pixels = pictures[:, rim].reshape(-1, 3)
    colour = np.median(pixels, axis=0)
    spread = np.median(np.linalg.norm(pixels - colour, axis=-1))
    return colour if spread < 30 and colour.max() < 90 else None


def _find_object(contrast: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """The mask (H, W) of the one object of a frame; None without one, or with a second one worth the name."""
    peak = np.percentile(contrast, 98)
    if peak < MIN_CONTRAST:
        return None
    labels = _components(contrast > 0.5 * peak)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    order = np.argsort(areas)[::-1]
    share = areas[order[0]] / contrast.size
    alone = len(areas) < 3 or areas[order[1]] < 0.15 * areas[order[0]]
    return labels == order[0] if alone and 0.02 <= share <= 0.35 else None


def _components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Label 4-connected regions 1, 2, ... and 0 outside, by joining each row's runs to those above them."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(edges == 1), np.argwhere(edges == -1)  # both (row, column), run by run
    runs = [(int(row), int(a), int(b)) for (row, a), (_, b) in zip(starts, stops, strict=True)]
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            run = parent[run]
        return run

    first_above = 0
    for i, (row, start, stop) in enumerate(runs):
        while runs[first_above][0] < row - 1:
            first_above += 1
        for j in range(first_above, i):
            if runs[j][0] == row - 1 and runs[j][1] < stop and start < runs[j][2]:
                parent[root(i)] = root(j)
    names = {r: n for n, r in enumerate(sorted({root(i) for i in range(len(runs))}), start=1)}
    labels = np.zeros(mask.shape, np.int64)
    for i, (row, start, stop) in enumerate(runs):
        labels[row, start:stop] = names[root(i)]
    return labels


def _of_steady_size(objects: list[NDArray[np.bool_] | None]) -> list[NDArray[np.bool_] | None]:
    """Drop the frames whose object has an area far from the usual: it flickers or dissolves."""
    areas = [mask.sum() for mask in objects if mask is not None]
    if not areas:
        return objects
    usual = np.median(areas)
    return [m if m is not None and 0.6 * usual <= m.sum() <= 1.6 * usual else None for m in objects]


def _core(picture: NDArray[np.float32], contrast: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Colours (n, 3) of the half of the object that contrasts most, away from its blurred rim."""
    return picture[mask & (contrast >= np.median(contrast[mask]))]


def name_colours(pixels: NDArray[np.float32]) -> list[str]:
    """The name of each colour (n, 3); `none` if its hue is 24 degrees off all, or it is half saturated."""
    high, low = pixels.max(-1), pixels.min(-1)
    saturation = (high - low) / np.maximum(high, 1)
    hue = hue_degrees(pixels)
    names = np.full(len(pixels), NONE, dtype="U8")
    for name, colour in COLOURS.items():
        if name == "white":
            names[saturation < 0.25] = name
            continue
        off = np.abs((hue - hue_degrees(np.array([colour], np.float32))[0] + 180) % 360 - 180)
        names[(saturation > 0.4) & (off < 24)] = name
    names[high < 90] = NONE
    return names.tolist()


def hue_degrees(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hue of RGB colours (n, 3), as the angle around the grey axis: red 0, green 120, blue 240."""
    r, g, b = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


class Moments(NamedTuple):
    """What is measured of an object in one frame; lengths and areas in pixels."""

    x: float
    """Centroid."""
    y: float
    softness: float
    """See MAX_SOFTNESS."""
    compactness: float
    """1 for a disc, 0.95 for a square, 0.83 for a triangle; falls with blur."""
    elongation: float
    """0 for all three shapes."""
    third_x: float
    third_y: float
    """Parts of E z^3 / area^1.5, z = x + iy about the centroid with y upwards."""
    fourth: float
    """Real part of E z^4 / area^2."""


def _moments(
    picture: NDArray[np.float32],
    background: NDArray[np.float32],
    colour: NDArray[np.float32],
    mask: NDArray[np.bool_],
) -> Moments:
    """Measure the object under a mask.

    Each pixel is weighted with how far it has gone from the background's to the object's colour, so that
    blurred outlines count in part. With z = x + iy about the centroid (y upwards): E z^3 and E z^4 do not
    change under an isotropic blur, whatever its width, and neither does the area.
    """
    towards = colour - background
    rows, columns = np.nonzero(_dilate(mask, 3))
    coverage = (picture[rows, columns] - background) @ towards / (towards @ towards)
    full = np.percentile(coverage, 95)
    softness = (coverage > 0.25 * full).sum() / (coverage > 0.75 * full).sum()
    coverage = np.where(coverage < 0.06, 0, coverage.clip(0, 1))  # codec noise would count in the high powers
    area = coverage.sum()
    x, y = (coverage * columns).sum() / area + 0.5, (coverage * rows).sum() / area + 0.5
    z = (columns + 0.5 - x) - 1j * (rows + 0.5 - y)

    second = (coverage * z**2).sum() / area
    third = (coverage * z**3).sum() / area / area**1.5
    fourth = (coverage * z**4).sum() / area / area**2
    spread = (coverage * np.abs(z) ** 2).sum() / area
    compactness, elongation = area / (2 * np.pi * spread), abs(second) / spread
    return Moments(x, y, softness, compactness, elongation, third.real, third.imag, fourth.real)


def _dilate(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    for _ in range(pixels):
        grown = np.pad(mask, 1)
        mask = grown[1:-1, 1:-1] | grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
    return mask


def _erode(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~_dilate(~mask, 1)


TRIANGLE_THIRD = -((4 / (3 * np.sqrt(3))) ** 1.5) / 10
"""`third_y` of an equilateral triangle that stands on its base; 0 for circle and square."""
SQUARE_FOURTH = -1 / 60
"""`fourth` of an upright square; 0 for circle and equilateral triangle."""


def name_shape(of: Moments) -> str:
    """The shape whose moments are nearest; `none` if all are far, or the object is frayed or elongated."""
    if of.softness > MAX_SOFTNESS or of.compactness < 0.65 or of.elongation > 0.2:
        return NONE
    point = np.array([of.third_y / TRIANGLE_THIRD, of.fourth / SQUARE_FOURTH, of.third_x / TRIANGLE_THIRD])
    prototypes = {"circle": (0, 0, 0), "square": (0, 1, 0), "triangle": (1, 0, 0)}
    distances = {name: float(np.linalg.norm(point - prototype)) for name, prototype in prototypes.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < 0.45 else NONE


def name_motion(centroids: NDArray[np.float64]) -> tuple[str, bool]:
    """Direction of the first clear displacement of centroids (T, 2), in short sides; and if it returns.

    `none` when it never moves `MIN_TRAVEL`, moves diagonally (the smaller part above half of the larger) or
    jumps.
    """
    steps = np.linalg.norm(np.diff(centroids, axis=0), axis=1)
    travelled = centroids - centroids[0]
    far = np.flatnonzero(np.linalg.norm(travelled, axis=1) >= MIN_TRAVEL)
    if len(far) == 0 or steps.max() > 0.3:
        return NONE, False
    first = travelled[far[0]]
    along, across = np.max(np.abs(first)), np.min(np.abs(first))
    if across > 0.5 * along:
        return NONE, False
    direction = max(DIRECTIONS, key=lambda name: float(first @ np.array(DIRECTIONS[name])))
    ahead = travelled @ np.array(DIRECTIONS[direction])
    turns_back = ahead.max() - ahead[np.argmax(ahead) :].min() > 0.75 * MIN_TRAVEL
    return direction, bool(turns_back)
