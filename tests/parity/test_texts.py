"""Captions as each published pipeline encodes them: `encode_prompt` of `diffusers` on tiny encoders, against ours."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hydra import compose, initialize_config_dir

from kinema.conditioning.text import (
    CombinedText,
    CombinedTextEncoder,
    PretrainedText,
    TextCleaning,
    TextPadding,
    build_text_encoder,
    written_words,
)
from kinema.config import register_schemas, to_dataclass
from kinema.interop.captions import CAPTIONS
from tests.parity import tiny_texts

PROMPTS = [
    "A red circle moves left.",
    "",
    '  Tom &amp;amp; Jerry\n\tmeet at the cafÃ©  &lt;3 \u00a0 “STOP” and "GO" and "GO" ',
    "Ünïcödé: 一只红色的球, 🎈 ŝĉ {braces}",
    "very long " * 200,
]
ENCODERS = {
    "WanPipeline": tiny_texts.umt5,
    "HunyuanVideoPipeline": tiny_texts.llama,
    "HunyuanVideo15Pipeline": tiny_texts.qwen,
}
BESIDE = {"HunyuanVideoPipeline": tiny_texts.clip, "HunyuanVideo15Pipeline": tiny_texts.byt5}
PIPELINES = [
    "WanPipeline", "CogVideoXPipeline", "LTXPipeline", "LTXConditionPipeline", "MochiPipeline", "LattePipeline",
    "Cosmos2TextToImagePipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline",
]  # fmt: skip


@dataclasses.dataclass
class Expected:
    """What the reference's transformer is given: tokens, and where it masks them."""

    text: torch.Tensor
    mask: torch.Tensor | None = None

    def seen(self):
        """The tokens of each caption that no mask hides."""
        if self.mask is None:
            return list(self.text)
        return [text[mask.bool()] for text, mask in zip(self.text, self.mask, strict=True)]


def save(folder, pair):
    for part in pair:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=PIPELINES, name="release")
def any_release(request, tmp_path_factory):
    """Pipeline class, its encoders, and ours from the folders that they were saved in."""
    name = request.param
    pairs = [make() for make in (ENCODERS.get(name, tiny_texts.t5), BESIDE.get(name)) if make]
    folders = [save(tmp_path_factory.mktemp(f"{name}{n}"), pair) for n, pair in enumerate(pairs)]
    policy = CAPTIONS[name]
    if isinstance(policy, CombinedText):
        second = "pooled" if policy.pooled else "glyphs"
        parts = {"tokens": folders[0], second: folders[1]}
        changed = {key: dataclasses.replace(policy.parts()[key], path=path) for key, path in parts.items()}
        policy = dataclasses.replace(policy, **changed)
    else:
        policy = dataclasses.replace(policy, path=folders[0])
    return name, pairs, build_text_encoder(policy)


class Sizes(torch.nn.Module):
    """What a pipeline asks its VAE while it is built."""

    config = SimpleNamespace(latent_channels=4)
    temporal_compression_ratio, spatial_compression_ratio = 4, 16


def pipeline_of(name, pairs):
    """The reference's pipeline with nothing but its text encoders."""
    cls = getattr(diffusers, name)
    encoders = {"text_encoder": pairs[0][0], "tokenizer": pairs[0][1]}
    if len(pairs) > 1:
        encoders |= {"text_encoder_2": pairs[1][0], "tokenizer_2": pairs[1][1]}
    parts = dict.fromkeys(("scheduler", "transformer", "guider"))
    parts |= {"safety_checker": torch.nn.Identity(), "vae": Sizes() if "15" in name else None}
    wanted = cls.__init__.__code__.co_varnames[: cls.__init__.__code__.co_argcount]
    return cls(**{key: part for key, part in (parts | encoders).items() if key in wanted})


def encode(name, pipeline, prompts):
    """`encode_prompt` of a pipeline -> tokens, and pooled vector or glyphs where it has them."""
    if name == "HunyuanVideoPipeline":
        text, pooled, mask = pipeline.encode_prompt(prompts, device="cpu")
        return Expected(text, mask), pooled
    if name == "HunyuanVideo15Pipeline":
        text, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompts, device="cpu", batch_size=len(prompts))
        return Expected(text, mask), Expected(glyphs, glyph_mask)
    found = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu", **LENGTHS.get(name, {}))
    has_mask = name in ("LTXPipeline", "LTXConditionPipeline", "MochiPipeline")
    return Expected(found[0], found[1] if has_mask else None), None


LENGTHS = {"WanPipeline": {"max_sequence_length": 512}}


def assert_same(actual, expected):
    assert [len(text) for text in actual] == [len(text) for text in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale)


@torch.no_grad()
def test_every_prompt_reaches_the_model_as_in_the_reference(release):
    name, pairs, ours = release
    pipeline = pipeline_of(name, pairs)
    batches = [[prompt] for prompt in PROMPTS] if name == "LattePipeline" else [PROMPTS]
    for prompts in batches:  # Latte cuts the padding of a caption that is alone, and only then
        text, beside = encode(name, pipeline, prompts)
        assert_same(ours.encode(prompts), text.seen())
        if name == "HunyuanVideoPipeline":
            assert_same(ours.beside(prompts)["pooled"], list(beside))
        if name == "HunyuanVideo15Pipeline":
            assert_same(ours.beside(prompts)["glyphs"], beside.seen())


@torch.no_grad()
def test_the_null_caption_is_the_references_empty_negative_prompt(release):
    name, pairs, ours = release
    text, beside = encode(name, pipeline_of(name, pairs), [""])
    assert_same([ours.null()], text.seen())
    found = ours.null_beside()
    assert list(found) == {"HunyuanVideoPipeline": ["pooled"], "HunyuanVideo15Pipeline": ["glyphs"]}.get(name, [])
    if name == "HunyuanVideoPipeline":
        assert_same([found["pooled"]], list(beside))
    if name == "HunyuanVideo15Pipeline":
        assert found["glyphs"].shape == (0, 12)


def test_what_is_cut_is_counted_and_said(release, caplog):
    _, _, ours = release
    encoder = ours.parts["tokens"] if isinstance(ours, CombinedTextEncoder) else ours
    before = encoder.num_truncated
    with caplog.at_level(logging.WARNING):
        encoder.num_truncated = 0
        encoder.encode(PROMPTS)
    assert encoder.num_truncated == 1  # the long one; the template and its crop are no part of a caption
    assert f"cut to text.max_tokens={encoder.max_tokens}" in caplog.text
    encoder.num_truncated = before


def test_letters_to_be_seen_are_those_in_quotation_marks():
    assert written_words('A sign says "STOP", another “GO”, a third "STOP".') == 'Text "STOP". Text "GO". '
    assert written_words("No letters, it's blank.") == ""


CHANGES = [{"padding": p} for p in TextPadding] + [{"cleaning": c} for c in TextCleaning] + [{"layer": -2}, {"crop": 1}]


@torch.no_grad()
def test_every_choice_of_a_policy_changes_what_the_model_sees(tmp_path):
    """Else the comparisons above could not tell one policy from another."""
    folder = save(tmp_path, tiny_texts.t5())
    base = PretrainedText(path=folder, max_tokens=100)
    encoded = [build_text_encoder(dataclasses.replace(base, **change)).encode(PROMPTS) for change in CHANGES]
    plain = build_text_encoder(base).encode(PROMPTS)
    same = [change for change, other in zip(CHANGES, encoded, strict=True) if equal(plain, other)]
    assert same == [{"padding": TextPadding.none}, {"cleaning": TextCleaning.none}]
    sizes = {tuple(map(len, other)) for other in encoded}
    assert len(sizes) > 3


def equal(one, other):
    return all(len(a) == len(b) and torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


CONFIGS = {
    "wan": "WanPipeline", "cogvideox": "CogVideoXPipeline", "ltx": "LTXPipeline", "mochi": "MochiPipeline",
    "latte": "LattePipeline", "cosmos": "Cosmos2TextToImagePipeline", "hunyuan": "HunyuanVideoPipeline",
    "hunyuan_15": "HunyuanVideo15Pipeline",
}  # fmt: skip


@pytest.mark.parametrize("choice", CONFIGS)
def test_a_training_from_scratch_can_choose_the_same_policy(choice):
    register_schemas()
    with initialize_config_dir(str(Path(__file__).parents[2] / "configs"), version_base="1.3"):
        config = to_dataclass(compose("train", [f"text={choice}"]))
    assert config.text == CAPTIONS[CONFIGS[choice]]
