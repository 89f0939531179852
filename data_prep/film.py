"""The small version of Big Buck Bunny, (c) Blender Foundation, CC BY 3.0, that lies in data_prep/film.

    python data_prep/prepare.py preset=film

makes the data set of 143 captioned shots from it, as from any other footage (see film/ATTRIBUTION.md). The last of
every five blocks of 20 seconds is held out; shots within 2 seconds of such a block belong to neither split.

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
from data_prep.captions import Shot, parse_shot, read_json_lines
from data_prep.source_video import decode_frames
from data_prep.stages.split import HeldOut
from kinema.console import explain_errors

FOLDER = Path(__file__).parent / "film"
SHOTS = FOLDER / "shots.jsonl"
FPS = 24
SIZE = (160, 90)
PART_FRAMES = (0, 1919, 3860, 5809, 7769, 9719, 11724)
"""The small version is cut into files here, always between two shots; credits follow."""
SOURCE_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
HELD_OUT = HeldOut(by="blocks", every=5, block_seconds=20.0, guard_seconds=2.0)
"""How the splits in the shot list were made, in seconds of the film."""


def read_shots() -> list[Shot]:
    """All captioned shots, in seconds of the film."""
    starts = {part_path(number).name: first / FPS for number, first in enumerate(PART_FRAMES[:-1])}
    shots = [(parse_shot(values, where), starts[str(values["path"])]) for values, where in read_json_lines(SHOTS)]
    return [
        replace(shot, start_seconds=shot.start_seconds + start, end_seconds=shot.end_seconds + start)
        for shot, start in shots
    ]


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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rebuild", choices=["rebuild"])
    parser.add_argument("--from", dest="film", type=Path, required=True, help="the 1280x720 film, bbb.mp4")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Rebuild the small version; returns the exit code."""
    rebuild(parse_arguments(argv).film)
    print(f"rebuilt {len(PART_FRAMES) - 1} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    explain_errors(main)()
