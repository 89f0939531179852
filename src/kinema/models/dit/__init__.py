"""The diffusion transformer: patches, segments, and blocks that are lists of sublayers."""

from kinema.models.dit.axes import (
    Activation,
    AttentionPattern,
    CrossNorm,
    Expert,
    HeadModulation,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    QKNorm,
    Rope,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.config import DiTConfig, StreamConfig
from kinema.models.dit.experts import Experts, join_experts, make_denoiser, name_in_expert, split_experts
from kinema.models.dit.extras import Extras, Sound
from kinema.models.dit.model import DiT
from kinema.models.dit.places import check_grid

__all__ = [
    "Activation",
    "AttentionPattern",
    "CrossNorm",
    "DiT",
    "DiTConfig",
    "Expert",
    "Experts",
    "Extras",
    "HeadModulation",
    "ModulationSource",
    "NormKind",
    "PositionEmbedding",
    "QKNorm",
    "Rope",
    "Sound",
    "StreamConfig",
    "TextEdge",
    "TextEmbedding",
    "check_grid",
    "join_experts",
    "make_denoiser",
    "name_in_expert",
    "split_experts",
]
