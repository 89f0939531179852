"""What every frozen text encoder has in common: captions to embeddings, and the policy that the manifest carries."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NULL_CAPTION = ""
"""The caption of a clip without one: its embedding is the null text of training dropout and of guidance."""


@dataclass
class TextConfig:
    """What every text encoder has in common; `HashText` and `PretrainedText` are choices."""

    max_tokens: int = 32
    """Longer captions are cut here, counted and logged."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"text.max_tokens={self.max_tokens} must be at least 1.")


class TextEncoder:
    """Captions to embeddings. Frozen: holds no trainable weight and no random state."""

    width: int
    device: torch.device = torch.device("cpu")

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_encoded = 0
        self.num_truncated = 0
        self._null: tuple[Tensor, dict[str, Tensor]] | None = None

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

    def beside(self, captions: Sequence[str]) -> dict[str, list[Tensor]]:
        """What a model reads of the captions beside `encode`, by its name among the model's extras; often nothing."""
        return {}

    def null(self) -> Tensor:
        """The embedding (L0, width) of the null caption: the same bytes for dropout and for guidance."""
        return self._of_null()[0]

    def null_beside(self) -> dict[str, Tensor]:
        """`beside` of the null caption."""
        return self._of_null()[1]

    def _of_null(self) -> tuple[Tensor, dict[str, Tensor]]:
        if self._null is None:
            counts = self.num_encoded, self.num_truncated
            beside = {name: found[0] for name, found in self.beside([NULL_CAPTION]).items()}
            self._null = self.encode([NULL_CAPTION])[0], beside
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


def check_policy(encoder: TextEncoder, manifest: Mapping[str, Any]) -> None:
    """Refuse an encoder whose policy contradicts the manifest's, naming each field."""
    policy = encoder.policy()
    keys = sorted((policy.keys() | manifest.keys()) - {"hash"})
    different = [key for key in keys if policy.get(key) != manifest.get(key)]
    if different:
        fields = ", ".join(f"text.{key}={policy.get(key)!r} (trained with {manifest.get(key)!r})" for key in different)
        raise ValueError(f"The text encoder is not the one the model was trained with: {fields}.")
