import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset as wds

from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DamagedSample, DatasetIndex, ShardWriter, read_member
from kinema.data.decode.encoding import encode_video


def make_clip(number, **facts):
    frames = np.full((4, 32, 48, 3), 20 + number, np.uint8)
    mp4 = encode_video(frames, 8)
    values = {
        "key": f"clip-{number:03d}",
        "caption": f"shade {number}",
        "fps": 8.0,
        "num_frames": 4,
        "width": 48,
        "height": 32,
        "duration_seconds": 0.5,
        "source": "test",
        "license": "CC0-1.0",
        "consent": "synthetic",
        "sha256": hashlib.sha256(mp4).hexdigest(),
        "split": "heldout" if number % 4 == 3 else "train",
        "extra": {"number": number},
    }
    return ClipRecord(**(values | facts)), mp4


CLIPS = [make_clip(number) for number in range(8)]


def write_dataset(folder, clips=CLIPS, **options):
    with ShardWriter(folder, max_samples=3, command="test", **options) as writer:
        for record, mp4 in clips:
            writer.write(record, mp4)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data")


def test_what_is_written_is_read_back_by_random_access(folder):
    index = DatasetIndex.load(folder)
    assert [entry.record.key for entry in index.entries] == [record.key for record, _ in CLIPS]
    for entry, (record, mp4) in reversed(list(zip(index.entries, CLIPS, strict=True))):
        assert read_member(folder, entry, "mp4") == mp4
        assert ClipRecord.from_json(read_member(folder, entry, "json")) == record
        assert entry.record.extra == {}


def test_webdataset_reads_the_shards_as_its_own(folder):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [(s["__key__"], s["mp4"]) for s in samples] == [(r.key, mp4) for r, mp4 in CLIPS]
    assert [json.loads(s["json"])["extra"]["number"] for s in samples] == list(range(8))


def test_offsets_are_those_of_the_tar_library(folder):
    entry = DatasetIndex.load(folder).entries[4]
    with tarfile.open(folder / entry.shard) as archive:
        info = archive.getmember(f"{entry.record.key}.mp4")
    assert (entry.members["mp4"].offset, entry.members["mp4"].size) == (info.offset_data, info.size)


def test_two_builds_are_equal_byte_for_byte(tmp_path, folder):
    again = write_dataset(tmp_path / "again", name="data")
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_the_manifest_counts_what_is_there(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    assert manifest["clips"] == 8
    assert manifest["seconds"] == 4.0
    assert manifest["splits"] == {"heldout": 2, "train": 6}
    assert manifest["licenses"] == {"CC0-1.0": 8}
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 3, 2]
    digests = [hashlib.sha256((folder / s["file"]).read_bytes()).hexdigest() for s in manifest["shards"]]
    assert [shard["sha256"] for shard in manifest["shards"]] == digests
    assert manifest["hash"] == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_splits_part_the_data_and_share_its_hash(tmp_path, folder):
    train, heldout = (DatasetIndex.load(folder, split) for split in ("train", "heldout"))
    assert [e.record.key for e in heldout.entries] == ["clip-003", "clip-007"]
    assert len(train.entries) + len(heldout.entries) == 8
    assert train.hash == heldout.hash
    changed = write_dataset(tmp_path / "changed", [*CLIPS[:7], make_clip(7, caption="another")])
    assert DatasetIndex.load(changed).hash != train.hash


def test_a_truncated_tar_is_refused_with_both_sizes(folder):
    path = folder / "clips-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 700)
    with pytest.raises(ValueError, match=rf"clips-000001.tar has {size - 700} bytes where the manifest says {size}"):
        DatasetIndex.load(folder)


def test_a_missing_shard_or_index_is_named(folder):
    (folder / "clips-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"clips-000002.tar is missing"):
        DatasetIndex.load(folder)
    (folder / "clips-000000.index.json").unlink()
    with pytest.raises(ValueError, match=r"clips-000000.index.json.*is missing"):
        DatasetIndex.load(folder)


def test_an_edited_index_is_refused(folder):
    path = folder / "clips-000000.index.json"
    path.write_text(path.read_text().replace("shade 0", "shade 9"))
    with pytest.raises(ValueError, match=r"clips-000000.index.json is not the index that the manifest knows"):
        DatasetIndex.load(folder)


def test_a_flipped_byte_is_a_damaged_sample_of_its_clip_only(folder):
    index = DatasetIndex.load(folder)
    hit = index.entries[4]
    with open(folder / hit.shard, "r+b") as shard:
        shard.seek(hit.members["mp4"].offset + 100)
        byte = shard.read(1)[0]
        shard.seek(-1, os.SEEK_CUR)
        shard.write(bytes([byte ^ 4]))
    with pytest.raises(DamagedSample, match=r"clip clip-004 in clips-000001.tar: .mp4 has another checksum"):
        read_member(folder, hit, "mp4")
    for entry in index.entries:
        if entry != hit:
            read_member(folder, entry, "mp4")


def test_a_shard_that_was_replaced_under_its_name_is_opened_anew(folder):
    """Files stay open between reads: what is wrong in one of them is looked for in the file that has its name now."""
    index = DatasetIndex.load(folder)
    entry = index.entries[4]
    shard, aside = folder / entry.shard, folder / "copy"
    good = shard.read_bytes()
    shard.write_bytes(bytes(len(good)))
    with pytest.raises(DamagedSample, match="checksum"):
        read_member(folder, entry, "mp4")
    aside.write_bytes(good)
    os.replace(aside, shard)
    read_member(folder, entry, "mp4")


def test_a_member_that_is_not_there_is_a_damaged_sample(folder):
    entry = DatasetIndex.load(folder).entries[0]
    with pytest.raises(DamagedSample, match=r"no member .wav"):
        read_member(folder, entry, "wav")
    (folder / entry.shard).unlink()
    with pytest.raises(DamagedSample, match="cannot be read"):
        read_member(folder, entry, "mp4")


def test_a_damaged_sample_leaves_a_worker_whole():
    error = pickle.loads(pickle.dumps(DamagedSample("clip-1", "clips-000000.tar", "gone")))
    assert (error.key, error.shard, error.reason) == ("clip-1", "clips-000000.tar", "gone")


def test_an_interrupted_build_never_looks_whole(tmp_path):
    target = tmp_path / "data"
    writer = ShardWriter(target, max_samples=3).__enter__()
    for record, mp4 in CLIPS[:5]:  # one shard complete, one open: then the power goes
        writer.write(record, mp4)
    assert not target.exists()
    with pytest.raises(ValueError, match="its build was interrupted"):
        DatasetIndex.load(target)
    write_dataset(target, CLIPS[5:])
    assert [e.record.key for e in DatasetIndex.load(target).entries] == ["clip-005", "clip-006", "clip-007"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_build_keeps_the_old_data_set(tmp_path, folder):
    before = DatasetIndex.load(folder).hash

    def fail_halfway():
        with ShardWriter(folder, overwrite=True) as writer:
            writer.write(*CLIPS[0])
            raise RuntimeError("generator broke")

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert DatasetIndex.load(folder).hash == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_nothing_is_overwritten_by_accident(tmp_path, folder):
    with pytest.raises(ValueError, match="holds a data set already"):
        ShardWriter(folder)
    write_dataset(folder, CLIPS[:2], overwrite=True)
    assert len(DatasetIndex.load(folder).entries) == 2
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    with pytest.raises(ValueError, match="not empty and not a data set"):
        ShardWriter(tmp_path / "photos", overwrite=True)


def test_an_empty_build_and_doubled_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"), ShardWriter(tmp_path / "none"):
        pass
    with pytest.raises(ValueError, match="key=clip-000 was written before"):
        write_dataset(tmp_path / "twice", [CLIPS[0], CLIPS[0]])
    with pytest.raises(ValueError, match=r"sha256=.* is not that of its mp4"):
        write_dataset(tmp_path / "other", [(CLIPS[0][0], CLIPS[1][1])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "caption=None must be of type str"),
        ({"caption": "  "}, "key=clip-000: caption='  ' is empty"),
        ({"fps": "8"}, "fps='8' must be of type float"),
        ({"fps": 0.0}, "fps=0.0 must be finite and above 0"),
        ({"duration_seconds": float("inf")}, "duration_seconds=inf"),
        ({"num_frames": True}, "num_frames=True must be of type int"),
        ({"split": "test"}, "split='test' must be one of train, heldout"),
        ({"license": ""}, "license is empty. Type 'unknown'"),
        ({"key": "a.b"}, "key='a.b' must be a name without dots"),
        ({"colour": "red"}, "unknown fields colour"),
    ],
)
def test_a_bad_record_is_refused_by_field(change, message):
    values = CLIPS[0][0].to_dict() | change
    with pytest.raises(ValueError, match=message):
        ClipRecord.from_dict(values)


def test_a_missing_field_is_named():
    values = CLIPS[0][0].to_dict()
    del values["fps"], values["license"]
    with pytest.raises(ValueError, match="key=clip-000: its json lacks fps, license"):
        ClipRecord.from_dict(values)
    with pytest.raises(ValueError, match="not json"):
        ClipRecord.from_json(b"\x00 oops")


def test_an_absent_caption_is_kept_for_counting_only_when_asked_for(tmp_path):
    values = CLIPS[0][0].to_dict()
    del values["caption"]
    with pytest.raises(ValueError, match="lacks caption"):
        ClipRecord.from_dict(values)
    assert ClipRecord.from_dict(values, allow_missing_caption=True).caption == ""
    folder = write_dataset(tmp_path / "data", [make_clip(0, caption=""), make_clip(1)])
    assert [e.record.caption for e in DatasetIndex.load(folder).entries] == ["", "shade 1"]


def write_foreign(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path.parent


def test_a_foreign_web_dataset_is_indexed_in_place(tmp_path):
    stated = {"caption": "from json", "license": "CC-BY-4.0", "fps": 8.0, "aesthetic_score": 5.1}
    folder = write_foreign(
        tmp_path / "wds" / "part-0.tar",
        {"a/0001.mp4": CLIPS[0][1], "a/0001.txt": b"from txt\n", "a/0002.MP4": CLIPS[1][1]}
        | {"a/0002.json": json.dumps(stated).encode(), "a/0003.mp4": CLIPS[2][1]},
    )
    with pytest.raises(ValueError, match="kinema data index"):
        DatasetIndex.load(folder)
    before = (folder / "part-0.tar").read_bytes()
    index = index_shards(folder)
    assert (folder / "part-0.tar").read_bytes() == before
    records = [entry.record for entry in index.entries]
    assert [r.caption for r in records] == ["from txt", "from json", ""]
    assert [r.license for r in records] == ["unknown", "CC-BY-4.0", "unknown"]
    assert [r.key for r in records] == ["a_0001", "a_0002", "a_0003"]
    assert {(r.fps, r.num_frames, r.width, r.height, r.duration_seconds) for r in records} == {(8.0, 4, 48, 32, 0.5)}
    assert [read_member(folder, e, "mp4") for e in index.entries] == [mp4 for _, mp4 in CLIPS[:3]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0001.txt": b"no clip"}, "1 of 1 samples .*no video 1"),
        ({"0001.mp4": b"nonsense"}, "1 of 1 samples .*video that cannot be opened 1"),
    ],
)
def test_a_foreign_tar_that_cannot_serve_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        index_shards(write_foreign(tmp_path / "wds" / "part-0.tar", members))


def test_a_foreign_tar_cut_short_is_refused(tmp_path):
    folder = write_foreign(tmp_path / "wds" / "part-0.tar", {"0001.mp4": CLIPS[0][1], "0002.mp4": CLIPS[1][1]})
    os.truncate(folder / "part-0.tar", 512 + len(CLIPS[0][1]) // 2)
    with pytest.raises(ValueError, match=r"part-0.tar .*Copy it again"):
        index_shards(folder)
    with pytest.raises(ValueError, match=r"no .tar files"):
        index_shards(tmp_path)


def test_what_is_no_data_set_says_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        DatasetIndex.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a data set"):
        DatasetIndex.load(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version=99"):
        DatasetIndex.load(tmp_path)
