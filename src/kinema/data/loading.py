"""Packs of decoded clips (or cached latents), read by worker processes in the order of the plan."""

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kinema.data.decoding import DecodeError, Decoder, decode_clip
from kinema.data.geometry import ClipShape, Geometry, assign_shape
from kinema.data.latents import LatentCache
from kinema.data.plan import Plan, PlannedClip, Slot, keyed_seed
from kinema.data.shards import (
    MANIFEST,
    DamagedSample,
    DatasetIndex,
    index_name,
    read_member,
    write_aside,
)

REMOTE_SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
"""Address schemes that data.path may have; never `pipe`, which runs commands."""


POLL_SECONDS = 2.0
"""How often a waiting loader looks whether its workers live."""


class Window(Enum):
    """Which part of a longer clip is shown: its start, or a random one each time."""

    start = "start"
    random = "random"


class Crop(Enum):
    """Which part of a wider or higher clip is shown: the centre, or a random one each time."""

    center = "center"
    random = "random"


@dataclass
class DataConfig:
    """The data set, the sizes that clips are brought to, and how a step's clips are dealt out."""

    path: str = "data/toy"
    """Folder of shards (see data_prep), or an address (file, http, https, s3, gs, hf) that is copied to
    cache_folder.
    """
    cache_folder: str = "~/.cache/kinema/data"
    """Where remote data sets are kept on this machine."""
    train_split: str = "train"
    heldout_split: str = "heldout"
    fps: float = 8.0
    """Clips are sampled by time at this rate, whatever the rate of the file."""
    shapes: list[list[int]] = field(default_factory=lambda: [[17, 64, 64]])
    """Sizes [frames, height, width] in use; each clip takes the nearest aspect ratio, then the longest that
    fits.
    """
    window: Window = Window.random
    crop: Crop = Crop.center
    decoder: Decoder = Decoder.decord
    clips_per_step: int = 16
    """Global batch: clips in one optimizer step, all ranks together."""
    lanes: int = 4
    """Packs in one step; the number of data ranks must divide it, and each serves its share one after the
    other.
    """
    max_pack_tokens: int = 8192
    """Most tokens in one pack: what bounds memory."""
    shuffle_block_shards: int = 4
    """Clips are shuffled inside blocks of so many shards; more mixes better and reads less locally."""
    num_workers: int = 2
    """Reading processes of each rank; 0 reads in the training process. The data do not depend on it."""
    prefetch: int = 2
    """Packs that each worker keeps ready."""
    timeout_seconds: float = 300.0
    """Longest wait for one pack before the run stops and names the clips in work."""
    max_failed_fraction: float = 0.01
    """More damaged clips than this share, and more than min_failed_clips, stop the run."""
    min_failed_clips: int = 3
    allowed_licenses: list[str] = field(default_factory=lambda: ["*"])
    """Licences as the clips state them, e.g. [CC-BY-3.0]; "*" allows all, even `unknown`."""
    require_captions: bool = True
    """Leave out clips without a caption, counted; otherwise they train as the empty caption."""
    max_clips: int | None = None
    """Use only the first clips of the split, for example 1 to overfit; null uses all."""
    latents: str | None = None
    """Folder of cached VAE latents to read in place of the videos."""
    text: str | None = None
    """Folder of cached embeddings to read in place of loading the text encoder (`kinema data encode-text`)."""

    def __post_init__(self) -> None:
        for name in ("fps", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be above 0.")
        for name in ("clips_per_step", "lanes", "max_pack_tokens", "shuffle_block_shards", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1.")
        for name in ("num_workers", "min_failed_clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 0.")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"data.max_failed_fraction={self.max_failed_fraction} must lie in 0 to 1.")
        if not self.shapes or any(len(shape) != 3 for shape in self.shapes):
            raise ValueError(f"data.shapes={self.shapes} must list [frames, height, width], e.g. [[17,64,64]].")
        if not self.allowed_licenses:
            raise ValueError('data.allowed_licenses=[] allows no clip. Type ["*"] to allow all.')

    @property
    def clip_shapes(self) -> list[ClipShape]:
        """`shapes` as ClipShape."""
        return [ClipShape(*shape) for shape in self.shapes]


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read or decoded."""

    key: str
    shard: str
    reason: str


@dataclass
class Pack:
    """The clips of one lane in one step, in the plan's order, with equal shapes side by side.

    A failed clip keeps its place, with zero frames (or latents) and weight 0. Either `frames` or `latents` is
    None.
    """

    step: int
    lane: int
    keys: list[str]
    captions: list[str]
    shapes: list[ClipShape]
    frames: list[Tensor] | None
    """uint8 (T, H, W, 3) RGB."""
    latents: list[tuple[Tensor, Tensor]] | None
    """Posterior mean and log-variance, float32 (C, t, h, w)."""
    weights: Tensor
    """float32 (B,): 1, or 0 for a failed clip."""
    positions: list[int]
    epochs: list[int]
    failures: list[Failure]
    fps: float
    seconds: float
    """Time that reading and decoding took in the worker."""


class DataWorkerError(RuntimeError):
    """A reading process died or hung; names the clips that were being decoded."""


@dataclass
class KeepReport:
    """How many clips of a data set are used, and why the others are not."""

    total: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Clips by reason."""
    dropped_by_source: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """One line, e.g. `kept 16/180 (9%): too short 150, no caption 14`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        share = f"kept {self.kept}/{self.total} ({self.kept / max(self.total, 1):.0%})"
        return f"{share}: {reasons}" if reasons else share


def plan_clips(
    index: DatasetIndex,
    shapes: Sequence[ClipShape],
    fps: float,
    geometry: Geometry,
    *,
    allowed_licenses: Sequence[str] = ("*",),
    require_captions: bool = True,
    max_clips: int | None = None,
    cost: Callable[[int], float] = float,
) -> tuple[list[PlannedClip], KeepReport]:
    """Give every usable clip its shape, tokens and cost, and count the others by reason.

    `cost` maps a clip's tokens to the work of training on it. Raises ValueError for an illegal shape (with
    the nearest legal ones), and when no clip remains.
    """
    legal = [geometry.check(shape) for shape in shapes]
    tokens = {shape: geometry.num_tokens(shape) for shape in legal}
    report = KeepReport(total=len(index.entries))
    clips: list[PlannedClip] = []
    for number, entry in enumerate(index.entries):
        record = entry.record
        shape = assign_shape(record, legal, fps)
        reason = None
        if "*" not in allowed_licenses and record.license not in allowed_licenses:
            reason = f"license {record.license} not in data.allowed_licenses"
        elif require_captions and not record.caption.strip():
            reason = "no caption"
        elif shape is None:
            reason = "too short"
        elif shape.frames > 1 and record.fps < 0.95 * fps:  # frames would be shown twice; 23.976 passes for 24
            reason = "frame rate below data.fps"
        if reason is None and max_clips is not None and len(clips) >= max_clips:
            reason = "beyond data.max_clips"
        if reason is None and shape is not None:
            clips.append(PlannedClip(number, shape, tokens[shape], cost(tokens[shape])))
        else:
            report.dropped[str(reason)] += 1
            report.dropped_by_source[record.source] += 1
    report.kept = len(clips)
    if not clips:
        raise ValueError(_nothing_left(index, legal, fps, report))
    return clips, report


def _nothing_left(index: DatasetIndex, shapes: Sequence[ClipShape], fps: float, report: KeepReport) -> str:
    longest = max((entry.record.duration_seconds for entry in index.entries), default=0.0)
    fastest = max((entry.record.fps for entry in index.entries), default=0.0)
    fewest = min(shape.frames for shape in shapes)
    return (
        f"No clip of {index.folder} can be used: {report.line()}. The shortest of data.shapes needs {fewest} "
        f"frames at data.fps={fps}, {fewest / fps:.2f} s; the longest clip lasts {longest:.2f} s and the "
        f"fastest has {fastest:g} frames a second. Type fewer frames, another data.fps, or other data."
    )


def make_loader(
    index: DatasetIndex,
    plan: Plan,
    lanes: Sequence[int],
    start_step: int,
    num_steps: int,
    *,
    fps: float,
    decoder: Decoder = Decoder.decord,
    window: Window = Window.start,
    crop: Crop = Crop.center,
    seed: int,
    num_workers: int = 0,
    prefetch: int = 2,
    timeout_seconds: float = 300.0,
    latents: LatentCache | None = None,
) -> Iterator[list[Pack]]:
    """Yield the packs of these lanes, one list a step, for steps start_step to start_step + num_steps.

    A pack depends on (data, plan, seed, step, lane) only, so any number of workers yields the same. Closing
    the iterator, or dropping it, ends the workers.
    """
    if latents is not None:
        if crop is not Crop.center:
            raise ValueError(f"data.crop={crop.name} cannot be used with data.latents, which cache the centre crop.")
        latents.check_covers([(index.entries[clip.entry_index].record.key, clip.shape) for clip in plan.clips])
    dataset = _Packs(index, plan, fps=fps, decoder=decoder, window=window, crop=crop, seed=seed, latents=latents)
    wanted = _StepsAndLanes(range(start_step, start_step + num_steps), list(lanes))
    return _read(dataset, wanted, num_workers, prefetch, timeout_seconds)


class _StepsAndLanes(Iterable[tuple[int, int]]):
    """What to load, in order; not a list, as a run may have millions of steps."""

    def __init__(self, steps: range, lanes: list[int]) -> None:
        self.steps, self.lanes = steps, lanes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, lane) for step in self.steps for lane in self.lanes)

    def __len__(self) -> int:
        return len(self.steps) * len(self.lanes)


class _Packs(Dataset):
    """Map-style data set whose items are the packs, by (step, lane)."""

    def __init__(
        self,
        index: DatasetIndex,
        plan: Plan,
        *,
        fps: float,
        decoder: Decoder,
        window: Window,
        crop: Crop,
        seed: int,
        latents: LatentCache | None,
    ) -> None:
        self.index, self.plan, self.fps, self.decoder = index, plan, fps, decoder
        self.window, self.crop, self.seed, self.latents = window, crop, seed, latents
        self.condemned: dict[int, str] = {}  # entries that killed or hung a worker, with the reason
        self.progress = torch.full((1, 3), -1, dtype=torch.int64)
        self.worker = 0

    def start_worker(self, worker: int) -> None:
        """Called in each new worker process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then saves
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that was inherited
        torch.set_num_threads(1)
        self.worker = worker
        self.progress[worker, 0] = os.getpid()

    def __getitem__(self, step_and_lane: tuple[int, int]) -> "Pack":
        began = time.perf_counter()
        step, lane = step_and_lane
        slots = self.plan.step(step)[lane]
        contents: list[Any] = []
        failures = []
        for slot in slots:
            try:
                contents.append(self._read_clip(slot))
            except (DamagedSample, DecodeError) as error:
                entry = self.index.entries[slot.clip.entry_index]
                reason = error.reason if isinstance(error, DamagedSample) else str(error)
                failures.append(Failure(entry.record.key, entry.shard, reason))
                contents.append(None)
        weights = torch.tensor([float(content is not None) for content in contents])
        contents = [self._blank(slot) if c is None else c for slot, c in zip(slots, contents, strict=True)]
        records = [self.index.entries[slot.clip.entry_index].record for slot in slots]
        return Pack(
            step=step,
            lane=lane,
            keys=[record.key for record in records],
            captions=[record.caption for record in records],
            shapes=[slot.clip.shape for slot in slots],
            frames=contents if self.latents is None else None,
            latents=None if self.latents is None else contents,
            weights=weights,
            positions=[slot.position for slot in slots],
            epochs=[slot.epoch for slot in slots],
            failures=failures,
            fps=self.fps,
            seconds=time.perf_counter() - began,
        )

    def _read_clip(self, slot: Slot) -> Any:
        number = slot.clip.entry_index
        if number in self.condemned:
            raise DecodeError(self.condemned[number])
        self.progress[self.worker, 1:] = torch.tensor([number, time.monotonic_ns()])
        contents = self._read_frames(slot) if self.latents is None else self._read_latents(slot)
        self.progress[self.worker, 1] = -1
        return contents

    def _read_frames(self, slot: Slot) -> Tensor:
        entry = self.index.entries[slot.clip.entry_index]
        spare = entry.record.duration_seconds - slot.clip.shape.frames / self.fps
        start, top, left = self._window_and_crop(slot, max(spare, 0.0))
        mp4 = read_member(self.index.folder, entry, "mp4")
        return decode_clip(mp4, slot.clip.shape, self.fps, start, self.decoder, crop=(top, left))

    def _window_and_crop(self, slot: Slot, spare_seconds: float) -> tuple[float, float, float]:
        """Start in seconds, and the crop's place along height and width: keyed by (seed, position)."""
        draws = [keyed_seed(self.seed, name, slot.position) / 2**64 for name in ("window", "top", "left")]
        start = draws[0] * spare_seconds if self.window is Window.random else 0.0
        top, left = draws[1:] if self.crop is Crop.random else (0.5, 0.5)
        return start, top, left

    def _read_latents(self, slot: Slot) -> tuple[Tensor, Tensor]:
        assert self.latents is not None
        key = self.index.entries[slot.clip.entry_index].record.key
        starts = self.latents.starts(key, slot.clip.shape)
        chosen = keyed_seed(self.seed, "window", slot.position) % len(starts) if self.window is Window.random else 0
        return self.latents.read(key, slot.clip.shape, starts[chosen])

    def _blank(self, slot: Slot) -> Any:
        if self.latents is None:
            return torch.zeros(*slot.clip.shape, 3, dtype=torch.uint8)
        shape = self.latents.latent_shape(slot.clip.shape)
        return torch.zeros(shape), torch.zeros(shape)


def _read(
    dataset: _Packs, wanted: _StepsAndLanes, num_workers: int, prefetch: int, timeout_seconds: float
) -> Iterator[list[Pack]]:
    if num_workers == 0:
        for step in wanted.steps:
            yield [dataset[step, lane] for lane in wanted.lanes]
        return
    readers = _Readers(dataset, num_workers, prefetch, timeout_seconds)
    try:
        readers.start(wanted, skip=0)
        for number in range(len(wanted.steps)):
            yield [readers.next(wanted, number * len(wanted.lanes) + lane) for lane in range(len(wanted.lanes))]
    finally:
        readers.stop()


class _Readers:
    """The worker processes of one loader: a crashed or hung one is replaced, its clip counted as failed."""

    def __init__(self, dataset: _Packs, num_workers: int, prefetch: int, timeout_seconds: float) -> None:
        self.dataset, self.num_workers, self.prefetch = dataset, num_workers, prefetch
        self.timeout_seconds = timeout_seconds
        self.restarts_in_a_row = 0
        # Of each worker: its process, the entry that it decodes or -1, and since when (nanoseconds).
        dataset.progress = torch.full((num_workers, 3), -1, dtype=torch.int64).share_memory_()
        self.packs: Iterator[tuple[Pack, Tensor]] = iter(())

    def start(self, wanted: _StepsAndLanes, skip: int) -> None:
        """Fork the workers, for all that is wanted after the first `skip` packs."""
        self.dataset.progress.fill_(-1)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Rest(wanted, skip),
            num_workers=self.num_workers,
            collate_fn=_flatten,
            prefetch_factor=self.prefetch,
            timeout=min(POLL_SECONDS, self.timeout_seconds),
            worker_init_fn=self.dataset.start_worker,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        previous = signal.getsignal(signal.SIGCHLD)
        self.packs = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's own raises wherever training happens to be when a worker dies; `next` looks itself.
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)

    def next(self, wanted: _StepsAndLanes, number: int) -> Pack:
        """Pack `number` of what is wanted."""
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                pack = _unflatten(*next(self.packs))
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):  # a pack cannot be fetched from a worker that just died
                    time.sleep(0.2)
                dead = self._dead()
                hung = time.monotonic() >= deadline and not dead
                if not (dead or hung):
                    if "DataLoader timed out" in str(error):
                        continue
                    raise  # the worker's own exception
                self._condemn(dead, hung, error)
                self.stop()
                self.start(wanted, skip=number)
                deadline = time.monotonic() + self.timeout_seconds
                continue
            self.restarts_in_a_row = 0
            return pack

    def stop(self) -> None:
        """End the workers, and kill those that do not end."""
        self.packs = iter(())  # PyTorch ends them when its iterator goes
        pids = set(self.dataset.progress[:, 0].tolist())
        for child in multiprocessing.active_children():
            if child.pid in pids:
                child.kill()
                child.join()

    def _dead(self) -> dict[int, int | None]:
        """{worker: exit code} of the workers that ended, None where it is unknown."""
        workers = getattr(self.packs, "_workers", [])
        return {number: process.exitcode for number, process in enumerate(workers) if not process.is_alive()}

    def _condemn(self, dead: dict[int, int | None], hung: bool, error: Exception) -> None:
        """Note the clips at fault so that nobody decodes them again; raise when no clip can be at fault."""
        self.restarts_in_a_row += 1
        if -signal.SIGBUS in dead.values():
            raise DataWorkerError(
                "A reading process ran out of shared memory (/dev/shm). Type a lower data.prefetch or "
                "data.num_workers, or give the machine or container more shared memory."
            ) from error
        now, before = time.monotonic_ns(), len(self.dataset.condemned)
        for worker, (_, entry, since) in enumerate(self.dataset.progress.tolist()):
            if entry < 0:
                continue
            if worker in dead and dead[worker] != -signal.SIGTERM:  # that is the scheduler's doing, not the clip's
                self.dataset.condemned[entry] = f"decoding it killed the process (exit code {dead[worker]})"
            elif hung and now - since > 0.5e9 * self.timeout_seconds:
                self.dataset.condemned[entry] = f"decoding it takes over data.timeout_seconds={self.timeout_seconds:g}"
        if len(self.dataset.condemned) == before and self.restarts_in_a_row > 3:
            raise DataWorkerError(
                f"Reading processes ended or hung {self.restarts_in_a_row} times without a clip at fault "
                f"(exit codes {list(dead.values())}). Type data.num_workers=0 to see the cause."
            ) from error


class _Rest(Iterable[tuple[int, int]]):
    """What is wanted without the packs that were delivered."""

    def __init__(self, wanted: _StepsAndLanes, skip: int) -> None:
        self.wanted, self.skip = wanted, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(self.wanted, self.skip, None)

    def __len__(self) -> int:
        return len(self.wanted) - self.skip


def _flatten(pack: Pack) -> tuple[Pack, Tensor]:
    """Move a pack's clips into one tensor: every tensor handed to another process takes a file descriptor."""
    tensors = _tensors(pack)
    sizes = [tensor.shape for tensor in tensors]
    field_name = "frames" if pack.latents is None else "latents"
    shell: Any = {field_name: sizes}
    return replace(pack, **shell), torch.cat([tensor.flatten() for tensor in tensors])


def _unflatten(pack: Pack, flat: Tensor) -> Pack:
    """The pack again, its clips being views of the one tensor."""
    sizes: Any = pack.frames if pack.latents is None else pack.latents
    parts = flat.split([size.numel() for size in sizes])
    tensors = [part.view(size) for part, size in zip(parts, sizes, strict=True)]
    if pack.latents is None:
        return replace(pack, frames=tensors)
    return replace(pack, latents=list(zip(tensors[::2], tensors[1::2], strict=True)))


def _tensors(pack: Pack) -> list[Tensor]:
    if pack.latents is None:
        assert pack.frames is not None
        return pack.frames
    return [tensor for pair in pack.latents for tensor in pair]


def resolve_folder(path: str, cache_folder: str | Path) -> Path:
    """The local folder of a data set: `path` itself, or a copy of the address it names, e.g.
    https://HOST/FOLDER.

    Shards and indexes are copied whole and checked against the manifest's sha256; those that are there
    already stay. A data set that changed at its address gets a folder of its own. Raises ValueError for a
    scheme outside REMOTE_SCHEMES, an address that does not answer, or a file that arrives damaged.
    """
    scheme, colon, _ = path.partition(":")
    if not colon:
        return Path(path)
    if scheme not in REMOTE_SCHEMES:
        raise ValueError(f"data.path={path} must be a folder, or begin with one of {', '.join(REMOTE_SCHEMES)}.")
    address = path.rstrip("/")
    content = _fetch(f"{address}/{MANIFEST}")
    name = f"{address.rsplit('/', 1)[-1]}-{hashlib.sha256(content).hexdigest()[:16]}"
    folder = Path(cache_folder).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shards = json.loads(content)["shards"]
        files = [(shard["file"], shard["sha256"]) for shard in shards]
        files += [(index_name(shard["file"]), shard["index_sha256"]) for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.path={path}: {MANIFEST} at that address is no manifest ({error!r}).") from error
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine copies, the others find the files
        for file, digest in files:
            _copy(address, file, digest, folder)
        write_aside(folder / MANIFEST, content)
    return folder


def _copy(address: str, file: str, digest: str, folder: Path) -> None:
    if Path(file).name != file:
        raise ValueError(f"data.path={address}: its manifest names the file {file!r}, which is not a plain name.")
    target = folder / file
    if target.is_file():  # written aside and checked before it took its name
        return
    content = _fetch(f"{address}/{file}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{address}/{file} arrived damaged: {len(content)} bytes of another sha256. Try again.")
    write_aside(target, content)


def _fetch(address: str) -> bytes:
    """All bytes at an address, through WebDataset's `gopen`."""
    from webdataset.gopen import gopen, gopen_schemes

    gopen_schemes.setdefault("s3", _open_s3)
    try:
        if address.startswith("file:"):  # gopen would open it as well, but not where WDS_SECURE is set
            return Path(url2pathname(urlparse(address).path)).read_bytes()
        with gopen(address) as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"data.path: {address} cannot be read ({error}).") from error


def _open_s3(address: str, mode: str, bufsize: int) -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise ValueError(f"data.path={address} needs the s3 extra: pip install 'kinema[s3]'.") from error
    return s3fs.S3FileSystem().open(address, mode)
