"""The stage sound: a click of the source is heard in its clip at its time, and no picture changes."""

import av
import numpy as np

from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.rows import read_rows
from data_prep.stages.sound import Sound
from kinema.data.decode.encoding import write_video
from tests.unit.made_clips import FPS, clip_row, panned, pipeline

RATE = 48_000


def clicks(path):
    """Seconds at which the sound of a file gets loud, and its length, by plain decoding."""
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    sound = np.abs(np.concatenate(blocks))
    loud = np.flatnonzero(sound > 0.3) / RATE
    return [float(t) for i, t in enumerate(loud) if i == 0 or t - loud[i - 1] > 0.2], len(sound) / RATE


def picture_packets(path):
    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def test_a_click_keeps_its_time_and_the_pictures_their_bytes(tmp_path):
    sound = np.zeros(6 * RATE, np.float32)
    for second in (0.5, 2.75, 4.5):
        sound[int(second * RATE) : int((second + 0.05) * RATE)] = 0.8 * np.sin(np.arange(0.05 * RATE) * 0.2)
    frames = np.concatenate([panned(30), panned(40), panned(50)])
    write_video(tmp_path / "source.mp4", frames, FPS, audio=sound, sample_rate=RATE)
    facts = {"path": str(tmp_path / "source.mp4"), "audio": {"codec": "aac"}, "start_seconds": 2.0}
    rows = [clip_row(tmp_path, "loud", panned(40), **facts), clip_row(tmp_path, "mute", panned(30), audio=None)]
    pipeline(tmp_path, {"sound": Sound()}, rows, LocalEngine(workers=0)).run(["sound"], show=False)

    loud, mute = read_rows(tmp_path / "01-sound" / "rows.jsonl")
    assert mute == rows[1]
    assert loud["sound"]["rate"] == RATE
    times, seconds = clicks(tmp_path / loud["clip"])
    np.testing.assert_allclose(times, [0.75], atol=0.03)
    np.testing.assert_allclose(seconds, 2.0, atol=0.05)
    assert picture_packets(tmp_path / loud["clip"]) == picture_packets(tmp_path / "loud.mp4")
    assert loud["clip_bytes"] == (tmp_path / loud["clip"]).stat().st_size
