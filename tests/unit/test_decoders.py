"""Odd videos with their frame numbers painted in, through every decoder."""

import io
import struct
import tempfile
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kinema.data.decode.decoders import pyav as pyav_decoder
from kinema.data.decode.decoders import torchcodec as torchcodec_decoder
from kinema.data.decode.decoders.video import BATCH
from kinema.data.decode.decoding import DecodeError, Decoder, decode_clip
from kinema.data.decode.encoding import encode_video
from kinema.data.geometry import ClipShape
from tests.unit.clips import numbered_video, numbers

EACH = pytest.mark.parametrize("decoder", list(Decoder), ids=lambda decoder: decoder.name)
TIMES = [i / 20 for i in range(60)]
SHAPE = ClipShape(9, 32, 64)


def box_at(mp4: bytes, kind: bytes) -> int:
    """Where the body of the first box of this kind begins."""
    return mp4.index(kind, mp4.index(b"moov")) + 4


def patched(mp4: bytes, at: int, value: int) -> bytes:
    return mp4[:at] + struct.pack(">I", value) + mp4[at + 4 :]


def remuxed(mp4: bytes, container_format: str, shift_seconds: float = 0.0, **options: str) -> bytes:
    """The same packets in another file, earlier by some seconds."""
    with tempfile.TemporaryDirectory() as folder, av.open(io.BytesIO(mp4)) as source:
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=container_format, options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is None:
                    continue
                ticks = round(shift_seconds / packet.time_base)
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                packet.stream = stream
                target.mux(packet)
        return path.read_bytes()


@contextmanager
def refusal_of(decoder, reasons):
    """A library may refuse for its reason, as some versions do; never return something else."""
    try:
        yield
    except DecodeError as error:
        if reasons.get(decoder, "no such reason") not in str(error):
            raise


def asked(mp4, decoder, fps=10.0, start=0.0, shape=SHAPE):
    return numbers(decode_clip(mp4, shape, fps, start, decoder))


ODD = {
    "odd sides": {"size": (67, 129), "codec": "mpeg4"},
    "10 bits": {"pix_fmt": "yuv420p10le"},
    "4:4:4": {"pix_fmt": "yuv444p", "size": (66, 134)},
    "one key frame": {"key_every": 1000},
    "only key frames": {"key_every": 1},
    "one key frame, B-frames": {"key_every": 1000, "b_frames": 3},
    "matroska": {"container_format": "matroska"},
    "transport stream": {"container_format": "mpegts", "size": (64, 128)},
    "quicktime": {"container_format": "mov"},
}


@EACH
@pytest.mark.parametrize("name", ODD)
def test_the_frames_of_odd_files_are_those_asked_for(decoder, name):
    mp4 = numbered_video(TIMES, **ODD[name])
    assert asked(mp4, decoder, 10, 0.0) == list(range(0, 18, 2))
    assert asked(mp4, decoder, 10, 1.0) == list(range(20, 38, 2))
    assert asked(mp4, decoder, 5, 0.5) == list(range(10, 46, 4))


@EACH
def test_a_clip_longer_than_a_batch_comes_whole_and_in_order(decoder):
    mp4 = numbered_video([i / 30 for i in range(200)])
    frames = decode_clip(mp4, ClipShape(3 * BATCH + 5, 32, 32), 30, 1.0, decoder)
    assert numbers(frames) == list(range(30, 30 + 3 * BATCH + 5))


class OutOfOrder:
    """A reader of packets whose frames come two by two in the wrong order, as from a file that hides its B-frames."""

    def __init__(self, frames):
        self.frames = frames

    def __call__(self, mp4, packets, first):
        frames = list(self.frames(mp4, packets, first))
        return (frames[number ^ 1] for number in range(len(frames) // 2 * 2))


def test_frames_that_leave_the_decoder_out_of_order_are_told_by_their_times(monkeypatch):
    monkeypatch.setattr(pyav_decoder, "_frames_from", OutOfOrder(pyav_decoder._frames_from))
    assert asked(numbered_video(TIMES), Decoder.pyav, 20) == list(range(9))


@EACH
def test_an_edit_list_that_begins_inside_a_group_of_pictures_hides_the_frames_before(decoder):
    mp4 = remuxed(numbered_video(TIMES), "mp4", shift_seconds=7 / 20)
    with av.open(io.BytesIO(mp4)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 7
    known = {Decoder.torchcodec: "of other times than", Decoder.decord: "is not that of the file"}
    with refusal_of(decoder, known):
        assert asked(mp4, decoder) == list(range(7, 25, 2))
        assert asked(mp4, decoder, start=1.0) == list(range(27, 45, 2))


@EACH
def test_a_header_that_promises_twice_the_length_gives_the_frames_there_are_and_no_others(decoder):
    mp4 = numbered_video(TIMES)
    for kind, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20), (b"elst", 8)):
        at = box_at(mp4, kind) + offset
        mp4 = patched(mp4, at, 2 * struct.unpack(">I", mp4[at : at + 4])[0])
    assert asked(mp4, decoder, start=1.0) == list(range(20, 38, 2))
    with pytest.raises(DecodeError):
        asked(mp4, decoder, start=3.5)


@EACH
def test_a_file_whose_last_third_is_missing_never_gives_other_frames(decoder):
    """The header lies in front and lists all frames: decord once spun for ever in such files, or repeated frames."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    whole = encode_video(noise, 20)
    assert whole.index(b"moov") < whole.index(b"mdat")
    with av.open(io.BytesIO(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    with pytest.raises(DecodeError, match="a packet of the video is not whole"):
        decode_clip(whole[: places[40] + 9], ClipShape(9, 64, 64), 10, 0.0, decoder)
    cut = whole[: places[40]]
    begin = decode_clip(cut, ClipShape(9, 64, 64), 10, 0.0, decoder)
    assert torch.equal(begin, decode_clip(whole, ClipShape(9, 64, 64), 10, 0.0, decoder))
    with pytest.raises(DecodeError):
        decode_clip(cut, ClipShape(9, 64, 64), 10, 2.0, decoder)


@EACH
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_made_so(decoder, aspect):
    """A disc stored in stretched pixels is round in the clip, and the crop follows the picture as displayed."""
    mp4 = numbered_video(TIMES, pixel_aspect=aspect)  # bars; displayed 128 x 64 or 64 x 128
    wide = aspect > 1
    shape = ClipShape(9, 32, 64) if wide else ClipShape(9, 64, 32)
    assert asked(mp4, decoder, shape=shape) == list(range(0, 18, 2))  # all bars are seen: nothing was cut off
    square = decode_clip(mp4, ClipShape(9, 64, 64), 10, 0.0, decoder)
    stored = decode_clip(numbered_video(TIMES), ClipShape(9, 64, 64), 10, 0.0, decoder)
    if wide:  # the middle half of the width
        middle = stored[:, :, 16:48].float().repeat_interleave(2, 2)
        assert (square.float() - middle).abs().mean() < 12
    else:
        assert (square.int() - stored.int()).abs().float().mean() < 2  # bars look alike from top to bottom


def test_a_missing_torchcodec_is_no_damaged_clip_and_says_what_to_type(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    torchcodec_decoder.import_torchcodec.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'kinema\[torchcodec\]'"):
        decode_clip(b"", ClipShape(1, 8, 8), 8, 0.0, Decoder.torchcodec)
    torchcodec_decoder.import_torchcodec.cache_clear()
