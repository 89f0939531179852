"""Where each parameter lies in this rank's shards, and the way between shards and full tensors by name."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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


Fill = Callable[[Fragment, Tensor], object]
"""Writes the elements of a fragment into the tensor (size,) that it is given."""


class Layout:
    """The fragments of every trainable parameter that this rank owns; some parameters may have none here."""

    def __init__(
        self, shapes: dict[str, torch.Size], shards: dict[str, int], fragments: Sequence[Fragment], replicated: bool
    ) -> None:
        self.shapes = shapes
        self.shard_of = shards
        self.members = [[name for name in shapes if shards[name] == n] for n in range(max(shards.values()) + 1)]
        """Parameters of each shard, of which this rank owns some or none; the same on every rank."""
        self.fragments = {fragment.name: fragment for fragment in fragments}
        self.replicated = replicated
        """Every rank owns every parameter whole."""

    def gather(self, shards: Sequence[Tensor | None], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Full float32 tensors of parameters `names` from shard-shaped values, on every rank. A collective."""
        for name in names:
            values = shards[self.shard_of[name]]
            assert values is not None, f"no values of {name}"
            full = self.share(values, name)
            if not self.replicated:
                dist.all_reduce(full)
            yield name, full

    def share(self, shard: Tensor, name: str) -> Tensor:
        """What this rank has of a full tensor, zero elsewhere: the sum over ranks is the tensor.

        It lies where collectives work; an offloaded shard may not.
        """
        device = torch.device("cuda") if dist.get_backend() == "nccl" else shard.device
        full = torch.zeros(self.shapes[name], device=device)
        if fragment := self.fragments.get(name):
            fragment.of_full(full).copy_(fragment.of_shard(shard.contiguous()))
        return full

    def scatter(self, full: dict[str, Tensor], shards: Sequence[Tensor]) -> None:
        """Fill shard-shaped tensors from full ones by parameter name, where `full` has them. No collective."""
        self.fill(shards, full, lambda fragment, part: part.copy_(fragment.of_full(full[fragment.name].contiguous())))

    def fill(self, shards: Sequence[Tensor], names: Iterable[str], fill: Fill) -> None:
        """Let `fill` write this rank's elements of parameters `names` into shard-shaped tensors. No collective."""
        for name in names:
            if fragment := self.fragments.get(name):
                fill(fragment, fragment.of_shard(shards[fragment.shard]))


def layout_of(parameters: dict[str, nn.Parameter], group_of: dict[str, int], optimizer: Any, zero_stage: int) -> Layout:
    """The layout that DeepSpeed's `optimizer` gave these parameters, after `deepspeed.initialize`.

    `group_of` is the number of each parameter's group.
    """
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    if zero_stage == 0:
        order = [id(p) for group in optimizer.param_groups for p in group["params"]]
        shards = {name: order.index(id(p)) for name, p in parameters.items()}
        fragments = [Fragment(name, shapes[name], 0, p.numel(), shards[name], 0) for name, p in parameters.items()]
    elif zero_stage < 3:
        shards, fragments = group_of, list(_of_flat_groups(parameters))
    else:
        places = {name: optimizer.grad_position[optimizer.get_param_id(p)] for name, p in parameters.items()}
        shards = {name: shard for name, (shard, _, _) in places.items()}
        fragments = list(_of_partitions(parameters, places))
    return Layout(shapes, shards, fragments, replicated=zero_stage == 0)


def _of_flat_groups(parameters: dict[str, nn.Parameter]) -> Iterator[Fragment]:
    """ZeRO 1 and 2 lay a group's parameters end to end and cut the whole: a parameter may lie across ranks."""
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            inside, shard = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, parameter.shape, inside.start, inside.numel, mapping.param_group_index, shard.start)


def _of_partitions(parameters: dict[str, nn.Parameter], places: dict[str, Any]) -> Iterator[Fragment]:
    """ZeRO 3 cuts every parameter into one part for each rank; the last parts may be short or empty."""
    for name, parameter in parameters.items():
        shard, offset, part = places[name]
        start = part * dist.get_rank()
        size = min(part, parameter.ds_numel - start)
        if size > 0:
            yield Fragment(name, parameter.ds_shape, start, size, shard, offset)
