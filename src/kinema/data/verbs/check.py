"""`kinema data check PATH`: is every clip of a data set what its record says?"""

import argparse
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kinema.data.account.licenses import is_known
from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.opened import local_folder
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DamagedSample, DatasetIndex, read_member
from kinema.data.decode.clip_decoder import OVERHEAD_MIB
from kinema.data.decode.cuts import suspected_cuts
from kinema.data.decode.decoders.packets import read_packets
from kinema.data.decode.decoders.video import first_line
from kinema.data.decode.decoding import check_size
from kinema.data.decode.images import IMAGES, image_pixels, media_of
from kinema.data.decode.isolation import CallDied, Isolated
from kinema.data.decode.probe import square_pixels
from kinema.data.verbs.contact_sheet import contact_sheet

EXIT_READY, EXIT_DATA_ERROR = 0, 65  # EX_DATAERR of sysexits.h
SHEET_CLIPS = 24
CLIP_SECONDS, CLIP_MIB = 120.0, 4096.0
"""What one clip may take: time, and memory of all its frames."""
NAMED_KEYS = 5
"""How many clips of one cause the verdict names before it says `...`."""


@dataclass(frozen=True)
class Problem:
    """Why a clip cannot be kept."""

    key: str
    cause: str
    """`damaged`, `undecodable`, `no caption` or `wrong record`: what the verdict counts."""
    detail: str


@dataclass
class ClipReport:
    """What was found in one clip."""

    record: ClipRecord
    problem: Problem | None = None
    cuts: list[int] = field(default_factory=list)
    picture: NDArray[np.uint8] | None = None
    """A few of its frames, only for clips of the contact sheet."""


@dataclass
class CheckResult:
    """Everything that `kinema data check` prints."""

    folder: Path
    index: DatasetIndex
    reports: list[ClipReport]
    sheet: Path | None

    @property
    def problems(self) -> list[Problem]:
        """One for each clip that cannot be kept, in data set order."""
        return [report.problem for report in self.reports if report.problem is not None]

    @property
    def kept(self) -> int:
        """Clips without a problem. A suspected cut is no problem but a hint."""
        return len(self.reports) - len(self.problems)

    @property
    def ready(self) -> bool:
        """Whether every clip is kept."""
        return not self.problems

    @property
    def exit_code(self) -> int:
        """0 if ready, else 65."""
        return EXIT_READY if self.ready else EXIT_DATA_ERROR

    def verdict(self) -> str:
        """`kept 512/512 READY`, or how many were kept and every cause with the first clips it hit."""
        count = f"kept {self.kept}/{len(self.reports)}"
        if self.ready:
            return f"{count} READY"
        by_cause: dict[str, list[str]] = defaultdict(list)
        for problem in self.problems:
            by_cause[problem.cause].append(problem.key)
        causes = [f"{cause} {len(keys)} ({_first(keys)})" for cause, keys in sorted(by_cause.items())]
        return f"{count}: {', '.join(causes)}"

    def table(self) -> str:
        """The data set in a few lines of plain text."""
        records = [report.record for report in self.reports]
        lines = [
            f"{self.index.manifest['name']} in {self.folder}, hash {self.index.hash[:12]}",
            "",
            f"{'split':<10}{'clips':>7}{'minutes':>9}   {'seconds':<14}{'fps':<34}sizes",
        ]
        for split in sorted({record.split for record in records}, reverse=True):
            lines.append(_split_line(split, [record for record in records if record.split == split]))
        causes = Counter(problem.cause for problem in self.problems)
        cut = [report.record.key for report in self.reports if report.cuts]
        lines += [
            "",
            f"{'missing captions':<18}{causes['no caption']}",
            f"{'undecodable':<18}{causes['undecodable']}",
            f"{'damaged bytes':<18}{causes['damaged']}",
            f"{'wrong records':<18}{causes['wrong record']}",
            f"{'suspected cuts':<18}{len(cut)}" + (f" ({_first(cut)})" if cut else ""),
            f"{'licences':<18}{_counts(record.license for record in records)}",
            f"{'not SPDX':<18}{_counts(r.license for r in records if not is_known(r.license)) or 0}",
            f"{'generated':<18}{_counts(record.generated for record in records)}",
            f"{'sources':<18}{_counts(record.source for record in records)}",
            f"{'consent':<18}{_counts(record.consent for record in records)}",
        ]
        lines += [f"{'attribution':<18}{text}" for text in self.index.manifest.get("attributions", [])]
        return "\n".join(lines)


def check_dataset(folder: str | Path, *, workers: int = 2, show_progress: bool = False) -> CheckResult:
    """Decode every clip, compare it with its record, and write `contact_sheet.png` beside the manifest.

    Raises ValueError (from `DatasetIndex.load`) if the data set as a whole cannot be opened.
    """
    folder = Path(folder)
    index = DatasetIndex.load(folder)
    if not index.entries:
        raise ValueError(f"data.path={folder} has no clips: there is nothing to check. Build it again.")
    shown = set(np.rint(np.linspace(0, len(index.entries) - 1, SHEET_CLIPS)).astype(int).tolist())
    reports = list(
        tqdm(
            _reports(folder, index.entries, shown, workers),
            total=len(index.entries),
            unit="clip",
            desc="checking",
            disable=not show_progress,
        )
    )
    return CheckResult(folder, index, reports, _write_sheet(folder, reports))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kinema data check`."""
    parser.add_argument("path", type=local_folder, help="folder with a data set, e.g. data/toy")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, the problems and the verdict; returns 0 if ready, else 65."""
    try:
        result = check_dataset(arguments.path, workers=arguments.workers, show_progress=True)
    except ValueError as error:
        print(f"kept 0: {error}")
        return EXIT_DATA_ERROR
    print(result.table())
    for problem in result.problems[:20]:
        print(f"{problem.cause}: {problem.key}: {problem.detail}")
    if len(result.problems) > 20:
        print(f"... and {len(result.problems) - 20} more problems")
    if result.sheet is not None:
        print(f"contact sheet {result.sheet}")
    print(result.verdict())
    return result.exit_code


def main(argv: list[str] | None = None) -> int:
    """`python -m kinema.data.verbs.check PATH`."""
    parser = argparse.ArgumentParser(prog="kinema data check", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _reports(folder: Path, entries: Sequence[ClipEntry], shown: set[int], workers: int) -> Iterator[ClipReport]:
    """A report for each entry, in order. Each thread waits for a process of its own, which a clip may well kill."""
    idle: SimpleQueue[Isolated] = SimpleQueue()
    for _ in range(workers):
        idle.put(Isolated(partial(check_clip, folder), CLIP_SECONDS, 2 * CLIP_MIB + OVERHEAD_MIB))

    def report(number: int) -> ClipReport:
        entry, process = entries[number], idle.get()
        try:
            return process(entry, number in shown)
        except CallDied as error:
            return ClipReport(entry.record, _undecodable(entry, f"decoding it {error}"))
        finally:
            idle.put(process)

    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(report, range(len(entries)))
    finally:
        while not idle.empty():
            idle.get().close()


def _undecodable(entry: ClipEntry, why: str) -> Problem:
    return Problem(entry.record.key, "undecodable", f"{entry.shard}: {why}")


def check_clip(folder: str | os.PathLike[str], entry: ClipEntry, show: bool) -> ClipReport:
    """Decode one clip and compare it with its record; with `show`, five of its frames are kept."""
    record, key = entry.record, entry.record.key
    try:
        media = media_of(entry.members)
        content = read_member(folder, entry, media)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            problem = f"{entry.shard}: sha256 of the {media} is not the record's"
            return ClipReport(record, Problem(key, "damaged", problem))
        if "json" in entry.members:
            read_member(folder, entry, "json")
    except DamagedSample as error:
        return ClipReport(record, Problem(key, "damaged", f"{error.shard}: {error.reason}"))
    try:
        frames, fps, stretch = (image_pixels(content)[None], 0.0, 1.0) if media in IMAGES else _decode(content)
    except Exception as error:  # the library's errors share no narrower base
        return ClipReport(record, _undecodable(entry, first_line(error)))

    report = ClipReport(record, cuts=suspected_cuts(frames))
    difference = _difference(record, frames, fps, stretch)
    if difference:
        report.problem = Problem(key, "wrong record", difference)
    elif not record.caption.strip():
        report.problem = Problem(key, "no caption", "its caption is empty or absent")
    if show:
        report.picture = frames[np.rint(np.linspace(0, len(frames) - 1, 5)).astype(int)].copy()
    return report


def _decode(mp4: bytes) -> tuple[NDArray[np.uint8], float, float]:
    """All frames (T, H, W, 3) upright, their mean rate by timestamps (0 for a single frame), and the width of their
    pixels over the height.
    """
    packets = read_packets(mp4)
    check_size(len(packets.pts), packets, CLIP_MIB)
    with av.open(io.BytesIO(mp4), "r") as container:
        frames = list(container.decode(video=0))
    if not frames:
        raise ValueError("no frame could be decoded")
    # PyAV leaves the turning that the file asks for to its caller; rotation is counter-clockwise, as rot90's.
    turns = round(frames[0].rotation / 90) % 4
    pictures: NDArray[np.uint8] = np.stack([np.rot90(frame.to_ndarray(format="rgb24"), turns) for frame in frames])
    seconds = frames[-1].time - frames[0].time
    stretch = 1 / packets.pixel_aspect if turns % 2 else packets.pixel_aspect
    return pictures, (len(frames) - 1) / seconds if seconds > 0 else 0.0, stretch


def _difference(record: ClipRecord, frames: NDArray[np.uint8], fps: float, stretch: float) -> str:
    """What the record says against what was decoded; empty when they agree."""
    count, height, width = frames.shape[:3]
    width, height = square_pixels(width, height, stretch)
    found = []
    if (width, height) != (record.width, record.height):
        found.append(f"size {record.width}x{record.height} in the record, {width}x{height} in the mp4")
    if count != record.num_frames:
        found.append(f"num_frames={record.num_frames} in the record, {count} in the mp4")
    if fps and abs(fps - record.fps) > 0.01 * record.fps:
        found.append(f"fps={record.fps:g} in the record, {fps:.3f} in the mp4")
    if abs(record.duration_seconds - record.num_frames / record.fps) > 1.5 / record.fps:
        found.append(f"duration_seconds={record.duration_seconds:g} is not num_frames / fps")
    return "; ".join(found)


def _write_sheet(folder: Path, reports: list[ClipReport]) -> Path | None:
    rows = [(r.picture, f"{r.record.key}: {r.record.caption}") for r in reports if r.picture is not None]
    if not rows:
        return None  # nothing could be decoded; the verdict says so
    path = folder / "contact_sheet.png"
    contact_sheet(rows, path, columns=2, title=f"{len(rows)} of {len(reports)} clips of {folder.name}")
    return path


def _split_line(split: str, records: list[ClipRecord]) -> str:
    seconds = [record.duration_seconds for record in records]
    span = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return (
        f"{split:<10}{len(records):>7}{sum(seconds) / 60:>9.1f}   {span:<14}"
        f"{_counts(f'{record.fps:g}' for record in records):<34}"
        f"{_counts(f'{record.width}x{record.height}' for record in records)}"
    )


def _counts(values: Iterable[str]) -> str:
    """`24: 310, 8: 290`, the commonest first."""
    ordered = Counter(values).most_common()
    shown = ", ".join(f"{value}: {count}" for value, count in ordered[:6])
    return shown + (f", and {len(ordered) - 6} more" if len(ordered) > 6 else "")


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


if __name__ == "__main__":
    raise SystemExit(main())
