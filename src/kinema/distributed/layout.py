"""Where each parameter lies in this rank's shards, and the way between shards and full tensors by name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a flattened parameter, and where this rank keeps them; sizes in elements."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """First element within the parameter."""
    size: int
    shard: int
    """Number of the shard, in the order of `Engine.shards()`."""
    offset: int
    """First element within the shard."""

    def of_shard(self, shard: Tensor) -> Tensor:
        """The fragment's elements (size,) in a tensor of the shard's shape, as a view."""
        return shard.view(-1)[self.offset : self.offset + self.size]

    def of_full(self, full: Tensor) -> Tensor:
        """The fragment's elements (size,) in a full, contiguous tensor, as a view."""
        return full.view(-1)[self.start : self.start + self.size]


class Layout:
    """The fragments of every trainable parameter that this rank owns; some parameters may have none here."""

    def __init__(self, shapes: dict[str, torch.Size], fragments: Sequence[Fragment], replicated: bool) -> None:
        self.shapes = shapes
        self.fragments = {fragment.name: fragment for fragment in fragments}
        self.replicated = replicated
        """Every rank owns every parameter whole."""

    def gather(self, shards: Sequence[Tensor | None], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Full float32 tensors of parameters `names` from shard-shaped values, on every rank. A collective."""
        device = next(shard.device for shard in shards if shard is not None)
        for name in names:
            full = torch.zeros(self.shapes[name], device=device)
            if fragment := self.fragments.get(name):
                values = shards[fragment.shard]
                assert values is not None, f"no values of {name}"
                fragment.of_full(full).copy_(fragment.of_shard(values))
            yield name, full if self.replicated else _summed(full)

    def scatter(self, full: dict[str, Tensor], shards: Sequence[Tensor]) -> None:
        """Fill shard-shaped tensors from full ones by parameter name, where `full` has them. No collective."""
        for name, value in full.items():
            if fragment := self.fragments.get(name):
                fragment.of_shard(shards[fragment.shard]).copy_(fragment.of_full(value.contiguous()))


def _summed(full: Tensor) -> Tensor:
    """Sum over ranks, on the device that the process group works on (offloaded shards lie elsewhere)."""
    if dist.get_backend() == "nccl" and full.device.type == "cpu":
        full = full.cuda()
    dist.all_reduce(full)
    return full


def layout_of(parameters: dict[str, nn.Parameter], optimizer: Any, zero_stage: int) -> Layout:
    """The layout that DeepSpeed's `optimizer` gave these parameters, after `deepspeed.initialize`."""
    find = {0: _whole, 1: _of_flat_groups, 2: _of_flat_groups, 3: _of_partitions}[zero_stage]
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    return Layout(shapes, list(find(parameters, shapes, optimizer)), replicated=zero_stage == 0)


def _whole(parameters: dict[str, nn.Parameter], shapes: dict[str, torch.Size], optimizer: Any) -> Iterator[Fragment]:
    """Without ZeRO each parameter is its own shard."""
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in parameters.items():
        yield Fragment(name, shapes[name], 0, parameter.numel(), order.index(id(parameter)), 0)


def _of_flat_groups(
    parameters: dict[str, nn.Parameter], shapes: dict[str, torch.Size], optimizer: Any
) -> Iterator[Fragment]:
    """ZeRO 1 and 2 lay a group's parameters end to end and cut the whole: a parameter may lie across ranks."""
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        inside, shard = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(name, shapes[name], inside.start, inside.numel, mapping.param_group_index, shard.start)


def _of_partitions(
    parameters: dict[str, nn.Parameter], shapes: dict[str, torch.Size], optimizer: Any
) -> Iterator[Fragment]:
    """ZeRO 3 cuts every parameter into one part for each rank; the last parts may be short or empty."""
    for name, parameter in parameters.items():
        shard, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = part * dist.get_rank()
        size = min(part, parameter.ds_numel - start)
        if size > 0:
            yield Fragment(name, shapes[name], start, size, shard, offset)
