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
        """Captions -> embeddings (L_i, width) float32; L_i is max_tokens unless the padding is cut off again."""
        if not captions:
            return []
        tokens = self.tokenize(captions)
        output = self.run(tokens)
        hidden = output.last_hidden_state if self.config.layer == -1 else output.hidden_states[self.config.layer]
        lengths = tokens["attention_mask"].sum(dim=1) - self.config.crop
        cropped = hidden[:, self.config.crop :].float()
        return [self.pad(text, length) for text, length in zip(cropped, lengths.tolist(), strict=True)]

    @torch.no_grad()
    def pool(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> one vector (width,) float32 each, as encoders with a pooled output (CLIP) have it."""
        if not captions:
            return []
        return list(self.run(self.tokenize(captions)).pooler_output.float())

    def run(self, tokens: Mapping[str, Tensor]) -> Any:
        """Tokens (B, L) and their mask -> the encoder's output."""
        mask = None if self.config.padding in UNMASKED else tokens["attention_mask"].to(self.device)
        has_layers = self.config.layer != -1
        return self.model(tokens["input_ids"].to(self.device), attention_mask=mask, output_hidden_states=has_layers)

    def tokenize(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Captions -> `input_ids` and `attention_mask` (B, L), padded on the right; cut ones are counted."""
        texts = [self.read(caption) for caption in captions]
        for caption, ids in zip(captions, self.tokenizer(texts)["input_ids"], strict=True):
            self.count(caption, len(ids) - self.config.crop)
        return self.tokenizer(
            texts,
            padding="longest" if self.config.padding is TextPadding.none else "max_length",
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
        return {
            "encoder": self.config.family.value,
            "weights": self.weights_hash,
            "tokenizer": hash_tokenizer(self.tokenizer),
            "max_tokens": self.max_tokens,
            "padding": self.config.padding.value,
            "cleaning": self.config.cleaning.value,
            "blank": self.config.blank,
            "template": self.config.template,
            "crop": self.config.crop,
            "layer": self.config.layer,
            "dtype": self.config.dtype.value,
        }
