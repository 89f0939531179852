import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from kinema.data.dataset import compiled, table
from kinema.data.dataset.columns import columns_of_records
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.dataset.table import DTYPES, ClipTable, TableWriter
from tests.unit.clips import build

CLIPS = 23


@pytest.fixture
def folder(tmp_path):
    facts = {
        "caption": lambda i: "" if i % 5 == 0 else f"größe {i} " * (i % 3 + 1),
        "license": lambda i: ["CC0-1.0", "CC-BY-4.0"][i % 2],
        "split": lambda i: "heldout" if i % 7 == 0 else "train",
        "width": lambda i: 64 + i,
        "attribution": lambda i: f"by {i}",
    }
    return build(tmp_path / "set", CLIPS, **facts).folder


def entries_of_jsons(folder, split):
    """What the indexes say, read without the code under test."""
    manifest = json.loads((folder / "dataset.json").read_text())
    for shard in manifest["shards"]:
        index = json.loads((folder / shard["file"].replace(".tar", ".index.json")).read_text())
        yield from (
            (sample["record"], shard["file"], sample["members"])
            for sample in index["samples"]
            if split in (None, sample["record"]["split"])
        )


@pytest.mark.parametrize("split", [None, "train", "heldout"])
@pytest.mark.parametrize("in_memory", [0, 100])
def test_entries_and_columns_are_those_of_the_indexes(folder, monkeypatch, split, in_memory):
    monkeypatch.setattr(compiled, "IN_MEMORY_CLIPS", in_memory)
    monkeypatch.setattr(table, "ROWS_AT_A_TIME", 7)
    index = DatasetIndex.load(folder, split)
    found = [
        (entry.record.to_dict(with_extra=False), entry.shard, {k: vars(m) for k, m in entry.members.items()})
        for entry in index.entries
    ]
    assert found == list(entries_of_jsons(folder, split))
    assert index.entries[-1] == index.entries[len(index.entries) - 1] == list(index.entries)[-1]
    assert index.entries[1:3] == [index.entries[1], index.entries[2]]
    assert list(index.clip_keys()) == [entry.record.key for entry in index.entries]
    assert list(index.entries.texts("caption")) == [entry.record.caption for entry in index.entries]
    with pytest.raises(IndexError):
        index.entries[len(index.entries)]
    expected = columns_of_records([e.record for e in index.entries], [e.shard for e in index.entries])
    for name, column in vars(index.columns).items():
        if hasattr(column, "names"):
            assert [column.names[code] for code in column.codes] == [
                getattr(expected, name).names[code] for code in getattr(expected, name).codes
            ]
        else:
            np.testing.assert_array_equal(column, getattr(expected, name))


def test_columns_are_made_once_and_anew_for_another_state_of_the_data(folder, monkeypatch):
    monkeypatch.setattr(compiled, "IN_MEMORY_CLIPS", 0)
    DatasetIndex.load(folder, "train")
    (place,) = folder.glob(".columns-*")
    stamps = {path: path.stat().st_mtime_ns for path in place.glob("*/*")}
    assert len(stamps) == 2 * (len(DTYPES) + 1)
    index = DatasetIndex.load(folder, "heldout")
    copy = pickle.loads(pickle.dumps(index))
    assert copy.entries.folder is not None
    assert list(copy.entries) == list(index.entries)
    assert {path: path.stat().st_mtime_ns for path in place.glob("*/*")} == stamps
    build(folder.parent / "other", 5)
    for path in (folder.parent / "other").iterdir():
        os.replace(path, folder / path.name)
    assert len(DatasetIndex.load(folder, "train").entries) == 5
    assert [path.name for path in folder.glob(".columns-*")] != [place.name]
    assert len(list(folder.glob(".columns-*"))) == 1


def test_a_cut_column_is_refused_and_says_what_to_remove(folder, monkeypatch):
    monkeypatch.setattr(compiled, "IN_MEMORY_CLIPS", 0)
    DatasetIndex.load(folder, "train")
    (path,) = folder.glob(".columns-*/train/caption.text")
    os.truncate(path, 10)
    with pytest.raises(ValueError, match=r"caption\.text was cut short .* Remove .*train"):
        DatasetIndex.load(folder, "train")


def write_for_ever(folder, entries):
    while True:
        writer = TableWriter(folder / "table")
        for _ in range(50):
            writer.add(entries)
        writer.close()
        os.rename(folder / "table", folder / f"table-{time.monotonic_ns()}")


def test_a_killed_writer_leaves_no_table_that_is_not_whole(folder, tmp_path):
    entries = list(DatasetIndex.load(folder).entries)
    for wait in (0.25, 0.4, 0.55):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path, entries))
        process.start()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    tables = [path for path in tmp_path.glob("table*") if path.suffix != ".building"]
    assert tables
    for path in tables:
        assert list(ClipTable.open(path)) == entries * 50
