"""Images as clips of one frame."""

import io
import warnings
from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kinema.data.decode.decoders.video import DecodeError
from kinema.data.decode.decoding import resize_and_crop
from kinema.data.geometry import ClipShape

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Members that are read where a sample has no mp4."""


def media_of(members: Container[str]) -> str:
    """The member of a sample that holds its pictures: the mp4, or else an image."""
    return next((ext for ext in ("mp4", *IMAGES) if ext in members), "mp4")


def decode_image(content: bytes, shape: ClipShape, crop: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """An image cropped to the shape and resized: uint8 (1, H, W, 3); raises DecodeError."""
    return resize_and_crop(image_pixels(content)[None], shape, crop)


def image_pixels(content: bytes) -> NDArray[np.uint8]:
    """An image upright, in RGB: (H, W, 3); raises DecodeError."""
    from PIL import ImageOps

    with _opened(content) as image:
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DecodeError(f"image: {error}") from error


def probe_image(content: bytes) -> dict[str, Any]:
    """Facts of a record, from the image's header: one frame, said to last a second; raises DecodeError."""
    with _opened(content) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # the camera lay on its side
            width, height = height, width
    return {"fps": 1.0, "num_frames": 1, "width": width, "height": height, "duration_seconds": 1.0}


def _opened(content: bytes) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # too many pixels: a bomb
            return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"image: {error}") from error
