"""The stages borders, score and filter on real files: what each removes, and that anyone can look at it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from data_prep.pipeline.config import register_schemas
from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.rows import read_rows
from data_prep.scores.keep import Range
from data_prep.scores.measure import Plugin
from data_prep.stages.borders import CutBorders
from data_prep.stages.filter import Filter, RemoveDuplicates, preference
from data_prep.stages.score import Score
from kinema.config import to_dataclass
from tests.unit.made_clips import clip_row, panned, pipeline, scenery, still

HERE = LocalEngine(workers=0)


def stages(**thresholds):
    given = {name: Range(*bounds) for name, bounds in thresholds.items()}
    return {"borders": CutBorders(), "score": Score(), "filter": Filter(given, shown=4)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Clips with one fault each, and one good clip, through all three stages."""
    work = tmp_path_factory.mktemp("work")
    good = panned(40, 1)
    rows = [
        clip_row(work, "good", good),
        clip_row(work, "again", good[:, ::2, ::2]),
        clip_row(work, "framed", np.pad(panned(40, 2), ((0, 0), (10, 14), (0, 0), (0, 0)))),
        clip_row(work, "frozen", still(scenery(3))),
        clip_row(work, "dark", panned(40, 4) // 60),
        clip_row(work, "copy-in-heldout", panned(40, 2), split="heldout"),
        clip_row(work, "slow", panned(20, 5)),
    ]
    run = pipeline(work, stages(dark_share=(None, 0.9), still_share=(None, 0.9), motion=(0.2, None)), rows, HERE)
    return work, run.run(["borders", "score", "filter"], show=False)


def test_every_fault_is_found_by_its_own_filter(done):
    work, reports = done
    assert reports[-1].dropped == {
        "dark_share above 0.9": 1,
        "duplicate of a kept clip": 2,
        "motion below 0.2": 1,
        "still_share above 0.9": 1,
    }
    dropped = {row["key"]: row for row in read_rows(work / "03-filter" / "dropped.jsonl")}
    assert dropped["again"]["duplicate_of"] == "good"
    assert dropped["framed"]["duplicate_of"] == "copy-in-heldout"  # or training would see what is held out
    assert [row["key"] for row in read_rows(work / "03-filter" / "rows.jsonl")] == ["good", "copy-in-heldout"]


def test_bars_are_cut_off_and_other_clips_stay_byte_for_byte(done):
    work, _ = done
    before = {row["key"]: row for row in read_rows(work / "input.jsonl")}
    after = {row["key"]: row for row in read_rows(work / "01-borders" / "rows.jsonl")}
    assert after["framed"]["borders"] == {"top": 10, "bottom": 14, "left": 0, "right": 0}
    assert (after["framed"]["width"], after["framed"]["height"]) == (160, 120)
    assert all(after[key] == before[key] for key in before if key != "framed")


def test_clips_with_bars_can_be_dropped_instead(tmp_path):
    rows = [clip_row(tmp_path, "framed", np.pad(panned(40), ((0, 0), (0, 0), (16, 16), (0, 0))))]
    rows.append(clip_row(tmp_path, "plain", panned(40)))
    [report] = pipeline(tmp_path, {"borders": CutBorders("drop")}, rows, HERE).run(["borders"], show=False)
    assert (report.kept, report.dropped) == (1, {"has borders": 1})


def test_the_keep_table_is_on_disk_with_pictures_of_what_went_and_what_just_stayed(done):
    work, _ = done
    folder = work / "03-filter"
    table = json.loads((folder / "keep.json").read_text())
    assert (table["given"], table["kept"]) == (7, 2)
    by_name = {line["name"]: line for line in table["filters"]}
    assert [by_name[name]["after"] for name in ("still_share", "dark_share", "motion", "duplicates")] == [1, 1, 1, 2]
    assert by_name["still_share"]["alone"] == 2  # in the dark one nothing is seen to move either
    assert [shown["key"] for shown in by_name["motion"]["removed"]] == ["slow"]
    assert {shown["key"] for shown in by_name["motion"]["inside"]} == {"good", "copy-in-heldout"}
    assert by_name["duplicates"]["removed"][0]["of"]["key"] in ("good", "copy-in-heldout")
    for line in table["filters"]:
        for shown in line["removed"] + line["inside"]:
            with Image.open(folder / shown["picture"]) as picture:
                assert picture.width > 4 * picture.height
    assert sum(table["scores"]["motion"]["histogram"]["counts"]) == 7


def test_equal_input_gives_equal_rows_whoever_works(done, tmp_path):
    work, _ = done
    for row in read_rows(work / "input.jsonl"):
        (tmp_path / row["clip"]).write_bytes((work / row["clip"]).read_bytes())
    run = pipeline(tmp_path, {"score": Score()}, read_rows(work / "01-borders" / "rows.jsonl"), LocalEngine(workers=1))
    (tmp_path / "01-borders").symlink_to(work / "01-borders")
    run.run(["score"], show=False)
    assert (tmp_path / "01-score" / "rows.jsonl").read_bytes() == (work / "02-score" / "rows.jsonl").read_bytes()


def brightest(**settings):
    """A plug-in: the factory gets the settings, the function a sample."""
    return lambda clip: {name: float(clip.frames.max()) for name in settings}


def test_a_plug_in_scores_and_filters(tmp_path):
    rows = [clip_row(tmp_path, "low", still(scenery() // 2)), clip_row(tmp_path, "high", still(scenery()))]
    plugin = Plugin("tests.unit.test_score_stages:brightest", {"glow": True})
    run = pipeline(
        tmp_path,
        {"score": Score(use=[], scorers={"mine": plugin}), "filter": Filter({"glow": Range(min=180)})},
        rows,
        HERE,
    )
    assert run.run(["score", "filter"], show=False)[-1].dropped == {"glow below 180": 1}


def test_own_scorers_thresholds_and_captioners_are_named_on_the_command_line():
    register_schemas()
    words = [
        *("input=x", "out=y", "caption=command", 'caption.command=[describe,"{clip}"]'),
        '++score.scorers={mine:{target:"tests.unit.test_score_stages:brightest",settings:{glow:true}}}',
        *("++filter.thresholds={mine:{min:5}}", "filter.thresholds.motion.min=0.1"),
    ]
    with initialize_config_dir(str(Path(__file__).parents[2] / "configs" / "prep"), version_base="1.3"):
        config = to_dataclass(compose("prepare", words))
    assert config.score.scorers["mine"].load("mine")
    assert config.filter.thresholds["mine"] == Range(min=5)
    assert config.filter.thresholds["motion"].min == 0.1
    assert config.filter.thresholds["still_share"].max == 0.9
    assert config.caption.command == ["describe", "{clip}"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Score(use=["beauty"]), r"score\.use=\['beauty'\]"),
        (lambda: Score(scorers={"motion": Plugin("a:b")}), "is a scorer of Kinema's"),
        (lambda: Filter({"motion": Range(2, 1)}), r"filter\.thresholds\.motion\.min=2"),
        (lambda: RemoveDuplicates(limit=200), r"filter\.duplicates\.limit=200"),
        (lambda: CutBorders("paint"), r"borders\.action=paint"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_key(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_of_copies_the_held_out_larger_longer_one_stays():
    base = {"split": "train", "width": 64, "height": 64, "duration_seconds": 2.0, "key": "b"}
    order = [
        base | {"split": "heldout", "width": 32},
        base | {"width": 128},
        base | {"duration_seconds": 3.0},
        base | {"key": "a"},
        base,
    ]
    order.reverse()
    assert sorted(order, key=preference) == order[::-1]
