"""Perceptual distances of a reconstruction from its video: without weights, or by a local network."""

from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn


class Perceptual(Enum):
    """What a perceptual loss compares."""

    pyramid = "pyramid"
    """Edges and motion at three scales; needs no weights."""
    mobilenet_v2 = "mobilenet_v2"
    """Features of MobileNetV2 (Sandler et al. 2018), read from a local file."""
    vgg16 = "vgg16"
    """Features of VGG-16 (Simonyan and Zisserman 2014), read from a local file."""


class PyramidDistance(nn.Module):
    """Mean absolute difference of spatial and temporal gradients at full, half and quarter size."""

    num_scales = 3

    def forward(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Two videos (B, 3, T, H, W) in [-1, 1] -> distance (B,)."""
        error = reconstruction - video  # averaging and differences are linear: one pyramid for both videos
        total = error.new_zeros(len(error))
        for scale in range(self.num_scales):
            error = error if scale == 0 else F.avg_pool3d(error, (1, 2, 2))
            for dim in (2, 3, 4):
                if error.shape[dim] > 1:  # a single image has no motion
                    total = total + error.diff(dim=dim).abs().flatten(1).mean(dim=1)
        return total / self.num_scales


class FeatureDistance(nn.Module):
    """Squared difference of channel-normalised features of a frozen image network, summed over its stages.

    Zhang et al. 2018 (The Unreasonable Effectiveness of Deep Features), section 3, with uniform instead of
    learned channel weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, stages: nn.ModuleList) -> None:
        super().__init__()
        self.stages = stages.requires_grad_(False).eval()
        # ImageNet's, which networks in torchvision's format were trained with, for pixels in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FeatureDistance":
        """The network is frozen: its batch norms always use their stored statistics."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Two videos (B, 3, T, H, W) in [-1, 1] -> distance (B,), the mean over frames."""
        batch = len(video)
        ours, theirs = self._prepare(reconstruction), self._prepare(video)
        total = ours.new_zeros(batch)
        for stage in self.stages:
            ours, theirs = stage(ours), stage(theirs)
            difference = F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)
            total = total + difference.square().sum(dim=1).unflatten(0, (batch, -1)).flatten(1).mean(dim=1)
        return total

    def _prepare(self, video: Tensor) -> Tensor:
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        return (frames * 0.5 + 0.5 - self.mean) / self.std


def feature_distance(perceptual: Perceptual, path: str) -> FeatureDistance:
    """The distance by the network in a file: .safetensors, or .pth of nothing but tensors."""
    network = _NETWORKS[perceptual]()
    wanted = network.state_dict()
    found = _read_features(path)
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    shapes = [key for key in wanted.keys() & found.keys() if wanted[key].shape != found[key].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"vae_loss.perceptual_weights={path} is no {perceptual.value} state dict in torchvision's "
            f"format: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, "
            f"{len(shapes)} of another shape {sorted(shapes)[:3]}"
        )
    network.load_state_dict(found)
    return FeatureDistance(nn.ModuleList([network.features[a:b] for a, b in pairwise(_STAGES[perceptual])]))


def _read_features(path: str) -> dict[str, Tensor]:
    """The feature layers' tensors; the classifier on top of them is not used."""
    if not Path(path).is_file():
        raise ValueError(f"vae_loss.perceptual_weights={path!r} does not exist; name a .safetensors or .pth file")
    is_safetensors = path.endswith(".safetensors")
    tensors = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    return {key: value for key, value in tensors.items() if not key.startswith("classifier.")}


class _Features(nn.Module):
    """Holds layers under the name `features`, as torchvision's state dicts call them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)


def _vgg16() -> _Features:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return _Features(layers)


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [] if expansion == 1 else [_conv_norm(channels, hidden, 1)]
        project = [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*expand, _conv_norm(hidden, hidden, 3, stride, groups=hidden), *project)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _mobilenet_v2() -> _Features:
    layers: list[nn.Module] = [_conv_norm(3, 32, 3, stride=2)]
    channels = 32
    # Sandler et al. 2018, table 2: expansion, channels, blocks, stride of the first block
    for expansion, out, count, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(count):
            layers.append(_InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
            channels = out
    return _Features([*layers, _conv_norm(channels, 1280, 1)])


_NETWORKS: dict[Perceptual, Callable[[], _Features]] = {
    Perceptual.vgg16: _vgg16,
    Perceptual.mobilenet_v2: _mobilenet_v2,
}
# Ends of the stages whose features are compared. VGG-16: after the last ReLU of each resolution, as LPIPS
# does; MobileNetV2: after the last block of each of its first four resolutions.
_STAGES = {Perceptual.vgg16: (0, 4, 9, 16, 23, 30), Perceptual.mobilenet_v2: (0, 2, 4, 7, 14)}
