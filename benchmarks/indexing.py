"""What the index of a large data set costs: its columns made once, then opened, planned and read by entries.

python -m benchmarks.indexing                 # the columns of a million clips made, and of ten million opened

The ten million are the columns of the one million ten times over.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kinema.data.account.refusals import Refusals, change_of_rights
from kinema.data.account.rights import RightsPolicy, idle_words
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import FORMAT_VERSION, DatasetIndex, index_name
from kinema.data.dataset.table import DTYPES, FACTS
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.windows import CachedWindow, Windows
from kinema.data.steps.candidates import Candidates, plan_clips
from kinema.data.storage.store import MANIFEST, Member

SHARD_BYTES = 2**34


def write_synthetic(folder: Path, clips: int, per_shard: int) -> None:
    """Manifest and indexes of so many clips. Every shard is a link to one hole of a file, with one index: no videos."""
    samples = [sample(number) for number in range(per_shard)]
    index = json.dumps({"shard": "any", "samples": samples}, indent=0).encode()
    (folder / "index").write_bytes(index)
    with (folder / "hole").open("wb") as hole:
        hole.truncate(SHARD_BYTES)
    shards = []
    for number in range(clips // per_shard):
        name = f"clips-{number:06d}.tar"
        os.link(folder / "hole", folder / name)
        os.link(folder / "index", folder / index_name(name))
        digest = hashlib.sha256(index).hexdigest()
        shards.append({"file": name, "bytes": SHARD_BYTES, "samples": per_shard, "index_sha256": digest})
    facts = {"format_version": FORMAT_VERSION, "name": "synthetic", "clips": clips, "hash": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps({**facts, "shards": shards}))


def sample(number: int) -> dict[str, Any]:
    """One clip of an index, with an ordinary caption."""
    record = ClipRecord(
        key=f"clip-{number:09d}", caption=f"a red ball rolls over a green field number {number} " * 3, fps=24.0,
        num_frames=49 + number % 240, width=1280, height=720, duration_seconds=(49 + number % 240) / 24,
        source=f"source-{number % 100}", license=["CC0-1.0", "CC-BY-4.0"][number % 2], consent="none-visible",
        sha256=hashlib.sha256(str(number).encode()).hexdigest(), split="heldout" if number % 100 == 0 else "train",
    )  # fmt: skip
    video, text = {"offset": number << 20, "size": 1 << 20, "crc32": number}, {"offset": 0, "size": 9, "crc32": 1}
    return {"key": record.key, "members": {"mp4": video, "json": text}, "record": record.to_dict(with_extra=False)}


def repeat(table: Path, times: int) -> None:
    """Make a table hold its clips so many times."""
    facts = json.loads((table / FACTS).read_text())
    for name, dtype in DTYPES.items():
        once = np.fromfile(table / name, dtype)
        with (table / name).open("ab") as file:
            for number in range(1, times):
                (once + once[-1] * number if name.endswith(".end") else once).tofile(file)
        facts["lengths"][name] *= times
    (table / FACTS).write_text(json.dumps(facts))


def in_a_fresh_process(work: Callable[..., None], *arguments: Any) -> None:
    """So that its peak of memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{work.__name__} failed"


def peak_mib() -> float:
    """Most memory that this process has held, pages of mapped files included, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def private_mib() -> float:
    """Memory that is this process's own, mapped files excluded, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def load(folder: Path, what: str) -> None:
    """Load the training split, and print what it took."""
    before, began, cpu = private_mib(), time.perf_counter(), time.process_time()
    index = DatasetIndex.load(folder, "train")
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{what}: {len(index.entries)} training clips in {seconds:.2f} s ({cpu:.2f} s of CPU), "
          f"{private_mib() - before:.0f} MiB of its own, peak {peak_mib():.0f} MiB", flush=True)  # fmt: skip


def use(folder: Path) -> None:
    """Read every column that planning reads, and entries in random order."""
    load(folder, "opened")
    index, began = DatasetIndex.load(folder, "train"), time.perf_counter()
    long_enough = int((index.columns.duration_seconds > 5).sum())
    wide = int((index.columns.width * index.columns.height > 10**6).sum())
    print(f"two questions to columns: {long_enough} and {wide} clips, {time.perf_counter() - began:.2f} s")
    rows = np.random.default_rng(0).integers(0, len(index.entries), 20_000).tolist()
    began = time.perf_counter()
    for row in rows:
        assert index.entries[row].members["mp4"].size == 2**20
    print(f"an entry at random: {1e6 * (time.perf_counter() - began) / len(rows):.0f} us; "
          f"{private_mib():.0f} MiB of its own, peak {peak_mib():.0f} MiB with mapped pages")  # fmt: skip


def cached_keys(index: DatasetIndex, shape: ClipShape) -> Windows:
    """The places of a latent cache that has one window of every clip."""

    def of_shard(number: int) -> list[CachedWindow]:
        rows = range(number, min(number + 1000, len(index.entries)))
        place = f"latents-{number:09d}.tar"
        return [CachedWindow((f"{index.text('key', row)} {row}", shape), 0.0, place, Member(row, 1, 0)) for row in rows]

    return Windows(of_shard(number) for number in range(0, len(index.entries), 1000))


def start(folder: Path) -> None:
    """What a run asks of all its clips before its first step."""
    index, absent = DatasetIndex.load(folder, "train"), frozenset[Any]()
    policy, before = (
        RightsPolicy(excluded_sources=("source-7",), excluded_keys=("none", "clip-000000008")),
        private_mib(),
    )

    shape = ClipShape(17, 256, 448)

    def plan() -> Candidates:
        return plan_clips(index, [shape], 8.0, Geometry(4, 8, (1, 2, 2)))[0]

    planned, places = plan(), list[Windows]()
    sources, licenses = index.columns.source.names, index.columns.license.names
    questions: dict[str, Callable[[], Any]] = {
        "plan_clips": plan,
        "data.rights, with a key": lambda: Refusals(policy, index),
        "its change": lambda: change_of_rights(index, planned.entry_index, RightsPolicy(), policy),
        "its idle words": lambda: idle_words(
            RightsPolicy(excluded_keys=("none",)), licenses, sources, index.clip_keys()
        ),
        "captions in a text cache": lambda: sum(
            hashlib.sha256(caption.encode()).hexdigest() in absent for caption in index.table.texts("caption")
        ),
        "places of a latent cache": lambda: places.append(cached_keys(index, shape)),
        "clips in that cache": lambda: places[0].lacking(
            (f"{index.text('key', clip.entry_index)} {clip.entry_index}", clip.shape) for clip in planned
        ),
    }
    for what, ask in questions.items():
        began = time.process_time()
        ask()
        cpu, mib = time.process_time() - began, private_mib() - before
        print(f"{what}: {len(index.entries)} clips, {cpu:.1f} s of CPU, {mib:.0f} MiB of its own", flush=True)


def main() -> None:
    """Measure and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_synthetic(folder, arguments.clips, arguments.per_shard)
        in_a_fresh_process(load, folder, "columns made")
        for table in folder.glob(".columns-*/*/"):
            repeat(table, arguments.times)
        columns = sum(path.stat().st_size for path in folder.glob(".columns-*/*/*"))
        print(f"columns on disk, {arguments.times} times over: {columns / 2**20:.0f} MiB")
        in_a_fresh_process(use, folder)
        in_a_fresh_process(start, folder)


if __name__ == "__main__":
    main()
