"""How far copies of the film's shots lie from them in bits, how well painted text is found, and what it costs.

python benchmarks/scores.py
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, the repository's root is not on the path
from data_prep.captions import read_json_lines
from data_prep.clip_frames import read_frames
from data_prep.scores.duplicates import near_pairs, signature
from data_prep.scores.measure import SCORERS, measure
from data_prep.scores.sample import Sample, frames_to_sample
from data_prep.scores.text import text_share
from kinema.data.decode.encoding import encode_video

FILM = Path(__file__).parents[1] / "data_prep" / "film"
FPS = 24
Frames = NDArray[np.uint8]


def shots() -> list[Frames]:
    """Every shot of the film."""
    videos: dict[str, Frames] = {}
    found = []
    for values, _ in read_json_lines(FILM / "shots.jsonl"):
        name = str(values["path"])
        if name not in videos:
            videos = {name: read_frames(FILM / name)}
        first, stop = (round(float(values[key]) * FPS) for key in ("start_seconds", "end_seconds"))  # type: ignore[arg-type]
        found.append(videos[name][first:stop])
    return found


def sample(frames: Frames) -> Sample:
    """As the stage reads it."""
    numbers = np.array(frames_to_sample(len(frames), FPS))
    return Sample(frames[numbers], numbers / FPS)


def encoded_again(frames: Frames) -> Frames:
    """Decoded from a small file."""
    with av.open(io.BytesIO(encode_video(frames, FPS, crf=38))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def cropped(share: float) -> Callable[[Frames], Frames]:
    """Without `share` of height and width."""

    def crop(frames: Frames) -> Frames:
        top, left = (int(side * share / 2) for side in frames.shape[1:3])
        return frames[:, top : frames.shape[1] - top, left : frames.shape[2] - left]

    return crop


COPIES: dict[str, Callable[[Frames], Frames]] = {
    "encoded again, crf 38": encoded_again,
    "half the size": lambda frames: np.stack([cv2.resize(f, (80, 45), interpolation=cv2.INTER_AREA) for f in frames]),
    "cropped by 2 %": cropped(0.02),
    "cropped by 5 %": cropped(0.05),
    "cropped by 10 %": cropped(0.10),
    "brighter by a fifth": lambda frames: np.clip(frames * 1.2 + 10, 0, 255).astype(np.uint8),
    "mirrored": lambda frames: frames[:, :, ::-1],
}


def distances(clips: list[Frames]) -> None:
    """Bits between each shot and its copies, and between different shots."""
    own = np.stack([signature(sample(clip)) for clip in clips])
    for name, change in COPIES.items():
        bits = [np.bitwise_count(own[i] ^ signature(sample(change(clips[i])))).sum() for i in range(0, len(clips), 5)]
        print(f"{name:<24} median {np.median(bits):>4.0f}  most {max(bits):>4}")
    between = np.bitwise_count(own[:, None] ^ own[None]).sum(axis=2)[np.triu_indices(len(own), 1)]
    print(f"{'another shot':<24} median {np.median(between):>4.0f}  least {np.sort(between)[:4].tolist()}")


def text(clips: list[Frames]) -> None:
    """Share of the shots in which a painted line is found, and its area against the true one."""
    print(f"text_share without text: at most {max(text_share(sample(clip)) for clip in clips):.4f}")
    words = "SUBSCRIBE for more 24/7"
    for size in (8, 12, 16, 24, 36, 48):
        font = ImageFont.load_default(size)
        box, found = font.getbbox(words), []
        for clip in clips[:30:2]:
            shown = sample(clip)
            pictures = [Image.fromarray(frame).resize((455, 256)) for frame in shown.frames]
            for picture in pictures:
                ImageDraw.Draw(picture).text((30, 256 - 2 * size), words, "white", font, stroke_width=1, stroke_fill=0)
            found.append(text_share(Sample(np.stack([np.asarray(p) for p in pictures]), shown.seconds)))
        area = (box[2] - box[0]) * (box[3] - box[1]) / (455 * 256)
        hit = np.mean([share > 0.003 for share in found])
        print(f"text {size:>2} pixels high: found in {hit:.0%}, area {np.median(found):.3f} of {area:.3f}")


def speed(clips: list[Frames]) -> None:
    """Seconds for all scores of a clip, and for the search among random signatures."""
    samples = [sample(clip) for clip in clips[::8]]
    started = time.perf_counter()
    for one in samples:
        measure(one, SCORERS)
    print(f"all scores: {(time.perf_counter() - started) / len(samples):.2f} s a clip of {clips[0].shape[2]} pixels")
    for count in (10_000, 100_000):
        given = np.random.default_rng(0).integers(0, 2**64, (count, 4), dtype=np.uint64)
        started = time.perf_counter()
        near_pairs(given, 24)
        print(f"near pairs of {count:,} signatures: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    film = shots()
    distances(film)
    text(film)
    speed(film)
