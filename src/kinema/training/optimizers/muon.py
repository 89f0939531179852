"""Muon: the momentum of each hidden matrix made orthogonal, as a whole, however it is sharded; AdamW elsewhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kinema.distributed.layout import Layout
from kinema.distributed.optimizer_state import ADAM_STATE, Allocate
from kinema.training.optimizers.blockwise import adamw_step

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen for the steepest slope at zero (Jordan et al. 2024)."""


def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearly orthogonal matrix with the singular vectors of `matrix` (m, n) and singular values near 1, in `dtype`.

    Newton and Schulz's iteration as in Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.to(dtype).T if tall else matrix.to(dtype)
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


def rms_of_adamw(shape: Sequence[int]) -> float:
    """What makes an update as long as AdamW's, so that both share a learning rate (Liu et al. 2025, Moonlight)."""
    return 0.2 * math.sqrt(max(shape[0], math.prod(shape[1:])))


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold hidden matrices (and kernels, as matrices by output channel); others use AdamW.

    Momentum is sharded like the weights. To orthogonalize, each matrix is put together on one rank, the matrices of a
    round on different ranks, and its update is sent to all: 2 (W - 1) / W of the matrices' bytes a rank and step, as
    an all-reduce. Without ZeRO every rank computes every update, and nothing is sent.
    """

    layout: Layout
    moved: list[Tensor]

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    def place(self, moved: list[Tensor], layout: Layout) -> None:
        """Learn where the parameters lie in the flat tensors that the engine has this optimiser move."""
        self.moved, self.layout = moved, layout

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """See `NamedState`."""
        return ("momentum",) if group["muon"] else ADAM_STATE

    def create_state(self, moved: Tensor, group: dict[str, Any], allocate: Allocate) -> None:
        """See `NamedState`."""
        state = {name: allocate(moved.detach()) for name in self.state_names(group)}
        self.state[moved].update(step=torch.zeros((), device=moved.device), **state)

    def read_state(self, moved: Tensor, name: str) -> Tensor:
        """See `NamedState`."""
        return self.state[moved][name]

    def write_state(self, moved: Tensor, name: str, value: Tensor) -> None:
        """See `NamedState`."""
        self.state[moved][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every tensor that has a gradient. A collective under ZeRO."""
        for group in self.param_groups:
            for moved in (moved for moved in group["params"] if moved.grad is not None):
                if group["muon"]:
                    self._move(moved, group)
                else:
                    adamw_step(moved, self.state[moved], group)

    def _move(self, moved: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[moved], moved.grad
        assert gradient is not None
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(state["momentum"], group["momentum"])  # Nesterov's
        moved.mul_(1 - group["lr"] * group["weight_decay"])
        shard = next(number for number, tensor in enumerate(self.moved) if tensor is moved)
        for name, update in self._updates(direction, self.layout.members[shard]):
            if fragment := self.layout.fragments.get(name):
                mine = fragment.of_full(update).to(moved)
                fragment.of_shard(moved).add_(mine, alpha=-group["lr"] * rms_of_adamw(fragment.shape))

    def _updates(self, direction: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The update of each whole matrix; where the state is sharded, computed once, on one rank."""
        sharded = not self.layout.replicated
        world, rank = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
        for first in range(0, len(names), world):
            turn = names[first : first + world]
            matrices = [self.layout.share(direction, name) for name in turn]
            if sharded:
                _for_each_owner(dist.reduce, "dst", matrices)
            if rank < len(turn):
                matrices[rank] = self._update(matrices[rank])
            if sharded:
                _for_each_owner(dist.broadcast, "src", matrices)
            yield from zip(turn, matrices, strict=True)

    def _update(self, matrix: Tensor) -> Tensor:
        found = orthogonalize(matrix.flatten(1), self.defaults["steps"], self.defaults["dtype"])
        return found.to(matrix).reshape(matrix.shape).contiguous()


def _for_each_owner(collective: Callable[..., Any], role: str, matrices: list[Tensor]) -> None:
    """One collective a matrix, all at once; the n-th belongs to rank n."""
    for wait in [collective(matrix, **{role: owner}, async_op=True) for owner, matrix in enumerate(matrices)]:
        wait.wait()
