"""What one rank owns of a run's tensors, and its copy in host memory that a save is written from."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kinema.distributed.layout import Layout
from kinema.training.checkpoints.pieces import Piece, share


def owned(
    layout: Layout, shards: Sequence[Tensor | None], names: Iterable[str], rank: int, ranks: int, prefix: str = ""
) -> Iterator[Piece]:
    """The elements of parameters `names` that this rank is to write; those of all ranks make each of them once."""
    pieces = _held(layout, shards, names, prefix)
    return share(pieces, rank, ranks) if layout.replicated else pieces


def _held(layout: Layout, shards: Sequence[Tensor | None], names: Iterable[str], prefix: str) -> Iterator[Piece]:
    for name in names:
        if fragment := layout.fragments.get(name):
            shard = shards[fragment.shard]
            assert shard is not None, f"no values of {name}"
            yield Piece(f"{prefix}{name}", tuple(fragment.shape), fragment.start, fragment.of_shard(shard).detach())


class HostMemory:
    """Copies of pieces in memory that stays from save to save: fresh pages would cost the step more than the copy."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def look_now(self) -> None:
        """On a GPU: `copy`, which another thread may call, is to wait for what was computed by now, and no longer."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, files: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
        """The pieces of each file as they are now. The copy before, if there was one, is overwritten."""
        with torch.cuda.stream(self._stream):
            copies = {file: [self._copy(file, piece) for piece in pieces] for file, pieces in files.items()}
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _copy(self, file: str, piece: Piece) -> Piece:
        values, key = piece.values, (file, piece.key)
        kept = self._copies.get(key)
        if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
            kept = self._copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        kept.copy_(values, non_blocking=values.is_cuda)
        return Piece(piece.name, piece.shape, piece.start, kept)
