"""Captions through a small transformer of their own before the video sees them."""

import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Lengths
from kinema.models.dit.blocks import refiner_blocks
from kinema.models.dit.conditioning import Condition, PooledEmbedding, TimestepEmbedding, means
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import Linear
from kinema.models.dit.segments import Tokens, clip_segment


class TextRefiner(nn.Module):
    """Self-attention over each caption, gated by the timestep and the caption's mean.

    Kong et al. 2024 (HunyuanVideo): a language model reads only forwards, this looks both ways.
    """

    def __init__(self, config: DiTConfig, text_width: int) -> None:
        super().__init__()
        self.embed = Linear(text_width, config.width)
        self.timestep_embedding = TimestepEmbedding(config.timestep_channels, config.width, config.timestep_scale)
        self.pooled_embedding = PooledEmbedding(text_width, config.width)
        self.blocks = nn.ModuleList(refiner_blocks(config))

    def forward(self, words: Tensor, lengths: Lengths, timesteps: Tensor) -> Tensor:
        """words (M, text_width), timesteps (B,) -> (M, D)"""
        raw = self.timestep_embedding(timesteps)
        raw = raw + self.pooled_embedding(means(words.to(raw.dtype), lengths))
        condition = Condition(raw, F.silu(raw), None)
        tokens: Tokens = {"text": self.embed(words).to(raw.dtype)}
        for block in self.blocks:
            tokens = block(tokens, {"text": clip_segment(lengths)}, condition)
        return tokens["text"]
