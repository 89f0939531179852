"""Frozen text encoders, each with a policy that the manifest carries and the sampler obeys."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

NULL_CAPTION = ""
"""The caption of a clip without one: its embedding is the null text of training dropout and of guidance."""


@dataclass
class TextConfig:
    """What every text encoder has in common; `HashText` and `PretrainedText` are the choices."""

    max_tokens: int = 32
    """Longer captions are cut here, counted and logged."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"text.max_tokens={self.max_tokens} must be at least 1.")


@dataclass
class HashText(TextConfig):
    """A frozen encoder without a download: each word is a random vector made from its own hash."""

    width: int = 64
    """Numbers in an embedding; even. Words of a small vocabulary stay nearly orthogonal from 64 upwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 2 or self.width % 2:
            raise ValueError(f"text.width={self.width} must be even and at least 2, for example 64.")


class TextFamily(Enum):
    """Which class of `transformers` reads the weights."""

    t5 = "t5"
    umt5 = "umt5"
    clip = "clip"
    auto = "auto"
    """Any encoder that `AutoModel` knows, such as BERT."""


class TextPadding(Enum):
    """What becomes of captions shorter than `max_tokens`; published models differ, and it shows."""

    none = "none"
    """Masked in the encoder; only the real tokens come out."""

    zeros = "zeros"
    """Masked in the encoder; then zeros up to max_tokens."""

    encoded = "encoded"
    """Padding tokens are encoded like words, without any mask, and max_tokens embeddings come out."""


class TextDtype(Enum):
    """What a pretrained encoder computes in; the embeddings are float32 either way."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class PretrainedText(TextConfig):
    """A frozen encoder from `transformers`, read from safetensors weights only."""

    path: str = ""
    """A local folder with config, safetensors weights and tokenizer, or a name on the hub."""

    family: TextFamily = TextFamily.t5
    """t5, umt5, clip or auto."""

    max_tokens: int = 256
    """Longer captions are cut here, counted and logged."""

    padding: TextPadding = TextPadding.none
    """none, zeros or encoded."""

    template: str = "{}"
    """What the encoder reads; {} stands for the caption. The null caption passes through it too."""

    layer: int = -1
    """Which hidden layer to take: -1 is the output with its final norm, -2 the layer before, without it."""

    dtype: TextDtype = TextDtype.float32
    """float32 or bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("text.path is empty: type the folder of a text encoder, or its name on the hub.")
        if self.template.count("{}") != 1:
            raise ValueError(f"text.template={self.template!r} must hold {{}} exactly once, where the caption goes.")
        if self.layer >= 0:
            raise ValueError(f"text.layer={self.layer} counts from the end: -1 is the output, -2 the layer before.")


class TextEncoder:
    """Captions to embeddings. Frozen: holds no trainable weight and no random state."""

    width: int
    device: torch.device = torch.device("cpu")

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_encoded = 0
        self.num_truncated = 0
        self._null: Tensor | None = None

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> embeddings (L_i, width) float32, each independent of the other captions."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Everything that decides an embedding, except where the weights lie."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the encoder, and what it returns from now on."""
        self.device = torch.device(device)
        self._null = None
        return self

    def null(self) -> Tensor:
        """The embedding (L0, width) of the null caption: the same bytes for dropout and for guidance."""
        if self._null is None:
            counts = self.num_encoded, self.num_truncated
            self._null = self.encode([NULL_CAPTION])[0]
            self.num_encoded, self.num_truncated = counts  # the counts are of captions that somebody wrote
        return self._null

    def policy(self) -> dict[str, Any]:
        """What goes into the manifest: `describe()`, the null caption, and a hash over both."""
        policy = {**self.describe(), "width": self.width, "null_caption": NULL_CAPTION}
        text = "\n".join(f"{key}={policy[key]!r}" for key in sorted(policy))
        return {**policy, "hash": hashlib.sha256(text.encode()).hexdigest()}

    def count(self, caption: str, num_tokens: int) -> None:
        """Count a caption of `num_tokens`, and say the first time that one was cut."""
        self.num_encoded += 1
        if num_tokens <= self.max_tokens:
            return
        self.num_truncated += 1
        if self.num_truncated == 1:
            log.warning(
                "A caption of %d tokens is cut to text.max_tokens=%d; more are counted silently: %r",
                num_tokens,
                self.max_tokens,
                caption,
            )


class HashTextEncoder(TextEncoder):
    """Words to random vectors by their hash, plus a trace of the word before and a position code.

    Lower case, compatibility characters unfolded (NFKC), punctuation dropped. A start token comes first, so
    the null caption is one token long. The network must learn what a word means, as with one-hot words;
    nothing about the vectors is learned or stored, and any word of any language has one.
    """

    def __init__(self, config: HashText) -> None:
        super().__init__(config.max_tokens)
        self.width = config.width
        self.positions = position_code(config.max_tokens, config.width)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> embeddings (words + 1, width) float32 of about unit variance."""
        return [self.encode_one(caption).to(self.device) for caption in captions]

    def encode_one(self, caption: str) -> Tensor:
        """One caption -> (words + 1, width) on the CPU."""
        words = ["<start>", *split_words(caption)]
        self.count(caption, len(words))
        vectors = torch.stack([word_vector(word, self.width) for word in words[: self.max_tokens]])
        # The word before, marked as such by turning its vector around: "red" reaches the "ball" it describes.
        before = torch.cat([torch.zeros(1, self.width), vectors[:-1].flip(1)])
        return (vectors + 0.5 * before + 0.5 * self.positions[: len(vectors)]) / 1.5**0.5

    def describe(self) -> dict[str, Any]:
        """Everything that decides an embedding."""
        return {"encoder": "hash", "version": 1, "max_tokens": self.max_tokens, "padding": "none"}


def split_words(caption: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", caption).lower())


@lru_cache(maxsize=100_000)
def word_vector(word: str, width: int) -> Tensor:
    """A word -> its vector (width,) float32, uniform of unit variance; the same bits on every machine."""
    values = np.frombuffer(hashlib.shake_256(word.encode()).digest(4 * width), dtype="<u4")
    uniform = (values.astype(np.float64) + 0.5) / 2**32
    return torch.from_numpy((2 * uniform - 1) * 3**0.5).float()


def position_code(num_tokens: int, width: int) -> Tensor:
    """Sines and cosines (num_tokens, width) of unit variance (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
    return (2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)).float()


class PretrainedTextEncoder(TextEncoder):
    """A transformer encoder of `transformers`, frozen."""

    def __init__(self, config: PretrainedText) -> None:
        super().__init__(config.max_tokens)
        self.config = config
        self.tokenizer = load_tokenizer(config)
        self.model = load_model(config)
        self.width = self.model.config.hidden_size
        self.weights_hash = hash_weights(self.model)

    def to(self, device: torch.device | str) -> "PretrainedTextEncoder":
        """Move the weights too."""
        super().to(device)
        self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> embeddings (L_i, width) float32; L_i is max_tokens unless text.padding=none."""
        if not captions:
            return []
        tokens = self.tokenize(captions)
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        is_masked = self.config.padding is not TextPadding.encoded
        output = self.model(
            input_ids=ids,
            attention_mask=mask if is_masked else None,
            output_hidden_states=self.config.layer != -1,
        )
        hidden = output.last_hidden_state if self.config.layer == -1 else output.hidden_states[self.config.layer]
        lengths = tokens["attention_mask"].sum(dim=1).tolist()
        return [self.pad(clip.float(), length) for clip, length in zip(hidden, lengths, strict=True)]

    def tokenize(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Captions -> `input_ids` and `attention_mask` (B, L), padded on the right; cut ones are counted."""
        texts = [self.config.template.replace("{}", caption) for caption in captions]
        for caption, ids in zip(captions, self.tokenizer(texts)["input_ids"], strict=True):
            self.count(caption, len(ids))
        padding = "longest" if self.config.padding is TextPadding.none else "max_length"
        return self.tokenizer(
            texts,
            padding=padding,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def pad(self, embedding: Tensor, length: int) -> Tensor:
        """(L, width) with `length` real tokens -> what the padding policy leaves."""
        if self.config.padding is TextPadding.none:
            return embedding[:length]
        if self.config.padding is TextPadding.zeros:
            return torch.cat([embedding[:length], torch.zeros_like(embedding[length:])])
        return embedding

    def describe(self) -> dict[str, Any]:
        """Everything that decides an embedding, except where the weights lie."""
        return {
            "encoder": self.config.family.value,
            "weights": self.weights_hash,
            "max_tokens": self.max_tokens,
            "padding": self.config.padding.value,
            "template": self.config.template,
            "layer": self.config.layer,
            "dtype": self.config.dtype.value,
        }


def load_tokenizer(config: PretrainedText) -> Any:
    """The tokenizer beside the weights, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = read_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"text.path={config.path}: this tokenizer has no padding token; add one to its config.")
    return tokenizer


def load_model(config: PretrainedText) -> nn.Module:
    """The frozen encoder, from safetensors weights; never from a pickle, and never with a weight missing."""
    import transformers

    check_fits(config, read_pretrained(transformers.AutoConfig, config))
    classes = {
        TextFamily.t5: transformers.T5EncoderModel,
        TextFamily.umt5: transformers.UMT5EncoderModel,
        TextFamily.clip: transformers.CLIPTextModel,
        TextFamily.auto: transformers.AutoModel,
    }
    dtype = torch.float32 if config.dtype is TextDtype.float32 else torch.bfloat16
    options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    model, loading = read_pretrained(classes[config.family], config, **options)
    if loading["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"text.path={config.path} lacks {len(missing)} weights of text.family={config.family.value}, "
            f"for example {missing[0]}."
        )
    return model.eval().requires_grad_(False)


def read_pretrained(kind: Any, config: PretrainedText, **options: Any) -> Any:
    """`kind.from_pretrained`, with an error that names the config key."""
    try:
        return kind.from_pretrained(config.path, **options)
    except (OSError, ValueError) as error:
        is_folder = Path(config.path).is_dir()
        where = "the folder lacks a file" if is_folder else "no such folder, and the hub did not give it"
        raise ValueError(
            f"text.path={config.path} cannot be read by {kind.__name__} ({where}): it must hold config.json, "
            f"tokenizer files and *.safetensors weights. {error}"
        ) from error


def check_fits(config: PretrainedText, model_config: Any) -> None:
    """Refuse a family, a length or a layer that this encoder does not have, before its weights are read."""
    families = {
        TextFamily.t5: ["t5"],
        TextFamily.umt5: ["umt5"],
        TextFamily.clip: ["clip", "clip_text_model"],
    }
    found = model_config.model_type
    if found not in families.get(config.family, [found]):
        raise ValueError(
            f"text.family={config.family.value} does not fit text.path={config.path}, whose type is {found}."
        )
    model_config = getattr(model_config, "text_config", model_config)  # a whole CLIP holds two
    longest = getattr(model_config, "max_position_embeddings", config.max_tokens)
    if config.max_tokens > longest:
        raise ValueError(
            f"text.max_tokens={config.max_tokens} is more than the {longest} tokens that "
            f"text.path={config.path} was built for. Type {longest} or less."
        )
    num_layers = model_config.num_hidden_layers
    if -config.layer > num_layers + 1:
        raise ValueError(f"text.layer={config.layer} does not exist: text.path={config.path} has {num_layers} layers.")


def hash_weights(model: nn.Module, max_values: int = 4096) -> str:
    """A fingerprint: names, shapes and up to twice `max_values` evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        stride = max(1, values.numel() // max_values)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that a config describes, on the CPU."""
    if isinstance(config, HashText):
        return HashTextEncoder(config)
    if isinstance(config, PretrainedText):
        return PretrainedTextEncoder(config)
    raise ValueError(f"text={type(config).__name__} is not a text encoder: choose hash or pretrained.")


def check_policy(encoder: TextEncoder, manifest: Mapping[str, Any]) -> None:
    """Refuse an encoder whose policy contradicts the manifest's, naming each field."""
    policy = encoder.policy()
    keys = sorted((policy.keys() | manifest.keys()) - {"hash"})
    different = [key for key in keys if policy.get(key) != manifest.get(key)]
    if different:
        fields = ", ".join(f"text.{key}={policy.get(key)!r} (trained with {manifest.get(key)!r})" for key in different)
        raise ValueError(f"The text encoder is not the one the model was trained with: {fields}.")
