"""Packs of ranks that work on them together: the first rank of each group reads, and sends what it read."""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import torch

from kinema.data.packs.pack import Pack, flatten, unflatten
from kinema.distributed.collectives import from_first, tensor_from_first
from kinema.distributed.process import Process

Steps = Iterable[list[Pack]]


def read_once(process: Process, read: Callable[[], Steps]) -> Iterator[list[Pack]]:
    """The packs of each step that `read` gives on the first rank of this rank's sequence group, on all its ranks.

    Were each to read them, a clip that only one of them could decode would end their agreement without a word. What
    the first rank fails with, all of them raise.
    """
    return iter(read()) if process.mesh.sequence_group is None else _from_first(process, read)


def _from_first(process: Process, read: Callable[[], Steps]) -> Iterator[list[Pack]]:
    group, device = process.mesh.sequence_group, process.device
    for outcome in _outcomes(read) if process.mesh.counts else repeat(None):
        flattened = [flatten(pack) for pack in outcome] if isinstance(outcome, list) else []
        told = from_first([(shell, flat.shape, flat.dtype) for shell, flat in flattened] or outcome, group)
        if told is None:
            return
        if isinstance(told, Exception):
            raise told
        flats = [flat.to(device) for _, flat in flattened]
        flats = flats or [torch.empty(shape, dtype=dtype, device=device) for _, shape, dtype in told]
        sent = [tensor_from_first(flat, group).cpu() for flat in flats]
        yield [unflatten(shell, flat) for (shell, _, _), flat in zip(told, sent, strict=True)]


def _outcomes(read: Callable[[], Steps]) -> Iterator[list[Pack] | Exception | None]:
    """The packs of each step, then None; an error instead of what it prevented."""
    try:
        yield from read()
        yield None
    except Exception as error:
        yield error
