import io
import json
import pickle
import random
import tarfile
from collections import Counter
from fractions import Fraction

import pytest

from kinema.data.dataset.foreign import ForeignOptions
from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.storage.place import resolve_folder
from kinema.data.storage.remote import StorageConfig
from kinema.data.storage.store import StoredFolder
from kinema.data.verbs.check import check_dataset
from kinema.data.verbs.index import parse_field
from tests.servers import faulty_proxy, nginx
from tests.unit.clips import numbered_video, quarter_turned

VIDEO = numbered_video([i / 10 for i in range(8)])
MATROSKA = numbered_video([i / 10 for i in range(8)], container_format="matroska")


def write_tar(path, members):
    """(name, bytes) of files, or (TarInfo, None) of anything else."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, payload in members:
            info = name if payload is None else tarfile.TarInfo(name)
            info.size = len(payload or b"")
            archive.addfile(info, io.BytesIO(payload or b""))
    return path.parent


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info, None


PAIR = [("mp4", VIDEO), ("txt", b"a caption")]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_other_names_and_containers_become_clips(tmp_path):
    meta = {"long": {"caption": "deep"}, "rate": "CC-BY-4.0", "text": "not this"}
    members = {"1.webm": MATROSKA, "1.cap": b"from cap", "2.mkv": MATROSKA, "2.json": json.dumps(meta).encode()}
    members |= {"3.mov": VIDEO, "3.caption": "größe".encode(), "4.avi": VIDEO, "4.json": b'{"txt": "from json"}'}
    folder = write_tar(tmp_path / "set" / "a.tar", members.items())
    index = index_shards(folder, options=ForeignOptions({"caption": "long.caption", "license": "rate"}))
    assert [e.record.caption for e in index.entries] == ["from cap", "deep", "größe", "from json"]
    assert [e.record.license for e in index.entries] == ["unknown", "CC-BY-4.0", "unknown", "unknown"]
    assert {(e.record.num_frames, e.record.width, e.record.height) for e in index.entries} == {(8, 64, 64)}
    assert [read_member(folder, e, "mp4") for e in index.entries] == [MATROSKA, MATROSKA, VIDEO, VIDEO]
    with pytest.raises(ValueError, match=r"data\.foreign\.fields: captoin is not a field"):
        ForeignOptions({"captoin": "x"})


def test_turned_stretched_and_variable_clips_are_indexed_as_they_are_shown(tmp_path):
    size, uneven = (32, 64), [0, 0.1, 0.2, 0.5, 0.6, 1.4, 1.5, 1.6]  # rate in the header: 30
    lying = numbered_video([i / 10 for i in range(8)], size=size)
    wide = numbered_video([i / 10 for i in range(8)], size=size, pixel_aspect=Fraction(3, 2))
    videos = {"lying": lying, "turned": quarter_turned(lying), "uneven": numbered_video(uneven), "wide": wide}
    videos |= {"both": quarter_turned(wide), "mkv": numbered_video(uneven, container_format="matroska")}
    members = [(f"{key}.{ext}", data) for key, mp4 in videos.items() for ext, data in (("mp4", mp4), ("txt", b"seen"))]
    index = index_shards(write_tar(tmp_path / "set" / "a.tar", members))
    assert {entry.record.key: (entry.record.width, entry.record.height) for entry in index.entries} == {
        "lying": (64, 32), "turned": (32, 64), "uneven": (64, 64), "wide": (96, 32), "both": (32, 96), "mkv": (64, 64)
    }  # fmt: skip
    assert [entry.record.fps for entry in index.entries] == pytest.approx([10, 10, 7 / 1.6, 10, 10, 7 / 1.6])
    result = check_dataset(index.folder)
    assert result.ready, result.problems


HOSTILE = [
    ("good.mp4", VIDEO), ("good.txt", b"fine"), ("good.pkl", pickle.dumps(Bomb())), ("good.cls.pickle", b"x"),
    ("../../evil.mp4", VIDEO), ("/etc/evil.mp4", VIDEO), ("a\\evil.mp4", VIDEO), link("link.mp4", "/etc/passwd"),
    ("utf.mp4", VIDEO), ("utf.txt", b"\xff\xfe\xfa"), ("json.mp4", VIDEO), ("json.json", b'{"caption": "\xff"}'),
    ("list.mp4", VIDEO), ("list.json", b"[1]"), ("sound.wav", b"RIFF"), ("empty.mp4", b""), ("half.mp4", VIDEO[:999]),
    ("fact.mp4", VIDEO), ("fact.json", b'{"fps": "fast"}'), ("half2.mp4", VIDEO),
    ("half2.json", b'{"caption": "\\ud800"}'), ("good.mp4", VIDEO), ("twice.mp4", VIDEO), ("twice.mp4", VIDEO),
    ("inf.mp4", VIDEO), ("inf.json", b'{"fps": Infinity}'),
]  # fmt: skip


def test_what_cannot_serve_is_counted_and_nothing_is_run(tmp_path):
    folder = write_tar(tmp_path / "set" / "a.tar", HOSTILE)
    with pytest.raises(ValueError, match=r"of 12 samples .*more than max_refused_fraction=0\.1.*Mend the tars"):
        index_shards(folder)
    index = index_shards(folder, options=ForeignOptions(max_refused_fraction=1.0))
    assert [e.record.key for e in index.entries] == ["good", "twice"]
    refused = index.manifest["refused"]
    assert {name: refused[name] for name in ("pickle", "path out of the tar", "link or device", "named twice")} == {
        "pickle": 2, "path out of the tar": 3, "link or device": 1, "named twice": 1,
    }  # fmt: skip
    given = {"utf", "json", "list", "sound", "empty", "half", "fact", "half2", "good again", "inf"}
    samples = {name: count for name, count in refused.items() if name not in ("pickle", "path out of the tar")}
    del samples["link or device"], samples["named twice"]
    assert sum(samples.values()) == len(given)
    assert samples["caption that is not UTF-8"] == samples["no video"] == samples["key seen before"] == 1
    assert set(index.entries[0].members) == {"mp4", "txt"}


def test_every_cut_of_a_foreign_tar_is_told(tmp_path):
    folder = write_tar(tmp_path / "set" / "a.tar", [(f"{i}.mp4", VIDEO) for i in range(3)])
    whole = (folder / "a.tar").read_bytes()
    assert len(index_shards(folder).entries) == 3
    ends = 3 * (512 + (len(VIDEO) + 511) // 512 * 512)
    cuts = [*range(0, ends, 256), ends + 512]
    for cut in cuts:
        (folder / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"Copy it again"):
            index_shards(folder)
    for header in range(0, ends, ends // 3):
        (folder / "a.tar").write_bytes(whole[: header + 3] + b"?" + whole[header + 4 :])
        with pytest.raises(ValueError, match=r"Copy it again"):
            index_shards(folder)


@pytest.mark.parametrize("tars", [40, pytest.param(3000, marks=pytest.mark.soak)])
def test_of_a_mutated_tar_every_sample_is_indexed_whole_or_counted(tmp_path, tars):
    rng, options = random.Random(0), ForeignOptions(max_refused_fraction=1.0)
    folder = write_tar(tmp_path / "set" / "a.tar", [(f"{i}.{ext}", data) for i in range(4) for ext, data in PAIR])
    whole = (folder / "a.tar").read_bytes()
    ends: Counter[str] = Counter()
    for _ in range(tars):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        (folder / "a.tar").write_bytes(content)
        try:
            index = index_shards(folder, options=options)
        except ValueError as error:
            ends["Copy" if "Copy it again" in str(error) else "Mend"] += 1
            continue
        ends["indexed"] += 1
        refused = index.manifest.get("refused", {})
        # A flipped name takes a member to another sample; but what was given is there, or counted.
        found = sum(len(entry.members) for entry in index.entries)
        assert found + 2 * sum(refused.values()) >= 8, (index.entries, refused)
        assert all(len(read_member(folder, entry, ext)) for entry in index.entries for ext in entry.members)
    assert ends["Copy"] + ends["Mend"] + ends["indexed"] == tars
    assert ends["indexed"] > 0 < ends["Copy"], ends


def test_foreign_tars_are_streamed_once_and_then_read_at_random(tmp_path):
    for shard in range(3):
        members = [(f"{shard}{i}.mp4", VIDEO) for i in range(4)] + [(f"{shard}9.mp4", VIDEO), (f"{shard}9.txt", b"x")]
        folder = write_tar(tmp_path / "www" / f"part-{shard}.tar", members)
    local = DatasetIndex.load(index_shards(write_tar(tmp_path / "copy" / "x.tar", members)).folder)
    assert len(local.entries) == 5
    quick = StorageConfig(retries=6, backoff_seconds=0.02, timeout_seconds=0.5, cache_gib=0)
    here = resolve_folder(str(folder), tmp_path / "cache")
    assert isinstance(here, StoredFolder)
    assert sorted(path.name for path in folder.iterdir()) == ["part-0.tar", "part-1.tar", "part-2.tar"]
    expected = DatasetIndex.load(here)
    trouble = {"reset": 0.15, "503": 0.1, "short": 0.15}
    with (
        nginx(folder.parent, tmp_path / "run", rules="autoindex on;") as port,
        faulty_proxy(port, trouble, seed=1) as proxy,
    ):
        for tail in ("www/part-{0..2}.tar", "www"):
            stored = resolve_folder(f"http://127.0.0.1:{proxy.port}/{tail}", tmp_path / "cache", quick)
            index = DatasetIndex.load(stored)
            assert index.hash == expected.hash
            assert list(index.entries) == list(expected.entries)
            assert all(read_member(stored, entry, "mp4") == VIDEO for entry in index.entries)
    manifests = sorted((tmp_path / "cache").glob("www*/dataset.json"))
    stamps = [path.stat().st_mtime_ns for path in manifests]
    resolve_folder(str(folder), tmp_path / "cache")
    assert [path.stat().st_mtime_ns for path in manifests] == stamps


def test_a_field_without_its_other_name_is_named():
    with pytest.raises(ValueError, match="--field caption must be OURS=THEIRS"):
        parse_field("caption")
    assert parse_field("license=meta.license") == ("license", "meta.license")
