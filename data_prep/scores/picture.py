"""Sharpness and exposure of the frames."""

import numpy as np

from data_prep.scores.sample import Sample

SHARPNESS_SHORT_SIDE = 256
"""Pixels: sharpness depends on the size it is measured at; a smaller video is scaled up and counts as soft."""
BLACK, WHITE = 5, 250
"""Luma, of 255, up to which and from which on a pixel is clipped: shadows or lights that hold no detail."""


def sharpness(sample: Sample) -> float:
    """Variance of the Laplacian of 8-bit luma with 256 pixels on the shorter side, median over the frames.

    Pech-Pacheco et al. 2000. Below about 20 a picture looks blurred; noise and fine texture count as sharp, a
    flat drawing as soft.
    """
    import cv2

    pictures = sample.luma_at(SHARPNESS_SHORT_SIDE)
    return float(np.median([cv2.Laplacian(picture, cv2.CV_64F).var() for picture in pictures]))


def exposure(sample: Sample) -> dict[str, float]:
    """`brightness`: mean luma, 0 to 1; `dark_share` and `bright_share`: clipped pixels, 0 to 1."""
    return {
        "brightness": float(sample.luma.mean() / 255),
        "dark_share": float((sample.luma <= BLACK).mean()),
        "bright_share": float((sample.luma >= WHITE).mean()),
    }
