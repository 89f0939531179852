import io
import itertools
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch

from kinema.data.decode.decoders import decord as decord_decoder
from kinema.data.decode.decoding import DecodeError, Decoder, decode_clip, nearest_frames, resize_and_crop
from kinema.data.decode.encoding import encode_video
from kinema.data.geometry import ClipShape
from tests.unit.clips import numbered_video, numbers, quarter_turned

EACH = pytest.mark.parametrize("decoder", list(Decoder), ids=lambda decoder: decoder.name)
SIZE = (32, 32)


def nearest(times, wanted):
    """Plain reference: the earliest of the nearest frames."""
    gaps = [[round(abs(t - w), 7) for t in times] for w in wanted]
    return [gap.index(min(gap)) for gap in gaps]


def variable_times():
    """Gaps from 10 to 120 ms, a still of 0.7 s included."""
    gaps = np.random.default_rng(0).uniform(0.01, 0.12, 59)
    gaps[30] = 0.7
    return [0.0, *np.cumsum(gaps).round(3).tolist()]


TIMELINES = {
    "30 fps": [i / 30 for i in range(90)],
    "24 fps": [i / 24 for i in range(72)],
    "12.5 fps": [i / 12.5 for i in range(40)],
    "23.976 fps": [i * 1001 / 24000 for i in range(72)],
    "variable": variable_times(),
}


@EACH
@pytest.mark.parametrize("name", TIMELINES)
@pytest.mark.parametrize("b_frames", [0, 3])
def test_the_frames_asked_for_by_time_are_returned(decoder, name, b_frames):
    times = TIMELINES[name]
    mp4 = numbered_video(times, b_frames=b_frames)
    for fps, start in [(8, 0.0), (8, 0.31), (5, 1.0), (24, 1.2), (7.3, 0.05)]:
        frames = decode_clip(mp4, ClipShape(9, *SIZE), fps, start, decoder)
        assert frames.shape == (9, *SIZE, 3)
        assert frames.dtype == torch.uint8
        assert numbers(frames) == nearest(times, [start + i / fps for i in range(9)]), (fps, start)


@EACH
def test_neighbouring_key_frames_do_not_mislead_the_decoder(decoder):
    """decord's own seeking returns a neighbour here."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    mp4 = encode_video(noise, 20)  # every frame a new scene: the encoder sets key frames at will
    with av.open(io.BytesIO(mp4)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert any(one and two for one, two in itertools.pairwise(keys))
    whole = decode_clip(mp4, ClipShape(40, 64, 64), 20, 0.0, decoder)
    assert (whole.int() - torch.from_numpy(noise).int()).abs().float().mean() < 60  # colours are coarse
    for number in range(36):
        part = decode_clip(mp4, ClipShape(3, 64, 64), 10, number / 20, decoder)
        assert torch.equal(part, whole[number : number + 5 : 2])


def test_the_test_video_really_has_b_frames():
    with av.open(io.BytesIO(numbered_video(TIMELINES["24 fps"], b_frames=3))) as container:
        kinds = {av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0)}
    assert kinds == {"I", "P", "B"}


@EACH
def test_a_late_first_timestamp_counts_as_the_start(decoder):
    mp4 = numbered_video([0.5 + i / 20 for i in range(40)], container_format="matroska")
    with av.open(io.BytesIO(mp4)) as container:  # which keeps the late start, where mp4 drops it
        assert next(container.decode(video=0)).time == 0.5
    assert numbers(decode_clip(mp4, ClipShape(5, *SIZE), 10, 0.0, decoder)) == [0, 2, 4, 6, 8]


@EACH
def test_a_clip_that_ends_too_early_is_an_error_and_never_padded(decoder):
    mp4 = numbered_video(TIMELINES["30 fps"])
    decode_clip(mp4, ClipShape(9, *SIZE), 8, 2.0, decoder)  # the last frame is at 3.0 s, where the video ends
    with pytest.raises(DecodeError, match=r"2\.500 s to 3\.500 s were asked of a video that lasts 3\.000 s"):
        decode_clip(mp4, ClipShape(9, *SIZE), 8, 2.5, decoder)
    with pytest.raises(DecodeError, match="were asked"):
        decode_clip(mp4, ClipShape(9, *SIZE), 8, -0.2, decoder)


@EACH
def test_damage_is_an_error_with_a_countable_reason(decoder):
    mp4 = numbered_video(TIMELINES["24 fps"])
    reasons = set()
    for broken in (b"", b"<html>", mp4[: len(mp4) // 2], bytes(len(mp4))):
        with pytest.raises(DecodeError) as error:
            decode_clip(broken, ClipShape(9, *SIZE), 8, 0.0, decoder)
        reasons.add(str(error.value))
        assert str(error.value).startswith(decoder.name)
        assert ".cc:" not in str(error.value)
    assert len(reasons) <= 4


class PaddingReader:
    """decord's reader of a video whose padded rows it takes for more channels."""

    def get_batch(self, numbers):
        raise RuntimeError("[06:45:00] /project/x.cc:171: Check failed: from_size == to_size (18432 vs. 13824) DECORD")


def test_a_width_that_decord_cannot_hand_over_is_an_error_that_says_what_to_type():
    with pytest.raises(DecodeError, match=r"frames of this width.* Type data\.decoder=pyav"):
        decord_decoder.take(PaddingReader(), range(1))


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 72, 80, 96, 144, 192])
@pytest.mark.parametrize("frames_asked", [1, 5])
def test_decord_returns_the_right_pixels_of_any_width_or_names_the_other_decoder(width, frames_asked):
    """Which widths it cannot hand over depends on the processor's vector length: 48 with 32 bytes and with 64."""
    mp4, shape = encode_video(picture(32, width), 12), ClipShape(frames_asked, 32, width)
    expected = decode_clip(mp4, shape, 8, 0.0, Decoder.pyav)
    frames, refusal = None, ""
    try:
        frames = decode_clip(mp4, shape, 8, 0.0, Decoder.decord)
    except DecodeError as error:
        refusal = str(error)
    if frames is None:
        assert "Type data.decoder=pyav" in refusal
        assert width % 64
    else:
        assert (frames.int() - expected.int()).abs().max() <= 3


@EACH
def test_sound_alone_is_an_error(decoder):
    mp4 = encode_video(np.zeros((8, 32, 32, 3), np.uint8), 8, audio=np.zeros(16_000, np.float32))
    with av.open(io.BytesIO(mp4)) as source:
        target_file = io.BytesIO()
        with av.open(target_file, "w", format="mp4") as target:
            stream = target.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(source.streams.audio[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    with pytest.raises(DecodeError):
        decode_clip(target_file.getvalue(), ClipShape(5, *SIZE), 8, 0.0, decoder)


def picture(height, width):
    """Red falls along the height, green rises along the width; a white bar marks the top."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = np.linspace(255, 0, height)[:, None]
    frame[..., 1] = np.linspace(0, 255, width)[None]
    frame[: height // 8] = 255
    return frame[None].repeat(12, 0)


@EACH
def test_height_and_width_keep_their_places(decoder):
    mp4 = encode_video(picture(64, 128), 12)
    frames = decode_clip(mp4, ClipShape(5, 32, 64), 8, 0.0, decoder).float()
    assert frames.shape == (5, 32, 64, 3)
    assert frames[0, 0].mean() > 240  # the bar is on top
    assert frames[0, 8, :, 0].mean() > frames[0, 28, :, 0].mean() + 100
    assert frames[0, 8:, -3, 1].mean() > frames[0, 8:, 3, 1].mean() + 150


def test_all_libraries_give_nearly_the_same_pixels():
    noise = torch.nn.functional.interpolate(
        torch.rand(24, 3, 9, 16, generator=torch.manual_seed(0)), (72, 128), mode="bicubic"
    )
    frames = (noise.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()
    mp4 = encode_video(frames, 24)
    for shape in (ClipShape(9, 72, 128), ClipShape(9, 48, 48), ClipShape(9, 96, 160)):
        one, *others = (decode_clip(mp4, shape, 8, 0.0, decoder).int() for decoder in Decoder)
        for other in others:
            assert one.shape == other.shape == (*shape, 3)
            assert (one - other).abs().max() <= 3
            assert (one - other).abs().float().mean() < 0.5
    # And all are what was encoded.
    direct = decode_clip(mp4, ClipShape(9, 72, 128), 8, 0.0, Decoder.pyav).int()
    assert (direct - frames[[0, 3, 6, 9, 12, 15, 18, 21, 23]].int())[:8].abs().float().mean() < 10


@EACH
def test_decoding_twice_gives_the_same_bytes(decoder):
    mp4 = encode_video(picture(64, 128), 12)
    one, other = (decode_clip(mp4, ClipShape(5, 32, 32), 8, 0.1, decoder) for _ in range(2))
    assert torch.equal(one, other)


@EACH
def test_rotation_is_applied(decoder):
    upright = picture(64, 128)
    mp4 = encode_video(upright, 12)
    rotated = quarter_turned(mp4)
    frames = decode_clip(rotated, ClipShape(1, 128, 64), 8, 0.0, decoder).int()
    straight = decode_clip(mp4, ClipShape(1, 64, 128), 8, 0.0, decoder).int()
    # The display matrix says: turn by 90 degrees clockwise.
    assert (frames[0] - torch.rot90(straight[0], -1)).abs().float().mean() < 3


def test_the_centre_is_cropped_unless_another_place_is_named():
    frame = torch.arange(8, dtype=torch.uint8)[None, None, :, None].expand(1, 4, 8, 3).numpy()
    columns = {
        place: resize_and_crop(frame, ClipShape(1, 4, 4), (0.5, place))[0, 0, :, 0].tolist() for place in (0, 0.5, 1)
    }
    assert columns == {0: [0, 1, 2, 3], 0.5: [2, 3, 4, 5], 1: [4, 5, 6, 7]}


def test_shrinking_averages():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    frame = checks.astype(np.uint8)[None, :, :, None].repeat(3, -1)
    small = resize_and_crop(frame, ClipShape(1, 16, 16)).int()
    assert (small - 127).abs().max() <= 4  # without antialiasing: black and white


def test_ties_go_to_the_earlier_frame_whatever_the_rounding():
    starts = np.array([0.0, 0.1, 0.2])
    times = np.array([0.05, 0.05 + 1e-8, 0.0501, 0.15, 9.0])
    assert nearest_frames(starts, times).tolist() == [0, 0, 1, 1, 2]


def test_decord_is_imported_at_first_use_only():
    code = "import kinema.data.packs.loading, sys; print('decord' in sys.modules, 'av' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_a_mixed_installation_is_refused(monkeypatch):
    class Installed:
        def __init__(self, name):
            self.name = name

    monkeypatch.setattr("importlib.metadata.distributions", lambda: [Installed("decord"), Installed("Decord2")])
    decord_decoder.import_decord.cache_clear()
    with pytest.raises(ImportError, match="pip uninstall -y decord decord2"):
        decode_clip(b"", ClipShape(1, 8, 8), 8, 0.0, Decoder.decord)
    decord_decoder.import_decord.cache_clear()


@EACH
def test_small_clips_decode_fast(decoder):
    frames = (np.random.default_rng(0).random((96, 8, 8, 3)) * 255).astype(np.uint8)
    frames = frames[::12].repeat(12, 0).repeat(8, 1).repeat(8, 2)
    mp4 = encode_video(frames, 24)
    decode_clip(mp4, ClipShape(29, 64, 64), 8, 0.0, decoder)
    began = time.thread_time() if decoder is Decoder.pyav else time.process_time()
    for _ in range(10):
        decode_clip(mp4, ClipShape(29, 64, 64), 8, 0.0, decoder)
    used = (time.thread_time() if decoder is Decoder.pyav else time.process_time()) - began
    assert 10 / used > 40  # measured: 120; half of it, as test machines vary
