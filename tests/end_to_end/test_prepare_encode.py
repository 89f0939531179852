"""The stage encode makes the caches that the commands make, and makes them once."""

import json

import pytest

from data_prep.pipeline.engines import LocalEngine
from data_prep.stages.encode import Encode
from kinema.conditioning.text import TextCache
from kinema.data.packs.latents import MANIFEST
from tests.parity.tiny_texts import clip, llama
from tests.unit.made_clips import pipeline

pytestmark = pytest.mark.slow


def test_caches_are_made_by_the_commands_and_made_once(folder, tmp_path):
    text = ["text=hunyuan", "text.tokens.template='see {}'", "text.tokens.crop=0", "text.tokens.max_tokens=64"]
    for name, made in {"tokens": llama, "pooled": clip}.items():
        for part in made():
            part.save_pretrained(tmp_path / name)
        text.append(f"text.{name}.path={tmp_path}/{name}")
    data, work = tmp_path / "toy", tmp_path / "work"
    data.symlink_to(folder / "toy")
    work.mkdir()
    stage = Encode(data=str(data), vae=f"{folder}/runs/vae", shapes=["5x32x32"], text=text)

    def encode():
        [report] = pipeline(work, {"encode": stage}, [{"key": "toy"}], LocalEngine(0)).run(["encode"], show=False)
        assert report.kept == 1
        made = [*(tmp_path / "toy.latents").iterdir(), *(tmp_path / "toy.text").iterdir()]
        return {path: path.stat().st_mtime_ns for path in made}

    first = encode()
    latents = json.loads((tmp_path / "toy.latents" / MANIFEST).read_text())
    assert (sum(shard["samples"] for shard in latents["shards"]), latents["failures"]) == (24, {})
    assert TextCache.exists(str(tmp_path / "toy.text"))
    (work / "01-encode" / "report.json").unlink()  # killed before the last word
    assert encode() == first


@pytest.mark.soak
def test_a_command_that_fails_stops_the_stage(folder, tmp_path):
    stage = Encode(data=f"{folder}/toy", vae=f"{folder}/none", shapes=["5x32x32"])
    with pytest.raises(ValueError, match=r"encode: kinema data encode .* failed"):
        pipeline(tmp_path, {"encode": stage}, [{"key": "toy"}], LocalEngine(workers=0)).run(["encode"], show=False)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"vae": "runs/vae"}, r"encode\.shapes=\[\]"), ({"text": ["text=wan"], "text_of_run": "runs/a"}, "give one")],
)
def test_settings_that_make_no_sense_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        Encode(**settings)
