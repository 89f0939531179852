"""Many clips on one picture, for a person to look at."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (250, 250, 250), (40, 40, 40)
GAP, MARGIN = 3, 18
BOX = 112
"""Longer side of a frame, in pixels, unless a scale is given."""
CAPTION_SIZE, LINE_HEIGHT, TITLE_SIZE = 15, 19, 20
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[tuple[NDArray[np.uint8], str]],
    path: str | Path,
    *,
    frames_per_row: int = 5,
    columns: int = 1,
    scale: float | None = None,
    title: str = "",
) -> None:
    """Write a PNG: a strip of evenly spaced frames for each clip (T, H, W, 3) under its caption.

    First and last frame are always there. `scale` enlarges all frames alike; by default each clip is fitted
    into a box of 112 pixels. Frames stand in a common grid, whatever their aspect ratios. Raises ValueError
    without rows or for frames of another layout.
    """
    if not rows:
        raise ValueError("rows=[] must hold at least one clip: there is nothing to show.")
    if frames_per_row < 1 or columns < 1:
        raise ValueError(f"frames_per_row={frames_per_row} and columns={columns} must be at least 1.")
    strips = [_pick_frames(frames, frames_per_row, scale) for frames, _ in rows]
    slot = max(picture.width for strip in strips for picture in strip)
    font = ImageFont.load_default(CAPTION_SIZE)
    width = frames_per_row * (slot + GAP) - GAP
    cells = [
        _cell(strip, _wrap(caption, font, width), slot, font) for strip, (_, caption) in zip(strips, rows, strict=True)
    ]
    _save(_arrange(cells, columns, title), Path(path))


def strip_jpeg(frames: NDArray[np.uint8], count: int = 5) -> bytes:
    """JPEG of evenly spread frames of one clip (T, H, W, 3) side by side, without words."""
    pictures = _pick_frames(frames, min(count, len(frames)), None)
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), PAPER)
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (width + GAP), 0))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=85)
    return content.getvalue()


def _pick_frames(frames: NDArray[np.uint8], count: int, scale: float | None) -> list[Image.Image]:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames of type {frames.dtype} and shape {frames.shape} must be uint8 (T, H, W, 3).")
    height, width = frames.shape[1:3]
    factor = BOX / max(height, width) if scale is None else scale
    size = max(1, round(width * factor)), max(1, round(height * factor))
    chosen = np.rint(np.linspace(0, len(frames) - 1, count)).astype(int)
    return [Image.fromarray(frames[i]).resize(size, Image.Resampling.BICUBIC) for i in chosen]


def _cell(strip: list[Image.Image], lines: list[str], slot: int, font: Font) -> Image.Image:
    """One clip: its caption, and under it the frames, each in the middle of its slot."""
    above = len(lines) * LINE_HEIGHT + 3
    cell = Image.new("RGB", (len(strip) * (slot + GAP) - GAP, above + strip[0].height), PAPER)
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((0, number * LINE_HEIGHT), line, INK, font)
    for place, picture in enumerate(strip):
        cell.paste(picture, (place * (slot + GAP) + (slot - picture.width) // 2, above))
    return cell


def _arrange(cells: list[Image.Image], columns: int, title: str) -> Image.Image:
    """Cells line by line under the title; a line is as high as its highest cell."""
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    top = MARGIN + (TITLE_SIZE + MARGIN if title else 0)
    width = MARGIN + min(columns, len(cells)) * (cells[0].width + MARGIN)
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN * len(lines)), PAPER)
    if title:
        ImageDraw.Draw(sheet).text((MARGIN, MARGIN // 2), title, INK, ImageFont.load_default(TITLE_SIZE))
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (MARGIN + column * (cell.width + MARGIN), top))
        top += height + MARGIN
    return sheet


def _wrap(caption: str, font: Font, width: int) -> list[str]:
    """The caption in lines of at most `width` pixels; a longer word stands alone."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    sheet.save(unfinished, format="PNG")
    os.replace(unfinished, path)
