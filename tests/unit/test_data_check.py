import argparse
import hashlib
import json
import os
import struct

import numpy as np
import pytest
from PIL import Image

from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, ShardWriter
from kinema.data.decode.encoding import encode_video
from kinema.data.verbs.check import _decode, add_arguments, check_dataset, run
from kinema.data.verbs.contact_sheet import contact_sheet


def make_clip(number, mp4=None, **facts):
    frames = np.full((6, 32, 48, 3), 60, np.uint8)
    frames[:, 8:20, 4 + number : 20 + number] = (230, 40, 40)
    mp4 = mp4 or encode_video(frames, 8)
    values = {
        "key": f"clip-{number}",
        "caption": f"a square at {number}",
        "fps": 8.0,
        "num_frames": 6,
        "width": 48,
        "height": 32,
        "duration_seconds": 0.75,
        "source": "test",
        "license": "CC0-1.0",
        "consent": "synthetic",
        "sha256": hashlib.sha256(mp4).hexdigest(),
        "split": "train",
    }
    return ClipRecord(**(values | facts)), mp4


def write_dataset(folder, clips):
    with ShardWriter(folder, max_samples=4, command="test") as writer:
        for record, mp4 in clips:
            writer.write(record, mp4)
    return folder


def check_by_command(path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    code = run(parser.parse_args([str(path)]))
    return code, capsys.readouterr().out.strip().splitlines()


def test_a_good_data_set_is_ready_and_its_sheet_is_drawn(tmp_path, capsys):
    folder = write_dataset(tmp_path / "data", [make_clip(n) for n in range(5)])
    code, lines = check_by_command(folder, capsys)
    assert code == 0
    assert lines[-1] == "kept 5/5 READY"
    assert any(line.split()[:2] == ["train", "5"] and "48x32: 5" in line for line in lines)
    assert "licences          CC0-1.0: 5" in lines
    with Image.open(folder / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (230, 40, 40)).max(1) < 12).sum() > 5 * 5 * 500  # each clip's square in each of 5 frames


def test_every_cause_is_counted_and_named(tmp_path, capsys):
    two_shots = np.concatenate([np.full((5, 32, 48, 3), 40, np.uint8), np.full((5, 32, 48, 3), 200, np.uint8)])
    clips = [
        make_clip(0),
        make_clip(1, caption=""),
        make_clip(2, mp4=b"this is no video at all"),
        make_clip(3, num_frames=60, duration_seconds=7.5),
        make_clip(4, width=32, height=48),
        make_clip(5, fps=16.0, duration_seconds=0.375),
        make_clip(6, mp4=encode_video(two_shots, 8), num_frames=10, duration_seconds=1.25),
        make_clip(7),
    ]
    folder = write_dataset(tmp_path / "data", clips)
    hit = DatasetIndex.load(folder).entries[7]
    with open(folder / hit.shard, "r+b") as shard:
        shard.seek(hit.members["mp4"].offset + 300)
        shard.write(b"\xff\x00\xff")

    code, lines = check_by_command(folder, capsys)
    assert code == 65
    assert lines[-1] == (
        "kept 2/8: damaged 1 (clip-7), no caption 1 (clip-1), undecodable 1 (clip-2), "
        "wrong record 3 (clip-3, clip-4, clip-5)"
    )
    assert "missing captions  1" in lines
    assert "undecodable       1" in lines
    assert "suspected cuts    1 (clip-6)" in lines
    text = "\n".join(lines)
    assert "num_frames=60 in the record, 6 in the mp4" in text
    assert "size 32x48 in the record, 48x32 in the mp4" in text
    assert "fps=16 in the record, 8.000 in the mp4" in text


def test_a_truncated_tar_is_a_verdict_and_no_traceback(tmp_path, capsys):
    folder = write_dataset(tmp_path / "data", [make_clip(0)])
    os.truncate(folder / "clips-000000.tar", 1000)
    code, lines = check_by_command(folder, capsys)
    assert code == 65
    assert lines[-1].startswith("kept 0: ")
    assert "clips-000000.tar has 1000 bytes" in lines[-1]


def test_the_record_is_held_to_the_picture_as_displayed(tmp_path):
    """Phones store upright clips lying, with a turn in the header; decord obeys it: the reference."""
    decord = pytest.importorskip("decord")
    frames = np.zeros((3, 64, 128, 3), np.uint8)  # 64 wide when upright, which decord can show
    frames[:, :20, :20] = (240, 40, 40)  # red marks one corner
    mp4 = encode_video(frames, 8)
    header = mp4.index(b"tkhd") - 4
    matrix = header + 8 + 40
    assert struct.unpack(">9i", mp4[matrix : matrix + 36])[0] == 1 << 16
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    mp4 = mp4[:matrix] + turned + mp4[matrix + 36 :]
    (tmp_path / "turned.mp4").write_bytes(mp4)

    ours, *_ = _decode(mp4)
    reference = decord.VideoReader(str(tmp_path / "turned.mp4"))[0].asnumpy()
    assert ours.shape == (3, 128, 64, 3) == (3, *reference.shape)
    np.testing.assert_allclose(ours[0].astype(int), reference, atol=6)
    record = {"num_frames": 3, "duration_seconds": 0.375}
    upright = write_dataset(tmp_path / "upright", [make_clip(0, mp4=mp4, width=64, height=128, **record)])
    assert check_dataset(upright).ready
    lying = write_dataset(tmp_path / "lying", [make_clip(0, mp4=mp4, width=128, height=64, **record)])
    assert not check_dataset(lying).ready


def test_a_sheet_shows_first_and_last_frame_in_order(tmp_path):
    frames = np.zeros((9, 16, 24, 3), np.uint8)
    frames[...] = (20 + 25 * np.arange(9))[:, None, None, None]
    contact_sheet([(frames, "grey")], tmp_path / "sheet.png", frames_per_row=3, scale=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        row = np.asarray(sheet.convert("L"))[-26]  # through the middle of the only strip
    shades = [int(value) for i, value in enumerate(row) if value < 245 and (i == 0 or row[i - 1] != value)]
    assert shades == [20, 120, 220]


def test_a_sheet_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one clip"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="must be uint8"):
        contact_sheet([(np.zeros((2, 8, 8, 3)), "x")], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_json_that_others_can_read(tmp_path):
    folder = write_dataset(tmp_path / "data", [make_clip(0, attribution="(c) Somebody")])
    manifest = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert manifest["attributions"] == ["(c) Somebody"]
    assert "(c) Somebody" in check_dataset(folder).table()
