"""The toy data set: moving, bouncing, colliding shapes; exact captions, ground truth, a tone on each hit.

    python data_prep/toy.py --out data/toy --clips 1800 --seed 0

Deterministic: the same arguments give the same bytes, whatever the number of workers. Every clip shows one
object (or two, in about 15 % of the train clips) that moves along one axis. The caption is exactly true for
the first 2.125 seconds, that is 17 frames at 8 fps plus one interval; later the object may bounce
unannounced. Combinations of colour, shape and direction for which `kinema.evaluation.toy_check.is_heldout`
holds are never in the train split; the held-out split has nothing else.
"""

import argparse
import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kinema.console import explain_errors
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import ShardWriter
from kinema.data.decode.encoding import encode_video
from kinema.data.verbs.contact_sheet import contact_sheet
from kinema.evaluation.toy_check import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Attributes,
    combinations,
    is_heldout,
)

WINDOW_SECONDS = 2.125
"""The caption is exactly true this long."""
HIT_SECONDS = (0.85, 1.25)
"""When a bounce or collision that the caption names happens: late enough to see where from, early enough to
see it.
"""
MARGIN = 1.5
"""Pixels kept free of walls and other objects where the caption says nothing of a hit."""
FPS = (8, 12, 16, 24)
SAMPLE_RATE = 16_000
SHEET_CLIPS = 24


# --- Shapes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """An outline about its centroid. `diameter` is that of the disc with the same area, in pixels."""

    name: str
    diameter: float

    @property
    def side(self) -> float:
        """Of the square or triangle with the disc's area, so that `large` means the same for all."""
        area = np.pi / 4 * self.diameter**2
        return float(np.sqrt(area) if self.name == "square" else np.sqrt(4 / np.sqrt(3) * area))

    @property
    def extents(self) -> tuple[float, float, float, float]:
        """How far it reaches (left, up, right, down) from its centroid, in pixels, all positive."""
        if self.name == "circle":
            return (self.diameter / 2,) * 4
        if self.name == "square":
            return (self.side / 2,) * 4
        height = np.sqrt(3) / 2 * self.side  # the triangle stands on its base
        return (self.side / 2, 2 / 3 * height, self.side / 2, height / 3)

    def distance(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        """Signed distance to the outline in pixels, negative inside (past a corner: to an edge's line)."""
        if self.name == "circle":
            return np.hypot(x, y) - self.diameter / 2
        if self.name == "square":
            return np.maximum(np.abs(x), np.abs(y)) - self.side / 2
        inner = self.side / np.sqrt(12)
        return np.maximum(y, np.abs(x) * (np.sqrt(3) / 2) - y / 2) - inner

    def profile(self, direction: str, across: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far it reaches towards `direction`, on lines `across` from its centroid; -inf beside it."""
        reach = np.full(across.shape, -np.inf)
        left, up, right, down = self.extents
        limit = max(left, up, right, down)
        along = np.linspace(-limit, limit, 801)
        step = np.array(DIRECTIONS[direction])
        for i, offset in enumerate(across):
            x, y = (along * step[0], offset) if step[0] else (offset, along * step[1])
            inside = self.distance(*np.broadcast_arrays(x, y)) <= 0
            if inside.any():
                reach[i] = along[inside].max()
        return reach


def contact_distance(first: Shape, second: Shape, direction: str) -> float:
    """Distance of the centroids at which `first`, moving in `direction`, touches `second` ahead of it."""
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}[direction]
    across = np.linspace(-first.diameter, first.diameter, 161)
    return float(np.max(first.profile(direction, across) + second.profile(back, across)))


# --- Physics: every motion is along one axis, so that each hit has an exact time ---------------------------


@dataclass
class Body:
    """One object: what its caption says, its outline, start (pixels) and speed (pixels a second)."""

    attributes: Attributes
    shape: Shape
    start: tuple[float, float]
    speed: float

    @property
    def axis(self) -> int:
        """0 for x, 1 for y."""
        return 0 if DIRECTIONS[self.attributes.direction][0] else 1

    def limits(self, size: tuple[int, int]) -> tuple[float, float]:
        """Where the centroid turns round, along the axis, in a frame of `size` (width, height)."""
        extents = self.shape.extents
        return extents[self.axis], size[self.axis] - extents[self.axis + 2]


@dataclass(frozen=True)
class Event:
    """One hit."""

    seconds: float
    kind: str
    """`wall` or `collision`."""
    objects: tuple[int, ...]


def simulate(
    bodies: list[Body], size: tuple[int, int], seconds: float, contact: float | None
) -> tuple[list[list[tuple[float, float, float]]], list[Event]]:
    """Elastic motion from event to event, without time steps.

    Returns for each body its path as (time, position along its axis, velocity after) at every change, and
    the hits. `contact` is the distance at which two bodies on one line touch, None when they never meet.
    Mass is area.
    """
    position = [body.start[body.axis] for body in bodies]
    velocity = [body.speed * DIRECTIONS[body.attributes.direction][body.axis] for body in bodies]
    mass = [body.shape.diameter**2 for body in bodies]
    paths = [[(0.0, p, v)] for p, v in zip(position, velocity, strict=True)]
    events: list[Event] = []
    now = 0.0
    while True:
        wait, hit = _next_hit(bodies, size, position, velocity, contact)
        if now + wait > seconds:
            return paths, events
        now += wait
        position = [p + v * wait for p, v in zip(position, velocity, strict=True)]
        if len(hit) == 1:
            velocity[hit[0]] *= -1
        else:
            velocity = _exchange(velocity, mass)
        for i in hit:
            paths[i].append((now, position[i], velocity[i]))
        events.append(Event(now, "wall" if len(hit) == 1 else "collision", hit))


def _next_hit(
    bodies: list[Body],
    size: tuple[int, int],
    position: list[float],
    velocity: list[float],
    contact: float | None,
) -> tuple[float, tuple[int, ...]]:
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for i, body in enumerate(bodies):
        low, high = body.limits(size)
        if velocity[i]:
            target = high if velocity[i] > 0 else low
            candidates.append((max(0.0, (target - position[i]) / velocity[i]), (i,)))
    if contact is not None:
        near, far = (0, 1) if position[0] < position[1] else (1, 0)
        closing = velocity[near] - velocity[far]
        if closing > 0:
            candidates.append((max(0.0, (position[far] - position[near] - contact) / closing), (0, 1)))
    return min(candidates, default=(np.inf, ()))


def _exchange(velocity: list[float], mass: list[float]) -> list[float]:
    """One-dimensional elastic collision: momentum and energy stay."""
    (u, v), (m, n) = velocity, mass
    mean = (m * u + n * v) / (m + n)
    return [2 * mean - u, 2 * mean - v]


def positions_at(body: Body, path: list[tuple[float, float, float]], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centroid at each time, (N, 2) as x, y in pixels."""
    moments = np.array(path)
    piece = np.searchsorted(moments[:, 0], times, side="right") - 1
    along = moments[piece, 1] + moments[piece, 2] * (times - moments[piece, 0])
    centroids = np.tile(np.array(body.start), (len(times), 1))
    centroids[:, body.axis] = along
    return centroids


# --- Choosing what happens ---------------------------------------------------------------------------------


@dataclass
class Scene:
    """One clip before it is drawn."""

    bodies: list[Body]
    size: tuple[int, int]
    """Width, height."""
    fps: int
    num_frames: int
    background: tuple[int, int, int]
    contact: float | None
    caption: str


def draw_scene(
    rng: np.random.Generator,
    sizes: list[tuple[int, int]],
    heldout: bool,
    pair_share: float,
    bounce_share: float,
) -> Scene:
    """Choose one clip; draws again until the choice fits the frame with an exact caption."""
    size = sizes[rng.integers(len(sizes))]
    fps = FPS[rng.integers(len(FPS))]
    num_frames = int(np.ceil(rng.uniform(2.25, 4.0) * fps))
    red, green, blue = (int(v) for v in rng.integers(14, 27) + rng.integers(-4, 5, 3))
    is_pair = not heldout and rng.random() < pair_share
    while True:
        drawn = draw_pair(rng, size, heldout) if is_pair else draw_single(rng, size, heldout, bounce_share)
        if drawn is not None:
            bodies, contact, caption = drawn
            return Scene(bodies, size, fps, num_frames, (red, green, blue), contact, caption)


Drawn = tuple[list[Body], float | None, str] | None


def draw_single(rng: np.random.Generator, size: tuple[int, int], heldout: bool, bounce_share: float) -> Drawn:
    """One object; None when this choice has no room."""
    options = combinations(heldout=heldout)
    colour, shape, direction = options[rng.integers(len(options))]
    attributes = Attributes(
        str(rng.choice(list(SIZES))),
        colour,
        shape,
        str(rng.choice(list(SPEEDS))),
        direction,
        bounces=bool(rng.random() < bounce_share),
    )
    body = _body(rng, attributes, size)
    low, high = body.limits(size)
    if attributes.bounces:
        ahead = body.speed * rng.uniform(*HIT_SECONDS)  # the wall is that far away
        interval = (ahead, ahead)
    else:
        interval = (body.speed * WINDOW_SECONDS + MARGIN, high - low - MARGIN)
    if interval[0] > min(interval[1], high - low - MARGIN):
        return None
    ahead = rng.uniform(*interval)
    sign = DIRECTIONS[direction][body.axis]
    along = high - ahead if sign > 0 else low + ahead
    body.start = _point(body.axis, along, _free_across(rng, body, size))
    return [body], None, attributes.phrase


def draw_pair(rng: np.random.Generator, size: tuple[int, int], heldout: bool) -> Drawn:
    """Two small objects of different colours: on one line with a collision, or on two lines without."""
    collide = rng.random() < 0.6
    axis = int(rng.integers(2))
    names = [("left", "right"), ("up", "down")][axis]
    headings = (names[1], names[0]) if collide else tuple(str(rng.choice(names)) for _ in range(2))
    colours = rng.permutation(list(COLOURS))[:2]
    attributes = [
        Attributes("small", str(c), str(rng.choice(SHAPES)), str(rng.choice(list(SPEEDS))), heading)
        for c, heading in zip(colours, headings, strict=True)
    ]
    if any(is_heldout(a.colour, a.shape, a.direction) != heldout for a in attributes):
        return None
    bodies = [_body(rng, a, size) for a in attributes]
    caption = f"{attributes[0].phrase} and {attributes[1].phrase}"
    if collide:
        contact = contact_distance(bodies[0].shape, bodies[1].shape, headings[0])
        return (bodies, contact, f"{caption} and they collide") if _meet(rng, bodies, size, contact) else None
    return (bodies, None, caption) if _side_by_side(rng, bodies, size) else None


def _meet(rng: np.random.Generator, bodies: list[Body], size: tuple[int, int], contact: float) -> bool:
    """Place two bodies that approach each other on one line; False when there is no room."""
    axis, seconds = bodies[0].axis, rng.uniform(*HIT_SECONDS)
    gap = contact + (bodies[0].speed + bodies[1].speed) * seconds
    first = bodies[0].limits(size)[0] + MARGIN
    last = bodies[1].limits(size)[1] - MARGIN - gap
    across = max(b.shape.extents[1 - axis] for b in bodies), max(b.shape.extents[3 - axis] for b in bodies)
    if last < first:
        return False
    along = rng.uniform(first, last)
    lane = rng.uniform(across[0] + MARGIN, size[1 - axis] - across[1] - MARGIN)
    bodies[0].start, bodies[1].start = _point(axis, along, lane), _point(axis, along + gap, lane)
    return True


def _side_by_side(rng: np.random.Generator, bodies: list[Body], size: tuple[int, int]) -> bool:
    """Place two bodies on parallel lines, with no hit in the captioned time; False without room."""
    axis = bodies[0].axis
    before, after = 1 - axis, 3 - axis
    order = rng.permutation(2)
    upper, lower = bodies[order[0]], bodies[order[1]]
    needed = sum(b.shape.extents[before] + b.shape.extents[after] for b in bodies) + 3 * MARGIN
    spare = size[1 - axis] - needed
    if spare < 0:
        return False
    cuts = np.sort(rng.uniform(0, spare, 2))
    lanes = (
        cuts[0] + MARGIN + upper.shape.extents[before],
        size[1 - axis] - (spare - cuts[1]) - MARGIN - lower.shape.extents[after],
    )
    for body, lane in zip((upper, lower), lanes, strict=True):
        low, high = body.limits(size)
        travel = body.speed * WINDOW_SECONDS + MARGIN
        if travel > high - low - MARGIN:
            return False
        ahead = rng.uniform(travel, high - low - MARGIN)
        sign = DIRECTIONS[body.attributes.direction][axis]
        body.start = _point(axis, high - ahead if sign > 0 else low + ahead, float(lane))
    return True


def _body(rng: np.random.Generator, attributes: Attributes, size: tuple[int, int]) -> Body:
    short = min(size)
    diameter = SIZES[attributes.size] * short * rng.uniform(0.95, 1.05)
    speed = SPEEDS[attributes.speed] * short * rng.uniform(0.92, 1.08)
    return Body(attributes, Shape(attributes.shape, float(diameter)), (0.0, 0.0), float(speed))


def _free_across(rng: np.random.Generator, body: Body, size: tuple[int, int]) -> float:
    extents, other = body.shape.extents, 1 - body.axis
    return float(rng.uniform(extents[other] + MARGIN, size[other] - extents[other + 2] - MARGIN))


def _point(axis: int, along: float, across: float) -> tuple[float, float]:
    return (along, across) if axis == 0 else (across, along)


# --- Pictures and sound ------------------------------------------------------------------------------------


def render(scene: Scene, trajectories: list[NDArray[np.float64]]) -> NDArray[np.uint8]:
    """uint8 (T, H, W, 3): each shape over the background with one pixel of anti-aliasing at its outline."""
    width, height = scene.size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5  # pixel centres
    picture = np.broadcast_to(np.asarray(scene.background, np.float32), (scene.num_frames, height, width, 3))
    for body, centroids in zip(scene.bodies, trajectories, strict=True):
        cx, cy = centroids.astype(np.float32).T[:, :, None, None]
        coverage = np.clip(0.5 - body.shape.distance(x - cx, y - cy), 0, 1)[..., None]
        picture = picture + coverage * (np.asarray(COLOURS[body.attributes.colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def ring(scene: Scene, events: list[Event]) -> NDArray[np.float32]:
    """Mono sound: a decaying tone from the exact sample of each hit, pitched by the object's colour."""
    sound = np.zeros(round(scene.num_frames / scene.fps * SAMPLE_RATE), np.float32)
    for event in events:
        begin = round(event.seconds * SAMPLE_RATE)
        t = np.arange(min(len(sound) - begin, SAMPLE_RATE // 2)) / SAMPLE_RATE
        for i in event.objects:
            note = list(COLOURS).index(scene.bodies[i].attributes.colour) * 2  # whole tones up from 392 Hz
            octave = 2 if event.kind == "collision" else 1
            pitch = 392.0 * octave * 2 ** (note / 12)
            sound[begin : begin + len(t)] += (0.35 * np.sin(2 * np.pi * pitch * t) * np.exp(-t / 0.09)).astype(
                np.float32
            )
    return np.clip(sound, -1, 1)


@dataclass(frozen=True)
class Job:
    """One clip to make: all that a worker needs."""

    number: int
    seed: int
    split: str
    sizes: list[tuple[int, int]]
    pair_share: float
    bounce_share: float
    keep_frames: bool
    backgrounds: tuple[tuple[int, int, int], ...] = ()
    """In turn, instead of the drawn ones."""


def make_clip(job: Job) -> tuple[ClipRecord, bytes, NDArray[np.uint8] | None]:
    """Record, mp4 and (for the contact sheet) captioned frames of one clip, from nothing but its job."""
    rng = np.random.default_rng([job.seed, job.number, job.split == "heldout"])
    scene = draw_scene(rng, job.sizes, job.split == "heldout", job.pair_share, job.bounce_share)
    if job.backgrounds:
        scene = replace(scene, background=job.backgrounds[job.number % len(job.backgrounds)])
    seconds = scene.num_frames / scene.fps
    paths, events = simulate(scene.bodies, scene.size, seconds, scene.contact)
    times = np.arange(scene.num_frames) / scene.fps
    trajectories = [positions_at(b, p, times) for b, p in zip(scene.bodies, paths, strict=True)]
    frames = render(scene, trajectories)
    mp4 = encode_video(frames, scene.fps, crf=14, audio=ring(scene, events), sample_rate=SAMPLE_RATE)
    record = ClipRecord(
        key=f"toy-{job.split}-{job.number:06d}",
        caption=scene.caption,
        fps=float(scene.fps),
        num_frames=scene.num_frames,
        width=scene.size[0],
        height=scene.size[1],
        duration_seconds=seconds,
        source=f"kinema-toy/{job.seed}",
        license="CC0-1.0",
        consent="synthetic",
        sha256=hashlib.sha256(mp4).hexdigest(),
        split=job.split,
        generated="no",
        extra=_ground_truth(scene, trajectories, events),
    )
    captioned = frames[: int(WINDOW_SECONDS * scene.fps) + 1]
    return record, mp4, captioned if job.keep_frames else None


def _ground_truth(scene: Scene, trajectories: list[NDArray[np.float64]], events: list[Event]) -> dict[str, Any]:
    return {
        "attributes": [asdict(body.attributes) for body in scene.bodies],
        "diameters": [round(body.shape.diameter, 3) for body in scene.bodies],
        "speeds": [round(body.speed, 3) for body in scene.bodies],
        "trajectories": [np.round(t, 3).tolist() for t in trajectories],
        "events": [{"seconds": round(e.seconds, 5), "kind": e.kind, "objects": list(e.objects)} for e in events],
        "caption_seconds": WINDOW_SECONDS,
        "background": list(scene.background),
    }


# --- The command -------------------------------------------------------------------------------------------


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`64x64,80x48` -> [(64, 64), (80, 48)], width first; raises ValueError for sides that are not
    multiples of 16.
    """
    sizes = []
    for item in text.split(","):
        try:
            width, height = (int(side) for side in item.split("x"))
        except ValueError:
            raise ValueError(f"--sizes {text}: {item!r} is not WIDTHxHEIGHT, e.g. 64x64,80x48.") from None
        if min(width, height) < 32 or width % 16 or height % 16:
            raise ValueError(f"--sizes {text}: sides of {item} must be multiples of 16 from 32 on, e.g. 64x64.")
        sizes.append((width, height))
    return sizes


def parse_backgrounds(text: str | None) -> tuple[tuple[int, int, int], ...]:
    """`20,20,20/20,60,150` -> ((20, 20, 20), (20, 60, 150)); None -> none. ValueError names what is no colour."""
    found = []
    for item in text.split("/") if text is not None else []:
        values = [int(value) for value in item.split(",") if value.isdigit()]
        if len(values) != 3 or max(values) > 255 or item.count(",") != 2:
            raise ValueError(
                f"--background {text}: {item} must be R,G,B with numbers from 0 to 255, e.g. 20,60,150; / lies between "
                "several."
            )
        found.append((values[0], values[1], values[2]))
    return tuple(found)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/toy")
    parser.add_argument("--clips", type=int, default=1800, help="clips of the train split (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=96, help="clips of the held-out split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips (default %(default)s)")
    parser.add_argument(
        "--sizes",
        default="64x64,64x64,64x48,64x80",
        help="WIDTHxHEIGHT list, drawn evenly; decord reads multiples of 64 as widths on every CPU "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--pairs", type=float, default=0.15, help="share of clips with two objects (default %(default)s)"
    )
    parser.add_argument(
        "--bounces",
        type=float,
        default=0.3,
        help="share of single objects that hit a wall (default %(default)s)",
    )
    parser.add_argument(
        "--background",
        help="R,G,B of every clip, e.g. 20,60,150, or several in turn, 20,20,20/20,60,150; instead of dark greys",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; changes nothing but the time (default %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that lies in --out")
    arguments = parser.parse_args(argv)
    if (
        arguments.clips < 1
        or arguments.heldout < 0
        or arguments.workers < 1
        or not (0 <= arguments.pairs <= 1 and 0 <= arguments.bounces <= 1)
    ):
        parser.error(
            "--clips and --workers must be at least 1, --heldout at least 0, --pairs and --bounces between 0 and 1"
        )
    return arguments


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Train clips, then held-out clips; the first ones are kept for the contact sheet."""
    sizes = parse_sizes(arguments.sizes)
    backgrounds = parse_backgrounds(arguments.background)
    shown = SHEET_CLIPS * 2 // 3
    return [
        Job(number, arguments.seed, split, sizes, arguments.pairs, arguments.bounces, number < keep, backgrounds)
        for split, count, keep in (
            ("train", arguments.clips, shown),
            ("heldout", arguments.heldout, SHEET_CLIPS - shown),
        )
        for number in range(count)
    ]


def make_clips(jobs: list[Job], workers: int) -> Iterator[tuple[ClipRecord, bytes, NDArray[np.uint8] | None]]:
    """All clips in the order of the jobs."""
    if workers == 1:
        yield from map(make_clip, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(make_clip, jobs, chunksize=8)


def main(argv: list[str] | None = None) -> int:
    """Build the data set; returns the exit code."""
    arguments = parse_arguments(argv)
    jobs = list_jobs(arguments)
    # Without --out and --workers, which change no byte of the data.
    given = ("clips", "heldout", "seed", "sizes", "pairs", "bounces")
    command = "python data_prep/toy.py " + " ".join(f"--{name} {getattr(arguments, name)}" for name in given)
    command += f" --background {arguments.background}" if arguments.background else ""
    rows = []
    with ShardWriter(arguments.out, name="toy", command=command, overwrite=arguments.overwrite) as writer:
        clips = make_clips(jobs, arguments.workers)
        for record, mp4, frames in tqdm(clips, total=len(jobs), unit="clip", desc="toy clips"):
            writer.write(record, mp4)
            if frames is not None:
                rows.append((frames, f"{record.split}: {record.caption}"))
    sheet = arguments.out / "contact_sheet.png"
    contact_sheet(
        rows,
        sheet,
        columns=2,
        title=f"toy, seed {arguments.seed}: the captioned first {WINDOW_SECONDS} seconds",
    )
    print(f"contact sheet {sheet}")
    print(f"kept {len(jobs)}/{len(jobs)} READY {arguments.out}")
    return 0


if __name__ == "__main__":
    explain_errors(main)()
