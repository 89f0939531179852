"""Tensors in pieces: each rank writes the elements that it owns, and anybody reads any elements by name.

A file is plain safetensors. A tensor that lies in it whole stands under its name, with its shape. Of one that lies in
several files each holds flat pieces, under `name@start`; `shapes` in the header then says the shape of the whole.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from zlib_ng import zlib_ng

CHUNK_BYTES = 1 << 22
SHAPES = "shapes"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names that safetensors gives to number formats."""


class PieceError(ValueError):
    """Files that do not hold what they should, or numbers that no file may hold."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one flattened tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element within the whole."""
    values: Tensor
    """(size,), on any device."""

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name if self.is_whole else f"{self.name}@{self.start}"

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.values.numel() == prod(self.shape)

    def cut(self, first: int, last: int) -> "Piece":
        """Its elements [first, last)."""
        return Piece(self.name, self.shape, self.start + first, self.values[first:last])


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor as one piece."""
    return Piece(name, tuple(tensor.shape), 0, tensor.detach().contiguous().view(-1))


def share(pieces: Iterable[Piece], rank: int, ranks: int) -> Iterator[Piece]:
    """This rank's even part of pieces that every rank has: a slice of all of them laid end to end."""
    pieces = list(pieces)
    total = sum(piece.values.numel() for piece in pieces)
    first, last, passed = total * rank // ranks, total * (rank + 1) // ranks, 0
    for piece in pieces:
        size = piece.values.numel()
        low, high = max(first - passed, 0), min(last - passed, size)
        if low < high or (size == 0 and rank == 0):
            yield piece.cut(low, high)
        passed += size


class Sum(NamedTuple):
    """The checksum of a piece, from which that of its tensor and of its file follow."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int
    """In elements."""
    num_bytes: int
    crc32: int


class Written(NamedTuple):
    """What was written to a file."""

    num_bytes: int
    crc32: int
    sums: list[Sum]


def write_pieces(path: Path, pieces: Sequence[Piece]) -> Written:
    """Write pieces that lie in host memory, chunk by chunk, checksummed on the way: no second copy of them is made.

    Raises PieceError for a number that is not finite: such a state is not worth going on from.
    """
    pieces = sorted(pieces, key=lambda piece: (-piece.values.element_size(), piece.key))
    header = _header(pieces)
    crc, sums = zlib_ng.crc32(header), []
    with path.open("wb") as file:
        file.write(header)
        for piece in pieces:
            own = 0
            for chunk in piece.values.split(CHUNK_BYTES // piece.values.element_size()):
                if chunk.is_floating_point() and not chunk.isfinite().all():
                    raise PieceError(f"{piece.name} holds a number that is not finite")
                content = memoryview(chunk.view(torch.uint8).numpy())
                file.write(content)
                own = zlib_ng.crc32(content, own)
            num_bytes = piece.values.numel() * piece.values.element_size()
            crc = zlib_ng.crc32_combine(crc, own, num_bytes)
            dtype = str(piece.values.dtype)
            sums.append(Sum(piece.name, piece.shape, dtype, piece.start, piece.values.numel(), num_bytes, own))
        return Written(file.tell(), crc, sums)


def _header(pieces: Sequence[Piece]) -> bytes:
    """The head of a safetensors file: its length, and in JSON where each tensor lies."""
    shapes = {piece.name: piece.shape for piece in pieces if not piece.is_whole}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **({SHAPES: json.dumps(shapes)} if shapes else {})}}
    offset = 0
    for piece in pieces:
        end = offset + piece.values.numel() * piece.values.element_size()
        shape = piece.shape if piece.is_whole else piece.values.shape
        entries[piece.key] = {"dtype": DTYPES[piece.values.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def whole_sums(sums: Iterable[Sum]) -> dict[str, Sum]:
    """Checksums of whole tensors from those of their pieces; PieceError where pieces overlap or are missing."""
    found: dict[str, list[Sum]] = {}
    for one in sums:
        found.setdefault(one.name, []).append(one)
    return {name: _joined(sorted(pieces, key=lambda one: one.start)) for name, pieces in found.items()}


def _joined(pieces: list[Sum]) -> Sum:
    crc, size, num_bytes = 0, 0, 0
    for one in pieces:
        if one.start != size:
            raise PieceError(f"{one.name}: a piece begins at {one.start} where {size} comes next")
        crc = zlib_ng.crc32_combine(crc, one.crc32, one.num_bytes)
        size, num_bytes = size + one.size, num_bytes + one.num_bytes
    if size != prod(pieces[0].shape):
        raise PieceError(f"{pieces[0].name}: {size} elements of {prod(pieces[0].shape)} were written")
    return pieces[0]._replace(start=0, size=size, num_bytes=num_bytes, crc32=crc)


class _Place(NamedTuple):
    start: int
    end: int
    path: Path
    key: str
    is_flat: bool


class StoredTensors:
    """The tensors of one or more files, by name; only what is asked for is read. Use it in a `with` block."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers. PieceError if a file is no safetensors, or if pieces overlap or are missing."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[_Place]] = {}
        self._files: dict[Path, Any] = {}
        for path in paths:
            self._enter(path)
        for name, places in self._places.items():
            places.sort()
            edges = [0, *(edge for place in places for edge in place[:2]), prod(self.shapes[name])]
            if edges[::2] != edges[1::2]:
                raise PieceError(f"{name}: its pieces {edges[1:-1]} do not make {edges[-1]} elements")

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def full(self, name: str) -> Tensor:
        """A whole tensor."""
        places = self._places[name]
        if not places[0].is_flat:
            return self._files[places[0].path].get_tensor(name)
        first = self._files[places[0].path].get_slice(places[0].key)[:0]
        full = torch.empty(self.shapes[name], dtype=first.dtype)
        self.read(full.view(-1), name)
        return full

    def read(self, target: Tensor, name: str, start: int = 0) -> None:
        """Fill `target` (size,), on any device, with the elements of a tensor from `start` on."""
        end = start + target.numel()
        for place in self._places[name]:
            low, high = max(start, place.start), min(end, place.end)
            if low < high:
                target[low - start : high - start].copy_(self._elements(place, low - place.start, high - place.start))

    def _elements(self, place: _Place, low: int, high: int) -> Tensor:
        file = self._files[place.path]
        if place.is_flat:
            return file.get_slice(place.key)[low:high]
        return file.get_tensor(place.key).view(-1)[low:high]

    def _enter(self, path: Path) -> None:
        try:
            file = self._files[path] = safe_open(path, "pt")
            shapes = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, _, start = key.rpartition("@")
                shape = file.get_slice(key).get_shape()
                is_flat = name in shapes
                if not is_flat:
                    name, start, shapes[key] = key, 0, shape
                place = _Place(int(start), int(start) + prod(shape), path, key, is_flat)
                self.shapes[name] = tuple(shapes[name])
                self._places.setdefault(name, []).append(place)
        except (SafetensorError, ValueError) as error:
            raise PieceError(f"{path} is no file of tensors: {error}") from error
