"""Captions through a small transformer of their own before the video sees them."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Lengths
from kinema.models.dit.axes import NormKind
from kinema.models.dit.blocks import encoder_sublayers, refiner_blocks, tower_blocks
from kinema.models.dit.conditioning import Condition, PooledEmbedding, TimestepEmbedding, means
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import Linear
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import Tokens, clip_segment
from kinema.models.position import rope_3d, word_positions


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


class TextTower(nn.Module):
    """Blocks like the model's own over each caption, with its timestep's modulation and positions along the words.

    Arkhipkin et al. 2025 (Kandinsky 5).
    """

    def __init__(self, config: DiTConfig, text_width: int) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.embed = Linear(text_width, config.width)
        self.norm = Norm(NormKind.layer, config.width, config.norm_eps, affine=True)
        self.blocks = nn.ModuleList(tower_blocks(config))

    def forward(self, words: Tensor, lengths: Lengths, condition: Condition) -> Tensor:
        """words (M, text_width), the last rows of the condition are the clips' -> (M, D)"""
        positions = word_positions(lengths, words.device)
        rope = rope_3d(positions, self.head_dim, [self.head_dim, 0, 0], self.theta, condition.raw.dtype)
        segment = replace(clip_segment(lengths, len(condition.raw) - len(lengths)), rope=rope)
        tokens: Tokens = {"text": self.norm(self.embed(words))}
        for block in self.blocks:
            tokens = block(tokens, {"text": segment}, condition)
        return tokens["text"]


class TextEncoder(nn.Module):
    """Sublayers like the model's own over each caption, without gates, timesteps and positions, and a norm at the end.

    MiniMax-H3.
    """

    def __init__(self, config: DiTConfig, text_width: int) -> None:
        super().__init__()
        self.embed = Linear(text_width, config.width)
        self.sublayers = nn.ModuleList(encoder_sublayers(config))
        self.norm = Norm(config.norm, config.width, config.norm_eps, affine=True)

    def forward(self, words: Tensor, lengths: Lengths) -> Tensor:
        """words (M, text_width) -> (M, D)"""
        embedded = self.embed(words)
        tokens: Tokens = {"text": embedded.to(torch.promote_types(embedded.dtype, torch.float32))}
        for sublayer in self.sublayers:
            tokens = sublayer(tokens, {"text": clip_segment(lengths)}, ())
        return self.norm(tokens["text"])
