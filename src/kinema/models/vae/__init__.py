"""The causal 3D VAE: model, posterior, losses and spatial tiling."""

from kinema.models.vae.autoencoder import Attention, CausalVAE, VAEConfig
from kinema.models.vae.discriminator import DiscriminatorNorm, PatchDiscriminator
from kinema.models.vae.layers import Convolution, Norm, SpacePadding, StreamState, TimePadding
from kinema.models.vae.losses import VAELoss, VAELossConfig, psnr
from kinema.models.vae.perceptual import Perceptual
from kinema.models.vae.posterior import LatentStatistics, Posterior
from kinema.models.vae.resampling import Halving, Resampling
from kinema.models.vae.slabs import HEIGHT, TIME, WIDTH, Slab
from kinema.models.vae.tiling import decode_tiled, encode_tiled

__all__ = [
    "HEIGHT",
    "TIME",
    "WIDTH",
    "Attention",
    "CausalVAE",
    "Convolution",
    "DiscriminatorNorm",
    "Halving",
    "LatentStatistics",
    "Norm",
    "PatchDiscriminator",
    "Perceptual",
    "Posterior",
    "Resampling",
    "Slab",
    "SpacePadding",
    "StreamState",
    "TimePadding",
    "VAEConfig",
    "VAELoss",
    "VAELossConfig",
    "decode_tiled",
    "encode_tiled",
    "psnr",
]
