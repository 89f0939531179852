"""Frozen text encoders, each with a policy that the manifest carries and the sampler obeys."""

from kinema.conditioning.text.cached import CachedTextEncoder, TextCache, TextCacheWriter
from kinema.conditioning.text.cleaning import TextCleaning
from kinema.conditioning.text.combined import CombinedText, CombinedTextEncoder, written_words
from kinema.conditioning.text.encoder import NULL_CAPTION, TextConfig, TextEncoder, check_policy
from kinema.conditioning.text.hashed import HashText, HashTextEncoder, split_words, word_vector
from kinema.conditioning.text.policy import PretrainedText, TextDtype, TextFamily, TextPadding
from kinema.conditioning.text.pretrained import PretrainedTextEncoder

__all__ = [
    "NULL_CAPTION",
    "TEXT_CONFIGS",
    "CachedTextEncoder",
    "CombinedText",
    "CombinedTextEncoder",
    "HashText",
    "HashTextEncoder",
    "PretrainedText",
    "PretrainedTextEncoder",
    "TextCache",
    "TextCacheWriter",
    "TextCleaning",
    "TextConfig",
    "TextDtype",
    "TextEncoder",
    "TextFamily",
    "TextPadding",
    "build_text_encoder",
    "check_policy",
    "split_words",
    "word_vector",
    "written_words",
]

TEXT_CONFIGS = (HashText, PretrainedText, CombinedText)
"""The choices of `text`."""


def build_text_encoder(config: TextConfig | CombinedText) -> TextEncoder:
    """The encoder that a config describes, on the CPU."""
    if isinstance(config, HashText):
        return HashTextEncoder(config)
    if isinstance(config, PretrainedText):
        return PretrainedTextEncoder(config)
    if isinstance(config, CombinedText):
        return CombinedTextEncoder(config)
    raise ValueError(f"text={type(config).__name__} is not a text encoder: choose hash, pretrained or combined.")
