"""How a new VAE starts: nearly linear, averaging blocks of pixels downwards and repeating them upwards.

A stack of random convolutions spends its first hundreds of steps on learning to pass plain colours on. A new VAE
passes them on already; every convolution beside that path starts random and small.
"""

import torch
from torch import Tensor, nn

from kinema.models.vae.layers import CausalConv, FrameAttention, Output, ResBlock
from kinema.models.vae.resampling import (
    CornerDown,
    JointDown,
    PackedDown,
    PackedUp,
    SpatialDown,
    SpatialUp,
    TemporalDown,
    TemporalUp,
)

BRANCH_SCALE = 0.1
"""Of the last convolution of a branch. Not zero, so that every weight has a gradient from the first step."""
LOGVAR = -5.0
"""Of the posterior; one as wide as the prior would drown the untrained mean and collapse."""


@torch.no_grad()
def initialise_encoder(encoder: nn.Sequential, output: Output, patch: int, channels: int) -> None:
    """Sets all convolutions in place. The input is space to depth of p x p pixels, the output that many means, and
    log-variances.
    """
    _initialise(encoder)
    first = _convolutions(encoder)[0].weight
    _middle_tap(first).copy_(torch.eye(first.shape[0], first.shape[1]) @ _cosines(patch))
    last = _last(output)
    if output.linear is not None:
        last.weight[channels:] = 0
    last.bias[channels:] = LOGVAR


@torch.no_grad()
def initialise_decoder(decoder: nn.Sequential, output: Output, patch: int) -> None:
    """Sets all convolutions in place; the inverse of the encoder as far as its channels reach."""
    _initialise(decoder)
    if output.linear is not None:
        last = output.linear.conv.weight
        _middle_tap(last).copy_(_cosines(patch).T @ torch.eye(last.shape[0], last.shape[1]))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, CausalConv):
            nn.init.zeros_(module.conv.bias)
            _pass_on(module)
    for module in network.modules():
        if isinstance(module, ResBlock):
            _small_branch([module.conv1, module.conv2])
        elif isinstance(module, Output):
            _small_branch([module.conv])
        elif isinstance(module, FrameAttention):
            module.out.weight.mul_(BRANCH_SCALE)
        elif isinstance(module, PackedDown | PackedUp):
            _small_branch([module.conv])  # their shortcuts pass everything on
        elif isinstance(module, SpatialDown | CornerDown | TemporalDown | JointDown):
            _average(module.conv)
        elif isinstance(module, SpatialUp | TemporalUp):
            _pass_on(module.conv, copies=module.copies)


def _pass_on(layer: CausalConv, copies: int = 1) -> None:
    """Channel i becomes channel i, and as many copies of it."""
    weight = layer.conv.weight
    identity = torch.eye(weight.shape[0] // copies, weight.shape[1])
    _middle_tap(weight.zero_(), layer.future_frames).copy_(identity.repeat(copies, 1))


def _average(layer: CausalConv) -> None:
    """Channel i becomes the mean of channel i over the frames and pixels of one stride."""
    weight, (time, height, width) = layer.conv.weight, layer.conv.stride
    frames, (rows, columns) = weight.shape[2] - time, layer.border
    taps = weight.zero_()[:, :, frames:, rows : rows + height, columns : columns + width]
    taps.copy_(torch.eye(*weight.shape[:2])[:, :, None, None, None] / (time * height * width))


def _small_branch(convolutions: list[nn.Module]) -> None:
    """Random convolutions that keep the variance of their input, the last one small."""
    layers = [layer for convolution in convolutions for layer in _convolutions(convolution)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    layers[-1].weight.mul_(BRANCH_SCALE)


def _convolutions(module: nn.Module) -> list[nn.Conv3d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv3d)]


def _last(output: Output) -> nn.Conv3d:
    """The convolution whose bias an output's channels have as they are."""
    return _convolutions(output.conv)[-1] if output.linear is None else output.linear.conv


def _middle_tap(weight: Tensor, future_frames: int = 0) -> Tensor:
    """View (out, in) of a convolution's weight at the middle pixel of the newest frame but those ahead."""
    return weight[:, :, -1 - future_frames, weight.shape[3] // 2, weight.shape[4] // 2]


def _cosines(patch: int) -> Tensor:
    """Orthonormal cosine transform of p x p patches of 3 colours, (3 p p, 3 p p): plain colours first."""
    position = torch.arange(patch)
    basis = torch.cos(torch.pi / patch * torch.outer(position, position + 0.5))
    basis = basis / basis.norm(dim=1, keepdim=True)
    by_frequency = (position[:, None] + position).flatten().argsort(stable=True)
    return torch.kron(torch.kron(basis, basis)[by_frequency], torch.eye(3))
