"""A data set from your own folder of videos: found, cut into shots, captioned, brought to one form, packed.

    python data_prep/folder.py --videos my_videos --out data/mine --license CC-BY-4.0

Any video that FFmpeg reads is taken: turned as its rotation tag says, stretched to square pixels, brought to
a constant frame rate by time, to 8 bits and to even sides, and written as H.264. Captions are read from

    NAME.txt beside NAME.mp4; videos.txt with prompt.txt, line by line; metadata.jsonl or captions.jsonl;
    or the file given with --captions.

A jsonl line is {"file": "a.mp4", "caption": "..."}; with "start_seconds" and "end_seconds" it describes one
shot, and the shots of that video are then taken from such lines and not searched.
"""

import argparse
import hashlib
import math
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, the repository's root is not on the path
from data_prep.captions import GUARD, Shot, Video, describe_videos, find_videos, read_captions, some_of
from data_prep.source_video import (
    Facts,
    Shaper,
    UnreadableVideo,
    at_constant_rate,
    decode_frames,
    read_facts,
    to_rgb,
)
from kinema.console import explain_errors
from kinema.data.contact_sheet import contact_sheet
from kinema.data.cuts import split_shots
from kinema.data.encoding import encode_video
from kinema.data.sample import GENERATED, ClipRecord
from kinema.data.shards import ShardWriter

SEARCH_SIZE = (160, 90)
"""Width and height at which cuts are searched; stretched or turned pictures have the same cuts."""
SHEET_CLIPS = 24
HIGHEST_FPS = 240
SLACK_SECONDS = 1e-3
"""Matroska rounds timestamps to milliseconds, and people round shot lists likewise."""
Clip = tuple[ClipRecord, bytes, NDArray[np.uint8]]
"""Record, mp4 and frames (T, H, W, 3)."""


@dataclass(frozen=True)
class Rights:
    """Where the videos come from and what is allowed with them."""

    source: str
    license: str
    consent: str = "unknown"
    attribution: str = ""
    source_url: str = ""
    collected: str = ""
    generated: str = "unknown"
    generator: str = ""


@dataclass(frozen=True)
class Profile:
    """The form that every clip gets."""

    fps: float | None = None
    """None keeps each video's own rate, rounded to the usual rate next to it."""
    size: tuple[int, int] | None = None
    """(width, height): scaled to cover it, the rest cut off evenly. None keeps size and aspect ratio."""
    short_side: int | None = None
    """Shrinks larger videos until their shorter side is this long, and keeps the aspect ratio."""
    min_seconds: float = 1.0
    max_seconds: float = 10.0
    """Longer shots are divided evenly."""

    def __post_init__(self) -> None:
        if self.size is not None and self.short_side is not None:
            raise ValueError("--size and --short-side exclude each other: give one.")
        if self.short_side is not None and self.short_side < 2:
            raise ValueError(f"--short-side {self.short_side} must be at least 2, e.g. 256.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"--fps {self.fps} must be above 0, e.g. 24.")
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(
                f"--min-seconds {self.min_seconds} must be from 0 and below --max-seconds {self.max_seconds}."
            )


@dataclass(frozen=True)
class SplitRule:
    """Which clips are held out: the last of every `every` videos, or of every `every` blocks of a video."""

    by: str = "videos"
    """`videos` or `blocks`."""
    every: int = 10
    """0 holds nothing out."""
    block_seconds: float = 20.0
    guard_seconds: float = 2.0
    """Between a held-out block and the nearest training clip."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.every == 1:
            raise ValueError(f"--heldout-every {self.every} must be 0 (none), or 2 and more.")

    def split(self, video_number: int, shot: Shot) -> str:
        """`train`, `heldout` or `guard`."""
        if self.every == 0:
            return "train"
        if self.by == "videos":
            return "heldout" if video_number % self.every == self.every - 1 else "train"
        return self.split_by_time(shot)

    def split_by_time(self, shot: Shot) -> str:
        """Clips drawn at random would leak: shots return to the same place and people within seconds.

        A shot inside a held-out block is `heldout`; another one that comes within `guard_seconds` of such a
        block is `guard`, and left out.
        """
        period = self.block_seconds * self.every
        for number in range(int(shot.end_seconds // period) + 2):
            last = (number + 1) * period
            first = last - self.block_seconds
            if shot.start_seconds >= first - SLACK_SECONDS and shot.end_seconds <= last + SLACK_SECONDS:
                return "heldout"
            near = shot.start_seconds < last + self.guard_seconds - SLACK_SECONDS
            if near and shot.end_seconds > first - self.guard_seconds + SLACK_SECONDS:
                return GUARD
        return "train"


@dataclass(frozen=True)
class Recipe:
    """All that decides how videos become clips."""

    rights: Rights
    profile: Profile
    split_rule: SplitRule
    max_failed_fraction: float = 0.0
    """Of the videos, that may be unreadable."""


# --- From videos to clips --------------------------------------------------------------------------------


@dataclass
class Job:
    """A video whose shots are known."""

    video: Video
    facts: Facts
    shots: list[Shot]


@dataclass
class Result:
    """What became of all shots."""

    videos: int
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Shots by cause."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(video, reason)"""
    splits: Counter[str] = field(default_factory=Counter)
    pictures: list[tuple[NDArray[np.uint8], str]] = field(default_factory=list)
    """Rows of the contact sheet."""

    def fail(self, video: Video, error: UnreadableVideo, limit: float) -> None:
        """Count a video that cannot be read; raises ValueError above the limit."""
        self.failures.append((video.name, str(error)))
        if len(self.failures) > limit * self.videos:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in self.failures)
            raise ValueError(
                f"{len(self.failures)} of {self.videos} videos cannot be read, more than "
                f"--max-failed-fraction {limit} allows:\n{reasons}\nMend or remove them, or allow more."
            )

    def verdict(self) -> str:
        """`kept 143/155: in a guard 12`, with every cause by name."""
        causes = [f"{cause} {count}" for cause, count in sorted(self.left_out.items())]
        if self.failures:
            causes.append(f"unreadable videos {len(self.failures)} ({some_of([n for n, _ in self.failures])})")
        total = self.kept + self.left_out.total()
        return f"kept {self.kept}/{total}" + (f": {', '.join(causes)}" if causes else "")


def build_dataset(
    videos: Sequence[Video], recipe: Recipe, writer: ShardWriter, *, show_progress: bool = True
) -> Result:
    """Find the shots, cut them out and write them with `writer`, then a contact sheet beside the shards.

    A video is taken as a whole or not at all. Raises ValueError, and leaves nothing behind, when more videos
    than `max_failed_fraction` cannot be read, or when no clip is left.
    """
    result = Result(len(videos))
    with writer:
        jobs = plan_jobs(videos, recipe, result, show_progress)
        total = sum(len(job.shots) for job in jobs)
        shown = set(np.rint(np.linspace(0, max(0, total - 1), SHEET_CLIPS)).astype(int).tolist())
        place = 0
        with tqdm(total=total, unit="clip", desc="cutting clips", disable=not show_progress) as bar:
            for job in jobs:
                for number, clip in enumerate(_whole_video(job, recipe, result)):
                    _write(clip, writer, result, show=place + number in shown)
                    bar.update()
                place += len(job.shots)
        if not result.kept:
            raise ValueError(f"{result.verdict()}. No clip is left.")
    title = f"{len(result.pictures)} of {result.kept} clips of {writer.name}"
    contact_sheet(result.pictures, writer.folder / "contact_sheet.png", columns=2, title=title)
    return result


def plan_jobs(videos: Sequence[Video], recipe: Recipe, result: Result, show_progress: bool) -> list[Job]:
    """The shots of each video that become clips; those left out are counted in `result`."""
    jobs = []
    bar = tqdm(videos, unit="video", desc="finding shots", disable=not show_progress)
    for number, video in enumerate(bar):
        try:
            facts = read_facts(video.path)
            if recipe.profile.fps is None and facts.fps > HIGHEST_FPS:
                raise UnreadableVideo(f"states {facts.fps:g} frames a second; say which rate with --fps")
            found = find_shots(video) if video.shots is None else video.shots
        except UnreadableVideo as error:
            result.fail(video, error, recipe.max_failed_fraction)
            continue
        parts = [part for shot in found for part in divide(shot, recipe.profile.max_seconds)]
        sorted_out = [(part, part.split or recipe.split_rule.split(number, part)) for part in parts]
        jobs.append(Job(video, facts, list(_without_rest(sorted_out, recipe.profile.min_seconds, result))))
    return jobs


def _without_rest(parts: list[tuple[Shot, str]], min_seconds: float, result: Result) -> Iterator[Shot]:
    for shot, split in parts:
        if shot.end_seconds - shot.start_seconds < min_seconds - SLACK_SECONDS:
            result.left_out["too short"] += 1
        elif split == GUARD:
            result.left_out["in a guard between the splits"] += 1
        else:
            yield replace(shot, split=split)


def find_shots(video: Video) -> list[Shot]:
    """Shots between the cuts of a video, all with its caption; raises UnreadableVideo if any frame is bad."""
    starts, end = list[float](), 0.0

    def small_pictures() -> Iterator[NDArray[np.uint8]]:
        nonlocal end
        reformatter = VideoReformatter()
        for seconds, shown, frame in decode_frames(video.path):
            starts.append(seconds)
            end = seconds + shown
            yield to_rgb(reformatter, frame, SEARCH_SIZE)

    shots = split_shots(small_pictures())
    edges = [*starts, end]
    return [Shot(edges[first], edges[stop], video.caption) for first, stop in shots]


def divide(shot: Shot, max_seconds: float) -> list[Shot]:
    """The shot in equal parts of at most `max_seconds`."""
    seconds = shot.end_seconds - shot.start_seconds
    count = max(1, math.ceil(seconds / max_seconds - SLACK_SECONDS))
    edges = [shot.start_seconds + seconds * part / count for part in range(count)]
    pairs = pairwise([*edges, shot.end_seconds])
    return [replace(shot, start_seconds=start, end_seconds=end) for start, end in pairs]


def _whole_video(job: Job, recipe: Recipe, result: Result) -> list[Clip]:
    """The video's clips; none, and a counted failure, if it cannot be read to the end of the last one."""
    try:
        clips = list(cut_clips(job, recipe.profile, recipe.rights))
    except UnreadableVideo as error:
        result.left_out["in unreadable videos"] += len(job.shots)
        result.fail(job.video, error, recipe.max_failed_fraction)
        return []
    if len(clips) < len(job.shots):
        raise ValueError(
            f"{job.video.name}: {len(job.shots) - len(clips)} of its {len(job.shots)} shots hold no frame. "
            "Mend its shot list: shots must lie before the end of the video and last at least a frame."
        )
    return clips


def cut_clips(job: Job, profile: Profile, rights: Rights) -> Iterator[Clip]:
    """The clip of each shot, in one pass over the video.

    A shot gets the frames whose own time lies in it, so none of its neighbour's slips in at another rate.
    """
    fps = profile.fps or job.facts.fps
    shaper = Shaper(job.facts.stretch, profile.size, profile.short_side)
    waiting, pictures = deque(enumerate(job.shots)), list[NDArray[np.uint8]]()
    converted: tuple[float, NDArray[np.uint8]] | None = None
    for seconds, _, frame in at_constant_rate(decode_frames(job.video.path), fps):
        while waiting and seconds >= waiting[0][1].end_seconds - SLACK_SECONDS:
            number, shot = waiting.popleft()
            if pictures:
                yield make_clip(job.video, number, shot, np.stack(pictures), fps=fps, rights=rights)
            pictures = []
        if not waiting:
            return
        if seconds >= waiting[0][1].start_seconds - SLACK_SECONDS:
            if converted is None or converted[0] != seconds:  # a repeated frame is converted once
                converted = (seconds, shaper.picture(frame))
            pictures.append(converted[1])
    if pictures:
        number, shot = waiting.popleft()
        yield make_clip(job.video, number, shot, np.stack(pictures), fps=fps, rights=rights)


def make_clip(video: Video, number: int, shot: Shot, frames: NDArray[np.uint8], *, fps: float, rights: Rights) -> Clip:
    """Encode the frames and state the facts."""
    mp4 = encode_video(frames, fps)
    place = {"start_seconds": round(shot.start_seconds, 6), "end_seconds": round(shot.end_seconds, 6)}
    record = ClipRecord(
        key=f"{video.key}-{number:04d}",
        caption=shot.caption,
        fps=fps,
        num_frames=len(frames),
        width=frames.shape[2],
        height=frames.shape[1],
        duration_seconds=len(frames) / fps,
        sha256=hashlib.sha256(mp4).hexdigest(),
        split=shot.split or "train",
        **asdict(rights),
        extra={"video": video.name, **place},
    )
    return record, mp4, frames


def _write(clip: Clip, writer: ShardWriter, result: Result, *, show: bool) -> None:
    record, mp4, frames = clip
    writer.write(record, mp4)
    result.kept += 1
    result.splits[record.split] += 1
    if show:
        few = np.rint(np.linspace(0, len(frames) - 1, 5)).astype(int)
        result.pictures.append((frames[few], f"{record.split}: {record.caption}"))


# --- Command line ----------------------------------------------------------------------------------------


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What the data set is to look like, for every script that cuts videos into clips."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/mine")
    parser.add_argument("--size", type=_size, help="WIDTHxHEIGHT of all clips, e.g. 128x64: cover and crop")
    parser.add_argument("--short-side", type=int, help="shrink larger videos to this, e.g. 256; keep the shape")
    parser.add_argument("--fps", type=float, help="constant rate of all clips (default: each video's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that lies in --out")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or int(match[1]) % 2 or int(match[2]) % 2 or not int(match[1]) * int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT with even sides, e.g. 128x64")
    return int(match[1]), int(match[2])


def print_result(result: Result, folder: Path) -> None:
    """Failures by name, where to look, and the verdict as the last line."""
    for name, reason in result.failures:
        print(f"unreadable: {name}: {reason}")
    print(f"train {result.splits['train']} clips, heldout {result.splits['heldout']} clips")
    print(f"contact sheet {folder / 'contact_sheet.png'}")
    print(f"{result.verdict()} READY {folder}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder with videos, also in sub-folders")
    parser.add_argument("--license", required=True, help="SPDX identifier, e.g. CC-BY-4.0; or: unknown")
    parser.add_argument("--consent", default="unknown", help="of people seen: given, none-visible, ...")
    parser.add_argument("--source", help="where the videos come from (default: the folder's name)")
    parser.add_argument("--attribution", default="", help="line that the licence asks you to show")
    parser.add_argument("--source-url", default="", help="address where they were found")
    parser.add_argument("--collected", default="", help="day they were taken from there, e.g. 2026-01-31")
    parser.add_argument("--generated", choices=GENERATED, default="unknown", help="share made by a generative model")
    parser.add_argument("--generator", default="", help="name of that model")
    parser.add_argument("--captions", type=Path, help="captions.jsonl, or prompt.txt beside videos.txt")
    parser.add_argument("--allow-missing-captions", action="store_true", help="keep videos without a caption")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="drop shorter shots (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="divide longer shots (%(default)s)")
    parser.add_argument(
        "--split",
        choices=("videos", "blocks"),
        default="videos",
        help="hold out videos, or 20 s blocks of each",
    )
    parser.add_argument("--heldout-every", type=int, default=10, help="hold out every Nth; 0: none (%(default)s)")
    parser.add_argument(
        "--max-failed-fraction", type=float, default=0.05, help="of videos that cannot be read (%(default)s)"
    )
    add_output_arguments(parser)
    return parser.parse_args(argv)


def rights_of(given: argparse.Namespace) -> Rights:
    """What the command line states of every clip; the source is the folder's name unless it is given."""
    stated = {f.name: getattr(given, f.name) for f in fields(Rights)}
    return Rights(**{**stated, "source": given.source or given.videos.resolve().name})


def main(argv: list[str] | None = None) -> int:
    """Build the data set; returns the exit code."""
    given = parse_arguments(argv)
    recipe = Recipe(
        rights_of(given),
        Profile(given.fps, given.size, given.short_side, given.min_seconds, given.max_seconds),
        SplitRule(given.split, given.heldout_every),
        given.max_failed_fraction,
    )
    writer = ShardWriter(given.out, overwrite=given.overwrite)
    names = find_videos(given.videos)
    lines = read_captions(given.videos, names, given.captions)
    videos = describe_videos(given.videos, names, lines, allow_missing=given.allow_missing_captions)
    result = build_dataset(videos, recipe, writer)
    if given.heldout_every and not result.splits["heldout"]:
        other = "" if given.split == "blocks" else ", or use --split blocks"
        print(f"Nothing is held out: too little video for --heldout-every {given.heldout_every}. Lower it{other}.")
    print_result(result, given.out)
    return 0


if __name__ == "__main__":
    explain_errors(main)()
