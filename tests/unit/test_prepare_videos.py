import json
from fractions import Fraction

import av
import numpy as np
import pytest

from data_prep.captions import Shot, describe_videos, find_videos, read_captions
from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.inputs import input_rows, write_inputs
from data_prep.pipeline.rows import cause, read_rows
from data_prep.pipeline.run import FAILED, Limits, Pipeline
from data_prep.source_video import Shaper, UnreadableVideo, decode_frames, nominal_fps
from data_prep.stages.cut import Cut
from data_prep.stages.ingest import Ingest
from data_prep.stages.probe import Probe, probe_video
from data_prep.stages.split import HeldOut, Split, divide
from data_prep.stages.write import HISTORY, Write
from kinema.data.account.ledger import DataBudgetError
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.decode.encoding import write_video
from kinema.data.verbs.check import check_dataset


def corners(height, width, number=0):
    """Grey picture with a red, a green, a blue and a white corner, clockwise from the top left."""
    picture = np.full((height, width, 3), 40 + 4 * number, np.uint8)
    h, w = height // 3, width // 3
    picture[:h, :w], picture[:h, -w:] = (220, 30, 30), (30, 200, 30)
    picture[-h:, -w:], picture[-h:, :w] = (30, 30, 220), (235, 235, 235)
    return picture


def write(path, pictures, *, fps=10, times=None, codec="libx264", pix_fmt="yuv420p", rotation=0, sar=None, **tags):
    """A video as somebody else's program may have written it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        base = Fraction(1, fps if times is None else 1000)
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, base
        if codec.startswith("libx264"):
            stream.options = {"crf": "4", "preset": "ultrafast"}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            seconds = number / fps if times is None else times[number]
            frame.pts, frame.time_base = round(seconds / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def first_picture(path, **shape):
    shaper = Shaper(probe_video(path)["stretch"], **shape)
    return shaper.picture(next(iter(decode_frames(path))).frame)


def build(folder, out="out", captions=True, failed=0.05, min_failed=3, rights=None, **settings):
    """The stages on a folder, in this process; returns the records and the frames of each clip by key."""
    if captions:
        for name in find_videos(folder):
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    target = folder.parent / out
    split, cut, write = (
        kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})
        for kind in (Split, Cut, Write)
    )
    write.out = str(target)
    made = {"ingest": Ingest(license="CC0-1.0", **(rights or {})), "probe": Probe(), "split": split, "cut": cut}
    made["write"] = write
    pipeline = Pipeline(made, folder.parent / f"{out}.work", LocalEngine(0), Limits(failed, min_failed))
    write_inputs(pipeline.work, input_rows([str(folder)]))
    pipeline.run(made, show=False)
    index = DatasetIndex.load(target)
    entries = sorted(index.entries, key=lambda entry: entry.record.key)
    frames = {entry.record.key: decoded(target, entry) for entry in entries}
    return {entry.record.key: entry.record for entry in entries}, frames


def decoded(folder, entry):
    path = folder / "one.mp4"
    path.write_bytes(read_member(folder, entry, "mp4"))
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    path.unlink()
    return frames


def history(dataset):
    return json.loads((dataset / HISTORY).read_text())["stages"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


def two_shots(first, second, size=(48, 64)):
    """Two textured scenes with a bright square that moves."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 100, (size[0] // 8, size[1] // 8, 1)).repeat(8, 0).repeat(8, 1) for _ in range(2)]
    scenes = [block + colour for block, colour in zip(blocks, ((20, 60, 20), (80, 100, 130)), strict=True)]
    pictures = [scenes[0]] * first + [scenes[1]] * second
    pictures = [picture.astype(np.uint8) for picture in pictures]
    for number, picture in enumerate(pictures):
        picture[8:16, number : number + 8] = 250
    return pictures


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_pictures_stand_upright_whatever_the_rotation_tag(folder, rotation):
    upright = corners(48, 64)
    stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
    path = write(folder / "turned.mp4", [stored] * 2, rotation=rotation)
    picture = first_picture(path)
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).mean() < 5


def test_stretched_pixels_become_square(folder):
    path = write(folder / "wide.mp4", [corners(48, 48)] * 2, sar=Fraction(4, 3))
    picture = first_picture(path)
    assert picture.shape == (48, 64, 3)
    assert np.abs(picture.astype(int) - corners(48, 64)).mean() < 12
    narrow = write(folder / "narrow.mp4", [corners(48, 64)] * 2, sar=Fraction(3, 4))
    assert first_picture(narrow).shape == (64, 64, 3)


def test_odd_sides_ten_bits_and_full_chroma_become_even_and_eight_bit(folder):
    path = write(folder / "odd.mkv", [corners(47, 63)] * 2, pix_fmt="yuv444p10le")
    picture = first_picture(path)
    assert picture.shape == (46, 62, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - corners(47, 63)[:46, :62]).mean() < 5


def test_colours_follow_the_tagged_and_the_customary_matrix(folder):
    """BT.709 pictures read with BT.601 coefficients would turn (220, 30, 30) by more than 10 levels."""
    red = np.full((720, 64, 3), (220, 30, 30), np.uint8)
    frame = av.VideoFrame.from_ndarray(red, format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
    for tag in (1, 2):  # BT.709; unspecified, which means BT.709 from 720 lines on
        frame.colorspace = tag
        picture = Shaper(1.0).picture(frame)
        assert np.abs(picture[360, 32].astype(int) - (220, 30, 30)).max() <= 4


def test_size_covers_and_crops_and_short_side_only_shrinks(folder):
    path = write(folder / "a.mp4", [corners(48, 96)] * 2)
    assert first_picture(path, size=(32, 32)).shape == (32, 32, 3)
    assert first_picture(path, short_side=24).shape == (24, 48, 3)
    assert first_picture(path, short_side=200).shape == (48, 96, 3)
    middle = corners(48, 96)[:, 24:72]
    assert np.abs(first_picture(path, size=(48, 48)).astype(int) - middle).mean() < 5


def test_variable_frame_rate_keeps_the_speed(folder):
    """A bar tells the frame's number: each output frame must show the input frame nearest in time."""
    times = [0.0, 0.1, 0.2, 0.25, 0.3, 0.7, 0.8, 1.2, 1.3, 1.4, 1.45, 1.5, 1.9, 2.0]
    pictures = [np.full((32, 64, 3), 60, np.uint8) for _ in times]
    for number, picture in enumerate(pictures):
        picture[:, 4 * number : 4 * number + 4] = 220
    write(folder / "vfr.mkv", pictures, times=times)
    records, frames = build(folder, fps=10, heldout=HeldOut(every=0))
    shown = frames["vfr-0000"].mean((1, 3)).reshape(-1, 16, 4).mean(2).argmax(1)
    distances = np.abs(np.array(times) - np.arange(len(shown))[:, None] / 10).round(6)
    nearest = distances.argmin(1).tolist()  # of equally near ones the first
    assert shown.tolist() == nearest
    assert len(set(np.diff(shown))) > 2  # some repeated, some left out
    assert records["vfr-0000"].fps == 10
    assert 2.0 <= records["vfr-0000"].duration_seconds <= 2.2
    cut = next(stage for stage in history(folder.parent / "out") if stage["stage"] == "cut")
    assert cut["remarks"] == {"variable frame rate made constant": 1}


def test_an_mp4_that_lacks_its_last_twentieth_is_cut_short(folder):
    path = folder / "a.mp4"
    write_video(path, np.stack([corners(48, 64, n) for n in range(20)]), 10)
    whole = path.read_bytes()
    assert probe_video(path)["frames"] == 20
    path.write_bytes(whole[: len(whole) * 95 // 100])
    with pytest.raises(UnreadableVideo, match="cut short: its index leads to byte"):
        probe_video(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.mov"])
def test_a_two_shot_video_is_cut_at_the_right_frame(folder, name):
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(name[1:], "libx264")
    pictures = two_shots(13, 17)
    options = {"bit_rate": 4_000_000} if codec != "libx264" else {}
    path = write(folder / name, pictures, codec=codec, **options)
    row = {"path": str(path), "caption": "", **probe_video(path)}
    for detector in ("built_in", "content", "adaptive", "hash", "histogram"):
        found = Split(detector=detector).find(row)
        assert [round(shot.start_seconds, 2) for shot in found] == [0, 1.3], detector
    records, frames = build(folder, heldout=HeldOut(every=0))
    assert [len(clip) for clip in frames.values()] == [13, 17]
    for clip, originals in zip(frames.values(), (pictures[:13], pictures[13:]), strict=True):
        assert np.abs(clip.astype(int) - np.stack(originals)).mean((1, 2, 3)).max() < 12
    assert records["a-0001"].extra == {}  # the index leaves it out
    assert path.exists()


def test_the_data_set_is_what_its_records_say(folder):
    write(folder / "one.mp4", two_shots(12, 14))
    (folder / "deep").mkdir()
    write(folder / "deep" / "two x.mp4", two_shots(25, 11, size=(64, 48)))
    records, _ = build(
        folder, rights={"attribution": "by me", "source": "home"}, heldout=HeldOut(every=2), max_seconds=2
    )
    assert list(records) == ["deep-two-x-0000", "deep-two-x-0001", "deep-two-x-0002", "one-0000", "one-0001"]
    assert {key: record.split for key, record in records.items()}["one-0000"] == "heldout"
    record = records["deep-two-x-0000"]
    assert (record.width, record.height, record.fps, record.license) == (48, 64, 10, "CC0-1.0")
    assert (record.attribution, record.source, record.consent) == ("by me", "home", "unknown")
    assert record.caption == "caption of deep/two x.mp4"
    result = check_dataset(folder.parent / "out")
    assert result.ready, result.verdict()
    assert not any(report.cuts for report in result.reports)
    assert (folder.parent / "out" / "contact_sheet.png").exists()


def test_listed_shots_are_taken_instead_of_searched_ones(folder):
    write(folder / "a.mp4", two_shots(20, 20))
    lines = [
        {"file": "a.mp4", "start_seconds": 0.5, "end_seconds": 1.5, "caption": "early"},
        {"file_name": "a.mp4", "start_seconds": 2.1, "end_seconds": 4, "text": "late", "split": "heldout"},
        {"file": "a.mp4", "start_seconds": 1.5, "end_seconds": 2.1, "caption": "between", "split": "guard"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, frames = build(folder, min_seconds=0.5, captions=False)
    assert [(r.caption, r.split, r.num_frames) for r in records.values()] == [
        ("early", "train", 10),
        ("late", "heldout", 19),
    ]
    assert np.abs(frames["a-0000"][0].astype(int) - two_shots(20, 20)[5]).mean() < 6


def test_a_shot_at_another_rate_shows_nothing_of_its_neighbours(folder):
    pictures = [np.full((32, 32, 3), 20 if i < 13 else 220, np.uint8) for i in range(30)]
    write(folder / "a.mp4", pictures)
    lines = [{"file": "a.mp4", "caption": "x", "start_seconds": a, "end_seconds": b} for a, b in ((0, 1.3), (1.3, 3))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for fps in (3, 7, 24, 60):
        _, frames = build(folder, fps=fps, overwrite=True, captions=False)
        assert frames["a-0000"].max() < 60
        assert frames["a-0001"].min() > 180
        assert abs(sum(map(len, frames.values())) - 3 * fps) <= 1


def test_captions_are_found_in_each_usual_place(folder):
    names = ["a.mp4", "b.mp4"]
    for name in names:
        write(folder / name, [corners(32, 32)] * 2)

    def captions(file=None):
        return [v.caption for v in describe_videos(folder, names, read_captions(folder, names, file))]

    assert captions() == ["", ""]
    (folder / "a.txt").write_text(" in the\nfile beside ")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "in the table"}\n')
    assert captions() == ["in the file beside", "in the table"]
    (folder / "videos.txt").write_text("b.mp4\na.mp4\n")
    (folder / "prompt.txt").write_text("second\nfirst\n")
    assert captions(folder / "prompt.txt") == ["first", "second"]
    with pytest.raises(ValueError, match=r"a\.mp4 has several captions"):
        captions()
    (folder / "prompt.txt").write_text("second\n")
    with pytest.raises(ValueError, match="2 lines"):
        captions(folder / "prompt.txt")
    (folder / "more.jsonl").write_text('{"file": "c.mp4", "caption": "x"}')
    with pytest.raises(ValueError, match=r"not in .*c\.mp4"):
        captions(folder / "more.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not json"),
        ('{"caption": "x"}', '"file"'),
        ('{"file": "a.mp4"}', '"caption"'),
        ('{"file": "a.mp4", "caption": "x", "start_seconds": 2, "end_seconds": 1}', "start_seconds=2"),
        ('{"file": "a.mp4", "caption": "x", "start_seconds": 2}', "end_seconds=None"),
        (
            '{"file": "a.mp4", "caption": "x", "start_seconds": 0, "end_seconds": 1, "split": "test"}',
            "'test'",
        ),
        ('{"file": "a.mp4", "caption": "x", "start_seconds": 9, "end_seconds": 10}', "holds no frame 1"),
        ('{"file": "a.mp4", "caption": "", "start_seconds": 0, "end_seconds": 1}', "no caption 1"),
    ],
)
def test_wrong_caption_lines_are_named(folder, line, message):
    write(folder / "a.mp4", [corners(32, 32)] * 20)
    (folder / "captions.jsonl").write_text(line)
    with pytest.raises((ValueError, DataBudgetError), match=message):
        build(folder, captions=False)
    assert not (folder.parent / "out").exists()


def test_missing_captions_pass_only_when_allowed(folder):
    write(folder / "a.mp4", [corners(32, 32)] * 20)
    with pytest.raises(ValueError, match="no caption 1"):
        build(folder, captions=False)
    records, _ = build(folder, require_captions=False, captions=False)
    assert records["a-0000"].caption == ""


def test_unreadable_videos_are_named_counted_and_limited(folder):
    good = write(folder / "good.mp4", two_shots(15, 15))
    cut_short = write(folder / "cut-short.mkv", two_shots(60, 60))
    cut_short.write_bytes(cut_short.read_bytes()[: cut_short.stat().st_size // 2])
    (folder / "noise.mp4").write_bytes(b"not a video" * 100)
    (folder / "half.mp4").write_bytes(good.read_bytes()[:2000])
    with pytest.raises(
        DataBudgetError, match=r"more than limits\.max_failed_fraction=0\.05 and limits\.min_failed=2 allow"
    ):
        build(folder, min_failed=2)
    assert not (folder.parent / "out").exists()
    records, _ = build(folder, failed=0.75)
    assert list(records) == ["good-0000", "good-0001"]
    failed = {row["video"]: row["reason"] for row in read_rows(folder.parent / "out.work" / "02-probe" / FAILED)}
    assert {name: cause(reason) for name, reason in failed.items()} == {
        "cut-short.mkv": "cut short",
        "noise.mp4": "cannot be opened",
        "half.mp4": "cannot be opened",
    }


def test_the_frame_rate_is_measured(folder):
    """Some programs write the clock's rate into the header; clips would have 1000 frames a second."""
    path = write(
        folder / "a.avi",
        two_shots(20, 20),
        codec="mpeg4",
        times=[i / 10 for i in range(40)],
        bit_rate=4_000_000,
    )
    assert probe_video(path)["fps"] == 10
    records, _ = build(folder)
    assert [record.num_frames for record in records.values()] == [20, 20]


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"min_side": 64}, "smaller than probe.min_side"),
        ({"max_side": 40}, "larger than probe.max_side"),
        ({"max_seconds": 3}, "longer than probe.max_seconds"),
        ({"max_fps": 5}, "more frames a second than probe.max_fps"),
    ],
)
def test_videos_out_of_bounds_are_dropped(folder, bounds, reason):
    path = write(folder / "a.mp4", two_shots(20, 20))
    [outcome] = Probe(**bounds).apply({"key": "a", "path": str(path)}, None)
    assert outcome.reason == reason


def test_the_probe_tells_rotation_sound_and_variable_rate(folder):
    turned = probe_video(write(folder / "turned.mp4", [corners(48, 64)] * 3, rotation=90))
    assert (turned["width"], turned["height"], turned["rotation"]) == (48, 64, 90)
    assert (turned["variable_rate"], turned["audio"]) == (False, None)
    times = [0.0, 0.1, 0.2, 0.7, 0.8, 0.9]
    uneven = probe_video(write(folder / "vfr.mkv", [corners(48, 64)] * 6, times=times))
    assert uneven["variable_rate"]
    assert uneven["duration_seconds"] == pytest.approx(1.0, abs=0.11)
    loud = folder / "loud.mp4"
    write_video(loud, np.zeros((5, 32, 32, 3), np.uint8), 10, audio=np.zeros(8000, np.float32))
    assert probe_video(loud)["audio"] == {"codec": "aac", "rate": 16000, "channels": 1}


def test_hdr_pictures_are_refused_with_the_remedy(folder):
    hdr = write(folder / "hdr.mp4", [corners(32, 32)] * 2, color_trc=16)
    with pytest.raises(UnreadableVideo, match="HDR"):
        list(decode_frames(hdr))


def test_too_short_shots_are_counted(folder):
    write(folder / "a.mp4", two_shots(25, 6))
    records, _ = build(folder)
    assert list(records) == ["a-0000"]
    [report] = [line for line in history(folder.parent / "out") if line["stage"] == "split"]
    assert (report["given"], report["kept"], report["dropped"]) == (1, 1, {"too short": 1})


def test_equal_videos_give_equal_bytes(folder):
    write(folder / "a.mp4", two_shots(12, 12))
    build(folder, out="first")
    build(folder, out="second")
    assert DatasetIndex.load(folder.parent / "first").hash == DatasetIndex.load(folder.parent / "second").hash


def test_names_of_any_script_become_keys_of_the_data_set(folder):
    for name in ("日本.mp4", "Привет.mkv"):
        write(folder / name, [corners(32, 32)] * 20)
    assert list(build(folder)[0]) == ["Привет-0000", "日本-0000"]


def test_long_shots_are_divided_evenly():
    parts = divide(Shot(1.0, 22.0, "x"), 10.0)
    assert [(p.start_seconds, p.end_seconds) for p in parts] == [(1, 8), (8, 15), (15, 22)]
    assert divide(Shot(0, 10.0), 10.0) == [Shot(0, 10.0)]


def test_time_blocks_keep_their_distance():
    """Against the definition, on a fine grid: held-out seconds are [80, 100), [180, 200), ..."""
    rule = HeldOut("blocks", 5, 20.0, 2.0)
    held = np.array([t for t in np.arange(0, 400, 0.25) if t % 100 >= 80])
    rng = np.random.default_rng(0)
    seen = set()
    for start, seconds in zip(rng.integers(0, 1200, 600) / 4, rng.integers(1, 60, 600) / 4, strict=True):
        times = np.arange(start, start + seconds, 0.25)
        distance = np.abs(times[:, None] - held).min()
        inside = np.isin(times, held).all() and (start % 100) + seconds <= 100
        # A distance of 2.25 s between first grid points may still be 2 s between the edges.
        expected = "heldout" if inside else "train" if distance >= 2.25 else "guard"
        got = rule.split(0, Shot(start, start + seconds))
        assert got == expected or (distance == 2.0 and got == "train"), (start, seconds)
        seen.add(got)
    assert seen == {"train", "heldout", "guard"}


def test_usual_frame_rates_are_recognised():
    assert nominal_fps(23.98) == 24000 / 1001
    assert nominal_fps(29.9) == pytest.approx(30000 / 1001)
    assert nominal_fps(27.3) == 27
    assert nominal_fps(0.4) == 1
