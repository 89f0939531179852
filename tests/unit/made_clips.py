"""Clips whose motion, detail and exposure are known, because they were made so, as arrays and as rows of a stage."""

import hashlib

import cv2
import numpy as np

from data_prep.pipeline.rows import write_rows
from data_prep.pipeline.run import Limits, Pipeline
from kinema.data.decode.encoding import write_video

FPS, FRAMES, HEIGHT, WIDTH = 24, 48, 120, 160


def scenery(seed=0, height=HEIGHT, width=WIDTH, smooth=2.0):
    """A still picture with detail everywhere, uint8 (H, W, 3): no two seeds look alike."""
    noise = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    broad = cv2.GaussianBlur(noise, (0, 0), 12) * 14 - 6.5
    fine = cv2.GaussianBlur(noise, (0, 0), smooth)
    return (np.clip(0.6 * broad + 2 * fine - 0.7, 0.15, 0.9) * 255).astype(np.uint8)


def still(picture):
    """A clip that shows one picture."""
    return np.repeat(picture[None], FRAMES, axis=0)


def panned(pixels_per_second, seed=0):
    """A camera that moves to the right over a broad scenery."""
    wide = scenery(seed, width=WIDTH + 400).astype(np.float32)
    shifts = np.arange(FRAMES) / FPS * pixels_per_second
    moves = [np.float32([[1, 0, -shift], [0, 1, 0]]) for shift in shifts]
    frames = [cv2.warpAffine(wide, move, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC) for move in moves]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def clip_row(folder, key, frames, **facts):
    """Write the clip into `folder`, and its row as stage cut gives it."""
    write_video(folder / f"{key}.mp4", frames, FPS)
    content = (folder / f"{key}.mp4").read_bytes()
    known = {"caption": f"caption of {key}", "split": "train", "source": "test", "license": "CC0-1.0"}
    return known | {
        "key": key,
        "clip": f"{key}.mp4",
        "clip_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "consent": "synthetic",
        "fps": float(FPS),
        "num_frames": len(frames),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "duration_seconds": len(frames) / FPS,
        **facts,
    }


def pipeline(work, stages, rows, engine, **limits):
    """A pipeline whose first stage gets these rows."""
    write_rows(work / "input.jsonl", rows)
    return Pipeline(stages, work, engine, Limits(**limits))
