"""Weights that others wrote, read without running any code of theirs: safetensors and JSON, nothing else."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kinema.interop.preset import Record

Shape = tuple[int, ...]

INDEX = "*.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
PREFIXES = ("model.diffusion_model.", "first_stage_model.", "text_encoders.", "conditioner.", "cond_stage_model.",
            "diffusion_model.", "vae.")  # fmt: skip
"""What single files put before the names of a part; the longer ones first."""
VAE_PREFIXES = ("first_stage_model.", "vae.")
HEADER_CONFIG = "kinema.config"
"""Key of a safetensors header under which Kinema's own single files hold their config, class name included."""
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies, under which name, and its shape; none of its numbers have been read."""

    file: Path
    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Published:
    """One model as its maker stores it."""

    path: Path
    """The folder or file that was named."""
    config: Record | None
    """What the file's header, config.json or Kinema's manifest beside it says; None where nothing does."""
    stored: dict[str, Stored] = field(repr=False)
    """Tensor name, without the prefix of a single file -> where it lies."""
    prefix: str = ""
    left_out: int = 0
    """Tensors of other parts in the same file."""

    @property
    def class_name(self) -> str | None:
        """The class that its config names."""
        return None if self.config is None else self.config.get("_class_name")

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: stored.shape for name, stored in self.stored.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, as it was stored."""
        found: dict[str, Tensor] = {}
        for file in {stored.file: None for stored in self.stored.values()}:
            wanted = {name: stored.name for name, stored in self.stored.items() if stored.file == file}
            with _opened(file) as handle:
                found |= {name: handle.get_tensor(inside) for name, inside in wanted.items()}
        return {name: found[name] for name in self.stored}


def is_pipeline(path: Path) -> bool:
    """Whether this is a folder of several models with a model_index.json."""
    return (path / "model_index.json").is_file()


def read_json(path: Path) -> Record:
    """A JSON object; ValueError when the file holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where a JSON object belongs.")
    return found


def read_published(path: Path, prefix: str | None = None) -> Published:
    """A component's folder or a single file; reads headers only, and refuses all that is not whole safetensors.

    `prefix` chooses a part of a single file that holds several.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    folder = path if path.is_dir() else path.parent
    beside = _config_beside(folder)
    files = [path] if path.is_file() else _weight_files(path)
    for file in files:
        _refuse_pickle(file)
    stored: dict[str, Stored] = {}
    for file in files:
        headers = _headers(file)
        if twice := sorted(stored.keys() & headers.keys()):
            raise ValueError(f"{path}: {twice[0]} is in {stored[twice[0]].file.name} and in {file.name}.")
        stored |= headers
    if path.is_dir():
        _check_index(path, stored)
    chosen, used = _part(path, stored, prefix)
    config = _header_config(files[0]) if len(files) == 1 else None
    if config is None and _may_describe(beside, used):
        config = beside
    return Published(path, config, chosen, used, len(stored) - len(chosen))


def _config_beside(folder: Path) -> Record | None:
    """The config.json of a folder, else what a manifest of Kinema there says of the maker's config."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if not (folder / "manifest.json").is_file():
        return None
    model = read_json(folder / "manifest.json").get("model")
    config = model.get("config") if isinstance(model, dict) else None
    if not isinstance(config, dict) or not config.keys() >= {"num_heads", "norm_eps"}:
        return None  # somebody else's manifest, or that of a VAE
    return {"num_heads": config["num_heads"], "eps": config["norm_eps"]}


def _may_describe(config: Record | None, prefix: str) -> bool:
    """Whether a config beside a file can be of this part of it: a VAE's of no transformer, and the reverse."""
    is_vaes = str((config or {}).get("_class_name")).startswith("Autoencoder")
    return not prefix or is_vaes is (prefix in VAE_PREFIXES)


def _header_config(file: Path) -> Record | None:
    """The config that Kinema writes into the header of a single file."""
    with _opened(file) as handle:
        text = (handle.metadata() or {}).get(HEADER_CONFIG)
    if text is None:
        return None
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {HEADER_CONFIG} in its header is no JSON object ({error}).") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model; ValueError when there are none, too many, or one is missing."""
    indexes, files = sorted(folder.glob(INDEX)), sorted(folder.glob("*.safetensors"))
    if len(indexes) > 1:
        raise ValueError(f"{folder} holds {len(indexes)} indexes, {_names(indexes)}: keep the one you mean.")
    if indexes:
        return _indexed_files(indexes[0])
    shards = [SHARD.fullmatch(file.name) for file in files]
    if files and all(shards) and len({shard["stem"] for shard in shards if shard}) == 1:
        count = int(shards[0]["count"])  # type: ignore[index]  # all() above
        if len(files) != count:
            raise ValueError(f"{folder} holds {len(files)} of {count} shards: {_names(files)}. Download the others.")
        return files
    if len(files) > 1:
        paths = " or ".join(str(file) for file in files[:5])
        raise ValueError(f"{folder} holds several models, {_names(files)}: instead of the folder, name {paths}.")
    if not files:
        _refuse_folder(folder)
    return files


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing[:5])}. "
            "Download them into the same folder."
        )
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files.")
    if outside := [name for name in found.values() if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]}, which is not a file of its own folder.")
    return found


def _check_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    for index in folder.glob(INDEX):
        named = _weight_map(index)
        wrong = [n for n, file in named.items() if n not in stored or stored[n].file.name != file]
        if wrong or stored.keys() - named.keys():
            what = wrong or sorted(stored.keys() - named.keys())
            raise ValueError(f"{index} and its files disagree about {len(what)} tensors: {', '.join(what[:5])}.")


def _refuse_folder(folder: Path) -> None:
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        _refuse_pickle(pickles[0])
    raise ValueError(f"{folder} holds no .safetensors file; name the folder or the file that does.")


def _refuse_pickle(file: Path) -> None:
    start = file.open("rb").read(2) if file.is_file() else b""
    is_pickle = start == b"PK" or (start[:1] == b"\x80" and file.suffix != ".safetensors")
    if file.suffix in PICKLE_SUFFIXES or is_pickle:
        raise ValueError(
            f"{file} is a pickle, which can run any code while it is read; Kinema never does that. Take the "
            "safetensors files of this model, or convert it where you trust it: safetensors.torch.save_file("
            f"torch.load('{file.name}', weights_only=True), '{file.stem}.safetensors')."
        )


def _headers(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds; the library checks the sizes in the header against those of the file."""
    found: dict[str, Stored] = {}
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118  # not a mapping
            part = handle.get_slice(name)
            found[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    if not found:
        raise ValueError(f"{file} holds no tensor.")
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is no whole safetensors file ({error}); download it again."
        ) from None


def _part(path: Path, stored: dict[str, Stored], prefix: str | None) -> tuple[dict[str, Stored], str]:
    """The tensors of one part of a file, without their prefix."""
    parts: dict[str, dict[str, Stored]] = {}
    for name, where in stored.items():
        found = next((known for known in PREFIXES if name.startswith(known)), "")
        parts.setdefault(found, {})[name.removeprefix(found)] = where
    if prefix is not None:
        if prefix not in parts:
            raise ValueError(f"prefix={prefix}: {path} has {', '.join(sorted(parts))} and nothing else.")
        return parts[prefix], prefix
    if len(parts) > 1:
        sizes = ", ".join(f"{name or 'no prefix'} ({len(part)} tensors)" for name, part in sorted(parts.items()))
        raise ValueError(f"{path} holds several models: {sizes}. Choose one, for example --prefix {max(parts)}")
    ((only, part),) = parts.items()
    return part, only


def _names(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:5])
    return shown + (", ..." if len(files) > 5 else "")


def dtype_of(stored: Stored) -> torch.dtype:
    """The type in which a tensor was stored."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored.dtype not in names:
        raise ValueError(f"{stored.file}: {stored.name} has type {stored.dtype}; Kinema reads {', '.join(names)}.")
    return names[stored.dtype]
