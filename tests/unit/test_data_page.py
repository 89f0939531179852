"""The data page: its numbers against the data set that it was built from, and nothing loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from data_prep.pipeline.engines import LocalEngine
from data_prep.scores.keep import Range
from data_prep.stages.filter import Filter
from data_prep.stages.page import Page
from data_prep.stages.score import Score
from data_prep.stages.write import Write
from kinema.cli import run_verb
from kinema.data.dataset.shards import DatasetIndex
from kinema.report import data_content
from kinema.report.data_page import build_data_page
from kinema.report.histogram import histogram_of, histogram_svg
from tests.unit.clips import build
from tests.unit.made_clips import clip_row, panned, pipeline, scenery, still


class ParsedPage(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text.strip())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Five clips of which two are filtered out and one has no caption, written and shown."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("sets") / "mine"
    rows = [
        clip_row(work, "fast", panned(60, 1), caption="a <b>fast</b> pan & more"),
        clip_row(work, "slow", panned(30, 2), caption="a slow pan", license="unknown"),
        clip_row(work, "frozen", still(scenery(3)), caption="nothing moves"),
        clip_row(work, "copy", panned(60, 1)[:, 2:-2, 2:-2], caption="a copy of the fast pan"),
        clip_row(work, "mute", panned(45, 5), caption=" "),
    ]
    stages = {
        "score": Score(),
        "filter": Filter({"motion": Range(min=0.1)}),
        "write": Write(out=str(out)),
        "page": Page(out=str(out), clips=8),
    }
    reports = pipeline(work, stages, rows, LocalEngine(workers=0)).run(list(stages), show=False)
    return out, reports


def test_the_page_is_one_well_formed_file_without_scripts_or_addresses(prepared):
    out, _ = prepared
    text = (out / "page.html").read_text()
    page = ParsedPage(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))
    assert not re.search(r"url\(|@import|https?://", text)
    assert "a &lt;b&gt;fast&lt;/b&gt; pan &amp; more" in text


def test_the_page_says_what_was_kept_and_shows_what_was_not(prepared):
    out, reports = prepared
    assert [report.kept for report in reports] == [5, 3, 2, 2]
    page = ParsedPage((out / "page.html").read_text())
    words = " ".join(page.words)
    assert "kept 3 of 5 (60%)" in words
    assert "1 motion below 0.1" in words
    assert "1 duplicate of a kept clip" in words
    assert "write 3 2 1 no caption" in " ".join(words.split())
    *_, written = json.loads((out / "prepare.json").read_text())["stages"]
    assert (written["stage"], written["given"], written["kept"]) == ("write", 3, 2)
    assert written["dropped"] == reports[2].dropped == {"no caption": 1}
    for shown in ("nothing moves", "a copy of the fast pan", "fast"):
        assert shown in words
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert pictures.count("shown/frozen.jpg") == 1
    assert {"fast.jpg", "slow.jpg"} <= set(pictures)
    assert "1 unknown" in words


def test_what_was_kept_lies_beside_the_shards(prepared):
    out, _ = prepared
    keep = json.loads((out / "preparation" / "keep.json").read_text())
    assert (keep["given"], keep["kept"]) == (5, 3)
    assert len(list((out / "preparation" / "shown").glob("*.jpg"))) == 5
    assert len(DatasetIndex.load(out).entries) == 2  # what lies beside changes nothing


def test_any_data_set_has_a_page_and_a_damaged_clip_is_named(tmp_path):
    build(tmp_path / "set", 6, damaged=(2,), caption=lambda n: "" if n == 4 else f"words {n % 2}")
    page, checks = build_data_page(tmp_path / "set", tmp_path / "elsewhere" / "page.html")
    by_title = {check.title: (check.state, check.text) for check in checks}
    assert by_title["Clips"] == ("bad", "1 of 6 shown cannot be decoded: clip-002")
    assert by_title["Captions"] == ("warn", "1 of 6 empty")
    assert by_title["Held out"] == ("warn", "none")
    assert "clip-002: " in page.read_text()


def test_numbers_of_the_page_are_those_of_the_index(tmp_path):
    index = build(
        tmp_path / "set",
        9,
        caption=lambda n: "one two three" if n < 4 else f"word {n}",
        license=lambda n: "CC0-1.0" if n < 6 else "MIT",
        split=lambda n: "heldout" if n == 8 else "train",
    )
    records = [entry.record for entry in index.entries]
    found = data_content.captions(records)
    assert (found["empty"], found["distinct"], found["in_copies"]) == (0, 6, 4)
    assert found["repeated"] == [("one two three", 4)]
    assert found["longest"][0] == "one two three"
    tables = dict(data_content.share_tables(records))
    assert [(name, clips) for name, clips, *_ in tables["Licence"]] == [("CC0-1.0", 6), ("MIT", 3)]
    assert sum(share for *_, share in tables["Licence"]) == pytest.approx(1)
    assert data_content.cards(index)[0] == ("clips", "9", "8 train, 1 heldout")


def test_long_tables_are_cut_and_say_how_much_was(tmp_path):
    index = build(tmp_path / "set", 20, source=lambda n: f"source {n}")
    rows = dict(data_content.share_tables([entry.record for entry in index.entries]))["Source"]
    assert len(rows) == data_content.MOST_ROWS + 1
    assert rows[-1][:2] == ("8 more", 8)


def test_a_histogram_draws_every_count_and_its_bounds():
    values = np.array([1, 1, 2, 5, 5, 5], float)
    found = histogram_of(values)
    assert found["counts"] == [2, 1, 0, 0, 3, 0][: len(found["counts"])]
    svg = histogram_svg(found, 'a "name"', bounds=[2.0], rule="at least 2")
    assert [int(count) for count in re.findall(r"<title>(\d+)</title>", svg)] == [2, 1, 3]
    assert len(re.findall(r"var\(--s5\)", svg)) == 1  # the ones are below
    assert svg.count("stroke-dasharray") == 1
    assert "&#34;name" in svg
    assert histogram_of(np.array([])) is None
    assert sum(histogram_of(np.full(3, 0.5))["counts"]) == 3


def test_the_command_ends_with_the_verdict(tmp_path, capsys):
    build(tmp_path / "set", 3)
    assert run_verb("data page", "kinema.report.data_page", "page", [str(tmp_path / "set")]) == 0
    wrote, verdict = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {tmp_path / 'set' / 'page.html'}"
    assert verdict.startswith("Clips: all 3 shown were decoded")
