"""Identity: config dataclasses as plain dictionaries and back, and short hashes of values and of weights."""

import dataclasses
import enum
import hashlib
import json
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from zlib_ng import zlib_ng


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready values, with its class name under `type`."""
    return {
        "type": type(config).__name__,
        **{f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)},
    }


def from_plain(plain: dict[str, Any], *choices: type) -> Any:
    """The dataclass that `to_plain` wrote; its `type` must be one of `choices` and its keys that class's fields."""
    by_name = {choice.__name__: choice for choice in choices}
    fields = dict(plain)
    kind = fields.pop("type", None)
    if kind not in by_name:
        raise ValueError(f"type={kind} is unknown here; this version reads {sorted(by_name)}.")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(by_name[kind]), fields))


def digest(value: Any) -> str:
    """A short, stable hash of JSON-ready values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of_checksums(checksums: dict[str, tuple[tuple[int, ...], str, int]]) -> str:
    """As `fingerprint`, of (shape, number format, CRC-32 of the bytes) by name: ranks make it of their parts."""
    lines = [f"{name} {shape} {dtype} {crc32}\n" for name, (shape, dtype, crc32) in sorted(checksums.items())]
    return f"crc32-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}"


def fingerprint_like(mark: str, tensors: dict[str, Tensor]) -> str:
    """The fingerprint of `tensors` of the kind that `mark` is: the same text if they are what it was made of."""
    if not mark.startswith("crc32-"):
        return fingerprint(tensors)
    return fingerprint_of_checksums({name: _checksum(tensor) for name, tensor in tensors.items()})


def _checksum(tensor: Tensor) -> tuple[tuple[int, ...], str, int]:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return tuple(tensor.shape), str(tensor.dtype), zlib_ng.crc32(content)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short hash of names, shapes, types and every byte: two sets of weights share it only if they are the same."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
