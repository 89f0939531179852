"""Embeddings of captions, encoded once, and read where the encoder would have run."""

import hashlib
import itertools
import json
import os
import shlex
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinema.conditioning.text.combined import CombinedText, of_parts
from kinema.conditioning.text.encoder import TextConfig, TextEncoder
from kinema.conditioning.text.hashed import HashText, HashTextEncoder
from kinema.conditioning.text.policy import PretrainedText
from kinema.conditioning.text.pretrained import describe
from kinema.conditioning.text.reading import hash_stored, load_tokenizer
from kinema.identity import to_plain

FORMAT_VERSION = 1
MANIFEST = "text.json"
SHARD_BYTES = 2**27


class Stored(NamedTuple):
    """One tensor of a caption as it lies on disk."""

    rows: int
    """Its length when it is whole: zeros at the end are not stored."""
    crc32: int


class TextCache:
    """A folder of embeddings and the policy that made them.

    It only grows, by safetensors shards that take their names when they are whole and never change: a cache that was
    interrupted is one that lacks captions. Reading maps the shards into memory, and touches what is read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.exists(folder):
            raise ValueError(f"data.text={folder} has no {MANIFEST}: it is no text cache. {_make(folder)}")
        self.manifest = json.loads((self.folder / MANIFEST).read_bytes())
        self._shards: list[Any] = []
        self._places: dict[str, tuple[int, dict[str, Stored]]] = {}
        for path in sorted(self.folder.glob("text-*.safetensors")):
            self._open(path)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether the folder is a text cache, whole or not."""
        return (Path(folder) / MANIFEST).is_file()

    @classmethod
    def create(cls, folder: str | Path, config: TextConfig | CombinedText, encoder: TextEncoder) -> "TextCache":
        """An empty cache for what this encoder, built from this config, will say."""
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise ValueError(f"--out {folder} is not empty, and no text cache. Choose another folder.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "identity": identify(config),
            "described": encoder.describe(),
            "width": encoder.width,
            "config": to_plain(config),
        }
        aside = Path(folder) / f".{MANIFEST}.part"
        aside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        os.replace(aside, Path(folder) / MANIFEST)
        return cls(folder)

    def check(self, config: TextConfig | CombinedText) -> None:
        """Raise ValueError, naming each field with both values, if another policy made these embeddings."""
        found = {"format_version": self.manifest["format_version"], **self.manifest["identity"]}
        wanted = {"format_version": FORMAT_VERSION, **identify(config)}
        keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        if keys:
            fields = ", ".join(f"text.{key}={found.get(key)!r} (here {wanted.get(key)!r})" for key in keys)
            raise ValueError(
                f"data.text={self.folder} was made with {fields}. Encode the captions again, into another folder "
                "(kinema data encode-text), or type data.text=null to encode in every step."
            )

    def lacking(self, captions: Iterable[str]) -> list[str]:
        """The distinct captions that are not here, in their order; millions may be asked for, and are not kept."""
        return list(dict.fromkeys(caption for caption in captions if _key(caption) not in self._places))

    def read(self, caption: str) -> dict[str, Tensor]:
        """The words of a caption on the CPU, by the names of `Condition`; the bits that the encoder gave."""
        if _key(caption) not in self._places:
            raise ValueError(f"data.text={self.folder} lacks a caption: {caption!r}. {_make(self.folder)}")
        shard, parts = self._places[_key(caption)]
        return {name: self._read(shard, f"{_key(caption)}/{name}", stored) for name, stored in parts.items()}

    def _read(self, shard: int, name: str, stored: Stored) -> Tensor:
        found = self._shards[shard].get_tensor(name)
        if _crc32(found) != stored.crc32:
            raise ValueError(f"data.text={self.folder}: the bytes of {name} changed on disk. {_make(self.folder)}")
        whole = torch.zeros(stored.rows, *found.shape[1:])
        whole[: len(found)] = found
        return whole

    def _open(self, path: Path) -> None:
        try:
            shard = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"data.text: {path} is damaged ({error}). Remove this file, and encode what it held again: "
                f"kinema data encode-text DATA --out {self.folder}"
            ) from error
        for key, parts in json.loads(shard.metadata()["captions"]).items():
            self._places[key] = len(self._shards), {name: Stored(*stored) for name, stored in parts.items()}
        self._shards.append(shard)


class TextCacheWriter:
    """Adds captions to a cache's folder, a shard at a time; leaving the context, in any way, keeps what was added."""

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._tensors: dict[str, Tensor] = {}
        self._captions: dict[str, dict[str, Stored]] = {}
        self._bytes = 0

    def __enter__(self) -> "TextCacheWriter":
        return self

    def add(self, caption: str, words: dict[str, Tensor]) -> None:
        """Append what an encoder made of a caption, float32, by the names of `Condition`."""
        key = _key(caption)
        self._captions[key] = {}
        for name, tensor in words.items():
            packed = pack(tensor)
            self._tensors[f"{key}/{name}"] = packed
            self._captions[key][name] = Stored(len(tensor), _crc32(packed))
            self._bytes += packed.nbytes
        if self._bytes >= self.shard_bytes:
            self._write()

    def _write(self) -> None:
        if not self._captions:
            return
        # Named after what it holds, so that two writers of one folder never take each other's name.
        name = f"text-{_key(' '.join(sorted(self._captions)))}.safetensors"
        aside = self.folder / f".{name}.part"
        save_file(self._tensors, aside, metadata={"captions": json.dumps(self._captions)})
        os.replace(aside, self.folder / name)
        self._tensors, self._captions, self._bytes = {}, {}, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()


class CachedTextEncoder(TextEncoder):
    """Stands in for the encoder that made a cache: the same embeddings and policy, and no weights in memory."""

    def __init__(self, cache: TextCache, max_tokens: int) -> None:
        super().__init__(max_tokens)
        self.cache = cache
        self.width = cache.manifest["width"]

    @classmethod
    def load(cls, folder: str | Path, config: TextConfig | CombinedText) -> "CachedTextEncoder":
        """Open a cache; ValueError if it was made by another policy than this config's."""
        cache = TextCache(folder)
        cache.check(config)
        return cls(cache, config.max_tokens)

    def check_covers(self, captions: Iterable[str], prompts: Sequence[str], data: Sequence[str]) -> None:
        """Raise ValueError unless the captions of these data sets, these prompts and the null caption are cached."""
        folder = self.cache.folder
        lacking, typed = self.cache.lacking(itertools.chain([""], captions)), self.cache.lacking(prompts)
        if missing := list(dict.fromkeys([*lacking, *typed])):
            options = "".join(f" --prompt {shlex.quote(prompt)}" for prompt in typed)
            commands = [f"kinema data encode-text {each} --out {folder}" for each in data]
            raise ValueError(
                f"data.text={folder} lacks {len(missing)} captions of the data and of task.samples, e.g. "
                f"{missing[0]!r}. Type: {' && '.join(commands)}{options}"
            )

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> embeddings (L_i, width) float32."""
        return [self.cache.read(caption)["text"].to(self.device) for caption in captions]

    def beside(self, captions: Sequence[str]) -> dict[str, list[Tensor]]:
        """What else the encoder made of the captions."""
        words = [self.cache.read(caption) for caption in captions]
        names = [name for name in words[0] if name != "text"] if words else []
        return {name: [each[name].to(self.device) for each in words] for name in names}

    def describe(self) -> dict[str, Any]:
        """What the encoder described."""
        return dict(self.cache.manifest["described"])


def identify(config: TextConfig | CombinedText) -> dict[str, Any]:
    """What an encoder would describe, without its weights in memory: theirs is the fingerprint of the files."""
    if isinstance(config, PretrainedText):
        return describe(config, load_tokenizer(config), hash_stored(config))
    if isinstance(config, CombinedText):
        return of_parts({name: identify(part) for name, part in config.parts().items()})
    assert isinstance(config, HashText)
    return {**HashTextEncoder(config).describe(), "width": config.width}


def pack(tensor: Tensor) -> Tensor:
    """float32 (L, width) or (width,) -> without zeros at the end, and in bfloat16 where not a bit is lost by either."""
    tensor = tensor.cpu().contiguous()
    filled = tensor.view(torch.int32) != 0  # bits, since -0.0 equals 0.0
    filled = filled.any(dim=1) if tensor.ndim > 1 else filled
    kept = tensor[: int(filled.nonzero()[-1]) + 1 if filled.any() else 0].clone()
    half = kept.bfloat16()
    return half if torch.equal(half.float().view(torch.int32), kept.view(torch.int32)) else kept


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes())


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()[:32]


def _make(folder: str | Path) -> str:
    return f"Type: kinema data encode-text DATA --out {folder}"
