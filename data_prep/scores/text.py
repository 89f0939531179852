"""Text laid over the picture: titles, subtitles, logos."""

import numpy as np
from numpy.typing import NDArray

from data_prep.scores.sample import Sample

SHORT_SIDE = 256
"""Pixels at which text is looked for: letters from about 8 to 60 pixels high there are found."""
STROKE_CONTRAST = 60
"""Luma, of 255, between a letter and what it stands on."""
STROKE_PIXELS = 9
"""Width of the structuring element: broader strokes are no letters."""
WORD_GAP = 11
"""Pixels between letters that belong to one line."""
PERSISTS = 0.75
"""Share of the frames in which a pixel must lie in a line of text: the picture moves, an overlay stays."""


def text_share(sample: Sample) -> float:
    """Share of the picture covered by lines of text that stay in their place, 0 to 1.

    Classical and without a model: thin bright or dark strokes (top-hat), joined sideways into lines, and lines
    kept by their shape and by how they are filled (after Chen et al. 2011, without their regions). It finds
    upright horizontal text of any script; it misses turned, broad, faint and scrolling text, and takes railings,
    blinds and lattices in a still picture for text. Set the threshold by looking at what it removed.
    """
    masks = [text_mask(picture) for picture in sample.luma_at(SHORT_SIDE)]
    stays = np.mean(masks, axis=0) >= PERSISTS
    return float(stays.mean())


def text_mask(luma: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where one picture (H, W) seems to hold lines of text."""
    import cv2

    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (STROKE_PIXELS, STROKE_PIXELS))
    mask = np.zeros(luma.shape, bool)
    for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):  # bright letters, then dark ones
        strokes = (cv2.morphologyEx(luma, operation, element) > STROKE_CONTRAST).astype(np.uint8)
        joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, WORD_GAP), np.uint8))
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
        for label in range(1, count):
            left, top, width, height, _ = boxes[label]
            window = slice(top, top + height), slice(left, left + width)
            if _is_line(width, height, strokes[window] * (labels[window] == label)):
                mask[window] = True
    return mask


def _is_line(width: int, height: int, strokes: NDArray[np.uint8]) -> bool:
    """Lines are broader than high, filled neither thinly nor wholly, and cross many strokes on their way."""
    if not 6 <= height <= 64 or width < 2 * height or width < 24:
        return False
    fill = float(strokes.mean())
    crossings = (np.diff(strokes.astype(np.int8), axis=1) > 0).sum(axis=1)  # strokes begun in each row
    busy = np.sort(crossings)[len(crossings) // 2 :].mean()  # of the busier half of the rows
    return 0.15 <= fill <= 0.8 and busy >= max(3, 0.8 * width / height)
