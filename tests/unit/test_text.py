"""Text encoders: the hash encoder's claims, and pretrained ones against transformers called directly."""

import logging
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from kinema.conditioning.text import (
    HashText,
    PretrainedText,
    TextConfig,
    TextDtype,
    TextEncoder,
    TextFamily,
    TextPadding,
    build_text_encoder,
    check_policy,
    split_words,
    word_vector,
)

COLOURS = ["red", "green", "blue", "yellow", "white", "purple"]
SHAPES = ["circle", "square", "triangle", "star"]
MOVES = ["left", "right", "up", "down"]


# The hash encoder


def test_hash_captions_differ_in_length_and_have_about_unit_variance():
    encoder = build_text_encoder(HashText(width=64, max_tokens=32))
    captions = ["a red circle moves left", "a star", ""]
    text = encoder.encode(captions)
    assert [tuple(t.shape) for t in text] == [(6, 64), (3, 64), (1, 64)]
    assert {t.dtype for t in text} == {torch.float32}
    assert 0.8 < torch.cat(text).var() < 1.2


def test_hash_reads_words_not_case_or_punctuation():
    encoder = build_text_encoder(HashText())
    plain, shouted, other = encoder.encode(
        ["a red ball moving left", "A RED ball, moving left!", "a red ball moving right"]
    )
    assert torch.equal(plain, shouted)
    assert not torch.equal(plain, other)
    assert split_words("Héllo, \uff37ORLD 42!") == ["héllo", "world", "42"]


def test_a_word_is_the_same_vector_in_every_process_and_on_every_machine():
    golden = word_vector("circle", 64)[:4]
    torch.testing.assert_close(golden, torch.tensor(GOLDEN), rtol=0, atol=0)


GOLDEN = [-0.6473985314369202, -0.25876232981681824, -0.22203707695007324, -0.320738822221756]


def test_words_are_nearly_orthogonal():
    vectors = torch.stack([word_vector(f"word{i}", 64) for i in range(500)])
    cosines = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(vectors).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.65
    assert abs(vectors.mean()) < 0.02
    assert abs(vectors.var() - 1) < 0.02


def ridge_accuracy(train_x, train_y, test_x, test_y) -> float:
    one_hot = torch.nn.functional.one_hot(train_y).double()
    gram = train_x.T @ train_x + 0.1 * torch.eye(train_x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, train_x.T @ one_hot)
    return ((test_x @ weights).argmax(dim=1) == test_y).double().mean().item()


def toy_captions() -> tuple[list[str], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    pick = {name: torch.randint(n, (600,), generator=g) for name, n in
            [("colour", 6), ("shape", 4), ("move", 4), ("other_colour", 6), ("other_shape", 4)]}  # fmt: skip
    captions = [
        f"A {COLOURS[c]} {SHAPES[s]} moves {MOVES[m]} and a {COLOURS[oc]} {SHAPES[os]} stays."
        for c, s, m, oc, os in zip(*(pick[name].tolist() for name in pick), strict=True)
    ]
    return captions, pick


@pytest.mark.parametrize("attribute", ["colour", "shape", "move"])
def test_what_a_caption_says_can_be_read_off_its_mean_embedding_by_a_linear_map(attribute):
    # Cross-attention with equal weights is such a mean: held-out captions, exact answers.
    captions, labels = toy_captions()
    one = [caption.split(" and ")[0] for caption in captions]
    x = torch.stack([t.mean(dim=0) for t in build_text_encoder(HashText()).encode(one)]).double()
    y = labels[attribute]
    assert ridge_accuracy(x[:400], y[:400], x[400:], y[400:]) == 1.0


def test_which_object_has_which_colour_can_be_read_off_one_token():
    captions, labels = toy_captions()
    text = build_text_encoder(HashText()).encode(captions)
    x = torch.stack([t[3] for t in text]).double()  # the token of the first object's shape
    y = labels["colour"]
    assert ridge_accuracy(x[:400], y[:400], x[400:], y[400:]) == 1.0


def test_a_long_caption_is_cut_counted_and_said_once(caplog):
    encoder = build_text_encoder(HashText(max_tokens=4))
    with caplog.at_level(logging.WARNING):
        text = encoder.encode(["one two three four five", "one two three", "a b c d e f"])
    assert [len(t) for t in text] == [4, 4, 4]
    assert (encoder.num_encoded, encoder.num_truncated) == (3, 2)
    assert len(caplog.records) == 1
    assert "text.max_tokens=4" in caplog.text


def test_null_text_is_the_encoding_of_the_empty_caption_and_counts_for_nobody():
    encoder = build_text_encoder(HashText())
    assert torch.equal(encoder.null(), encoder.encode([""])[0])
    fresh = build_text_encoder(HashText())
    fresh.null()
    assert fresh.num_encoded == 0


# Pretrained encoders: tiny random ones, saved as a user would have them

WORDS = ["a", "red", "ball", "blue", "cube", "rolls", "left", "right", "video", "of", ":", "."]


def save_tokenizer(folder, *, end: str, start: str | None = None) -> None:
    special = ["<pad>", "<unk>", end] + ([start] if start else [])
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start + ' ' if start else ''}$A {end}",
        special_tokens=[(name, vocabulary[name]) for name in (end, start) if name],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=end, bos_token=start
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module", name="t5_folder")
def tiny_t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder, end="</s>")
    return str(folder)


@pytest.fixture(scope="module", name="clip_folder")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, pad_token_id=0, bos_token_id=3, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder, start="<start>", end="<end>")
    return str(folder)


SHORT, LONG = "a red ball", "a blue cube rolls left : a red ball"


@pytest.fixture(params=["t5", "clip"], name="config")
def either_family(request, t5_folder, clip_folder):
    folder = t5_folder if request.param == "t5" else clip_folder
    return PretrainedText(path=folder, family=TextFamily(request.param), max_tokens=12)


def direct(config: PretrainedText, caption: str, **options):
    """transformers alone, one caption, nothing padded."""
    from transformers import AutoTokenizer

    kind = T5EncoderModel if config.family is TextFamily.t5 else CLIPTextModel
    ids = AutoTokenizer.from_pretrained(config.path)(caption, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return kind.from_pretrained(config.path).eval()(input_ids=ids, **options)


def test_the_embedding_is_that_of_transformers(config):
    encoder = build_text_encoder(config)
    for caption in (SHORT, LONG, ""):
        expected = direct(config, caption).last_hidden_state[0]
        actual = encoder.encode([caption])[0]
        assert torch.equal(actual, expected)
        assert actual.shape[1] == encoder.width == 16


def test_an_embedding_does_not_depend_on_the_longer_captions_beside_it(config):
    encoder = build_text_encoder(config)
    alone, beside = encoder.encode([SHORT])[0], encoder.encode([SHORT, LONG, ""])[0]
    assert len(alone) == len(beside) < len(encoder.encode([LONG])[0])
    assert torch.equal(beside, alone)


def test_an_embedding_does_not_depend_on_max_tokens_unless_padding_is_encoded(t5_folder):
    def encode(padding: TextPadding, max_tokens: int) -> torch.Tensor:
        config = PretrainedText(path=t5_folder, max_tokens=max_tokens, padding=padding)
        return build_text_encoder(config).encode([SHORT])[0]

    torch.testing.assert_close(encode(TextPadding.none, 6), encode(TextPadding.none, 12))
    zeros = encode(TextPadding.zeros, 12)
    torch.testing.assert_close(zeros[:4], encode(TextPadding.none, 12))
    assert zeros.shape == (12, 16)
    assert not zeros[4:].any()
    # Without a mask the padding speaks: that is why the policy is in the manifest.
    assert not torch.allclose(encode(TextPadding.encoded, 6)[:4], encode(TextPadding.encoded, 12)[:4])


def test_encoded_padding_is_transformers_without_a_mask(config):
    config.padding = TextPadding.encoded
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(config.path)(SHORT)["input_ids"]
    padded = torch.tensor([ids + [0] * (12 - len(ids))])
    kind = T5EncoderModel if config.family is TextFamily.t5 else CLIPTextModel
    with torch.no_grad():
        expected = kind.from_pretrained(config.path)(input_ids=padded).last_hidden_state[0]
    torch.testing.assert_close(build_text_encoder(config).encode([SHORT])[0], expected)


def test_template_layer_and_dtype(clip_folder):
    options = {"path": clip_folder, "family": TextFamily.clip, "max_tokens": 12}
    templated = build_text_encoder(PretrainedText(template="video of : {} .", **options))
    plain = build_text_encoder(PretrainedText(**options))
    assert torch.equal(templated.encode(["a ball"])[0], plain.encode(["video of : a ball ."])[0])
    assert torch.equal(templated.null(), plain.encode(["video of :  ."])[0])

    penultimate = PretrainedText(layer=-2, **options)
    expected = direct(penultimate, SHORT, output_hidden_states=True).hidden_states[-2][0]
    assert torch.equal(build_text_encoder(penultimate).encode([SHORT])[0], expected)

    half = build_text_encoder(PretrainedText(dtype=TextDtype.bfloat16, **options)).encode([SHORT])[0]
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, plain.encode([SHORT])[0], rtol=0.05, atol=0.05)


def test_cut_captions_are_counted(config):
    config.max_tokens = 5
    encoder = build_text_encoder(config)
    text = encoder.encode([SHORT, LONG])
    assert [len(t) <= 5 for t in text] == [True, True]
    assert encoder.num_truncated == 1


def test_the_encoder_is_frozen(config):
    encoder = build_text_encoder(config)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.encode([SHORT])[0].requires_grad


def test_null_text_is_the_same_bytes_in_another_process_whatever_was_encoded_before(config):
    trainer, sampler = build_text_encoder(config), build_text_encoder(config)
    trainer.encode([LONG, SHORT])
    assert trainer.null().numpy().tobytes() == sampler.null().numpy().tobytes()


def test_pickled_weights_are_never_read(t5_folder, tmp_path):
    save_tokenizer(tmp_path, end="</s>")
    model = T5EncoderModel.from_pretrained(t5_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        build_text_encoder(PretrainedText(path=str(tmp_path)))


def test_a_hub_that_does_not_answer_is_asked_once_and_said(monkeypatch):
    from huggingface_hub import HfApi

    from kinema.conditioning.text.reading import hub_problem

    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_problem.cache_clear()
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"text\.path=nobody/nothing .*does not answer: ConnectionError: no route"):
        build_text_encoder(PretrainedText(path="nobody/nothing"))
    assert asked == ["nobody/nothing"]
    assert time.perf_counter() - started < 20
    hub_problem.cache_clear()


def test_a_missing_weight_is_refused_not_made_up(t5_folder, tmp_path):
    model = T5EncoderModel.from_pretrained(t5_folder)
    weights = {k: v for k, v in model.state_dict().items() if "block.1" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    save_tokenizer(tmp_path, end="</s>")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of text\.family=t5, for example .*block\.1"):
        build_text_encoder(PretrainedText(path=str(tmp_path)))


# The policy


def test_the_policy_names_what_decides_an_embedding(t5_folder):
    policy = build_text_encoder(PretrainedText(path=t5_folder)).policy()
    assert {
        "encoder",
        "weights",
        "max_tokens",
        "padding",
        "template",
        "null_caption",
        "hash",
    } <= policy.keys()
    assert t5_folder not in str(policy)  # the folder may move


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("max_tokens", {"max_tokens": 100}),
        ("padding", {"padding": TextPadding.zeros}),
        ("template", {"template": "a video of {}"}),
        ("layer", {"layer": -2}),
        ("dtype", {"dtype": TextDtype.bfloat16}),
    ],
)
def test_another_policy_is_refused_by_name(t5_folder, key, change):
    trained = build_text_encoder(PretrainedText(path=t5_folder)).policy()
    other = build_text_encoder(PretrainedText(path=t5_folder, **change))
    check_policy(build_text_encoder(PretrainedText(path=t5_folder)), trained)
    assert other.policy()["hash"] != trained["hash"]
    with pytest.raises(ValueError, match=rf"text\.{key}="):
        check_policy(other, trained)


def test_other_weights_and_other_encoders_are_refused(t5_folder, tmp_path):
    model = T5EncoderModel.from_pretrained(t5_folder)
    with torch.no_grad():
        model.encoder.final_layer_norm.weight[3] += 0.01
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, end="</s>")
    trained = build_text_encoder(PretrainedText(path=t5_folder)).policy()
    with pytest.raises(ValueError, match=r"text\.weights="):
        check_policy(build_text_encoder(PretrainedText(path=str(tmp_path))), trained)
    with pytest.raises(ValueError, match=r"text\.encoder='hash' \(trained with 't5'\)"):
        check_policy(build_text_encoder(HashText()), trained)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: HashText(max_tokens=0), r"text\.max_tokens=0"),
        (lambda folder: HashText(width=7), r"text\.width=7"),
        (lambda folder: PretrainedText(), r"text\.path is empty"),
        (lambda folder: PretrainedText(path=folder, template="a video"), r"text\.template='a video'"),
        (lambda folder: PretrainedText(path=folder, layer=3), r"text\.layer=3"),
        (
            lambda folder: build_text_encoder(
                PretrainedText(path=folder, family=TextFamily.clip, max_tokens=12, layer=-9)
            ),
            r"text\.layer=-9 .* has 3 layers",
        ),
        (
            lambda folder: build_text_encoder(PretrainedText(path=folder, family=TextFamily.clip)),
            r"text\.max_tokens=256 is more than the 12",
        ),
        (lambda folder: build_text_encoder(PretrainedText(path=folder)), r"text\.family=t5 does not fit"),
        (
            lambda folder: build_text_encoder(PretrainedText(path=folder + "/missing")),
            r"text\.path=.*missing cannot be read",
        ),
        (lambda folder: build_text_encoder(TextConfig()), "text=TextConfig is not a text encoder"),
    ],
)
def test_settings_that_cannot_work_are_refused(clip_folder, make, message):
    with pytest.raises(ValueError, match=message):
        make(clip_folder)


def test_moving_the_encoder_moves_what_it_returns(t5_folder):
    for config in (HashText(), PretrainedText(path=t5_folder)):
        encoder: TextEncoder = build_text_encoder(config).to("cpu")
        assert encoder.encode([SHORT])[0].device == encoder.null().device == torch.device("cpu")
