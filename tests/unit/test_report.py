"""The run page of runs that are whole, killed, empty or odd; and the reference band."""

import argparse
import base64
import json
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinema.data.account.ledger import Account, Ledger
from kinema.report import band as bands
from kinema.report import content, page
from kinema.report.band import judge, make_band
from kinema.report.content import PHASES, duration, number
from kinema.report.media import Media, MediaShelf
from kinema.report.page import build_report
from kinema.report.plots import SENTINELS
from kinema.report.run_folder import read_run, series

STEPS = 400
BINS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")
PROMPTS = [
    "a red disc moves to the right",
    "a blue square falls <b>fast</b>",
    "a green ring and a white star collide",
]


def train_records(task="dit", steps=STEPS, seed=0, factor=1.0):
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        level = factor * (0.22 + 0.9 * np.exp(-step / 60))
        loss = level * np.exp(0.18 * rng.standard_normal())
        record = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "lr": 1e-3 * min(1, step / 40),
            "clips": 8,
            "tokens": 2560,
        }
        record["grad_norm"] = float(3 * level * np.exp(0.4 * rng.standard_normal()))
        record["lanes"] = {"efficiency": 0.97, "slowest": 1.0 + 0.1 * rng.random(), "padding": 0.0, "seconds": 0.2}
        seconds = np.array([0.01, 0.05, 0.2, 0.38, 0.03, 0.01]) * np.exp(0.08 * rng.standard_normal(6))
        record["seconds"] = dict(zip(PHASES, (seconds * (4 if step == 1 else 1)).tolist(), strict=True))
        if task == "dit":
            scale = (2.2, 1.1, 0.8, 0.6) * np.exp(0.2 * rng.standard_normal(4))
            record["loss_by_noise"] = dict(zip(BINS, (level * scale).tolist(), strict=True))
            record["loss_by_noise"][BINS[step % 4]] = None
        else:
            record["terms"] = {"reconstruction": 0.6 * loss, "kl": 40 * (1 - np.exp(-step / 50)) + 1}
        records.append(record)
    return records


def moving_square(path, step):
    """A real H.264 clip whose square gets sharper with the step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(step)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=8, options={"crf": "20"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(17):
            frame = np.full((64, 64, 3), 24, np.uint8)
            frame[20:36, 2 + 2 * t : 18 + 2 * t] = (220, 60, 50)
            noise = rng.normal(0, 90 * np.exp(-step / 120), frame.shape)
            frame = np.clip(frame + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder: Path, task="dit", factor=1.0) -> Path:
    """A run folder as the trainer leaves it after the last step."""
    folder.mkdir(parents=True)
    records = train_records(task, factor=factor)
    for step in range(50, STEPS + 1, 50):
        level = 0.25 + 0.9 * np.exp(-step / 60)
        for weights, extra in (("ema", 0.0), ("raw", 0.03)):
            line = {"kind": "validation", "step": step, "loss": level + extra, "weights": weights}
            line["loss_by_noise"] = dict(zip(BINS, [level * s for s in (2.1, 1.1, 0.8, 0.6)], strict=True))
            records.append(line | ({"psnr": 18 + step / 40} if task == "vae" else {}))
        records.append({"kind": "event", "step": step, "event": "checkpoint", "detail": f"checkpoints/step-{step:08d}"})
    records.append({"kind": "event", "step": 130, "event": "quarantine", "detail": "clip 0007: no frame at 1.2 s"})
    records.append({"kind": "event", "step": 200, "event": "resume", "detail": "2 ranks, was 1"})
    if task == "dit":
        for step in (0, 100, 200, 300, 400):
            names = [f"samples/step-{step:08d}/{i:02d}.mp4" for i in range(len(PROMPTS))]
            for name in names:
                moving_square(folder / name, step)
            records.append({"kind": "sample", "step": step, "videos": names, "prompts": PROMPTS})
        (folder / "timesteps.json").write_text(
            json.dumps(
                {
                    "edges": np.linspace(0, 1, 21).tolist(),
                    "counts": (1000 * np.sin(np.linspace(0.2, 2.9, 20)) ** 2).astype(int).tolist(),
                    "sampler": (3 * np.linspace(0, 1, 21) / (1 + 2 * np.linspace(0, 1, 21))).tolist(),
                }
            )
        )
        (folder / "evaluation").mkdir()
        Image.new("RGB", (40, 30), (9, 9, 9)).save(folder / "evaluation/captions.png")
        measured = {"step": STEPS, "weights": "ema", "prompts": 64, "rates": {"colour": 1.0, "shape": 0.9, "all": 0.75}}
        measured["settings"] = {"at_least": 0.8, "solver": "heun", "steps": 20, "guidance": 3.0}
        (folder / "evaluation/captions.json").write_text(json.dumps(measured))
    else:
        (folder / "vae_strips").mkdir()
        for step in (200, 400):
            picture = np.random.default_rng(step).integers(0, 255, (96, 320, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"vae_strips/{step}.png")
            psnr = [[24 + step / 60 - abs(t - 8) / 5 + clip for t in range(17)] for clip in range(3)]
            records.append(
                {
                    "kind": "reconstruction",
                    "step": step,
                    "sheet": f"vae_strips/{step}.png",
                    "psnr_per_frame": psnr,
                }
            )
    write_lines(folder / "metrics.jsonl", records)
    info = {
        "name": "shapes-7f3a",
        "task": task,
        "started": "2025-01-02T03:04:05",
        "world_size": 2,
        "parameters": 6_100_000,
    }
    info |= {
        "command": "python train.py experiment=demo run=shapes-7f3a",
        "device": "cpu, 2 threads",
        "config_hash": "91c2",
    }
    info |= {
        "flops_per_step": 4.2e10,
        "peak_flops_measured": 1.1e11,
        "versions": {"torch": "2.x", "deepspeed": "0.x"},
    }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "config.yaml").write_text(
        f"task: {task}\nsteps: {STEPS}\nseed: 0\ndata:\n  path: data/toy\n  clips_per_step: 8\n"
    )
    ledger = Ledger()
    ledger.sources["toy"] = Account(1599, 1, 1200, 3, 3391.5, Counter({"CC0-1.0": 1599}))
    for i in range(8):
        ledger.shards[f"clips-{i:06d}.tar"] = Account(200, 0, 150, 0, 424.0, Counter({"CC0-1.0": 200}))
    ledger.reasons["no frame at 1.2 s"] = 1
    (folder / "ledger.json").write_text(json.dumps(ledger.to_dict()))
    write_lines(
        folder / "quarantine.jsonl",
        [{"key": "0007", "shard": "clips-000000.tar", "reason": "no frame at 1.2 s"}],
    )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "shapes")


@pytest.fixture(scope="module")
def built(whole, tmp_path_factory):
    """The page of the whole run, found inside a band of three other healthy runs, and its build time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BANDS", tmp_path_factory.mktemp("bands"))
        bands.write_band(make_band([train_records(seed=seed) for seed in (1, 2, 3)]), "demo")
        started = time.process_time()
        page = build_report(whole, tmp_path_factory.mktemp("page") / "new" / "page.html")
        return page.read_text(), time.process_time() - started


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.tags = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href", "poster")]
        if tag not in ("meta", "img", "br", "path", "use", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.DOTALL)))


def test_page_is_one_file_and_valid(built):
    html, _ = built
    tags = Tags(html)
    assert not tags.open, f"unclosed: {tags.open}"
    assert len(set(tags.ids)) == len(tags.ids)
    assert tags.sources
    assert all(source.startswith(("data:", "#")) for source in tags.sources)
    assert "script" not in tags.tags
    for reference in re.findall(r"url\(#(\w+)\)", html):
        assert reference in tags.ids


def test_page_embeds_the_very_files_and_escapes_words(whole, built):
    html, _ = built
    for name in ("samples/step-00000000/00.mp4", "samples/step-00000400/02.mp4"):
        assert base64.b64encode((whole / name).read_bytes()).decode() in html
    assert html.count("<video ") == 15
    assert "<b>fast</b>" not in html
    assert "falls &lt;b&gt;fast&lt;/b&gt;" in html
    assert not re.search("|".join(SENTINELS.values()), html)  # every colour became a variable of the page
    variables = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    shared = {"--font", "--mono"}
    assert variables <= set(re.findall(r"(--[\w-]+):", light))
    assert variables - shared <= set(re.findall(r"(--[\w-]+):", dark))


def test_page_says_what_the_run_did(built):
    html, seconds = built
    assert seconds < 5
    text = text_of(html)
    assert "finished, 400 of 400 steps" in text
    assert "inside demo" in text  # found by experiment=demo in the command
    assert "1 in quarantine" in text
    assert "Lanes" in text
    assert "cost, mean / largest" in html
    assert "75% of 64 followed, 80% needed" in text
    assert "colour shape all at once 100 % 90 % 75 %" in text
    assert "toy 1,599 1 1,200 3 3.39 k CC0-1.0 (1,599)" in text
    assert "not recorded" not in text.split("Environment")[0].replace("Validation PSNR not recorded", "")
    seconds = [sum(record["seconds"].values()) for record in train_records()]
    assert f"{100 * 4.2e10 / (np.median(seconds) * 1.1e11 * 2):.2f} % = 42 G" in text


def test_vae_page_shows_reconstructions_and_no_samples(tmp_path):
    folder = write_run(tmp_path / "vae", task="vae")
    text = text_of(build_report(folder).read_text())
    assert "Term: reconstruction" in text
    expected = 24 + 400 / 60 + 1 - np.mean([abs(t - 8) for t in range(17)]) / 5
    assert f"step 400 · mean PSNR {expected:.2f} dB" in text
    assert "Samples" not in text
    assert "Loss by noise level" not in text
    (folder / "vae_strips/400.png").unlink()
    newest, *_ = content.reconstructions(read_run(folder), MediaShelf(folder))
    assert newest["media"] == Media("vae_strips/400.png", missing="file missing")


@pytest.mark.parametrize("task", ["dit", "vae"])
def test_nearly_empty_run_says_not_recorded(tmp_path, task):
    (tmp_path / "run.json").write_text(json.dumps({"name": "bare", "task": task}))
    text = text_of(build_report(tmp_path).read_text())
    assert "planned number of steps is not recorded" in text
    assert text.count("not recorded") >= 12
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n{"kind": "train", "st')
    text = text_of(build_report(tmp_path).read_text())
    assert "The last line of metrics.jsonl (line 2) is cut off" in text


def test_every_missing_key_and_file_leaves_a_page(tmp_path):
    """Records with one key, and odd values, of which each once was a crash of some report somewhere."""
    lines = [{"kind": kind, "step": 3} for kind in ("train", "validation", "sample", "reconstruction", "event")]
    lines += [{"kind": "train", "step": 4, "loss": None, "seconds": {}, "loss_by_noise": {"a": None}, "clips": 8}]
    lines += [{"kind": "train", "step": 5, "loss": float("nan"), "seconds": {"data": 0.0}, "clips": 8, "tokens": 0}]
    lines += [
        {
            "kind": "sample",
            "step": 5,
            "prompts": ["x"],
            "videos": ["../page.html", "no.mp4"],
            "sheet": "no.png",
        }
    ]
    lines += [
        {"kind": "reconstruction", "step": 5, "psnr_per_frame": [None, 3]},
        {"kind": "news", "step": 1},
        {"a": 1},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "config.yaml").write_text("steps: [")
    (tmp_path / "ledger.json").write_text("[]")
    (tmp_path / "timesteps.json").write_text('{"edges": [0, 1], "counts": []}')
    text = text_of(build_report(tmp_path).read_text())
    assert "2 line(s) of metrics.jsonl have no known kind or no step" in text
    assert "config.yaml cannot be parsed" in text
    assert "ledger.json holds no JSON object" in text
    assert "lies outside the run folder" in text


def test_verdict_names_interruption_and_spoilt_losses(whole, tmp_path):
    run = read_run(whole)
    assert page._finished(run).state == "good"
    run.train = run.train[:150]
    assert (
        page._finished(run).text == "not finished, 150 of 400 steps: still running or killed, last record at step 150"
    )
    run.events.append({"step": 150, "event": "end", "detail": "stopped by SIGTERM at step 150"})
    assert page._finished(run).text == "not finished, 150 of 400 steps: stopped by SIGTERM at step 150"
    run.train[7] = run.train[7] | {"loss": float("nan")}
    assert page._finished(run).state == "bad"


def test_a_step_run_twice_counts_once(tmp_path):
    records = train_records(steps=20)
    again = [record | {"loss": 7.0} for record in records[10:15]]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps(record) for record in records)
        + '\n{"kind": "tra'
        + "\n"
        + "\n".join(map(json.dumps, again))
    )
    run = read_run(tmp_path)
    steps, losses = series(run.train, "loss")
    assert steps.tolist() == list(range(1, 21))
    assert np.flatnonzero(losses == 7.0).tolist() == [10, 11, 12, 13, 14]
    assert any("5 step(s) were run twice" in note for note in run.notes)
    assert any("line 21" in note for note in run.notes)


def test_total_time_counts_the_steps_between_records(tmp_path):
    """The trainer writes means of the steps since the last record: the first alone, then every ten."""
    seconds = {step: 0.1 + 0.01 * step for step in range(1, 42)}
    groups = [[1], range(2, 11), range(11, 21), range(21, 31), range(31, 41), [41]]
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {
                "kind": "train",
                "step": group[-1],
                "seconds": {"forward": float(np.mean([seconds[s] for s in group]))},
            }
            for group in groups
        ],
    )
    assert content.speed(read_run(tmp_path))["total_seconds"] == pytest.approx(sum(seconds.values()))


def test_long_sample_histories_keep_first_and_last_and_say_so(whole, monkeypatch):
    run = read_run(whole)
    run.samples = [run.samples[i // 4] | {"step": i} for i in range(20)]
    shown = content.samples(run, MediaShelf(whole))
    steps = [column["step"] for column in shown["columns"]]
    assert (steps[0], steps[-1], len(steps), shown["left_out"]) == (0, 19, 8, 12)


def test_full_page_keeps_the_newest_pictures_and_names_the_rest(whole):
    run = read_run(whole)
    newest = [whole / name for name in run.samples[-1]["videos"]]
    shelf = MediaShelf(whole, left=sum(path.stat().st_size * 4 // 3 for path in newest))
    columns = content.samples(run, shelf)["columns"]
    assert all(media.uri for media in columns[-1]["media"].values())
    assert not any(media.uri for media in columns[0]["media"].values())
    assert "samples/step-00000000/00.mp4" in shelf.refused


def test_pictures_outside_the_run_folder_are_not_embedded(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("secret.png", "run/own.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    shelf = MediaShelf(tmp_path / "run")
    assert shelf.embed("own.png").uri.startswith("data:image/png;base64,")
    assert shelf.embed("../secret.png") == Media("../secret.png", missing="lies outside the run folder")


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run=.* is no run folder: it has neither run\.json nor metrics\.jsonl"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        build_report(tmp_path / "none")


def test_running_median_matches_the_plain_definition():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 5, 80)).astype(float)
    values, at = rng.standard_normal(80), rng.uniform(-5, steps[-1] + 30, 40)
    plain = [values[abs(steps - center) <= 6.5] for center in at]
    expected = [np.median(inside) if len(inside) else np.nan for inside in plain]
    np.testing.assert_array_equal(bands.running_median((steps, values), at, 13), expected)


def test_band_of_a_constant_loss_is_the_least_width():
    flat = [{"step": step, "loss": 2.0, "loss_by_noise": {"0-1": 4.0}} for step in range(1, 101)]
    band = make_band([flat])
    assert set(band["mid"]) == {2.0}
    assert set(band["low"]) == {1.9}
    assert set(band["by_noise"]["0-1"]["high"]) == {4.2}
    assert json.loads(json.dumps(band, allow_nan=False)) == band


@pytest.mark.parametrize("runs", [1, 3])
def test_band_accepts_healthy_runs_and_refuses_others(runs):
    band = make_band([train_records(seed=100 + seed) for seed in range(runs)])

    def verdict(records, name=None):
        curve = series(records, "loss") if name is None else series(records, "loss_by_noise", name)
        return judge(curve, band, name)

    healthy = [verdict(train_records(seed=seed), name).inside for seed in range(20) for name in (None, *BINS)]
    assert np.mean(healthy) > 0.95
    assert verdict(train_records(seed=1, steps=150)).inside  # a run that was interrupted
    worse, stuck = train_records(seed=2, factor=1.6), train_records(seed=3)
    for record in stuck:
        record["loss"] = 1.1
    assert verdict(worse).above > 0.5 * verdict(worse).judged
    assert not verdict(stuck).inside
    assert not verdict(train_records(seed=4, factor=0.6)).inside
    assert not verdict(train_records(seed=5, steps=3)).judged


def test_band_needs_enough_losses():
    with pytest.raises(ValueError, match=r"has 10 losses; a band needs at least 20"):
        make_band([train_records(steps=10)])
    with pytest.raises(ValueError, match=r"runs=\[\] is empty"):
        make_band([])


def test_command_makes_a_band_and_refuses_a_bad_name(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bands, "BANDS", tmp_path / "bands")
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    assert page.run(parser.parse_args([str(whole), "--make-band", "demo_dit"])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "READY: band of 1 run(s), steps 1 to 400"
    assert bands.load_band("demo_dit") == make_band([whole])
    with pytest.raises(ValueError, match=r"make-band=\.\./x: use lower-case letters"):
        page.run(parser.parse_args([str(whole), "--make-band", "../x"]))
    with pytest.raises(ValueError, match=r"band=other does not ship; choose among \['demo_dit'\]"):
        build_report(whole, tmp_path / "page.html", band="other")


def test_every_shipped_band_is_whole():
    for name in bands.shipped_bands():
        band = bands.load_band(name)
        low, mid, high = (np.array(band[key], float) for key in ("low", "mid", "high"))
        assert (low < mid).all()
        assert (mid < high).all()
        assert len(band["steps"]) == len(mid)


def test_numbers_read_well():
    assert [number(v) for v in (99_999, 100_000, 1.5e12, 0.01234, None, "CC0-1.0", True)] == [
        "99,999", "100 k", "1.5 T", "0.0123", "-", "CC0-1.0", "True",
    ]  # fmt: skip
    assert [duration(v) for v in (0.68, 20.171, 274, 7 * 3600)] == [
        "680 ms",
        "20.17 s",
        "4 min 34 s",
        "7 h 0 min",
    ]
