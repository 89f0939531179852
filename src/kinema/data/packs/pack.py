"""A pack, the clips of one lane in one step, and its way from a worker to the trainer."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from kinema.data.geometry import ClipShape


@dataclass(frozen=True)
class Failure:
    """A clip that keeps its place with weight 0, and why."""

    key: str
    shard: str
    reason: str
    fatal: bool = False
    """Decoding it killed a process, or had to be killed: nobody tries it again in this run."""


@dataclass(frozen=True)
class Fallback:
    """A clip that one decoder could not read and another one did."""

    key: str
    shard: str
    failed: str
    used: str
    reason: str

    def cause(self) -> str:
        """What equal cases are counted by, e.g. `decord -> pyav: no video stream`."""
        return f"{self.failed} -> {self.used}: {self.reason}"


@dataclass
class Pack:
    """The clips of one lane in one step, in the plan's order, with equal shapes side by side.

    A failed or withdrawn clip keeps its place, with zero frames (or latents) and weight 0. Either `frames` or
    `latents` is None.
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
    cost: float
    """Of training on it, as planned; only ratios matter."""
    positions: list[int]
    epochs: list[int]
    failures: list[Failure]
    """Clips that could not be read or decoded."""
    fps: float
    seconds: float
    """Time that reading and decoding took in the worker."""
    entries: list[int] = field(default_factory=list)
    """Numbers of the clips in the data set's index."""
    storage: dict[str, float] = field(default_factory=dict)
    """Counts of reading from an address (requests, bytes, retries, cache); empty for a local folder."""
    withdrawn: list[Failure] = field(default_factory=list)
    """Clips of the plan that are left out of this step, by data.rights or for what training on them did: weight 0."""
    fallbacks: list[Fallback] = field(default_factory=list)
    """Clips that another decoder read than the first one."""


def flatten(pack: Pack) -> tuple[Pack, Tensor]:
    """Move a pack's clips into one tensor, in shared memory where another process is to get it.

    One, as every tensor handed over takes a file descriptor; shared at once, as it would be copied once more.
    """
    tensors = _tensors(pack)
    sizes = [tensor.shape for tensor in tensors]
    field_name = "frames" if pack.latents is None else "latents"
    shell: Any = {field_name: sizes}
    flat = tensors[0].new_empty(0)
    if get_worker_info() is not None:
        numbers = sum(tensor.numel() for tensor in tensors)
        flat = flat.set_(flat.untyped_storage()._new_shared(numbers * flat.element_size()), 0, (numbers,))
    return replace(pack, **shell), torch.cat([tensor.flatten() for tensor in tensors], out=flat)


def unflatten(pack: Pack, flat: Tensor) -> Pack:
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
