"""Cached posteriors of an index's clips: from one cache, or from one for each data set of a mixture."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kinema.data.config import DataConfig, Window
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.geometry import ClipShape
from kinema.data.packs.latents import MANIFEST, LatentCache, Place
from kinema.data.packs.pack import Fallback
from kinema.data.steps.keyed import keyed_seed
from kinema.data.steps.plan import Plan, Slot
from kinema.data.storage.place import resolve_cache
from kinema.data.storage.store import add_counts

Found = tuple[LatentCache, Place]


def open_caches(data: DataConfig, index: DatasetIndex, vae_hash: str | None) -> dict[str, LatentCache]:
    """The cache of each member of the index, checked against what the run would encode; none where videos are read.

    ValueError names the key of the configuration and the field in which a cache differs.
    """
    if data.latent_folders and vae_hash is None:
        cached, none = ", ".join(data.latent_folders), " ".join(f"{key}=null" for key in data.latent_folders)
        raise ValueError(f"{cached}: a VAE trains on frames. Type {none}.")
    return {
        name: LatentCache.load(
            resolve_cache(folder, MANIFEST, data.cache_folder, data.storage, key),
            vae_hash=str(vae_hash),
            data_hash=part.hash,
            shapes=data.all_shapes,
            fps=data.fps,
            decoder=data.decoder,
            named=key,
        )
        for (name, part), (key, folder) in zip(index.members.items(), data.latent_folders.items(), strict=False)
    }


class CachedClips:
    """The contents of packs as posteriors, where `DecodedClips` has frames."""

    kind = "latents"

    def __init__(self, index: DatasetIndex, caches: Mapping[str, LatentCache], window: Window, seed: int) -> None:
        """`caches` by the names of `index.members`."""
        self.index, self.caches, self.window, self.seed = index, caches, window, seed

    def check_covers(self, plan: Plan) -> None:
        """Raise ValueError unless every clip of a plan is cached in its shape, or noted as failed."""
        for stage in plan.stages:
            for name, cache in self.caches.items():
                cache.check_covers(
                    (self.index.text("key", clip.entry_index), clip.shape)
                    for clip in stage.clips
                    if self.index.place(clip.entry_index)[0] == name
                )

    def expect(self, slots: Sequence[Slot]) -> list[Found]:
        """Where the window of each clip lies that its position draws; they are read next, and no others."""
        found = [self._find(slot) for slot in slots]
        for cache in self.caches.values():
            cache.expect([place for owner, place in found if owner is cache])
        return found

    def read(self, found: Found) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a clip, as `LatentCache.read`."""
        cache, place = found
        return cache.read(place)

    def blank(self, shape: ClipShape) -> tuple[Tensor, Tensor]:
        """What stands in the place of a clip that could not be read."""
        sizes = [cache.latent_shapes[shape] for cache in self.caches.values() if shape in cache.latent_shapes]
        return torch.zeros(sizes[0]), torch.zeros(sizes[0])

    def take_counts(self) -> dict[str, float]:
        """What reading from addresses took since the last call."""
        return add_counts(cache.take_counts() for cache in self.caches.values())

    def take_fallbacks(self) -> list[Fallback]:
        """Nothing is decoded."""
        return []

    def close(self) -> None:
        """Nothing is to be ended."""

    def _find(self, slot: Slot) -> Found:
        number = slot.clip.entry_index
        draw = keyed_seed(self.seed, "window", slot.position) if self.window is Window.random else 0
        cache = self.caches[self.index.place(number)[0]]
        return cache, cache.find(self.index.text("key", number), slot.clip.shape, draw)
