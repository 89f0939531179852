"""What each decoder makes of real files: python -m benchmarks.odd_files FOLDER

Opens every video below the folder with all decoders and compares, frame by frame, a run from the beginning, one from
the middle and one up to the end. PyAV is the reference: it reads them all. Prints a Markdown table.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinema.data.decode.decoders import decord, pyav, torchcodec
from kinema.data.decode.decoders.packets import read_packets
from kinema.data.decode.decoders.video import first_line
from kinema.data.decode.isolation import CallDied, Isolated

SUFFIXES = {".mp4", ".mov", ".avi", ".mpg", ".mpeg", ".ogg", ".ogv", ".webm", ".mkv", ".ts"}
LIBRARIES = {"pyav": pyav, "decord": decord, "torchcodec": torchcodec}
RUN = 12
"""Frames of each of the three runs."""
Found = tuple[int, NDArray[np.float64], tuple[int, ...]]
"""Number of frames; mean colour of each 8 x 8 block of the frames compared; shape of a frame."""


def look(content: bytes, library: str) -> Found:
    """How many frames there are, and small pictures of those to compare."""
    packets = read_packets(content)
    read = LIBRARIES[library].read_frames
    frames = [frame for run in _runs(len(packets.pts)) for batch in read(content, packets, run) for frame in batch]
    return len(packets.pts), np.stack([_small(frame) for frame in frames]), frames[0].shape[:2]


def _runs(count: int) -> Iterator[list[int]]:
    for first in (0, count // 2, count - RUN):
        yield list(range(max(0, first), min(count, max(0, first) + RUN)))


def _small(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    height, width = (side // 8 * 8 for side in frame.shape[:2])
    return frame[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))


def compare(reference: Found, other: Found) -> str:
    """`same`, or how two decoders' answers differ."""
    (_, pictures, shape), (_, other_pictures, other_shape) = reference, other
    if shape != other_shape:
        return f"frames of {other_shape[1]} x {other_shape[0]}"
    if (worst := np.abs(pictures - other_pictures).mean((1, 2, 3)).max()) > 1.5:
        return f"pixels differ by {worst:.1f} on average in the worst frame"
    return "same"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    print("| file | frames | size | decord | torchcodec |\n|---|---|---|---|---|", flush=True)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        found: dict[str, Found | str] = {}
        for library in LIBRARIES:
            process = Isolated(partial(look, path.read_bytes(), library), timeout_seconds=120, max_memory_mib=8000)
            try:
                found[library] = process()
            except CallDied as error:
                found[library] = str(error)
            except Exception as error:  # the libraries' errors share no narrower base
                found[library] = first_line(error)
            process.close()
        reference = found.pop("pyav")
        if isinstance(reference, str):
            others = [other if isinstance(other, str) else f"{other[0]} frames" for other in found.values()]
            print(f"| {path.name} | - | pyav: {reference} | {' | '.join(others)} |")
            continue
        answers = [other if isinstance(other, str) else compare(reference, other) for other in found.values()]
        size = f"{reference[2][1]} x {reference[2][0]}"
        print(f"| {path.name} | {reference[0]} | {size} | {' | '.join(answers)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
