"""How much moves, and whether anything does."""

import numpy as np

from data_prep.scores.sample import Sample

FLOW_SHORT_SIDE = 128
"""Pixels of the shorter side at which optical flow is computed, so that every clip costs the same."""
STILL_CELLS = 16
"""Cells along the shorter side whose means are compared: they lose noise, but no small thing that moves."""
STILL_LEVELS = 1.5
"""Luma, of 255, by which the mean of a cell may differ between two frames that show the same picture."""


def motion(sample: Sample) -> float | None:
    """Mean speed over all pixels, in frame heights a second; None for a clip without two near frames.

    Dense inverse search (Kroeger et al. 2016, as in OpenCV) between near frames. A square of a tenth of the
    picture that crosses it in a second scores about 0.1: it is the mean of the whole picture that counts, so
    a moving camera scores much more than a moving thing. Smooth areas take the motion of their edges, and what
    moves faster than a height a second is measured too slow.
    """
    import cv2

    if not sample.pairs:
        return None
    pictures = sample.luma_at(FLOW_SHORT_SIDE)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    start, speeds = np.zeros((*pictures.shape[1:], 2), np.float32), []
    for before, after in sample.pairs:
        field = flow.calc(pictures[before], pictures[after], start.copy())  # (H, W, 2), pixels
        seconds = sample.seconds[after] - sample.seconds[before]
        speeds.append(np.linalg.norm(field, axis=-1).mean() / pictures.shape[1] / seconds)
    return float(np.mean(speeds))


def still_share(sample: Sample) -> float | None:
    """Share of near frames that show the same picture, 0 to 1: 1 for a photograph or a frozen stream."""
    if not sample.pairs:
        return None
    cells = sample.luma_at(STILL_CELLS).astype(np.int16)
    same = [np.abs(cells[before] - cells[after]).max() <= STILL_LEVELS for before, after in sample.pairs]
    return float(np.mean(same))
