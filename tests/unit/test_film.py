from itertools import pairwise

import av
import numpy as np
import pytest

from data_prep.film import (
    FOLDER,
    FPS,
    PART_FRAMES,
    RIGHTS,
    SPLIT_RULE,
    film_videos,
    part_path,
    read_shots,
    rebuild,
)
from data_prep.folder import Profile, Recipe, Result, cut_clips, plan_jobs
from kinema.data.cuts import suspected_cuts

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
        assert before.end_seconds <= after.start_seconds
    assert shots[-1].end_seconds <= PART_FRAMES[-1] / FPS
    assert min(shot.end_seconds - shot.start_seconds for shot in shots) >= 0.6
    captions = [shot.caption for shot in shots]
    assert len(set(captions)) == len(captions)
    assert all(8 <= len(caption.split()) <= 45 and caption[0].isupper() and caption[-1] == "." for caption in captions)


def test_splits_are_by_time_with_guards():
    shots = read_shots()
    assert [shot.split for shot in shots] == [SPLIT_RULE.split_by_time(shot) for shot in shots]
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
    assert sum(len(video.shots) for video in film_videos()) == len(read_shots())
    for number, video in enumerate(film_videos()):
        with av.open(str(part_path(number))) as container:
            stream = container.streams.video[0]
            assert stream.frames == PART_FRAMES[number + 1] - PART_FRAMES[number]
            assert (stream.width, stream.height, stream.average_rate) == (160, 90, FPS)
        assert min(shot.start_seconds for shot in video.shots) >= -1e-6
        assert max(shot.end_seconds for shot in video.shots) * FPS <= stream.frames + 1e-3


def test_clips_of_one_file_are_whole_shots_without_cuts():
    """The shot list against the detector, which knows nothing of it: no cut inside, and moving pictures."""
    video = film_videos()[1]
    profile = Profile(min_seconds=0.5, max_seconds=12)
    jobs = plan_jobs([video], Recipe(RIGHTS, profile, SPLIT_RULE), Result(1), show_progress=False)
    kept = [shot for shot in video.shots if shot.split != "guard"]
    clips = list(cut_clips(jobs[0], profile, RIGHTS))
    assert [len(frames) for _, _, frames in clips] == [
        round((shot.end_seconds - shot.start_seconds) * FPS) for shot in kept
    ]
    assert [record.caption for record, _, _ in clips] == [shot.caption for shot in kept]
    assert not any(suspected_cuts(frames) for _, _, frames in clips)
    for record, _, frames in clips:
        assert (record.license, record.width, record.height) == ("CC-BY-3.0", 160, 90)
        assert np.abs(np.diff(frames[:: FPS // 2].astype(int), axis=0)).mean() > 0.1


def test_another_film_is_not_taken_for_the_source(tmp_path):
    (tmp_path / "bbb.mp4").write_bytes(b"another film")
    with pytest.raises(ValueError, match="sha256"):
        rebuild(tmp_path / "bbb.mp4")
