"""The patch discriminator of the VAE's adversarial loss."""

from enum import Enum
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class DiscriminatorNorm(Enum):
    """What keeps the discriminator's features in bounds; none of the choices mixes clips of a batch."""

    group = "group"
    spectral = "spectral"


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a video, each as real or reconstructed, with strided 3D convolutions.

    Isola et al. 2017 (pix2pix), section 3.2.2, with a third dimension for time; padded, so that a single
    image is a legal input.
    """

    def __init__(self, width: int, num_layers: int, norm: DiscriminatorNorm) -> None:
        super().__init__()
        self.norm = norm
        widths = [3] + [width * min(2**i, 8) for i in range(num_layers)]
        layers: list[nn.Module] = []
        for i, (channels, out) in enumerate(pairwise(widths)):
            layers.append(self._conv(channels, out, stride=(1 if i == 0 else 2, 2, 2)))
            if norm is DiscriminatorNorm.group and i > 0:
                layers.append(nn.GroupNorm(min(8, out), out))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, self._conv(widths[-1], 1, stride=(1, 1, 1)))

    def _conv(self, channels: int, out: int, stride: tuple[int, int, int]) -> nn.Module:
        conv = nn.Conv3d(channels, out, 3, stride, padding=1)
        return spectral_norm(conv) if self.norm is DiscriminatorNorm.spectral else conv

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> logits (B, patches), above zero for real."""
        return self.layers(video).flatten(1)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits (B, patches) of both -> loss (B,): real above 1, fake below -1 (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean(dim=1) + F.relu(1 + fake).mean(dim=1))


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Logits (B, patches) of a reconstruction -> loss (B,): the more it passes for real, the lower."""
    return -fake.mean(dim=1)
