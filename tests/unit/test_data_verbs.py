"""`kinema data stats`, `show` and `diff`, on Kinema's data sets and on tars of other programs."""

import argparse
import io
import json
import tarfile

import pytest
from PIL import Image

from kinema.data.dataset.shards import MANIFEST
from kinema.data.verbs import check, croissant, diff, index, show, stats
from kinema.report import data_page
from tests.unit.clips import build, numbered_video


def call(verb, *words):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(word) for word in words]))


def told(capsys, verb, *words):
    """Exit status and the lines of the text, or the object with --json."""
    code = call(verb, *words)
    out = capsys.readouterr().out.strip()
    return code, json.loads(out) if "--json" in words else out.splitlines()


def foreign(folder, samples):
    """Tars as another program writes them: {key: {ext: bytes}}, without an index."""
    folder.mkdir()
    with tarfile.open(folder / "part-0.tar", "w") as tar:
        for key, members in samples.items():
            for ext, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def mp4():
    return numbered_video([i / 10 for i in range(20)])


FACTS = {
    "license": lambda i: "my own" if i == 0 else "MIT" if i % 2 else "unknown",
    "source": lambda i: "film" if i < 4 else "toy",
    "consent": lambda i: "sure" if i == 3 else "given",
    "caption": lambda i: "" if i == 5 else "a ball",
    "duration_seconds": lambda i: float(i + 1),
    "generated": lambda i: "fully" if i == 7 else "no",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "set", 8, **FACTS).folder


def test_statistics_count_every_clip(folder, capsys):
    code, found = told(capsys, stats, folder, "--json")
    assert code == 0
    assert found["clips"] == 8
    assert found["seconds"] == sum(range(1, 9))
    assert found["quantiles"]["seconds"] == {"least": 1, "5 %": 1.35, "median": 4.5, "95 %": 7.65, "most": 8}
    counts = found["counts"]
    assert counts["license"] == {"MIT": 4, "unknown": 3, "my own": 1}
    assert counts["source"] == {"film": 4, "toy": 4}
    assert counts["generated"] == {"no": 7, "fully": 1}
    assert counts["member"] == {"json": 8, "mp4": 8}
    assert all(sum(counts[fact].values()) == 8 for fact in ("split", "size", "license", "source", "consent"))
    assert found["odd"] == {
        "without caption": 1,
        "license not stated": 3,
        "license not SPDX": 1,
        "left out by the index": 0,
        "consent not a known word": 1,
    }
    code, lines = told(capsys, stats, folder)
    assert lines[-1] == found["verdict"]
    assert lines[-1].startswith("COUNTED 8 clips in 2 shard(s), 0.6 minutes, ")
    assert "license not SPDX 1" in lines[-1]


def test_foreign_tars_are_counted_and_stay_as_they_are(tmp_path, mp4, capsys):
    samples = {f"a/{number}": {"mp4": mp4, "txt": b"a cat"} for number in range(2)}
    path = foreign(tmp_path / "theirs", samples)
    code, found = told(capsys, stats, path, "--json")
    assert (code, found["clips"], found["name"]) == (0, 2, "theirs")
    assert found["counts"]["license"] == {"unknown": 2}
    assert [file.name for file in path.iterdir()] == ["part-0.tar"]


def test_a_clip_is_shown_with_its_frames(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, lines = told(capsys, show, folder, "clip-001", "--to", sheet)
    assert code == 0
    assert any(line.split() == ["license", "MIT"] for line in lines)
    assert lines[-1].endswith(f"frames in {sheet}")
    assert Image.open(sheet).size[0] > 5 * 60


def test_a_whole_clip_is_no_problem_and_a_damaged_one_is_named(tmp_path, capsys):
    whole = build(tmp_path / "whole", 2, damaged=[1]).folder
    code, found = told(capsys, show, whole, "clip-000", "--to", tmp_path / "0.png", "--json")
    assert (code, found["problems"]) == (0, [])
    assert found["verdict"] == f"SHOWN clip-000 of clips-000000.tar, frames in {tmp_path / '0.png'}"
    assert found["record"]["license"] == found["json"]["license"] == "CC0-1.0"
    code, lines = told(capsys, show, whole, "clip-001", "--to", tmp_path / "1.png")
    assert code == 65
    assert lines[-1].startswith("DAMAGED clip-001 of clips-000000.tar: undecodable, ")
    assert not (tmp_path / "1.png").exists()


def test_an_unknown_key_is_answered_with_the_nearest(folder, tmp_path):
    with pytest.raises(ValueError, match=r"key=clip-01 is not in set\. Did you mean clip-0"):
        call(show, folder, "clip-01", "--to", tmp_path / "x.png")


def test_equal_clips_are_the_same_in_whatever_shards_they_lie(folder, tmp_path, capsys):
    other = build(tmp_path / "other", 8, per_shard=3, **FACTS).folder
    assert told(capsys, diff, folder, other) == (0, ["SAME 8 clips"])


def test_every_kind_of_difference_is_named_by_key(folder, tmp_path, capsys):
    changed = {**FACTS, "license": lambda i: "CC0-1.0" if i == 2 else FACTS["license"](i)}
    changed["extra"] = lambda i: {"score": 1} if i == 4 else {}
    other = build(tmp_path / "other", 9, damaged=[3], **changed).folder
    code, found = told(capsys, diff, folder, other, "--json")
    assert code == 1
    assert found["added"] == ["clip-008"]
    assert found["removed"] == []
    assert found["records"] == {
        "clip-002": {"license": ["unknown", "CC0-1.0"]},
        "clip-004": {"extra": [{}, {"score": 1}]},
    }
    assert found["members"] == {"clip-003": ["mp4"]}
    assert found["same"] == 5
    code, lines = told(capsys, diff, other, folder)
    assert code == 1
    assert lines == [
        "- clip-008",
        "~ clip-002: license 'CC0-1.0' -> 'unknown'",
        "~ clip-004: extra {'score': 1} -> {}",
        "! clip-003: other bytes of mp4",
        "DIFFERENT: 0 added, 1 removed, 2 with another record, 1 with other bytes, 5 the same",
    ]


def test_what_cannot_be_read_is_trouble(folder, tmp_path, capsys):
    code, lines = told(capsys, diff, folder, tmp_path / "absent")
    assert code == 2
    assert lines[-1].startswith("NOT COMPARED: data.path=")
    assert not (tmp_path / "absent" / MANIFEST).exists()


def test_a_foreign_set_is_compared_with_its_indexed_self(tmp_path, mp4, capsys):
    from kinema.data.dataset.indexing import index_shards

    samples = {"one": {"mp4": mp4, "json": b'{"caption": "a cat", "license": "MIT"}'}}
    path = foreign(tmp_path / "theirs", samples)
    again = foreign(tmp_path / "again", samples)
    index_shards(again)
    assert told(capsys, diff, path, again)[0] == 0


def test_an_address_is_looked_at_or_refused_by_name(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache
    address = folder.as_uri()
    assert told(capsys, stats, address, "--json")[1] == told(capsys, stats, folder, "--json")[1]
    assert told(capsys, diff, address, folder)[0] == 0
    lines = told(capsys, show, address, "clip-001", "--to", tmp_path / "one.png")[1]
    assert "clip-001" in lines[-1]
    assert (tmp_path / "one.png").exists()
    for verb in (check, croissant, data_page):
        with pytest.raises(SystemExit):
            call(verb, "https://me:word@example.org/set?token=secret")
        said = capsys.readouterr().err
        assert "https://***@example.org/set?***" in said
        assert "takes a folder: copy the data set here first" in said


def test_an_index_without_captions_says_where_they_may_be(tmp_path, mp4, capsys):
    meta = {"long": {"caption": "a cat"}, "rate": 3}
    samples = {key: {"mp4": mp4, "json": json.dumps(meta).encode()} for key in ("one", "two")}
    path = foreign(tmp_path / "theirs", samples)
    _, lines = told(capsys, index, path, "--field", "caption=nosuch")
    assert lines[0].startswith("no clip has a caption. Their json has: long.caption, rate. Type --field caption=KEY")
    assert "indexed 2 clips, 0 with a caption, in 1 shard(s)" in lines[1]
    _, lines = told(capsys, index, path, "--field", "caption=long.caption")
    assert "indexed 2 clips, 2 with a caption, in 1 shard(s)" in lines[0]
    assert len(lines) == 1
    bare = foreign(tmp_path / "bare", {"one": {"mp4": mp4}})
    assert "have no json either" in told(capsys, index, bare)[1][0]
