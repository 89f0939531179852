"""Cached embeddings are the encoder's bits, and no other policy's; `kinema data encode-text` completes what lacks."""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinema import cli
from kinema.conditioning.condition import embed, null_words
from kinema.conditioning.text import (
    CachedTextEncoder,
    CombinedText,
    HashText,
    PretrainedText,
    TextCache,
    TextCacheWriter,
    TextCleaning,
    TextDtype,
    TextFamily,
    TextPadding,
    build_text_encoder,
)
from kinema.conditioning.text.cached import pack
from tests.parity.tiny_texts import byt5, byte_tokenizer, clip, llama, umt5
from tests.unit.clips import build

CAPTIONS = ["", "a red ball", "a blue cube rolls left until it is cut off", 'a sign that says "STOP"']


def saved(folder, made):
    model, tokenizer = made
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", name="folders")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {made.__name__: saved(root / made.__name__, made()) for made in (umt5, llama, clip, byt5)}


@pytest.fixture(name="umt5_text")
def wan_like(folders):
    return PretrainedText(path=folders["umt5"], family=TextFamily.umt5, max_tokens=24, padding=TextPadding.zeros)


def choices(folders):
    tokens = PretrainedText(path=folders["llama"], family=TextFamily.llama, max_tokens=40, template="see {}", layer=-3)
    pooled = PretrainedText(path=folders["clip"], family=TextFamily.clip, max_tokens=30)
    glyphs = PretrainedText(path=folders["byt5"], max_tokens=30)
    umt5 = {"path": folders["umt5"], "family": TextFamily.umt5, "max_tokens": 24}
    return {
        "hash": HashText(),
        "words": PretrainedText(**umt5),
        "zeros": PretrainedText(padding=TextPadding.zeros, **umt5),
        "bfloat16": PretrainedText(dtype=TextDtype.bfloat16, padding=TextPadding.encoded, **umt5),
        "combined": CombinedText(tokens=tokens, pooled=pooled, glyphs=glyphs),
    }


def cached(folder, config, captions=CAPTIONS, **options):
    encoder = build_text_encoder(config)
    if not TextCache.exists(folder):
        TextCache.create(folder, config, encoder)
    with TextCacheWriter(folder, **options) as writer:
        for caption in captions:
            writer.add(caption, embed(encoder, [caption])[0])
    return encoder


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype == torch.float32
        assert one[name].shape == other[name].shape
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes()


@pytest.mark.parametrize("name", ["hash", "words", "zeros", "bfloat16", "combined"])
def test_a_cache_gives_the_bits_and_the_policy_of_its_encoder(folders, tmp_path, name):
    config = choices(folders)[name]
    encoder = cached(tmp_path / "cache", config, shard_bytes=600)
    assert len(list((tmp_path / "cache").glob("text-*.safetensors"))) > 1
    stand_in = CachedTextEncoder.load(tmp_path / "cache", config)
    order = CAPTIONS[::-1] + CAPTIONS[:2]  # together, whatever they were encoded beside
    for one, other in zip(embed(stand_in, order), embed(encoder, order), strict=True):
        same_bits(one, other)
    same_bits(null_words(stand_in), null_words(encoder))
    assert stand_in.policy() == encoder.policy()
    assert stand_in.width == encoder.width


def test_padding_and_half_precision_take_no_room(folders, tmp_path):
    kept = {}
    for name in ("zeros", "bfloat16"):
        cached(tmp_path / name, choices(folders)[name], ["a red ball"])
        (shard,) = (tmp_path / name).glob("*.safetensors")
        (kept[name],) = load_file(shard).values()
    assert kept["zeros"].shape == (11, 12)  # ten bytes and an end, of 24 tokens
    assert kept["bfloat16"].dtype == torch.bfloat16
    assert pack(torch.tensor([[1.0], [-0.0], [0.0]])).shape == (2, 1)  # a negative zero is a bit, too


def test_training_never_reads_the_encoder(folders, umt5_text, tmp_path, monkeypatch):
    cached(tmp_path / "cache", umt5_text)
    monkeypatch.setattr("kinema.conditioning.text.pretrained.load_model", lambda config: pytest.fail("loaded"))
    assert CachedTextEncoder.load(tmp_path / "cache", umt5_text).encode(["a red ball"])[0].shape == (24, 12)


def change_tokenizer(folder):
    byte_tokenizer(end="</s>", words=["ball"]).save_pretrained(folder)


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[-1]
    save_file({**tensors, name: tensors[name] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("max_tokens", {"max_tokens": 25}),
        ("template", {"template": "see {}"}),
        ("cleaning", {"cleaning": TextCleaning.web}),
        ("blank", {"blank": " "}),
        ("padding", {"padding": TextPadding.none}),
        ("layer", {"layer": -2}),
        ("crop", {"crop": 1}),
        ("dtype", {"dtype": TextDtype.bfloat16}),
        ("tokenizer", change_tokenizer),
        ("weights", change_weight),
    ],
)
def test_each_field_of_another_policy_is_refused_by_name_with_both(umt5_text, tmp_path, key, change):
    cached(tmp_path / "cache", umt5_text, [""])
    moved = shutil.copytree(umt5_text.path, tmp_path / "elsewhere")  # the folder may move
    config = dataclasses.replace(umt5_text, path=str(moved))
    CachedTextEncoder.load(tmp_path / "cache", config)
    if callable(change):
        change(moved)
        change = {}
    with pytest.raises(ValueError, match=rf"was made with text\.{key}=.* \(here .*data\.text=null") as refused:
        CachedTextEncoder.load(tmp_path / "cache", dataclasses.replace(config, **change))
    assert str(refused.value).count("(here") == 1


def test_another_encoder_is_refused(umt5_text, tmp_path):
    cached(tmp_path / "cache", umt5_text, [""])
    with pytest.raises(ValueError, match=r"text\.encoder='umt5' \(here 'hash'\)"):
        CachedTextEncoder.load(tmp_path / "cache", HashText())
    cached(tmp_path / "hash", HashText(), [""])
    with pytest.raises(ValueError, match=r"text\.width=64 \(here 32\)"):
        CachedTextEncoder.load(tmp_path / "hash", HashText(width=32))


def test_sharded_weights_are_the_same_weights(umt5_text, tmp_path):
    cached(tmp_path / "cache", umt5_text, [""])
    model, tokenizer = umt5()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    config = dataclasses.replace(umt5_text, path=str(tmp_path / "sharded"))
    CachedTextEncoder.load(tmp_path / "cache", config)
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"text\.path=.*no \*\.safetensors weights are on this machine"):
        CachedTextEncoder.load(tmp_path / "cache", config)


def test_a_damaged_shard_is_named(tmp_path):
    cached(tmp_path / "cache", HashText())
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="changed on disk"):
        CachedTextEncoder.load(tmp_path / "cache", HashText()).encode(CAPTIONS)
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged .*kinema data encode-text DATA --out"):
        CachedTextEncoder.load(tmp_path / "cache", HashText())


def resident_mib():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_a_cache_is_not_read_into_memory(tmp_path):
    TextCache.create(tmp_path / "cache", HashText(), build_text_encoder(HashText()))
    big = torch.randn(32, 2**17)  # 16 MiB each
    with TextCacheWriter(tmp_path / "cache", shard_bytes=2**40) as writer:
        for number in range(4):
            writer.add(f"caption {number}", {"text": big + number})
    del writer
    CachedTextEncoder.load(tmp_path / "cache", HashText()).encode(["caption 0"])  # whatever else a first time loads
    before = resident_mib()
    stand_in = CachedTextEncoder.load(tmp_path / "cache", HashText())
    assert resident_mib() - before < 16
    assert torch.equal(stand_in.encode(["caption 3"])[0], big + 3)


# The command


def kinema(monkeypatch, *words):
    monkeypatch.setenv("KINEMA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["kinema", "data", "encode-text", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


@pytest.fixture(scope="module", name="data")
def twelve_clips(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "set", 12)


def test_an_interrupted_cache_is_completed_and_a_prompt_added(data, umt5_text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    wanted = ["", *dict.fromkeys(entry.record.caption for entry in data.entries)]
    config = dataclasses.replace(umt5_text, cleaning=TextCleaning.web)
    words = ["text=wan", f"text.path={config.path}", "text.max_tokens=24"]
    seen = []

    def interrupted(encoder, captions):
        seen.extend(captions)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return embed(encoder, captions)

    monkeypatch.setattr("kinema.encode_text.embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kinema(monkeypatch, data.folder, "--out", out, "--config", *words)
    assert TextCache(out).lacking(wanted) == wanted[2:]
    monkeypatch.setattr("kinema.encode_text.embed", embed)
    kinema(monkeypatch, data.folder, "--out", out, "--config", *words, "task.samples.prompts=[a cat]")
    assert f"{len(wanted) + 1} captions, {len(wanted) - 1} of them new READY" in capsys.readouterr().out

    stand_in = CachedTextEncoder.load(out, config)
    stand_in.check_covers(wanted, ["a cat"], [str(data.folder)])
    with pytest.raises(ValueError, match=r"lacks 1 captions .*Type: ") as refused:
        stand_in.check_covers(wanted, ["a dog's tail"], [str(data.folder)])
    typed = str(refused.value).split("Type: kinema data encode-text ")[1]
    kinema(monkeypatch, *shlex.split(typed))  # what the refusal says is what helps
    CachedTextEncoder.load(out, config).check_covers(wanted, ["a dog's tail"], [str(data.folder)])
    monkeypatch.setattr("kinema.encode_text.build_text_encoder", lambda config: pytest.fail("nothing lacks"))
    kinema(monkeypatch, data.folder, "--out", out)
    with pytest.raises(ValueError, match="was made with"):
        kinema(monkeypatch, data.folder, "--out", out, "--config", "text=hash")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "type --run RUN or --config text=NAME"),
        (["--config", "text=wa"], "--config text=wa: .*wa"),
        (["--config", "experiment=demo_vae"], "composes no text encoder"),
        (["--config", "text=hash"], "is not empty, and no text cache"),
    ],
)
def test_what_to_type_is_said(data, tmp_path, monkeypatch, words, message):
    with pytest.raises(ValueError, match=message):
        kinema(monkeypatch, data.folder, "--out", data.folder, *words)
