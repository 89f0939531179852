"""The causal 3D VAE: model, posterior, losses and spatial tiling."""

from kinema.models.vae.autoencoder import CausalVAE, VAEConfig
from kinema.models.vae.layers import Convolution, Norm, StreamState, TimePadding
from kinema.models.vae.posterior import LatentStatistics, Posterior

__all__ = [
    "CausalVAE",
    "Convolution",
    "LatentStatistics",
    "Norm",
    "Posterior",
    "StreamState",
    "TimePadding",
    "VAEConfig",
]
