"""Frames of an index's clips: each read by its place in a shard, and decoded at a size and window that are due."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.data.account.rights import contradiction
from kinema.data.config import Crop, Window
from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.shards import DamagedSample, DatasetIndex, read_member
from kinema.data.decode.clip_decoder import ClipDecoder, DecodingRules
from kinema.data.decode.images import IMAGES, decode_image, media_of
from kinema.data.geometry import ClipShape
from kinema.data.packs.pack import Fallback
from kinema.data.steps.keyed import keyed_seed
from kinema.data.steps.plan import Slot
from kinema.data.storage.store import Member, add_counts, store_of


class DecodedClips:
    """The contents of packs as frames, where `CachedClips` has posteriors."""

    kind = "frames"

    def __init__(
        self,
        index: DatasetIndex,
        decoding: DecodingRules,
        *,
        fps: float,
        window: Window,
        crop: Crop,
        seed: int,
        compare: bool,
    ) -> None:
        """`compare`: whether what a clip's json in the tar states of rights must be what the index does."""
        self.index, self.decoder, self.fps = index, ClipDecoder(decoding), fps
        self.window, self.crop, self.seed, self.compare = window, crop, seed, compare
        self._compared: set[int] = set()  # entries whose json in the tar says the same as the index
        self._fallbacks: list[Fallback] = []

    def expect(self, slots: Sequence[Slot]) -> list["Located"]:
        """Where each clip lies. They are read next, and no others: fetched while the first ones are decoded."""
        found = [Located(slot, *self.index.locate(slot.clip.entry_index)) for slot in slots]
        wanted: dict[Any, list[tuple[str, Member]]] = {folder: [] for folder in self.index.folders}
        for clip in found:
            names = ("json", clip.media) if self._compares(clip) else (clip.media,)
            members = clip.entry.members
            wanted[clip.folder] += [(clip.entry.shard, members[name]) for name in names if name in members]
        for folder, members_of_it in wanted.items():
            store_of(folder).expect(members_of_it)
        return found

    def read(self, clip: "Located") -> Tensor:
        """uint8 (T, H, W, 3) RGB; raises DamagedSample or DecodeError."""
        self._compare_record(clip)
        shape, entry = clip.slot.clip.shape, clip.entry
        spare = entry.record.duration_seconds - shape.frames / self.fps
        start, top, left = self._window_and_crop(clip.slot, max(spare, 0.0))
        content = read_member(clip.folder, entry, clip.media)
        if clip.media in IMAGES:
            return decode_image(content, shape, (top, left))
        decoded = self.decoder.decode(content, shape, self.fps, start, (top, left))
        key = self.index.key(clip.slot.clip.entry_index)
        shard = self.index.entries[clip.slot.clip.entry_index].shard if decoded.refusals else ""
        for failed, reason in decoded.refusals:
            self._fallbacks.append(Fallback(key, shard, failed.name, decoded.decoder.name, reason))
        return decoded.frames

    def blank(self, shape: ClipShape) -> Tensor:
        """What stands in the place of a clip that could not be read."""
        return torch.zeros(*shape, 3, dtype=torch.uint8)

    def take_fallbacks(self) -> list[Fallback]:
        """The clips read since the last call that another decoder read than the first one."""
        taken, self._fallbacks = self._fallbacks, []
        return taken

    def take_counts(self) -> dict[str, float]:
        """What reading from addresses took since the last call."""
        return add_counts(store_of(folder).take_counts() for folder in self.index.folders)

    def close(self) -> None:
        """End the decoding process."""
        self.decoder.close()

    def _compares(self, clip: "Located") -> bool:
        return self.compare and clip.slot.clip.entry_index not in self._compared and "json" in clip.entry.members

    def _compare_record(self, clip: "Located") -> None:
        """Once for each clip: rights are planned by the index, and must be those that lie beside the clip."""
        if self._compares(clip):
            number = clip.slot.clip.entry_index
            if difference := contradiction(clip.entry.record, read_member(clip.folder, clip.entry, "json")):
                raise DamagedSample(self.index.key(number), self.index.entries[number].shard, difference)
            self._compared.add(number)

    def _window_and_crop(self, slot: Slot, spare_seconds: float) -> tuple[float, float, float]:
        """Start in seconds, and the crop's place along height and width: keyed by (seed, position)."""
        draws = [keyed_seed(self.seed, name, slot.position) / 2**64 for name in ("window", "top", "left")]
        start = draws[0] * spare_seconds if self.window is Window.random else 0.0
        top, left = draws[1:] if self.crop is Crop.random else (0.5, 0.5)
        return start, top, left


@dataclass(frozen=True)
class Located:
    """A clip that is due, and where its bytes lie, as its own data set says."""

    slot: Slot
    folder: str | os.PathLike[str]
    entry: ClipEntry

    @property
    def media(self) -> str:
        """The member that is the video or the image."""
        return media_of(self.entry.members)
