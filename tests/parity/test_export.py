"""Published weights in, out again, and through `diffusers`: bit-equal tensors and the same outputs."""

import json

import diffusers
import pytest
import safetensors.torch
import torch

import kinema
from kinema.data.geometry import ClipShape
from kinema.interop import comparing
from kinema.interop.exporting import export, split_shards
from kinema.interop.importing import import_model
from kinema.interop.recognising import recognise
from kinema.models.dit import DiT, DiTConfig
from kinema.sampling.pipeline import SamplingConfig, initial_noise

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
}  # fmt: skip


def randomise(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
    return model.eval()


@pytest.fixture(name="published")
def published_folder(tmp_path):
    randomise(diffusers.WanTransformer3DModel(**WAN)).save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def tensors_in(folder):
    return safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert all(actual[name].dtype == tensor.dtype for name, tensor in expected.items())


def public(folder):
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def test_published_in_and_out_is_bit_equal(tmp_path, published):
    import_model(published, tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(published))
    assert public(tmp_path / "out") == public(published)
    difference = float(lines[-1].rsplit(" ", 1)[1])
    assert 0 < difference < 1e-5


def test_half_precision_comes_back_bit_for_bit(tmp_path, published):
    path = published / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in tensors_in(published).items()}
    safetensors.torch.save_file(half, path)
    import_model(published, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    assert_bit_equal(tensors_in(tmp_path / "out"), half)


def test_a_module_is_exported_as_it_is(tmp_path, published):
    module = kinema.load(published)
    kinema.export(module, tmp_path / "out")
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(published))


def test_the_card_and_the_manifest_go_with_the_weights(tmp_path, published):
    import_model(published, tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert card.startswith("---\nlicense: other\nlibrary_name: diffusers\n")
    assert manifest["fingerprints"]["ema"] in card
    assert lines[-1] in card
    assert manifest["exported"] == {"weights": "ema", "format": "diffusers", "compared": lines}
    assert "| weights | ema |" in card


def test_a_single_file_comes_back(tmp_path, published):
    module = kinema.load(published)
    lines = kinema.export(module, tmp_path / "out", format="single-file")
    assert "largest difference" in lines[-1]
    names = safetensors.torch.load_file(tmp_path / "out" / "transformer.safetensors").keys()
    assert "model.diffusion_model.blocks.0.self_attn.q.weight" in names


def test_what_diffusers_computes_otherwise_is_not_written(tmp_path, published, monkeypatch):
    module = kinema.load(published)

    def wrong(reference, config, sample):
        return comparing.wan(reference, config, sample) * 1.001

    monkeypatch.setitem(comparing.CALLS, "WanTransformer3DModel", wrong)
    with pytest.raises(ValueError, match=r"largest difference 1\.0e-03 \(relative\) is above 1e-04: nothing was"):
        kinema.export(module, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_model_that_nobody_published_is_refused_by_the_axis(tmp_path, published):
    module = kinema.load(published)
    config = DiTConfig(**{**vars(module.config), "rope_theta": 100.0})
    own = DiT(config, module.latent_channels, module.text_width)
    with pytest.raises(ValueError, match=r"no published model is built like this one.*model\.rope_theta=100\.0"):
        kinema.export(own, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_shards_are_read_back_and_by_diffusers(tmp_path, published, monkeypatch):
    import kinema.interop.exporting as exporting

    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", 50_000)
    module = kinema.load(published)
    kinema.export(module, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_bit_equal(recognise(tmp_path / "out").published.tensors(), tensors_in(published))


def test_no_tensor_is_cut_or_reordered_between_shards():
    tensors = {str(n): torch.zeros(n) for n in (5, 1, 9, 2)}
    shards = split_shards(tensors, limit=24)
    assert [list(shard) for shard in shards] == [["5", "1"], ["9"], ["2"]]


VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1, 0.2, 0.3, 0.4],
       "latents_std": [1.0, 2.0, 1.5, 0.7]}  # fmt: skip


@pytest.fixture(name="pipeline")
def published_pipeline(tmp_path):
    """A whole pipeline with a tokenizer of eight words, as `diffusers` saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    encoder = UMT5Config(d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)
    whole = diffusers.WanPipeline(
        tokenizer=fast,
        text_encoder=randomise(UMT5EncoderModel(encoder)),
        vae=randomise(diffusers.AutoencoderKLWan(**VAE)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=randomise(diffusers.WanTransformer3DModel(**WAN)),
    )
    whole.save_pretrained(tmp_path / "published")
    return whole, tmp_path / "published"


def test_a_pipeline_comes_in_and_out(tmp_path, pipeline):
    whole, published = pipeline
    import_model(published, tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    assert [line.split(":")[0] for line in lines] == ["model_index.json", "vae", "transformer"]
    for part in ("transformer", "vae"):
        assert_bit_equal(tensors_in(tmp_path / "out" / part), tensors_in(published / part))
    index, expected = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "out", published))
    assert index == {
        **{name: value for name, value in expected.items() if name not in ("boundary_ratio", "expand_timesteps")},
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    parts = {"transformer": whole.transformer, "vae": whole.vae, "text_encoder": None, "tokenizer": None}
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "out", **parts)
    assert again.scheduler.config.shift == 3.0


def test_a_pipeline_of_two_transformers_is_not_cut_in_half(tmp_path, pipeline):
    _, published = pipeline
    (published / "transformer").rename(published / "transformer_2")
    with pytest.raises(ValueError, match=r"two transformers.*Import each"):
        import_model(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pipeline_is_loaded_whole_or_in_parts(tmp_path, pipeline):
    _, published = pipeline
    loaded = kinema.load(published)
    assert loaded.objective.timestep_shift == 3.0
    assert loaded.text_encoder.encode(["a red circle"])[0].shape == (512, 12)
    (published / "tokenizer").rename(tmp_path / "elsewhere")
    for source in (loaded, kinema.load(published)):
        lines = kinema.export(source, tmp_path / type(source).__name__)
        known = "model_index.json: WanPipeline, shift 3;" if source is loaded else "no model_index.json: the shift"
        assert lines[0].startswith(known)
    parts = kinema.load(published)
    assert_bit_equal(parts.denoiser.state_dict(), loaded.denoiser.state_dict())
    assert_bit_equal(parts.vae.state_dict(), loaded.vae.state_dict())


def test_an_imported_pipeline_takes_the_published_ones_step(tmp_path, pipeline):
    """Captions, guidance, timestep and sign at once; several steps need the release's own spacing of timesteps."""
    whole, published = pipeline
    import_model(published, tmp_path / "run")
    ours = kinema.load(tmp_path / "run")
    caption = "a red circle moves left"
    config, shape = SamplingConfig(num_steps=1, guidance_scale=4.0, seed=7), ClipShape(5, 32, 48)
    noise = initial_noise((4, *ours.geometry.latent_shape(shape)), config.seed)
    expected = whole(
        prompt=caption, negative_prompt="", height=32, width=48, num_frames=5, num_inference_steps=1,
        guidance_scale=4.0, latents=noise[None], output_type="latent", max_sequence_length=512,
    ).frames[0]  # fmt: skip
    actual = ours.latents([caption], shape, config)[0]
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_vae_comes_in_and_out_with_its_statistics(tmp_path):
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    module = kinema.load(tmp_path / "run")
    assert module.latent_std.tolist() == pytest.approx(VAE["latents_std"])
    for form in ("diffusers", "single-file"):
        lines = export(tmp_path / "run", tmp_path / form, format=form)
        assert float(lines[-1].rsplit(" ", 1)[1]) < 1e-5
    assert_bit_equal(tensors_in(tmp_path / "diffusers"), tensors_in(tmp_path / "published"))


FAMILIES = {
    "wan, image tokens": ("WanTransformer3DModel", WAN | {"in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 32}),
    "wan, a control tower": ("WanVACETransformer3DModel", WAN | {"vace_layers": [0], "vace_in_channels": 3}),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 20, "in_channels": 6, "out_channels": 6,
         "cross_attention_dim": 40, "num_layers": 2, "caption_channels": 12},
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "num_single_layers": 2, "text_embed_dim": 10, "pooled_projection_dim": 6, "rope_axes_dim": (4, 4, 4)},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 14, "text_embed_dim": 12, "num_layers": 2, "use_rotary_positional_embeddings": True},
    ),
    "latte": (
        "LatteTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 32, "attention_bias": True, "sample_size": 16, "patch_size": 2, "video_length": 16,
         "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
         "norm_eps": 1e-6, "caption_channels": 12, "num_embeds_ada_norm": 1000},
    ),
    "hunyuan vae": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "norm_num_groups": 4},
    ),
    "ltx2 vae": (
        "AutoencoderKLLTX2Video",
        {"latent_channels": 8, "block_out_channels": (16, 16, 32, 64), "decoder_block_out_channels": (16, 32, 64),
         "layers_per_block": (2, 1, 1, 1, 2), "decoder_layers_per_block": (1, 2, 1, 1), "decoder_causal": False,
         "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_in_and_out(tmp_path, family):
    name, config = FAMILIES[family]
    randomise(getattr(diffusers, name)(**config)).save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    lines += export(tmp_path / "run", tmp_path / "single", format="single-file")
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "published"))
    assert all(float(line.rsplit(" ", 1)[1]) < 2e-5 for line in lines)
    again = tmp_path / "again"
    export(tmp_path / "run", again, format="kinema", weights="raw")
    assert_bit_equal(kinema.load(again).state_dict(), kinema.load(tmp_path / "published").state_dict())
