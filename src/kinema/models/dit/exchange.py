"""Where two streams, the video and its sound, look at each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import attention_of
from kinema.models.dit.conditioning import ExactLinear, TimestepEmbedding
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import HeadShape, SegmentAttention
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import Segments, Tokens
from kinema.models.dit.sublayers import Sublayer

VIDEO, AUDIO = ("video",), ("audio",)
WHOLE = ("shift", "scale", "gate")
READ = WHOLE[:-1]
VECTORS = len(WHOLE + READ)
"""Shift, scale and gate of a stream that asks; shift and scale where it answers the other."""


class Exchange(nn.Module):
    """Video asks sound and sound asks video, both of what the other was before, on a common clock.

    HaCohen et al. 2026 (LTX-2): the attention has the sound's width and heads; only time turns its queries and keys.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        assert config.audio is not None
        video, audio = config.width, config.audio.width
        shape = HeadShape(
            audio,
            config.audio.num_heads,
            config.qk_norm,
            config.qk_norm_eps,
            config.bias,
            qkv_bias=config.qkv_bias,
            gated=config.head_gates,
        )
        attention = attention_of(config.attention_kernel)

        def norm() -> Norm:
            return Norm(config.norm, video, config.norm_eps, affine=False)

        see = SegmentAttention(shape, "audio", VIDEO, attention, answer_width=video)
        hear = SegmentAttention(shape, "video", AUDIO, attention, ask_width=video)
        self.hear = Sublayer({VIDEO: WHOLE, AUDIO: READ}, hear, norm())
        self.see = Sublayer({AUDIO: WHOLE, VIDEO: READ}, see, norm())
        self.video_table = nn.Parameter(torch.zeros(VECTORS, video))
        self.audio_table = nn.Parameter(torch.zeros(VECTORS, audio))

    def forward(self, tokens: Tokens, segments: Segments, shared: dict[str, Tensor]) -> Tokens:
        """Tokens of both and what all exchanges share, (R, 5, D) each -> tokens of both."""
        video = (shared["video"] + self.video_table).unbind(1)
        audio = (shared["audio"] + self.audio_table).unbind(1)
        whole = len(WHOLE)
        heard = self.hear(tokens, segments, [*video[:whole], *audio[whole:]])
        seen = self.see(tokens, segments, [*audio[:whole], *video[whole:]])
        return {"video": heard["video"], "audio": seen["audio"]}


class ExchangeCondition(nn.Module):
    """A stream's timesteps to what all its exchanges share; the gate has an embedding of its own."""

    def __init__(self, config: DiTConfig, width: int) -> None:
        super().__init__()
        channels, scale = config.timestep_channels, config.timestep_scale
        self.embedding, self.gate_embedding = (TimestepEmbedding(channels, width, scale) for _ in range(2))
        self.linear, self.gate = ExactLinear(width, (VECTORS - 1) * width), ExactLinear(width, width)
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (R,) -> (R, 5, D): shift, scale and gate to ask, shift and scale to answer"""
        rest = self.linear(F.silu(self.embedding(timesteps))).unflatten(1, (-1, self.width))
        gate = self.gate(F.silu(self.gate_embedding(timesteps)))[:, None]
        return torch.cat([rest[:, : len(READ)], gate, rest[:, len(READ) :]], dim=1)
