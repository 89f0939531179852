"""From a step and a lane to a pack of decoded clips, or of cached latents."""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kinema.data.clip_decoder import ClipDecoder, DecodingRules
from kinema.data.config import Crop, Window
from kinema.data.decoders.video import DecodeError, DecoderDied
from kinema.data.entry import ClipEntry
from kinema.data.geometry import ClipShape
from kinema.data.images import IMAGES, decode_image, media_of
from kinema.data.keyed import keyed_seed
from kinema.data.latents import LatentCache
from kinema.data.pack import Failure, Fallback, Pack
from kinema.data.plan import Plan, Slot
from kinema.data.rights import RightsPolicy, contradiction
from kinema.data.shards import DamagedSample, DatasetIndex, read_member
from kinema.data.store import Member, store_of


class ClipReader(Dataset):
    """Map-style data set whose items are the packs, by (step, lane)."""

    def __init__(
        self,
        index: DatasetIndex,
        plan: Plan,
        *,
        fps: float,
        decoding: DecodingRules,
        window: Window,
        crop: Crop,
        seed: int,
        latents: LatentCache | None,
        rights: RightsPolicy | None = None,
        condemned: Mapping[str, str] | None = None,
    ) -> None:
        self.index, self.plan, self.fps = index, plan, fps
        self.decoder = ClipDecoder(decoding)
        self.window, self.crop, self.seed, self.latents = window, crop, seed, latents
        self.rights = rights
        self.compared: set[int] = set()  # entries whose json in the tar says the same as the index
        self.condemned = dict(condemned or {})  # keys of clips that killed or hung a process, with the reason
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
        entries = [self.index.entries[slot.clip.entry_index] for slot in slots]
        self._expect(slots, entries)
        contents: list[Any] = []
        failures, withdrawn, fallbacks = [], [], list[Fallback]()
        for slot, entry in zip(slots, entries, strict=True):
            if refusal := self._refusal(slot, entry):
                withdrawn.append(refusal)
                contents.append(None)
                continue
            try:
                contents.append(self._read_clip(slot, entry, fallbacks))
            except (DamagedSample, DecodeError) as error:
                reason = error.reason if isinstance(error, DamagedSample) else str(error)
                failures.append(Failure(entry.record.key, entry.shard, reason, isinstance(error, DecoderDied)))
                contents.append(None)
        weights = torch.tensor([float(content is not None) for content in contents])
        contents = [self._blank(slot) if c is None else c for slot, c in zip(slots, contents, strict=True)]
        return Pack(
            step=step,
            lane=lane,
            keys=[entry.record.key for entry in entries],
            captions=[entry.record.caption for entry in entries],
            shapes=[slot.clip.shape for slot in slots],
            frames=contents if self.latents is None else None,
            latents=None if self.latents is None else contents,
            weights=weights,
            cost=sum(slot.clip.cost for slot in slots),
            positions=[slot.position for slot in slots],
            epochs=[slot.epoch for slot in slots],
            failures=failures,
            fps=self.fps,
            seconds=time.perf_counter() - began,
            entries=[slot.clip.entry_index for slot in slots],
            withdrawn=withdrawn,
            fallbacks=fallbacks,
            storage=self._storage_counts(),
        )

    def _expect(self, slots: list[Slot], entries: list[ClipEntry]) -> None:
        """Let the pack's clips be fetched while its first ones are decoded."""
        if self.latents is not None:
            pairs = zip(slots, entries, strict=True)
            self.latents.expect(
                [self._latents_of(slot, entry) for slot, entry in pairs if self._has_latents(slot, entry)]
            )
            return
        wanted: dict[Any, list[tuple[str, Member]]] = {folder: [] for folder in self.index.folders}
        for slot, entry in zip(slots, entries, strict=True):
            number = slot.clip.entry_index
            folder, own = self._own(number, entry)
            if entry.record.key not in self.condemned and not self._refusal(slot, entry):
                media = media_of(own.members)
                names = (media,) if self.rights is None or number in self.compared else ("json", media)
                wanted[folder] += [(own.shard, own.members[name]) for name in names if name in own.members]
        for folder, members in wanted.items():
            store_of(folder).expect(members)

    def _storage_counts(self) -> dict[str, float]:
        counts = Counter[str]()
        for folder in self.index.folders if self.latents is None else [self.latents.folder]:
            counts.update(store_of(folder).take_counts())
        return dict(counts)

    def _has_latents(self, slot: Slot, entry: ClipEntry) -> bool:
        assert self.latents is not None
        return not self._refusal(slot, entry) and entry.record.key not in self.latents.failures

    def _own(self, number: int, entry: ClipEntry) -> tuple[str | os.PathLike[str], ClipEntry]:
        """The folder that a clip's bytes lie in, and its entry there, which a joint index shows under another key."""
        return self.index.locate(number) if self.index.parts else (self.index.folder, entry)

    def _refusal(self, slot: Slot, entry: ClipEntry) -> Failure | None:
        reason = self.rights and self.rights.refusal(self._own(slot.clip.entry_index, entry)[1].record)
        return Failure(entry.record.key, entry.shard, reason) if reason else None

    def _compare_record(self, number: int, entry: ClipEntry) -> None:
        """Once for each clip: rights are planned by the index, and must be those that lie beside the clip."""
        if self.rights is None or number in self.compared or "json" not in entry.members:
            return
        folder, own = self._own(number, entry)
        if difference := contradiction(own.record, read_member(folder, own, "json")):
            raise DamagedSample(entry.record.key, entry.shard, difference)
        self.compared.add(number)

    def _read_clip(self, slot: Slot, entry: ClipEntry, fallbacks: list[Fallback]) -> Any:
        key = entry.record.key
        if key in self.condemned:
            raise DecoderDied(self.condemned[key])
        progress = self.progress[self.worker].numpy()  # the shared numbers themselves: setting a tensor's costs more
        progress[1:] = slot.clip.entry_index, time.monotonic_ns()
        try:
            if self.latents is not None:
                return self.latents.read(*self._latents_of(slot, entry))
            return self._read_frames(slot, entry, fallbacks)
        except DecoderDied as error:
            self.condemned[key] = str(error)
            raise
        finally:
            progress[1] = -1

    def _read_frames(self, slot: Slot, entry: ClipEntry, fallbacks: list[Fallback]) -> Tensor:
        self._compare_record(slot.clip.entry_index, entry)
        spare = entry.record.duration_seconds - slot.clip.shape.frames / self.fps
        start, top, left = self._window_and_crop(slot, max(spare, 0.0))
        media = media_of(entry.members)
        content = read_member(*self._own(slot.clip.entry_index, entry), media)
        if media in IMAGES:
            return decode_image(content, slot.clip.shape, (top, left))
        clip = self.decoder.decode(content, slot.clip.shape, self.fps, start, (top, left))
        for failed, reason in clip.refusals:
            fallbacks.append(Fallback(entry.record.key, entry.shard, failed.name, clip.decoder.name, reason))
        return clip.frames

    def _window_and_crop(self, slot: Slot, spare_seconds: float) -> tuple[float, float, float]:
        """Start in seconds, and the crop's place along height and width: keyed by (seed, position)."""
        draws = [keyed_seed(self.seed, name, slot.position) / 2**64 for name in ("window", "top", "left")]
        start = draws[0] * spare_seconds if self.window is Window.random else 0.0
        top, left = draws[1:] if self.crop is Crop.random else (0.5, 0.5)
        return start, top, left

    def _latents_of(self, slot: Slot, entry: ClipEntry) -> tuple[str, ClipShape, float]:
        """Key, shape and start of the cached window that is due."""
        assert self.latents is not None
        key = entry.record.key
        starts = self.latents.starts(key, slot.clip.shape)
        chosen = keyed_seed(self.seed, "window", slot.position) % len(starts) if self.window is Window.random else 0
        return key, slot.clip.shape, starts[chosen]

    def _blank(self, slot: Slot) -> Any:
        if self.latents is None:
            return torch.zeros(*slot.clip.shape, 3, dtype=torch.uint8)
        shape = self.latents.latent_shape(slot.clip.shape)
        return torch.zeros(shape), torch.zeros(shape)
