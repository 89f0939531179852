"""Text encoders of `transformers`, frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kinema.conditioning.text.cleaning import clean
from kinema.conditioning.text.encoder import TextEncoder
from kinema.conditioning.text.policy import PretrainedText, TextPadding
from kinema.conditioning.text.reading import hash_tokenizer, hash_weights, load_model, load_tokenizer

UNMASKED = (TextPadding.encoded, TextPadding.overheard)
CUT = (TextPadding.none, TextPadding.overheard)


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
        """Captions -> embeddings (L_i, width) float32; L_i is max_tokens unless the padding is cut off again.

        Each is encoded alone: a batch rounds otherwise, and an embedding would depend on its neighbours in a pack.
        """
        return [self.encode_one(caption) for caption in captions]

    def encode_one(self, caption: str) -> Tensor:
        """One caption -> (L, width)."""
        tokens = self.tokenize(caption)
        output = self.run(tokens)
        hidden = output.last_hidden_state if self.config.layer == -1 else output.hidden_states[self.config.layer]
        length = int(tokens["attention_mask"].sum()) - self.config.crop
        return self.pad(hidden[0, self.config.crop :].float(), length)

    @torch.no_grad()
    def pool(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> one vector (width,) float32 each, as encoders with a pooled output (CLIP) have it."""
        return [self.run(self.tokenize(caption)).pooler_output[0].float() for caption in captions]

    def run(self, tokens: Mapping[str, Tensor]) -> Any:
        """Tokens (1, L) and their mask -> the encoder's output."""
        mask = None if self.config.padding in UNMASKED else tokens["attention_mask"].to(self.device)
        has_layers = self.config.layer != -1
        return self.model(tokens["input_ids"].to(self.device), attention_mask=mask, output_hidden_states=has_layers)

    def tokenize(self, caption: str) -> Mapping[str, Tensor]:
        """A caption -> `input_ids` and `attention_mask` (1, L), padded on the right; cut ones are counted."""
        text = self.read(caption)
        self.count(caption, len(self.tokenizer(text)["input_ids"]) - self.config.crop)
        return self.tokenizer(
            [text],
            padding=False if self.config.padding is TextPadding.none else "max_length",
            padding_side="right",
            truncation=True,
            max_length=self.config.read_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def read(self, caption: str) -> str:
        """A caption -> what the tokenizer is given."""
        cleaned = clean(caption, self.config.cleaning) or self.config.blank
        return self.config.template.replace("{}", cleaned)

    def pad(self, embedding: Tensor, length: int) -> Tensor:
        """(L, width) with `length` real tokens -> what the padding policy leaves."""
        if self.config.padding in CUT:
            return embedding[:length]
        if self.config.padding is TextPadding.zeros:
            return torch.cat([embedding[:length], torch.zeros_like(embedding[length:])])
        return embedding

    def describe(self) -> dict[str, Any]:
        """Everything that decides an embedding, except where the weights lie."""
        return describe(self.config, self.tokenizer, self.weights_hash)


def describe(config: PretrainedText, tokenizer: Any, weights: str) -> dict[str, Any]:
    """Everything that decides an embedding; `weights` is their fingerprint."""
    return {
        "encoder": config.family.value,
        "weights": weights,
        "tokenizer": hash_tokenizer(tokenizer),
        "max_tokens": config.max_tokens,
        "padding": config.padding.value,
        "cleaning": config.cleaning.value,
        "blank": config.blank,
        "template": config.template,
        "crop": config.crop,
        "layer": config.layer,
        "dtype": config.dtype.value,
    }
