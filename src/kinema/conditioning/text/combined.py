"""Several encoders of one caption: its tokens from one, a pooled vector and the written letters from others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.conditioning.text.encoder import TextEncoder
from kinema.conditioning.text.policy import PretrainedText
from kinema.conditioning.text.pretrained import PretrainedTextEncoder

QUOTED = re.compile(r'"(.*?)"|“(.*?)”')


@dataclass
class CombinedText:
    """The encoders of HunyuanVideo (tokens and pooled) and of HunyuanVideo-1.5 (tokens and glyphs)."""

    tokens: PretrainedText
    """The encoder whose embeddings are the caption's tokens."""

    pooled: PretrainedText | None = None
    """One vector for the caption (CLIP); null for models without `model.pooled_width`."""

    glyphs: PretrainedText | None = None
    """Reads only what the caption has in quotation marks: letters that are to be seen (ByT5)."""

    def __post_init__(self) -> None:
        if self.pooled is None and self.glyphs is None:
            raise ValueError("text.pooled=null and text.glyphs=null: one encoder alone is text=pretrained.")

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption at most."""
        return self.tokens.max_tokens

    def parts(self) -> dict[str, PretrainedText]:
        """The encoders that there are, by their names."""
        named = {"tokens": self.tokens, "pooled": self.pooled, "glyphs": self.glyphs}
        return {name: part for name, part in named.items() if part is not None}


class CombinedTextEncoder(TextEncoder):
    """Each part with its own policy; `encode` gives the tokens, `beside` the rest."""

    def __init__(self, config: CombinedText) -> None:
        super().__init__(config.max_tokens)
        self.parts = {name: PretrainedTextEncoder(part) for name, part in config.parts().items()}
        self.width = self.parts["tokens"].width

    def to(self, device: torch.device | str) -> "CombinedTextEncoder":
        """Move every part."""
        super().to(device)
        for part in self.parts.values():
            part.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> embeddings (L_i, width) float32 of the first encoder."""
        return self.parts["tokens"].encode(captions)

    def beside(self, captions: Sequence[str]) -> dict[str, list[Tensor]]:
        """`pooled`: (width,) each; `glyphs`: (L_i, width) each, of no token where nothing is in quotation marks."""
        found = {}
        if "pooled" in self.parts:
            found["pooled"] = self.parts["pooled"].pool(captions)
        if "glyphs" in self.parts:
            found["glyphs"] = self._glyphs(self.parts["glyphs"], captions)
        return found

    def _glyphs(self, encoder: PretrainedTextEncoder, captions: Sequence[str]) -> list[Tensor]:
        written = [written_words(caption) for caption in captions]
        encoded = iter(encoder.encode([words for words in written if words]))
        nothing = torch.zeros(0, encoder.width, device=self.device)
        return [next(encoded) if words else nothing for words in written]

    def describe(self) -> dict[str, Any]:
        """What every part describes, as `part.key`."""
        return of_parts({name: part.describe() for name, part in self.parts.items()})


def of_parts(described: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What each part describes -> one dictionary, with `part.key`."""
    return {f"{name}.{key}": value for name, part in described.items() for key, value in part.items()}


def written_words(caption: str) -> str:
    """What stands in quotation marks, each piece once: `Text "STOP". Text "GO". `; nothing where there are none."""
    pieces = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(caption))
    return "".join(f'Text "{piece}". ' for piece in pieces)
