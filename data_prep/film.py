"""The film data set: 143 captioned shots of Big Buck Bunny, (c) Blender Foundation, CC BY 3.0.

    python data_prep/film.py --out data/film

A small version of the film lies in data_prep/film (see ATTRIBUTION.md there) with a caption for every shot,
written by looking. The last of every five blocks of 20 seconds is held out; shots within 2 seconds of such a
block belong to neither split. Everything else goes the way of your own videos, data_prep/folder.py.

    python data_prep/film.py rebuild --from bbb.mp4

makes the small version again from the 1280x720 film.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, the repository's root is not on the path
from data_prep.captions import Shot, Video, parse_shot, read_json_lines
from data_prep.folder import (
    Profile,
    Recipe,
    Rights,
    SplitRule,
    add_output_arguments,
    build_dataset,
    print_result,
)
from data_prep.source_video import decode_frames
from kinema.console import explain_errors
from kinema.data.shards import ShardWriter

FOLDER = Path(__file__).parent / "film"
SHOTS = FOLDER / "shots.jsonl"
FPS = 24
SIZE = (160, 90)
PART_FRAMES = (0, 1919, 3860, 5809, 7769, 9719, 11724)
"""The small version is cut into files here, always between two shots; credits follow."""
SOURCE_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
RIGHTS = Rights(
    source="Big Buck Bunny",
    license="CC-BY-3.0",
    consent="none-visible",
    attribution="(c) copyright Blender Foundation | www.bigbuckbunny.org (scaled down, cut into shots)",
    source_url="https://www.bigbuckbunny.org",
    generated="no",
)
SPLIT_RULE = SplitRule(by="blocks", every=5, block_seconds=20.0, guard_seconds=2.0)


def read_shots() -> list[Shot]:
    """All captioned shots, in seconds of the film."""
    return [parse_shot(values, where) for values, where in read_json_lines(SHOTS)]


def film_videos() -> list[Video]:
    """The committed files with their shots, in seconds of each file."""
    shots, videos = read_shots(), []
    for number, (first, stop) in enumerate(pairwise(PART_FRAMES)):
        start, end = first / FPS, stop / FPS
        inside = tuple(
            replace(shot, start_seconds=shot.start_seconds - start, end_seconds=shot.end_seconds - start)
            for shot in shots
            if start <= (shot.start_seconds + shot.end_seconds) / 2 < end
        )
        videos.append(Video(part_path(number), part_path(number).name, shots=inside))
    return videos


def part_path(number: int) -> Path:
    """File of one part of the small version."""
    return FOLDER / f"bbb-{number + 1}.mp4"


def rebuild(film: Path) -> None:
    """Write the small version anew; raises ValueError if `film` is another file than it was made from."""
    with open(film, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SOURCE_SHA256:
        raise ValueError(f"--from {film} has sha256 {digest}, not {SOURCE_SHA256}. ATTRIBUTION.md says where it is.")
    frames = (timed.frame for timed in decode_frames(film))
    with tqdm(total=PART_FRAMES[-1], unit="frame", desc="rebuilding") as bar:
        for number, (first, stop) in enumerate(pairwise(PART_FRAMES)):
            encode_part(islice(frames, stop - first), part_path(number))
            bar.update(stop - first)


def encode_part(frames: Iterator[av.VideoFrame], path: Path) -> None:
    """Small files for the repository: slow search and long groups, unlike the clips that are trained on."""
    reformatter = VideoReformatter()
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        context = stream.codec_context
        context.thread_count, context.gop_size = 1, 240  # one thread: equal bytes on every machine
        context.flags |= av.codec.context.Flags.bitexact
        context.colorspace = context.color_primaries = context.color_trc = 6  # BT.601, as converted below
        context.color_range = 1
        stream.options = {"preset": "veryslow", "crf": "24"}
        for index, frame in enumerate(frames):
            small = reformatter.reformat(
                frame,
                *SIZE,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation="AREA",
            )
            small.pts, small.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(small))
        container.mux(stream.encode())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `rebuild` as its first word asks for the other program."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if argv[:1] == ["rebuild"]:
        parser.add_argument("rebuild", choices=["rebuild"])
        parser.add_argument("--from", dest="film", type=Path, required=True, help="the 1280x720 film, bbb.mp4")
    else:
        add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Build the data set, or rebuild the small version; returns the exit code."""
    given = parse_arguments(argv)
    if "film" in given:
        rebuild(given.film)
        print(f"rebuilt {len(PART_FRAMES) - 1} files in {FOLDER}")
        return 0
    # A caption tells its whole shot, of 10.2 s at most, so none is divided; the shortest has 15 frames.
    profile = Profile(given.fps, given.size, given.short_side, min_seconds=0.5, max_seconds=12.0)
    command = "python data_prep/film.py" + "".join(
        f" --{name.replace('_', '-')} {value}"
        for name in ("size", "short_side", "fps")
        if (value := getattr(given, name)) is not None
    )
    writer = ShardWriter(given.out, name="film", command=command, overwrite=given.overwrite)
    result = build_dataset(film_videos(), Recipe(RIGHTS, profile, SPLIT_RULE), writer)
    print_result(result, given.out)
    return 0


if __name__ == "__main__":
    explain_errors(main)()
