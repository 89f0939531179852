"""Pictures that a video is given: read, and brought to the video's size as training brings its clips there."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kinema.data.decode.decoding import resize_and_crop
from kinema.data.geometry import ClipShape


def read_image(path: str | Path, key: str = "image") -> Tensor:
    """A picture file -> uint8 RGB (H, W, 3), turned upright; ValueError names `key` when it cannot be read."""
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                raise ValueError(f"{key}={path} has transparent pixels, which have no colour. Give it a background.")
            return torch.from_numpy(np.array(upright.convert("RGB")))
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be read as a picture: {error}") from None


def fit_images(images: Sequence[Tensor], shape: ClipShape, say: Callable[[str], object]) -> Tensor:
    """Pictures of any size -> uint8 (n, height, width, 3): the centre, cut to the aspect ratio; says what changes."""
    fitted = []
    for image in images:
        height, width = image.shape[:2]
        if (height, width) != shape[1:]:
            kept = min(height / shape.height, width / shape.width)
            cut = f"{round(shape.height * kept)}x{round(shape.width * kept)} of its {height}x{width} pixels"
            say(f"image: {cut} around the centre, resized to {shape.height}x{shape.width}")
        fitted.append(resize_and_crop(image[None].numpy(), shape)[0])
    return torch.stack(fitted)


def nearest_shape(image: Tensor, shapes: Sequence[ClipShape]) -> ClipShape:
    """The first of the shapes whose aspect ratio is nearest to that of a picture (H, W, 3)."""
    height, width = image.shape[:2]
    return min(shapes, key=lambda shape: round(abs(math.log(shape.width / shape.height * height / width)), 6))
