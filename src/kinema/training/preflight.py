"""What only a running job can show, looked at in its first steps: the silent faults of data, noise, loss and state."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kinema.data.packs.pack import Pack
from kinema.distributed.collectives import gather_objects
from kinema.distributed.engine import Engine
from kinema.distributed.mesh import Mesh
from kinema.training.ema import EMA
from kinema.training.task import Task

SAME_LOSS = 1e-4
SAME_LOSS_BFLOAT16 = 2e-2
"""Largest relative difference between two ranks' losses of one pack, which differ by rounding alone."""

ROUNDING = 1e-6
"""Losses that differ by less are one, however small they are."""


@dataclass
class PreflightConfig:
    """Checks of the first steps of every start; they change no number."""

    steps: int = 2
    """Steps that are checked; 0 checks none."""
    loss: bool = True
    """Let a neighbour compute the losses of each rank's first pack of the first step again: one forward, once."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"preflight.steps={self.steps} must be at least 0, usually 2.")


class PreflightFailed(RuntimeError):
    """A check of the first steps failed; the message begins with its name."""


@dataclass
class Preflight:
    """Looks at `config.steps` steps of one start. All ranks come to the same verdict, and stop together."""

    config: PreflightConfig
    mesh: Mesh
    task: Task
    ema: EMA
    tell: Callable[[str], None]
    """Takes the verdict when the last of these steps has passed."""
    same_loss: float = SAME_LOSS
    _left: int = field(init=False)
    _first: bool = True
    _seconds: float = 0.0
    _noise: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _losses: dict[int, float] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)
    _before: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left = self.config.steps

    def begin(self, packs: Sequence[Pack]) -> None:
        """Before the first micro-step of a step; a collective."""
        if not self._left:
            return
        began = time.perf_counter()
        self._noise, self._losses, self._again = {}, {}, {}
        check_clips(gather_objects((self.mesh.data_rank, [clips_of(pack) for pack in packs])))
        if self._first:
            self._before = self._marks()
        if self._first and self.config.loss and self.mesh.data_size > 1:
            self._again = self.task.recompute(from_neighbour(packs[0], self.mesh))
        self._seconds += time.perf_counter() - began

    def hear(self) -> None:
        """After each micro-step: what noise its clips were given, and their losses."""
        if self._left:
            self._noise |= self.task.noise_marks
            self._losses |= self.task.clip_losses

    def end(self) -> None:
        """After weights and average have moved; a collective. Raises PreflightFailed by the name of the check."""
        if not self._left:
            return
        self._left, began = self._left - 1, time.perf_counter()
        check_noise(gather_objects((self.mesh.data_rank, self._noise)))
        if self._first:
            check_losses(gather_objects((self._losses, self._again)), self.same_loss)
            self._first = False
        for name, engine in self.task.engines().items():
            check_replicas(name, gather_objects(replica_marks(engine)))
        check_finite(gather_objects(dict(self._finite())))
        if not self._left:
            now = self._marks()
            check_moved(gather_objects({what: self._before[what] != marks for what, marks in now.items()}))
        self._seconds += time.perf_counter() - began
        if not self._left:
            self.tell(f"passed in {self._seconds:.2f} s of {self.config.steps} step(s)")

    def _state(self) -> dict[str, list[Tensor]]:
        return {"weights": self.task.engines()["model"].shards(), "ema": self.ema.shards}

    def _marks(self) -> dict[str, list[int]]:
        return {what: marks_of(tensors) for what, tensors in self._state().items()}

    def _finite(self) -> Iterator[tuple[str, bool]]:
        for what, tensors in self._state().items():
            yield what, all(bool(tensor.sum(dtype=torch.float64).isfinite()) for tensor in tensors)


def clips_of(pack: Pack) -> tuple[int, int, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Step, lane, places in the global batch, and number and epoch of the clips."""
    return pack.step, pack.lane, tuple(pack.positions), tuple(zip(pack.entries, pack.epochs, strict=False))


def check_clips(everyone: Sequence[tuple[int, list[Any]]]) -> None:
    """Ranks of a sequence group have equal packs; no place and no clip of an epoch comes to two data ranks."""
    of_group: dict[int, list[Any]] = {}
    for rank, (data_rank, packs) in enumerate(everyone):
        if of_group.setdefault(data_rank, packs) != packs:
            raise PreflightFailed(f"clips: rank {rank} works with others of data rank {data_rank} on different packs.")
    steps = {pack[0] for packs in of_group.values() for pack in packs}
    if len(steps) > 1:
        raise PreflightFailed(f"clips: ranks stand at different steps: {sorted(steps)}.")
    for what, place in (("lane", 1), ("place in the batch", 2), ("clip", 3)):
        given: list[Any] = []
        for packs in of_group.values():
            for pack in packs:
                given += [pack[1]] if place == 1 else pack[place]
        if twice := [item for item, count in Counter(given).items() if count > 1]:
            raise PreflightFailed(f"clips: {len(twice)} {what}(s) come to more than one lane, such as {twice[0]}.")


def check_noise(everyone: Sequence[tuple[int, dict[int, tuple[float, ...]]]]) -> None:
    """No two clips of the step got the same noise, and ranks of a sequence group drew the same."""
    of_group: dict[int, dict[int, tuple[float, ...]]] = {}
    for rank, (data_rank, marks) in enumerate(everyone):
        if of_group.setdefault(data_rank, marks) != marks:
            raise PreflightFailed(f"noise: rank {rank} drew other noise than the first rank of data rank {data_rank}.")
    by_mark: dict[tuple[float, ...], int] = {}
    for marks in of_group.values():
        for position, mark in marks.items():
            if by_mark.setdefault(mark, position) != position:
                raise PreflightFailed(f"noise: clips {by_mark[mark]} and {position} of the batch got the same noise.")


def check_losses(everyone: Sequence[tuple[dict[int, float], dict[int, float]]], tolerance: float) -> None:
    """The loss of a clip is that which another rank computes of it, with its own copy of the weights."""
    trained = {position: loss for losses, _ in everyone for position, loss in losses.items()}
    for rank, (_, again) in enumerate(everyone):
        for position, loss in again.items():
            if not math.isclose(loss, trained[position], rel_tol=tolerance, abs_tol=ROUNDING):
                raise PreflightFailed(
                    f"loss: clip {position} of the batch has the loss {trained[position]:.6g} where it is trained, "
                    f"and {loss:.6g} on rank {rank}: weights, noise or conditions differ between ranks."
                )


def check_replicas(engine: str, everyone: Sequence[dict[str, int]]) -> None:
    """Weights that every rank holds whole are equal to the bit on all of them."""
    for rank, marks in enumerate(everyone):
        if other := [name for name, mark in marks.items() if everyone[0].get(name, mark) != mark]:
            raise PreflightFailed(
                f"replicas: after the update {len(other)} of {len(marks)} weights of {engine} differ between rank 0 "
                f"and rank {rank}, such as {other[0]}."
            )


def check_finite(everyone: Sequence[dict[str, bool]]) -> None:
    """Every rank's share of weights and average is finite."""
    for rank, finite in enumerate(everyone):
        if broken := [what for what, well in finite.items() if not well]:
            raise PreflightFailed(f"finite: {' and '.join(broken)} of rank {rank} hold inf or nan after the update.")


def check_moved(everyone: Sequence[dict[str, bool]]) -> None:
    """Weights and average are others than before, on some rank at least: a share may be all zero gradients."""
    for what in everyone[0]:
        if not any(moved[what] for moved in everyone):
            raise PreflightFailed(f"{what}: nothing moved in the first steps. Is the learning rate 0, or all frozen?")


def marks_of(tensors: Sequence[Tensor]) -> list[int]:
    """A sum over the bits of each tensor, in any order the same; equal tensors have equal marks."""
    if not tensors:
        return []
    return torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in tensors]).tolist()


def replica_marks(engine: Engine) -> dict[str, int]:
    """Marks of the weights that this rank holds whole; under ZeRO 3 that is none."""
    if engine.zero_stage == 3:
        return {}
    named = engine.parameters()
    return dict(zip(named, marks_of([parameter.detach() for parameter in named.values()]), strict=True))


def from_neighbour(pack: Pack, mesh: Mesh) -> Pack:
    """The pack of the data rank before this one, whose own goes to the next; a collective."""
    rank, step, size = dist.get_rank(), mesh.sequence_size, mesh.data_size * mesh.sequence_size
    after, before = (rank + step) % size, (rank - step) % size
    box: list[Any] = [None]
    if mesh.data_rank % 2 == 0:  # half of them send first, so that nobody waits for ever
        dist.send_object_list([pack], after)
        dist.recv_object_list(box, before)
    else:
        dist.recv_object_list(box, before)
        dist.send_object_list([pack], after)
    return box[0]


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
