"""The VAE over the ranks of a sequence group: each holds one slab of a clip and its activations, none the whole."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from kinema.distributed.halo import RankSlab, SlabAxis
from kinema.models.vae import CausalVAE, Posterior
from kinema.training.cut import Cut, plan_cut


class ContextParallel:
    """Calls a VAE on clips that every rank of `group` has, and gives each of them the result for the whole clip.

    Without a group it calls the VAE as it is. With one, a loss of what is returned must be computed by every rank
    alike: backwards each takes the gradient of its own slab, and the sum over ranks is that of one rank.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, strides: tuple[int, int], axis: SlabAxis = SlabAxis.auto
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group) if group is not None else 1
        self.strides = strides
        self.axis = axis

    def cut(self, frames: int, height: int, width: int) -> Cut:
        """How a clip of that many pixels is cut."""
        time, space = self.strides
        return plan_cut(
            (1 + (frames - 1) // time, height // space, width // space), self.strides, self.ranks, self.axis
        )

    def reconstruct(
        self, vae: Callable[..., tuple[Tensor, Posterior]], video: Tensor, noise: Tensor
    ) -> tuple[Tensor, Posterior]:
        """`vae(video, noise)`, a VAE or the engine around one: video (B, 3, T, H, W), noise (B, C, t, h, w)."""
        if self.group is None:
            return vae(video, noise)
        slab, cut = self._slab(self.cut(*video.shape[2:]))
        own, posterior = vae(cut.pixels_of(video, slab.index), cut.latents_of(noise, slab.index), slab)
        return slab.whole(own, cut.pixels), self._whole(posterior, slab, cut)

    def encode(self, vae: CausalVAE, video: Tensor) -> Posterior:
        """`vae.encode(video)`, (B, 3, T, H, W) in [-1, 1]."""
        if self.group is None:
            return vae.encode(video)
        slab, cut = self._slab(self.cut(*video.shape[2:]))
        return self._whole(vae.encode(cut.pixels_of(video, slab.index), slab), slab, cut)

    def decode(self, vae: CausalVAE, latents: Tensor) -> Tensor:
        """`vae.decode(latents)`, (B, C, t, h, w)."""
        if self.group is None:
            return vae.decode(latents)
        t, h, w = latents.shape[2:]
        slab, cut = self._slab(plan_cut((t, h, w), self.strides, self.ranks, self.axis))
        return slab.whole(vae.decode(cut.latents_of(latents, slab.index), slab), cut.pixels)

    def _slab(self, cut: Cut) -> tuple[RankSlab, Cut]:
        assert self.group is not None
        return RankSlab(self.group, cut.axis, cut.extents, cut.idle_extent), cut

    @staticmethod
    def _whole(posterior: Posterior, slab: RankSlab, cut: Cut) -> Posterior:
        return Posterior(*(slab.whole(part, cut.extents) for part in posterior))
