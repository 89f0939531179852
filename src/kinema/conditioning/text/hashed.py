"""A text encoder that needs no download: words as random vectors."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinema.conditioning.text.encoder import TextConfig, TextEncoder


@dataclass
class HashText(TextConfig):
    """A frozen encoder without a download: each word is a random vector made from its own hash."""

    width: int = 64
    """Numbers in an embedding; even. Words of a small vocabulary stay nearly orthogonal from 64 upwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 2 or self.width % 2:
            raise ValueError(f"text.width={self.width} must be even and at least 2, for example 64.")


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
