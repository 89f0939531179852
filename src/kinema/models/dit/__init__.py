"""The diffusion transformer: patches, segments, and blocks that are lists of sublayers."""

from kinema.models.dit.config import (
    Activation,
    AttentionPattern,
    CrossNorm,
    DiTConfig,
    HeadModulation,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    QKNorm,
    Rope,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.extras import Extras
from kinema.models.dit.model import DiT

__all__ = [
    "Activation",
    "AttentionPattern",
    "CrossNorm",
    "DiT",
    "DiTConfig",
    "Extras",
    "HeadModulation",
    "ModulationSource",
    "NormKind",
    "PositionEmbedding",
    "QKNorm",
    "Rope",
    "TextEdge",
    "TextEmbedding",
]
