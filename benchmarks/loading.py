"""What a loader costs over the bare work: cached latents beside WebDataset and bare reads, video beside the decoder.

All in one process, in turn, over the same shards, in CPU seconds of that process and its children: on a machine that
others use too, the wall tells about them. Kinema shuffles, begins in the middle of an epoch and checks every checksum.

    python -m benchmarks.loading latents --latent 16x5x32x32
    python -m benchmarks.loading video --size 480x832 --frames 81
"""

import argparse
import hashlib
import os
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from safetensors import torch as safetensors

from kinema.data.account.rights import RightsPolicy
from kinema.data.config import Window
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, ShardWriter, read_member
from kinema.data.decode.decoding import Decoder, decode_clip
from kinema.data.decode.encoding import encode_video
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.latents import LatentCache, LatentWriter
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from kinema.data.steps.plan import Plan
from kinema.data.steps.stages import Stage
from kinema.data.storage.store import checked

PACK, LANES = 8, 4  # clips in a pack, and packs in a step
EPOCHS = 4  # of one measurement: what is done once at the start of a run is shared out
FPS = 8.0
GEOMETRY = Geometry(4, 8, (1, 1, 1))
Loader = Callable[[], int]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def compare(loaders: dict[str, Loader], rounds: int) -> None:
    """Time all in turn, and print clips a CPU second of each and Kinema's ratio to it."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):  # the first round warms up
        for name, load in loaders.items():
            before = cpu_seconds()
            clips = load()
            if number:
                rates[name].append(clips / (cpu_seconds() - before))
    ours = rates["Kinema"]
    print("| loader | clips a CPU second | Kinema, times as many (quartiles) |\n|---|---|---|")
    for name, each in rates.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, each, strict=True)], n=4)
        print(f"| {name} | {statistics.median(each):.1f} | **{middle:.2f}** ({low:.2f} to {high:.2f}) |")


def write_clips(folder: Path, clips: int, frames: int, size: tuple[int, int]) -> DatasetIndex:
    """Clips of moving noise, all of the same bytes."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (frames, size[0] // 16, size[1] // 16, 3), np.uint8)
    mp4 = encode_video(small.repeat(16, axis=1).repeat(16, axis=2), FPS)
    facts = {"fps": FPS, "num_frames": frames, "height": size[0], "width": size[1], "duration_seconds": frames / FPS}
    words = {"caption": "noise", "source": "made", "license": "CC0-1.0", "consent": "synthetic", "split": "train"}
    with ShardWriter(folder, max_samples=64) as writer:
        for number in range(clips):
            digest = hashlib.sha256(mp4).hexdigest()
            writer.write(ClipRecord(key=f"clip-{number:06d}", sha256=digest, **words, **facts), mp4)  # type: ignore[arg-type]
    return DatasetIndex.load(folder)


def packs_of(index: DatasetIndex, shape: ClipShape, cache: LatentCache | None, window: Window) -> Loader:
    """Kinema's loader from the middle of an epoch, over as many clips as EPOCHS have."""
    clips, _ = plan_clips(index, [shape], FPS, GEOMETRY)
    plan = Plan([Stage(clips, 10**9, LANES * PACK)], seed=0, lanes=LANES, shuffle_block_shards=4)
    steps, lanes = len(clips) // (LANES * PACK), range(LANES)

    def load() -> int:
        packs = make_loader(
            index, plan, lanes, steps // 2, EPOCHS * steps, fps=FPS, seed=0, latents=cache, window=window,
            rights=RightsPolicy(),
        )  # fmt: skip
        return sum(int(pack.weights.sum()) for step in packs for pack in step)

    return load


def batches(values: Iterable[object]) -> int:
    """Keep a step's worth of values together, as a loader must; their number."""
    count, step = 0, list[object]()
    for value in values:
        step.append(value)
        count += 1
        if len(step) == LANES * PACK:
            step = []
    return count


def write_arrays(folder: Path, keys: list[str], size: list[int]) -> list[str]:
    """The same numbers as WebDataset's own users store them: .npy members, which its `decode()` reads."""
    pattern = str(folder / "arrays-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=64, verbose=0) as writer:
        for key in keys:
            mean, logvar = torch.randn(size).numpy(), torch.randn(size).numpy()
            writer.write({"__key__": key, "mean.npy": mean, "logvar.npy": logvar})
    return sorted(map(str, folder.glob("arrays-*.tar")))


def latents(arguments: argparse.Namespace, folder: Path) -> dict[str, Loader]:
    """Cached latents: ours, WebDataset's stream of the same tars, and reads at places known beforehand."""
    shape = ClipShape(9, 64, 64)
    index = write_clips(folder / "clips", arguments.clips, 10, (64, 64))
    identity: Any = {"vae_hash": "vae", "data_hash": index.hash, "shapes": [shape], "fps": FPS}
    size = [int(side) for side in arguments.latent.split("x")]
    with LatentWriter(folder / "latents", max_samples=64, **identity) as writer:
        for entry in index.entries:
            mean, logvar = torch.randn(size), torch.randn(size)
            writer.write(entry.record.key, shape, 0.0, mean, logvar)
    cache = LatentCache.load(folder / "latents", **identity)
    places = [(folder / "latents" / shard, member) for shard, member in cache.places()]
    tars = sorted(map(str, (folder / "latents").glob("*.tar")))
    arrays = write_arrays(folder, [entry.record.key for entry in index.entries], size)

    def bare(compare: bool = False) -> int:
        files = {path: os.open(path, os.O_RDONLY) for path, _ in places}
        count = 0
        for epoch in range(EPOCHS):
            shuffled = random.Random(epoch).sample(places, len(places))
            reads = ((os.pread(files[path], member.size, member.offset), member) for path, member in shuffled)
            payloads = (checked(payload, member) if compare else payload for payload, member in reads)
            count += batches(map(safetensors.load, payloads))
        for file in files.values():
            os.close(file)
        return count

    def stream() -> int:
        samples = (
            sample for _ in range(EPOCHS) for sample in webdataset.WebDataset(tars, shardshuffle=False).shuffle(64)
        )
        return batches(safetensors.load(sample["safetensors"]) for sample in samples)

    def plain() -> int:
        samples = (
            sample
            for _ in range(EPOCHS)
            for sample in webdataset.WebDataset(arrays, shardshuffle=False).shuffle(64).decode()
        )
        return batches((torch.from_numpy(s["mean.npy"]), torch.from_numpy(s["logvar.npy"])) for s in samples)

    print(f"{arguments.clips} clips of {2 * int(np.prod(size)) * 4 / 2**20:.2f} MiB (mean and log-variance)")
    return {
        "Kinema": packs_of(index, shape, cache, Window.start),
        "WebDataset, its own decode()": plain,
        "WebDataset, bytes parsed by safetensors": stream,
        "bare reads": bare,
        "bare reads, checksums compared": partial(bare, compare=True),
    }


def video(arguments: argparse.Namespace, folder: Path) -> dict[str, Loader]:
    """Video: ours, and the same decoder in a loop over bytes that are read by index."""
    height, width = (int(side) for side in arguments.size.split("x"))
    shape = ClipShape(arguments.frames, height // 2, width // 2)
    index = write_clips(folder / "clips", arguments.clips, arguments.frames, (height, width))

    def bare() -> int:
        files = (read_member(index.folder, entry, "mp4") for entry in index.entries)
        return batches(decode_clip(mp4, shape, FPS, 0.0, Decoder.decord) for mp4 in files)

    print(
        f"{arguments.clips} clips of {arguments.frames} frames {arguments.size}, to {height // 2}x{width // 2}, decord"
    )
    return {"Kinema": packs_of(index, shape, None, Window.start), "bare decoder": bare}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["latents", "video"])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--latent", default="16x5x32x32", help="channels x frames x height x width")
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.clips < LANES * PACK:
        parser.error(f"--clips {arguments.clips} do not fill one step. Type --clips {LANES * PACK} or more.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        loaders = {"latents": latents, "video": video}[arguments.what](arguments, Path(folder))
        compare(loaders, arguments.rounds)


if __name__ == "__main__":
    main()
