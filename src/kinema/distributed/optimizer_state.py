"""An optimiser's state by generic names, whatever keeps it: what a checkpoint saves and restores."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from kinema.distributed.layout import Layout

ADAM_STATE = ("exp_avg", "exp_avg_sq")
"""Adam's two moments (Kingma and Ba 2015), named as torch names them."""

Allocate = Callable[[Tensor], Tensor]
"""Zeros of the shape, type and device of a tensor."""


@runtime_checkable
class NamedState(Protocol):
    """What an optimiser of our own says of its state. `moved` is one of the flat tensors that it moves."""

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state tensors, one number for each weight, of the parameters of a group."""
        ...

    def create_state(self, moved: Tensor, group: dict[str, Any], allocate: Allocate) -> None:
        """The state before the first step."""
        ...

    def read_state(self, moved: Tensor, name: str) -> Tensor:
        """One state tensor as float32, of the shape of `moved`."""
        ...

    def write_state(self, moved: Tensor, name: str, value: Tensor) -> None:
        """Continue from a float32 state tensor of the shape of `moved`."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An optimiser that must know which parameters the flat tensors that it moves are made of."""

    def place(self, moved: list[Tensor], layout: Layout) -> None:
        """`moved` are the shards of the layout."""
        ...


class TorchAdamState:
    """The state of `torch.optim.AdamW`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state = optimizer.state

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """See `NamedState`."""
        return ADAM_STATE

    def create_state(self, moved: Tensor, group: dict[str, Any], allocate: Allocate) -> None:
        """See `NamedState`."""
        moments = {name: allocate(moved.detach()) for name in ADAM_STATE}
        self.state[moved].update(step=torch.zeros((), device=moved.device), **moments)

    def read_state(self, moved: Tensor, name: str) -> Tensor:
        """See `NamedState`."""
        return self.state[moved][name]

    def write_state(self, moved: Tensor, name: str, value: Tensor) -> None:
        """See `NamedState`."""
        self.state[moved][name].copy_(value)


def named_state(optimizer: torch.optim.Optimizer) -> NamedState:
    """The door to an optimiser's state."""
    if isinstance(optimizer, NamedState):
        return optimizer
    if type(optimizer) is torch.optim.AdamW:
        return TorchAdamState(optimizer)
    raise TypeError(f"{type(optimizer).__name__} does not say which state it has (see NamedState)")


def state_files(folder: Path) -> Allocate:
    """Zeros in files under `folder` that are mapped into memory: the kernel reads and writes them as they are used.

    The files lose their names at once, so that they vanish with the process, whatever ends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()

    def allocate(like: Tensor) -> Tensor:
        assert like.device.type == "cpu", "only offloaded state lies in files"
        path = folder / f"state-{os.getpid()}-{dist.get_rank()}-{next(numbers)}"
        mapped = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
        path.unlink()
        return mapped.view(like.shape)

    return allocate
