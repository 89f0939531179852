"""The few collectives that the loop needs, in plain words."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


def all_sum(values: list[float]) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if dist.get_world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_sum_array(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """An array summed over all ranks; its length must be the same on every rank."""
    tensor = torch.from_numpy(values.copy())
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def gather_objects(value: Any) -> list[Any]:
    """The plain value of every rank, in rank order, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def gather_to_main(value: Any) -> list[Any] | None:
    """The plain value of every rank, in rank order, on the main rank; None elsewhere."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone, dst=0)
    return everyone


def from_main(value: Any) -> Any:
    """The main rank's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The value of the first rank of a group, on all its ranks."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def tensor_from_first(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x, filled with what it holds on the first rank of a group; on a device that the group's backend reaches."""
    dist.broadcast(x, group=group, group_src=0)
    return x


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()
