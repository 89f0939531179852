"""What the pipeline takes in: folders, single files, lists with rights and shots, and tars of samples."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from data_prep.pipeline.inputs import input_rows
from data_prep.pipeline.rows import Dropped, RowFailed
from data_prep.pipeline.stage import Place
from data_prep.stages.ingest import Ingest
from kinema.data.decode.encoding import write_video


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/b c.mp4"):
        write_video(tmp_path / "in" / name, np.zeros((3, 32, 32, 3), np.uint8), 10)
    return tmp_path / "in"


def ingest(*given, **settings):
    stage, place = Ingest(**settings), Place(given[0].parent / "work", "01-ingest")
    outcomes = [out for path in given for row in input_rows([str(path)]) for out in stage.apply(row, place)]
    kept = list(stage.finish(iter(out for out in outcomes if not isinstance(out, Dropped)), place))
    return {row["key"]: row for row in kept}, [out for out in outcomes if isinstance(out, Dropped)]


def test_a_folder_and_single_files_with_captions_beside_them(folder):
    (folder / "a.txt").write_text("a caption")
    rows, _ = ingest(folder, license="CC0-1.0", generated="no")
    assert list(rows) == ["a", "deep-b-c"]
    assert rows["a"]["caption"] == "a caption"
    assert [rows["a"][name] for name in ("source", "license", "consent", "generated")] == [
        "in",
        "CC0-1.0",
        "unknown",
        "no",
    ]
    assert rows["deep-b-c"]["number"] == 1
    rows, _ = ingest(folder / "a.mp4", folder / "deep" / "b c.mp4", source="home")
    assert {key: (row["caption"], row["source"]) for key, row in rows.items()} == {
        "a": ("a caption", "home"),
        "b-c": ("", "home"),
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_lists_state_captions_rights_and_whatever_else(folder, kind):
    lines = [
        {"path": "a.mp4", "text": "first, with comma", "license": "CC-BY-4.0", "source": "x", "score": "7"},
        {"path": "deep/b c.mp4", "text": "second"},
        {"path": "gone.mp4", "text": "third"},
    ]
    path = folder / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, lines)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(lines), path)
    else:
        mark = "," if kind == "csv" else "\t"
        rows = [[line.get(name, "") for name in lines[0]] for line in lines]
        path.write_text("\n".join(mark.join(f'"{v}"' for v in row) for row in [list(lines[0]), *rows]))
    rows, dropped = ingest(path, license="CC0-1.0", attribution="me")
    assert [rows["a"][name] for name in ("caption", "license", "source", "attribution", "listed")] == [
        "first, with comma",
        "CC-BY-4.0",
        "x",
        "me",
        {"score": "7"},
    ]
    assert [rows["deep-b-c"][name] for name in ("caption", "license", "source")] == ["second", "CC0-1.0", "list"]
    assert [(out.row["video"], out.reason) for out in dropped] == [("gone.mp4", "file is missing")]


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("licence", "license"),
        ("lisence", "license"),
        ("captions", "caption"),
        ("Source", "source"),
        ("end_second", "end_"),
    ],
)
def test_columns_that_are_nearly_known_are_refused(folder, column, meant):
    (folder / "x.csv").write_text(f"path,{column}\na.mp4,b\n")
    with pytest.raises(ValueError, match=f"column {column} is unknown. Did you mean {meant}"):
        ingest(folder / "x.csv")
    rows, _ = ingest(folder / "x.csv", listed=[column])
    assert rows["a"]["listed"] == {column: "b"}


def test_rights_of_a_list_are_checked_before_anything_is_scored(folder):
    (folder / "x.csv").write_text("path,generated\na.mp4,possibly\n")
    with pytest.raises(ValueError, match=r"a\.mp4: generated='possibly' must be one of no, partly"):
        ingest(folder / "x.csv")


def test_columns_that_nobody_knows_are_named_once(folder, capsys):
    (folder / "x.csv").write_text(
        "path,caption,captions,caption_en,text2,score,video_id\na.mp4,b,c,d,e,1,v\ndeep/b c.mp4,b,c,d,e,2,w\n"
    )
    ingest(folder / "x.csv")
    assert capsys.readouterr().out.count("go along under listed: caption_en, captions, score, text2, video_id\n") == 1


def test_rows_with_times_are_shots(folder):
    head = "file,start_seconds,end_seconds,caption,split\n"
    (folder / "shots.csv").write_text(f"{head}a.mp4,0.2,0.3,late,heldout\na.mp4,0,0.2,early,\n")
    rows, _ = ingest(folder / "shots.csv")
    assert [(s["start_seconds"], s["caption"], s["split"]) for s in rows["a"]["shots"]] == [
        (0, "early", None),
        (0.2, "late", "heldout"),
    ]


def test_tars_of_samples_as_video2dataset_writes_them(folder):
    video = (folder / "a.mp4").read_bytes()
    members = {
        "00000.mp4": video,
        "00000.json": json.dumps({"url": "https://example.org/v", "license": None, "duration": 3}).encode(),
        "00000.txt": b"from the txt",
        "00001.json": json.dumps({"status": "failed_to_download"}).encode(),
    }
    with tarfile.open(folder / "00007.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows, dropped = ingest(folder)  # a folder of tars is taken as these
    assert [(out.row["key"], out.reason) for out in dropped] == [("00007-00001", "sample without a video")]
    [row] = rows.values()
    assert [row[name] for name in ("key", "caption", "source_url", "license", "listed")] == [
        "00007-00000",
        "from the txt",
        "https://example.org/v",
        "unknown",
        {"url": "https://example.org/v", "duration": 3},
    ]
    with open(row["path"], "rb") as file:
        assert file.read() == video
    (folder / "cut.tar").write_bytes((folder / "00007.tar").read_bytes()[:1500])
    with pytest.raises(RowFailed, match="no whole tar"):
        ingest(folder / "cut.tar")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "name,caption\na,b\n", "must have a path"),
        ("x.csv", "path,caption\na.mp4,b\na.mp4,c\n", "row 2: a.mp4 stands in the list twice"),
        ("x.csv", "path,caption,start_seconds,end_seconds\na.mp4,b,two,3\n", "start_seconds='two'"),
        ("x.jsonl", "{", "is not json"),
        ("x.pdf", "", "must be a folder, a video, a list"),
    ],
)
def test_what_cannot_be_taken_in_is_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ingest(folder / name)


def test_letters_of_every_script_stay_and_equal_keys_are_told_apart(folder):
    for name in ("日本.mp4", "Привет.mkv", "a.mkv", "deep/!.mp4", "x" * 240 + ".mp4"):
        (folder / name).write_bytes((folder / "a.mp4").read_bytes())
    rows, _ = ingest(folder)
    keys = {row["video"]: key for key, row in rows.items()}
    assert (keys["日本.mp4"], keys["Привет.mkv"], keys["deep/!.mp4"]) == ("日本", "Привет", "deep")
    assert keys["a.mp4"] == f"a-{hashlib.sha256(b'a.mp4').hexdigest()[:8]}"
    assert keys["a.mkv"] == f"a-{hashlib.sha256(b'a.mkv').hexdigest()[:8]}"
    assert len(keys["x" * 240 + ".mp4"]) == 200


def test_equal_names_of_two_inputs_are_told_apart_and_a_file_given_twice_is_named(folder):
    (folder / "deep" / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    rows, _ = ingest(folder / "a.mp4", folder / "deep" / "a.mp4")
    assert list(rows) == [f"a-{hashlib.sha256(path).hexdigest()[:8]}" for path in (b"a.mp4", b"deep/a.mp4")]
    with pytest.raises(ValueError, match=r"same file twice: .*a\.mp4"):
        ingest(folder / "a.mp4", folder / "a.mp4")
