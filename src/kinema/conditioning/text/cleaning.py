"""What releases do to a caption before it is cut into tokens."""

import html
from enum import Enum

import ftfy


class TextCleaning(Enum):
    """How captions are cleaned."""

    none = "none"
    web = "web"
    """Broken Unicode is mended, HTML entities are resolved (twice), each run of white space becomes one blank (Wan)."""
    lower = "lower"
    """Lower case, without white space at both ends (Latte)."""


def clean(caption: str, cleaning: TextCleaning) -> str:
    """The caption as the release would clean it."""
    if cleaning is TextCleaning.lower:
        return caption.lower().strip()
    if cleaning is TextCleaning.web:
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())
    return caption
