"""Croissant metadata, read by the library of the standard's own authors."""

import argparse
import hashlib
import json

import pytest

from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.verbs import croissant
from tests.unit.clips import build, numbered_video
from tests.unit.test_data_verbs import foreign

FACTS = {
    "license": lambda i: ["CC-BY-4.0", "MIT OR CC0-1.0", "my own", "unknown", "LicenseRef-Ours"][i],
    "attribution": lambda i: "(c) Somebody" if i == 0 else "",
    "consent": lambda i: "given" if i else "none-visible",
    "collected": lambda i: f"2026-01-{i + 1:02d}" if i < 3 else "",
    "source_url": "https://example.org/films",
    "generated": lambda i: "fully" if i == 4 else "no",
    "caption": lambda i: f'clip "{i}", größer',
    "fps": 10.0,
}


@pytest.fixture(scope="module")
def mlcroissant(tmp_path_factory):
    """The library, with a cache of its own: it keeps what it unpacks by the bare name of a tar."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROISSANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield pytest.importorskip("mlcroissant")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "five", 5, per_shard=2, **FACTS)


def write(folder, *words):
    parser = argparse.ArgumentParser()
    croissant.add_arguments(parser)
    assert croissant.run(parser.parse_args([str(folder), *words])) == 0
    return json.loads((folder / "croissant.json").read_text())


def test_the_records_and_the_videos_come_back_through_the_library(index, mlcroissant, capsys):
    write(index.folder, "--version", "1.0.0", "--date-published", "2026-02-01", "--cite-as", "us")
    assert capsys.readouterr().out.splitlines()[-1].endswith("5 licence(s), 1 clips under no SPDX licence, 17 fields")
    data = mlcroissant.Dataset(jsonld=str(index.folder / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    assert not data.metadata.ctx.issues.warnings
    read = {row["clips/key"].decode(): row for row in data.records("clips")}
    assert len(read) == 5
    for entry in index.entries:
        record, row = entry.record, read[entry.record.key]
        for name, value in record.to_dict(with_extra=False).items():
            found = row[f"clips/{name}"]
            assert (found.decode() if isinstance(value, str) else found) == value
    videos = {row["videos/key"].decode(): row["videos/content"] for row in data.records("videos")}
    assert videos == {entry.record.key: read_member(index.folder, entry, "mp4") for entry in index.entries}


def test_shards_licences_and_statements_are_those_of_the_data_set(index):
    described = write(index.folder, "--url", "https://example.org/five")
    shards = {node["@id"]: node["sha256"] for node in described["distribution"] if node["@type"] == "cr:FileObject"}
    assert shards == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in index.folder.glob("*.tar")}
    assert described["license"] == [
        "https://spdx.org/licenses/CC-BY-4.0.html", "LicenseRef-Ours", "MIT OR CC0-1.0", "my own", "unknown",
    ]  # fmt: skip
    assert described["url"] == "https://example.org/five"
    assert described["creditText"] == "(c) Somebody"
    assert described["rai:dataCollectionTimeFrame"] == "2026-01-01/2026-01-03"
    assert described["rai:personalSensitiveInformation"] == "Consent of people seen, in clips: given 4, none-visible 1."
    assert "no 4, fully 1" in described["rai:dataLimitations"]
    assert described["rai:dataCollection"] == "Clips of test (https://example.org/films)."


def test_the_library_would_notice_a_shard_that_is_described_wrongly(index, mlcroissant, tmp_path):
    described = croissant.describe(index, {})
    described["recordSet"][0]["field"][0]["source"]["fileSet"]["@id"] = "absent"
    (tmp_path / "croissant.json").write_text(json.dumps(described))
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=str(tmp_path / "croissant.json"))


def test_tars_of_another_program_are_described_once_they_have_an_index(tmp_path, mlcroissant):
    path = foreign(tmp_path / "theirs", {"one": {"mp4": numbered_video([i / 10 for i in range(20)]), "txt": b"a cat"}})
    with pytest.raises(ValueError, match="kinema data index"):
        write(path)
    index_shards(path)
    write(path)
    data = mlcroissant.Dataset(jsonld=str(path / "croissant.json"))
    (row,) = data.records("clips")
    assert (row["clips/key"], row["clips/caption"], row["clips/license"]) == (b"one", b"a cat", b"unknown")
    assert DatasetIndex.load(path).entries[0].record.caption == "a cat"
