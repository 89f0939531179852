"""The only two places where the pixel range changes."""

import torch
from torch import Tensor


def to_model_range(frames: Tensor) -> Tensor:
    """uint8 RGB frames (T, H, W, 3) in 0..255 -> float32 video (3, T, H, W) in [-1, 1].

    Raises ValueError for any other dtype or layout: floats that were scaled elsewhere are refused, not
    guessed.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(
            f"frames.dtype={frames.dtype} must be torch.uint8: the pixel range changes only here. "
            "Pass the decoded frames, 0..255, as they are."
        )
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames.shape={tuple(frames.shape)} must be (T, H, W, 3): RGB frames with the channels last. "
            "For one image pass image[None]."
        )
    return frames.permute(3, 0, 1, 2).to(torch.float32) / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """Float video (3, T, H, W) in [-1, 1] -> uint8 RGB frames (T, H, W, 3); values outside are clamped.

    Raises ValueError for an integer video, another layout, or values that are not finite.
    """
    if not video.is_floating_point():
        raise ValueError(f"video.dtype={video.dtype} must be a float type with values in [-1, 1].")
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(
            f"video.shape={tuple(video.shape)} must be (3, T, H, W): one clip, channels first. "
            "For a batch convert its clips one by one."
        )
    if not torch.isfinite(video).all():
        raise ValueError("video holds NaN or infinite values: they have no pixel value. Look where they come from.")
    levels = (video.to(torch.float32).clamp(-1.0, 1.0) + 1.0) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
