from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from data_prep.captions import read_json_lines
from data_prep.film import FOLDER, FPS, HELD_OUT, PART_FRAMES, SHOTS, part_path, read_shots, rebuild
from data_prep.pipeline.inputs import input_rows
from data_prep.pipeline.rows import Dropped
from data_prep.pipeline.stage import Place
from data_prep.prepare import CONFIGS
from data_prep.stages.cut import Cut
from kinema.config import to_dataclass
from kinema.data.decode.cuts import suspected_cuts

MIB = 2**20


def test_the_committed_files_are_small():
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert max(sizes) < MIB
    assert sum(sizes) < 4_000_000
    assert len(list(FOLDER.glob("*.mp4"))) == len(PART_FRAMES) - 1


def test_the_licence_is_stated_where_the_files_are():
    text = (FOLDER / "ATTRIBUTION.md").read_text()
    for words in (
        "Blender Foundation",
        "www.bigbuckbunny.org",
        "CC-BY-3.0",
        "What was changed",
        "rebuild --from",
    ):
        assert words in text


def test_shots_are_sorted_apart_and_captioned():
    shots = read_shots()
    assert 140 <= len(shots) <= 170
    for before, after in pairwise(shots):
        assert before.end_seconds <= after.start_seconds + 2e-6  # both are rounded
    assert shots[-1].end_seconds <= PART_FRAMES[-1] / FPS + 2e-6
    assert min(shot.end_seconds - shot.start_seconds for shot in shots) >= 0.6
    captions = [shot.caption for shot in shots]
    assert len(set(captions)) == len(captions)
    assert all(8 <= len(caption.split()) <= 45 and caption[0].isupper() and caption[-1] == "." for caption in captions)


def test_splits_are_by_time_with_guards():
    shots = read_shots()
    assert [shot.split for shot in shots] == [HELD_OUT.split_by_time(shot) for shot in shots]
    held = [shot for shot in shots if shot.split == "heldout"]
    train = [shot for shot in shots if shot.split == "train"]
    assert all(
        shot.start_seconds % 100 >= 80 and shot.end_seconds <= shot.start_seconds // 100 * 100 + 100.001
        for shot in held
    )
    gaps = [max(h.start_seconds - t.end_seconds, t.start_seconds - h.end_seconds) for h in held for t in train]
    assert min(gaps) >= 1.999
    assert 0.12 < len(held) / len(shots) < 0.25


def test_no_shot_crosses_from_one_file_to_the_next():
    for number in range(len(PART_FRAMES) - 1):
        with av.open(str(part_path(number))) as container:
            stream = container.streams.video[0]
            assert stream.frames == PART_FRAMES[number + 1] - PART_FRAMES[number]
            assert (stream.width, stream.height, stream.average_rate) == (160, 90, FPS)
        shots = [shot for shot, _ in read_json_lines(SHOTS) if shot["path"] == part_path(number).name]
        assert min(shot["start_seconds"] for shot in shots) >= 0
        assert max(shot["end_seconds"] for shot in shots) * FPS <= stream.frames + 1e-3


@pytest.fixture(scope="module")
def rows():
    """The shots of the second file, as the stages before `cut` leave them."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = to_dataclass(compose("prepare", ["preset=film"]))
    rows, place = input_rows([str(SHOTS)]), Place(Path(), "none")
    for stage in (config.ingest, config.probe, config.split):
        outcomes = [out for row in rows for out in stage.apply(row, place)]
        rows = list(stage.finish((out for out in outcomes if not isinstance(out, Dropped)), place))
    return [row for row in rows if row["video"] == "bbb-2.mp4"]


def test_clips_of_one_file_are_whole_shots_without_cuts(rows):
    """The shot list against the detector, which knows nothing of it: no cut inside, and moving pictures."""
    clips = [[] for _ in rows]
    for number, picture in Cut().pictures(rows, FPS):
        clips[number].append(picture)
    for row, clip in zip(rows, clips, strict=True):
        frames = np.stack(clip)
        assert len(frames) == round((row["end_seconds"] - row["start_seconds"]) * FPS)
        assert frames.shape[1:] == (90, 160, 3)
        assert np.abs(np.diff(frames[:: FPS // 2].astype(int), axis=0)).mean() > 0.1
        assert not suspected_cuts(frames)


def test_another_film_is_not_taken_for_the_source(tmp_path):
    (tmp_path / "bbb.mp4").write_bytes(b"another film")
    with pytest.raises(ValueError, match="sha256"):
        rebuild(tmp_path / "bbb.mp4")
