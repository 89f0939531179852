"""Floating-point operations of a model, counted from the layers that it has."""

import math
from collections.abc import Mapping

from torch import nn

from kinema.models.dit.conditioning import AttentionPooling, ExactLinear
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import Counts
from kinema.models.dit.segments import Grid, seen
from kinema.models.dit.sublayers import Sublayer

EDGES = {
    "patch_embedding": "video",
    "head": "video",
    "control": "video",
    "text_embedding": "text",
    "audio_embedding": "audio",
    "audio_head": "audio",
    "image_embedding": "image",
    "glyph_embedding": "glyph",
}
"""Parts outside the blocks that see every token of a segment; the others see one row a clip."""


def products(model: nn.Module, config: DiTConfig, grid: Grid, told: Mapping[str, int]) -> int:
    """Multiplications of the forward pass on one clip of this token grid, told so many tokens of each other segment.

    Those of a second tower (model.audio) are its own.
    """
    counts = Counts(
        {"video": math.prod(grid), **told}, {span: seen(span, grid, config.window) for span in config.all_spans}
    )
    caption = sum(told[source] for source in config.caption_sources)
    blocks = Counts({**counts.tokens, "text": caption}, counts.seen)
    rows = 2 if config.audio_channels and told["audio"] else 1  # sound in the same softmax has its own timestep
    found = 0
    for name, module in model.named_modules():
        if name.startswith(("audio.", "pooled_text.")):  # which count their own
            continue
        if isinstance(module, AttentionPooling):
            found += module.products(told["text"])
        if isinstance(module, Sublayer):
            found += module.products(counts if name.startswith("text_embedding.") else blocks)
        if isinstance(module, nn.Linear) and ".operation." not in name:  # they see each token, or each clip, once
            kind = None if isinstance(module, ExactLinear) else EDGES.get(name.split(".")[0])
            found += module.weight.numel() * (counts.tokens[kind] if kind else rows)
    return found
