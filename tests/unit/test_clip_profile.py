"""The one form in which clips are written: what every decoder reads alike."""

import io

import av
import numpy as np
import pytest
import torch

from kinema.data.decode.decoding import Decoder, decode_clip
from kinema.data.decode.encoding import encode_video
from kinema.data.geometry import ClipShape

FRAMES = 40


def clip(height, width, fps):
    """Frame i has a bright bar in the column of its number, over a soft picture in all colours that drifts."""
    coarse = torch.rand(FRAMES // 8 + 2, 3, 5, 7, generator=torch.manual_seed(0))
    soft = torch.nn.functional.interpolate(
        coarse.permute(1, 0, 2, 3)[None], (FRAMES, height, width), mode="trilinear", align_corners=True
    )[0]
    frames = (soft.permute(1, 2, 3, 0) * 200).byte().numpy()
    for number in range(FRAMES):
        left = number * width // FRAMES
        frames[number, :, left : max(left + 1, (number + 1) * width // FRAMES)] = 255
    return frames, encode_video(frames, fps)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 160), (270, 480)])
@pytest.mark.parametrize("fps", [8, 24000 / 1001, 30])
def test_every_decoder_reads_what_is_written_frame_for_frame(height, width, fps):
    """Within 3 levels of 255, and half a level on average: the conversions from YUV round differently."""
    frames, mp4 = clip(height, width, fps)
    shape = ClipShape(FRAMES, height, width)
    reference = decode_clip(mp4, shape, fps, 0.0, Decoder.pyav).int()
    bars = torch.from_numpy(frames).int()
    assert ((reference - bars).abs().float().mean((1, 2, 3)) < 6).all()  # each frame is its own, not a neighbour
    assert ((reference - bars.roll(1, 0)).abs().float().mean((1, 2, 3)) > 6).all()
    for decoder in (Decoder.decord, Decoder.torchcodec):
        other = decode_clip(mp4, shape, fps, 0.0, decoder).int()
        assert (other - reference).abs().max() <= 3
        assert (other - reference).abs().float().mean() < 0.5


def test_the_form_is_the_safe_one():
    mp4 = clip(64, 96, 12)[1]
    assert mp4.index(b"moov") < mp4.index(b"mdat")  # readable from its beginning
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", False)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (6, 6, 6, 1)
        assert stream.sample_aspect_ratio in (None, 0, 1)
        packets = [packet for packet in container.demux(stream) if packet.size]
    assert all(packet.pts == packet.dts for packet in packets)
    keys = np.flatnonzero([packet.is_keyframe for packet in packets])
    assert keys[0] == 0
    assert np.diff([*keys, len(packets)]).max() <= 12  # a second
    assert packets[0].pts == 0
    whole = decode_clip(mp4, ClipShape(FRAMES, 64, 96), 12, 0.0, Decoder.pyav)
    for number in keys:  # groups are closed: a decoder that begins at a key frame needs nothing from before it
        assert torch.equal(decode_clip(mp4, ClipShape(1, 64, 96), 12, number / 12, Decoder.pyav)[0], whole[number])
