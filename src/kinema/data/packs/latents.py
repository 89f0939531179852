"""Cached VAE posteriors: encoded once, read by random access, refused when they belong to something else."""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor

from kinema.data.dataset.shards import DamagedSample, DatasetIndex, index_name, read_member, write_aside
from kinema.data.decode.clip_decoder import ClipDecoder, DecodingRules
from kinema.data.decode.decoders.video import DecodeError, Decoder
from kinema.data.geometry import ClipShape
from kinema.data.packs.windows import CachedWindow, Windows
from kinema.data.steps.candidates import PlannedClip
from kinema.data.storage.store import Member, StoredFolder, WrongBytes, store_of

FORMAT_VERSION = 2
PREPROCESSING = "frames nearest in time; centre crop to the aspect ratio; antialiased bilinear resizing; -1 to 1"
"""What is done to a clip before the VAE sees it; changed with the code that does it: older caches are then refused."""
MANIFEST = "latents.json"
# Latents are views of bytes that cannot be written to, and that nobody else has.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
BLOCK = 512  # bytes; tar rounds every payload up to whole blocks


class LatentWriter:
    """Writes posteriors into WebDataset tars (one safetensors member a clip), an index beside each, and a
    manifest.

    A context manager. The folder takes its name when it is whole; nothing is left of an interrupted one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vae_hash: str,
        data_hash: str,
        shapes: Sequence[ClipShape],
        fps: float,
        decoder: Decoder = Decoder.decord,
        max_samples: int = 1024,
    ) -> None:
        self.folder, self.max_samples = Path(folder), max_samples
        if self.folder.exists():
            raise ValueError(f"folder={self.folder} exists already. Remove it, or choose another for the latents.")
        self.building = self.folder.with_name(self.folder.name + ".building")
        self._identity = _identity(vae_hash, data_hash, shapes, fps, decoder)
        self._latent_shapes: dict[ClipShape, list[int]] = {}
        self._shards: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._failures: dict[str, str] = {}
        self._tar: Any = None

    def __enter__(self) -> "LatentWriter":
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self

    def write(self, key: str, shape: ClipShape, start_seconds: float, mean: Tensor, logvar: Tensor) -> None:
        """Append one posterior, (C, t, h, w) each; kept as float32."""
        if mean.shape != logvar.shape or mean.ndim != 4:
            sizes = f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)}"
            raise ValueError(f"Clip key={key}: {sizes} must both be (C, t, h, w).")
        expected = self._latent_shapes.setdefault(shape, list(mean.shape))
        if expected != list(mean.shape):
            raise ValueError(f"Clip key={key}: latents {list(mean.shape)}, but others of {shape} have {expected}.")
        tensors = {"mean": mean, "logvar": logvar.clone()}  # safetensors refuses shared memory
        tensors = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
        self._append(key, shape, round(start_seconds, 6), safetensors.save(tensors))

    def fail(self, key: str, reason: str) -> None:
        """Note a clip that could not be encoded; reading it reports the reason, as for any damaged clip."""
        self._failures[key] = reason

    def _append(self, key: str, shape: ClipShape, start_seconds: float, payload: bytes) -> None:
        if self._tar is None:
            from webdataset.writer import TarWriter

            self._tar_path = self.building / f"latents-{len(self._shards):06d}.tar"
            self._tar = TarWriter(str(self._tar_path), encoder=False, mtime=0)
        name = f"{key}--{'x'.join(map(str, shape))}--{round(start_seconds * 1e6):012d}"
        self._tar.write({"__key__": name, "safetensors": payload})
        offset = self._tar.tarstream.offset - (len(payload) + BLOCK - 1) // BLOCK * BLOCK
        member = {"offset": offset, "size": len(payload), "crc32": zlib.crc32(payload)}
        self._samples.append({"key": key, "shape": shape, "start_seconds": start_seconds, "member": member})
        if len(self._samples) == self.max_samples:
            self._close_shard()

    def _close_shard(self) -> None:
        self._tar.close()
        path = self._tar_path
        content = json.dumps({"shard": path.name, "samples": self._samples}, indent=0).encode()
        write_aside(path.with_name(index_name(path.name)), content)
        shard = {"file": path.name, "bytes": path.stat().st_size, "samples": len(self._samples)}
        self._shards.append({**shard, "index_sha256": hashlib.sha256(content).hexdigest()})
        self._tar, self._samples = None, []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._close_shard()
        if kind is not None or not self._shards:
            shutil.rmtree(self.building)
            if kind is None:
                raise ValueError(f"No latents were written for folder={self.folder}: {self._failures or 'no clips'}.")
            return
        indexes = "".join(shard["index_sha256"] for shard in self._shards)  # and these hold a checksum of each latent
        manifest = {
            **self._identity,
            "hash": hashlib.sha256(indexes.encode()).hexdigest(),
            "latent_shapes": [[list(shape), latent] for shape, latent in self._latent_shapes.items()],
            "failures": self._failures,
            "shards": self._shards,
        }
        write_aside(self.building / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        os.replace(self.building, self.folder)


def write_latents(
    folder: str | Path,
    index: DatasetIndex,
    clips: Sequence[PlannedClip],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    vae_hash: str,
    shapes: Sequence[ClipShape],
    fps: float,
    decoder: Decoder = Decoder.decord,
    windows_per_clip: int = 1,
) -> dict[str, str]:
    """Encode every planned clip into `folder`; returns {key: reason} of those that failed.

    `encode` maps frames uint8 (T, H, W, 3) to the posterior's mean and log-variance (C, t, h, w). With more
    than one window, starts are spread evenly over what each clip can spare; the loader draws among them.
    """
    failures = {}
    identity: Any = {"vae_hash": vae_hash, "data_hash": index.hash, "shapes": shapes, "fps": fps, "decoder": decoder}
    reader = ClipDecoder(DecodingRules(decoder))
    with closing(reader), LatentWriter(folder, **identity) as writer:
        for clip in clips:
            entry = index.entries[clip.entry_index]
            spare = max(entry.record.duration_seconds - clip.shape.frames / fps, 0.0)
            try:
                mp4 = read_member(index.folder, entry, "mp4")
                for start in np.unique(np.linspace(0, spare, windows_per_clip).round(6)).tolist():
                    frames = reader.decode(mp4, clip.shape, fps, start).frames
                    writer.write(entry.record.key, clip.shape, start, *encode(frames))
            except (DamagedSample, DecodeError) as error:
                failures[entry.record.key] = str(error)
                writer.fail(entry.record.key, str(error))
    return failures


class Place(NamedTuple):
    """Where a window's posterior lies, or why it does not."""

    key: str
    shard: str
    member: Member | None
    """None where encoding failed."""
    reason: str = ""


class LatentCache:
    """Read access to a folder of `LatentWriter`, or to one at an address, through the same door as shards."""

    def __init__(self, folder: Path | StoredFolder, manifest: dict[str, Any], windows: Windows, named: str) -> None:
        self.folder, self.manifest, self._windows, self.named = folder, manifest, windows, named
        self._store = store_of(folder)
        self.latent_shapes = {ClipShape(*shape): tuple(latent) for shape, latent in manifest["latent_shapes"]}
        """(C, t, h, w) of the latents of a clip shape."""

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        vae_hash: str,
        data_hash: str,
        shapes: Sequence[ClipShape],
        fps: float,
        decoder: Decoder = Decoder.decord,
        named: str = "data.latents",
    ) -> "LatentCache":
        """Open a cache; raises ValueError naming the field in which it differs from what the run would
        encode. `named` is the key of the configuration that names the folder.
        """
        folder = folder if isinstance(folder, StoredFolder) else Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{named}={folder} has no {MANIFEST}: it is not a whole latent cache. Encode it again.")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, wanted in _identity(vae_hash, data_hash, shapes, fps, decoder).items():
            if manifest.get(name) != wanted:
                as_made = f"data.{name}={manifest.get(name)}".replace(" ", "")
                narrow = f"type '{as_made}', " * (name in ("shapes", "fps", "decoder"))
                raise ValueError(
                    f"{named}={folder} was made with {name}={manifest.get(name)}, and this run has "
                    f"{name}={wanted}. Encode the latents again, {narrow}or type {named}=null to encode anew "
                    "in every step."
                )
        return cls(folder, manifest, _load_windows(folder, manifest, named), named)

    @property
    def failures(self) -> dict[str, str]:
        """Clips that could not be encoded, by key, with the reason."""
        return self.manifest["failures"]

    def find(self, key: str, shape: ClipShape, draw: int = 0) -> Place:
        """Where a window of the clip lies, of those encoded the one that `draw` falls on; or why none does."""
        if key in self.failures:
            return Place(key, str(self.folder), None, self.failures[key])
        windows = self._windows[key, shape]
        return Place(key, *windows[draw % len(windows)])

    def check_covers(self, wanted: Iterable[tuple[str, ClipShape]]) -> None:
        """Raise ValueError unless every clip, in its shape, is cached or noted as failed."""
        without, total = self._windows.lacking(wanted)
        lacking = [key for key, _ in without if key not in self.failures]
        if lacking:
            raise ValueError(
                f"{self.named}={self.folder} lacks {len(lacking)} of {total} clips, e.g. {lacking[0]}. "
                "Encode the latents again with the same data selection."
            )

    def places(self) -> list[tuple[str, Member]]:
        """Shard and place of every cached window, as they lie in the shards."""
        return list(self._windows)

    def read(self, place: Place) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 (C, t, h, w); raises DamagedSample if encoding the clip failed, or the bytes
        are not those written.
        """
        key, shard, member, reason = place
        if member is None:
            raise DamagedSample(key, shard, reason)
        try:
            return _posterior(self._store.read(shard, member))
        except OSError as error:
            raise DamagedSample(key, shard, f"cannot be read: {error}") from error
        except WrongBytes as error:
            raise DamagedSample(key, shard, f"the latents' member {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedSample(key, shard, f"latents do not parse: {error}") from error

    def expect(self, wanted: Iterable[Place]) -> None:
        """Say which latents will be read next: from an address they come together."""
        self._store.expect([(place.shard, place.member) for place in wanted if place.member])

    def take_counts(self) -> dict[str, float]:
        """What reading them from an address took since the last call."""
        return self._store.take_counts()


def _posterior(payload: bytes) -> tuple[Tensor, Tensor]:
    """Mean and log-variance as views of a safetensors file, which the library would copy: half the time of a read."""
    mean, logvar = _layout(payload[: 8 + int.from_bytes(payload[:8], "little")])
    return _view(payload, *mean), _view(payload, *logvar)


def _view(payload: bytes, offset: int, shape: tuple[int, ...]) -> Tensor:
    """The quickest of several ways: small latents are read in less than 0.2 ms."""
    return torch.from_numpy(np.ndarray(shape, np.float32, payload, offset))


@lru_cache(64)  # latents of one size have the same header
def _layout(header: bytes) -> list[tuple[int, tuple[int, ...]]]:
    """Where in the file the mean begins, and its shape; and the same of the log-variance."""
    facts = json.loads(header[8:])
    parts = [facts[name] for name in ("mean", "logvar")]
    return [(len(header) + part["data_offsets"][0], tuple(part["shape"])) for part in parts]


def _identity(
    vae_hash: str, data_hash: str, shapes: Sequence[ClipShape], fps: float, decoder: Decoder
) -> dict[str, Any]:
    """What must agree between the cache and the run."""
    return {
        "format_version": FORMAT_VERSION,
        "vae_hash": vae_hash,
        "data_hash": data_hash,
        "shapes": sorted(list(shape) for shape in shapes),
        "fps": float(fps),
        "decoder": decoder.value,
        "preprocessing": PREPROCESSING,
    }


def _load_windows(folder: Path | StoredFolder, manifest: dict[str, Any], named: str) -> Windows:
    try:
        return Windows(_windows_of(folder, shard) for shard in manifest["shards"])
    except ValueError as error:
        raise ValueError(f"{named}={folder}: {error}. Encode the latents again.") from error


def _windows_of(folder: Path | StoredFolder, shard: dict[str, Any]) -> list[CachedWindow]:
    path = folder / shard["file"]
    size = path.stat().st_size if path.is_file() else 0
    if isinstance(folder, Path) and size != shard["bytes"]:  # elsewhere, `resolve_folder` looked
        raise ValueError(f"{path} has {size} bytes, not {shard['bytes']}")
    content = path.with_name(index_name(path.name)).read_bytes()
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ValueError(f"the index of {path} was changed")
    return [
        CachedWindow(
            (sample["key"], ClipShape(*sample["shape"])),
            sample["start_seconds"],
            shard["file"],
            Member(**sample["member"]),
        )
        for sample in json.loads(content)["samples"]
    ]
