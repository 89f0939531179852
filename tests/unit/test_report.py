"""The run page of runs that are whole, killed, empty or odd; and the reference band."""

import argparse
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinema.report import band as bands
from kinema.report import page
from kinema.report.band import judge, make_band
from kinema.report.page import build_report, duration, number
from kinema.report.run_folder import read_run, series

STEPS = 400
BINS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")
PROMPTS = ["a red disc moves to the right", "a blue square falls <b>fast</b>", "a green ring and a white star collide"]


def train_records(task="dit", steps=STEPS, seed=0, factor=1.0):
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        level = factor * (0.22 + 0.9 * np.exp(-step / 60))
        loss = level * np.exp(0.18 * rng.standard_normal())
        record = {"kind": "train", "step": step, "loss": loss, "lr": 1e-3 * min(1, step / 40), "clips": 8, "tokens": 2560}
        record["grad_norm"] = float(3 * level * np.exp(0.4 * rng.standard_normal()))
        seconds = np.array([0.01, 0.05, 0.2, 0.38, 0.03, 0.01]) * np.exp(0.08 * rng.standard_normal(6))
        record["seconds"] = dict(zip(page.PHASES, (seconds * (4 if step == 1 else 1)).tolist(), strict=True))
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
    else:
        (folder / "vae_strips").mkdir()
        for step in (200, 400):
            picture = np.random.default_rng(step).integers(0, 255, (96, 320, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"vae_strips/{step}.png")
            psnr = [[24 + step / 60 - abs(t - 8) / 5 + clip for t in range(17)] for clip in range(3)]
            records.append({"kind": "reconstruction", "step": step, "sheet": f"vae_strips/{step}.png", "psnr_per_frame": psnr})
    write_lines(folder / "metrics.jsonl", records)
    info = {"name": "shapes-7f3a", "task": task, "started": "2025-01-02T03:04:05", "world_size": 2, "parameters": 6_100_000}
    info |= {"command": "python train.py experiment=demo run=shapes-7f3a", "device": "cpu, 2 threads", "config_hash": "91c2"}
    info |= {"flops_per_step": 4.2e10, "peak_flops_measured": 1.1e11, "versions": {"torch": "2.x", "deepspeed": "0.x"}}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "config.yaml").write_text(f"task: {task}\nsteps: {STEPS}\nseed: 0\ndata:\n  path: data/toy\n  clips_per_step: 8\n")
    row = {"decoded": 1600, "failed": 1, "clips": 1600, "seconds": 3391.5, "license": "CC0-1.0"}
    (folder / "ledger.json").write_text(
        json.dumps({"sources": {"toy": row}, "shards": {f"clips-{i:06d}.tar": row for i in range(8)}})
    )
    write_lines(folder / "quarantine.jsonl", [{"key": "0007", "shard": "clips-000000.tar", "reason": "no frame at 1.2 s"}])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "shapes")


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


def test_page_is_one_file_and_valid(whole, tmp_path):
    html = build_report(whole, tmp_path / "page.html").read_text()
    tags = Tags(html)
    assert not tags.open, f"unclosed: {tags.open}"
    assert len(set(tags.ids)) == len(tags.ids)
    assert tags.sources
    assert all(source.startswith(("data:", "#")) for source in tags.sources)
    assert "script" not in tags.tags
    for reference in re.findall(r"url\(#(\w+)\)", html):
        assert reference in tags.ids
