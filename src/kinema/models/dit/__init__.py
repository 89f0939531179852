"""The diffusion transformer: patches, segments, and blocks that are lists of sublayers."""

from kinema.models.dit.conditioning import TIMESTEP_SCALE
from kinema.models.dit.layers import Activation
from kinema.models.dit.model import AttentionPattern, DiT, DiTConfig, ModulationSource, PositionEmbedding

__all__ = [
    "TIMESTEP_SCALE",
    "Activation",
    "AttentionPattern",
    "DiT",
    "DiTConfig",
    "ModulationSource",
    "PositionEmbedding",
]
