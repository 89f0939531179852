"""Images as clips of one frame, beside videos, from Kinema's shards and from others."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from kinema.data.dataset.foreign import ForeignOptions
from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.shards import DatasetIndex, ShardWriter
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.decode.decoders.video import DecodeError
from kinema.data.decode.images import decode_image, probe_image
from kinema.data.geometry import ClipShape
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from kinema.data.verbs.check import check_clip
from tests.unit.clips import GEOMETRY, make_plan, numbered_video, record

SHAPES = [ClipShape(5, 32, 32), ClipShape(1, 32, 32), ClipShape(1, 64, 32)]


def picture(color, size=(64, 64), kind="PNG", **options):
    """An image whose upper half has a colour, bytes of a file."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2] = color
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    mp4 = numbered_video([i / 10 for i in range(20)])
    with ShardWriter(folder, max_samples=3) as writer:
        writer.write(record("video", mp4), mp4)
        for ext, size in (("png", (64, 64)), ("jpg", (64, 128)), ("webp", (64, 64))):
            kind = {"jpg": "JPEG"}.get(ext, ext.upper())
            content = picture((250, 10, 10), size, kind)
            facts = {"fps": 1.0, "num_frames": 1, "duration_seconds": 1.0, "width": size[0], "height": size[1]}
            writer.write(record(f"image-{ext}", content, **facts), content, ext)
    return DatasetIndex.load(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_and_videos_share_packs(index, workers):
    plan = make_plan(index, shapes=SHAPES, lanes=1, clips_per_step=4)
    ((pack,),) = make_loader(index, plan, [0], 0, 1, fps=8, seed=0, decoding=DecodingRules(), num_workers=workers)
    shapes = dict(zip(pack.keys, pack.shapes, strict=True))
    assert shapes == {
        "video": (5, 32, 32), "image-png": (1, 32, 32), "image-webp": (1, 32, 32), "image-jpg": (1, 64, 32)
    }  # fmt: skip
    assert not pack.failures
    assert pack.weights.tolist() == [1.0] * 4
    for key, frames in zip(pack.keys, pack.frames, strict=True):
        assert tuple(frames.shape) == (*shapes[key], 3)
        if key != "video":
            assert frames[0, 2].float().mean(0).tolist() == pytest.approx([250, 10, 10], abs=12)
            assert frames[0, -3].max() < 12


def test_images_are_checked_like_videos(index):
    for entry in index.entries:
        report = check_clip(index.folder, entry, show=True)
        assert report.problem is None or entry.record.key == "video", report.problem


def test_an_image_without_a_shape_of_one_frame_is_counted_as_such(index):
    _, report = plan_clips(index, SHAPES[:1], 8, GEOMETRY)
    assert report.line() == "kept 1/4 (25%): image, and data.shapes has none of one frame 3"


def test_a_photograph_is_turned_upright():
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise shows it upright
    content = picture((250, 250, 250), (128, 64), "JPEG", exif=turned)
    assert probe_image(content)["width"] == 64
    frames = decode_image(content, ClipShape(1, 128, 64))
    assert frames[0, :, 48:].float().mean() > 240
    assert frames[0, :, :16].float().mean() < 15


@pytest.mark.parametrize("content", [b"", b"GIF89a", picture((1, 2, 3))[:60], b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_whole_image_is_an_error_of_its_clip(content):
    with pytest.raises(DecodeError):
        decode_image(content, ClipShape(1, 32, 32))


def test_a_bomb_is_not_opened():
    bomb = picture((0, 0, 0), (20_000, 10_000), "PNG")
    assert len(bomb) < 2**20
    with pytest.raises(DecodeError, match="pixels"):
        decode_image(bomb, ClipShape(1, 32, 32))


def test_foreign_tars_of_images_are_indexed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("x.jpg", picture((9, 9, 9), (40, 30), "JPEG")), ("x.txt", b"a wall"), ("y.png", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (entry,) = index_shards(tmp_path, options=ForeignOptions(max_refused_fraction=0.5)).entries
    assert (entry.record.caption, entry.record.width, entry.record.height) == ("a wall", 40, 30)
    assert entry.record.num_frames == 1
    assert entry.record.sha256 == hashlib.sha256(picture((9, 9, 9), (40, 30), "JPEG")).hexdigest()
