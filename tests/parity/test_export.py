"""Published weights in, out again, and through `diffusers`: bit-equal tensors and the same outputs."""

import json
import shutil

import diffusers
import pytest
import safetensors.torch
import torch

import kinema
from kinema.interop import comparing, exporting
from kinema.interop.exporting import export, split_shards
from kinema.interop.importing import import_model
from kinema.interop.recognising import recognise
from kinema.models.dit import DiT, DiTConfig
from tests.parity.published import WAN, WAN_VAE, randomise, wan_pipeline


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


@torch.no_grad()
def test_the_reference_loads_an_export_by_its_own_from_pretrained(tmp_path, published):
    """The literal call, with accelerate: no key missing, none left over, the same bits."""
    import_model(published, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    load = diffusers.WanTransformer3DModel.from_pretrained
    found, told = load(tmp_path / "out", torch_dtype=torch.float32, output_loading_info=True)
    assert {key: value for key, value in told.items() if value} == {}
    assert_bit_equal(found.state_dict(), load(published, torch_dtype=torch.float32).state_dict())


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
    assert "Imported from wan (`WanTransformer3DModel`) and exported with Kinema, not trained." in card
    for unknown in ("None", "| steps |", "| data |", "dropped", "not known"):
        assert unknown.lower() not in card.lower()


def test_a_single_file_comes_back(tmp_path, published):
    module = kinema.load(published)
    lines = kinema.export(module, tmp_path / "out", format="single-file")
    assert "largest difference" in lines[-1]
    names = safetensors.torch.load_file(tmp_path / "out" / "transformer.safetensors").keys()
    assert "model.diffusion_model.blocks.0.self_attn.q.weight" in names
    back = kinema.load(tmp_path / "out" / "transformer.safetensors")
    assert back.config == module.config
    assert_bit_equal(back.state_dict(), module.state_dict())


def test_the_check_of_a_single_file_reads_it_as_an_import_does(tmp_path, monkeypatch):
    config = WAN | {"num_attention_heads": 8, "attention_head_dim": 32}
    randomise(diffusers.WanTransformer3DModel(**config)).save_pretrained(tmp_path / "published")
    module = kinema.load(tmp_path / "published")
    monkeypatch.setattr(exporting, "HEADER_CONFIG", "unread")
    with pytest.raises(ValueError, match=r"is above 1e-04: nothing was written"):
        kinema.export(module, tmp_path / "out", format="single-file")


@pytest.mark.parametrize("name", ["", "wan.safetensors"])
def test_a_prefixed_file_in_half_precision_takes_the_config_beside_it(tmp_path, name):
    config = WAN | {"num_attention_heads": 7, "attention_head_dim": 12}
    reference = randomise(diffusers.WanTransformer3DModel(**config)).half().float()
    reference.save_pretrained(tmp_path / "published")
    kinema.export(kinema.load(tmp_path / "published"), tmp_path / "single", format="single-file")
    tensors = safetensors.torch.load_file(tmp_path / "single" / "transformer.safetensors")
    (tmp_path / "comfy").mkdir()
    safetensors.torch.save_file({n: t.half() for n, t in tensors.items()}, tmp_path / "comfy" / "wan.safetensors")
    shutil.copy(tmp_path / "published" / "config.json", tmp_path / "comfy")
    module = kinema.load(tmp_path / "comfy" / name)
    assert comparing.difference(module, reference, dict(reference.config)) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "choices"), [({"format": "onnx"}, "diffusers, single-file, kinema"), ({"weights": "best"}, "raw")]
)
def test_a_choice_that_is_none_names_the_choices(tmp_path, published, wrong, choices):
    with pytest.raises(ValueError, match=f"=(onnx|best): type one of .*{choices}"):
        kinema.export(kinema.load(published), tmp_path / "out", **wrong)


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
    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", 50_000)
    module = kinema.load(published)
    kinema.export(module, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_bit_equal(recognise(tmp_path / "out").published.tensors(), tensors_in(published))


def test_no_tensor_is_cut_or_reordered_between_shards():
    tensors = {str(n): torch.zeros(n) for n in (5, 1, 9, 2)}
    shards = split_shards(tensors, limit=24)
    assert [list(shard) for shard in shards] == [["5", "1"], ["9"], ["2"]]


@pytest.fixture(name="pipeline")
def published_pipeline(tmp_path):
    """A whole pipeline, as `diffusers` saves it."""
    whole = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    whole.save_pretrained(tmp_path / "published")
    return whole, tmp_path / "published"


def test_a_pipeline_comes_in_and_out(tmp_path, pipeline):
    whole, published = pipeline
    import_model(published, tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    assert [line.split(":")[0] for line in lines] == ["model_index.json", "vae", "transformer", "WanPipeline"]
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
    loaded = diffusers.WanPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    assert_bit_equal(loaded.transformer.state_dict(), whole.transformer.state_dict())
    assert_bit_equal(loaded.vae.state_dict(), whole.vae.state_dict())
    assert again.scheduler.config.shift == 3.0


@pytest.fixture(name="pair")
def published_pair(tmp_path, pipeline):
    """The same with a transformer for high noise and one for low, as Wan 2.2 A14B has."""
    whole, _ = pipeline
    low = randomise(diffusers.WanTransformer3DModel(**WAN))
    for parameter in low.parameters():
        parameter.data.neg_()
    parts = {name: part for name, part in whole.components.items() if name in ("tokenizer", "text_encoder", "vae")}
    both = diffusers.WanPipeline(
        **parts, scheduler=whole.scheduler, transformer=whole.transformer, transformer_2=low, boundary_ratio=0.875
    )
    both.save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


def test_a_pair_of_experts_comes_in_and_out(tmp_path, pair):
    import_model(pair, tmp_path / "run")
    lines = export(tmp_path / "run", tmp_path / "out")
    parts = ["vae", "transformer", "transformer_2"]
    assert [line.split(":")[0] for line in lines] == ["model_index.json", *parts, "WanPipeline"]
    for part in ("transformer", "transformer_2", "vae"):
        assert_bit_equal(tensors_in(tmp_path / "out" / part), tensors_in(pair / part))
    index, expected = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "out", pair))
    given = {"text_encoder": [None, None], "tokenizer": [None, None]}
    assert index == {name: value for name, value in expected.items() if name != "expand_timesteps"} | given
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    assert again.config.boundary_ratio == 0.875
    assert_bit_equal(again.transformer_2.state_dict(), tensors_in(pair / "transformer_2"))


def test_a_pair_of_experts_is_one_module(tmp_path, pair):
    ours = kinema.load(pair).denoiser
    latents, timesteps = torch.randn(2, 4, 3, 6, 4), torch.tensor([0.9, 0.8])
    text = torch.randn(2, 7, 12)
    found = ours(list(latents), timesteps, list(text))
    for i, part in enumerate(("transformer", "transformer_2")):
        theirs = diffusers.WanTransformer3DModel.from_pretrained(pair / part)
        expected = theirs(latents[i : i + 1], timesteps[i : i + 1] * 1000, text[i : i + 1]).sample[0]
        assert (found[i] - expected).abs().max() <= 1e-5 * expected.abs().max()
    lines = kinema.export(ours, tmp_path / "out")
    assert [line.split(":")[0] for line in lines] == ["transformer", "transformer_2"]


def test_a_pair_without_its_boundary_is_refused(tmp_path, pair):
    index = json.loads((pair / "model_index.json").read_text())
    (pair / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(ValueError, match=r"no boundary_ratio.*0\.875"):
        import_model(pair, tmp_path / "run")
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


def test_a_vae_comes_in_and_out_with_its_statistics(tmp_path):
    randomise(diffusers.AutoencoderKLWan(**WAN_VAE)).save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    module = kinema.load(tmp_path / "run")
    assert module.latent_std.tolist() == pytest.approx(WAN_VAE["latents_std"])
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
    "ltx-2": (
        "LTX2VideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 20, "in_channels": 6, "out_channels": 6, "num_layers": 2,
         "cross_attention_dim": 40, "caption_channels": 12, "rope_type": "interleaved", "audio_in_channels": 5,
         "audio_out_channels": None, "audio_sampling_rate": 32000, "audio_hop_length": 320,
         "audio_num_attention_heads": 2, "audio_attention_head_dim": 12,
         "audio_cross_attention_dim": 24},
    ),
    "ltx-2.3": (
        "LTX2VideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 20, "in_channels": 6, "out_channels": 6, "num_layers": 2,
         "cross_attention_dim": 40, "rope_type": "split", "audio_in_channels": 5,
         "audio_out_channels": 5, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12,
         "audio_cross_attention_dim": 24, "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
         "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True},
    ),
    "hunyuan 1.5": (
        "HunyuanVideo15Transformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 7, "out_channels": 3, "num_layers": 2,
         "text_embed_dim": 10, "text_embed_2_dim": 6, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4),
         "target_size": 960, "task_type": "t2v"},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 14, "text_embed_dim": 12, "num_layers": 2, "use_rotary_positional_embeddings": True},
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 5, "out_channels": 4, "num_layers": 2,
         "text_embed_dim": 12, "adaln_lora_dim": 6, "rope_scale": (1.0, 3.0, 3.0), "extra_pos_embed_type": None,
         "use_crossattn_projection": True, "crossattn_proj_in_channels": 20, "encoder_hidden_states_channels": 12},
    ),
    "kandinsky": (
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 6, "time_dim": 10, "model_dim": 32,
         "ff_dim": 40, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 4, 4), "visual_cond": True},
    ),
    "minimax h3": (
        "MiniMaxH3Transformer3DModel",
        {"num_attention_heads": 3, "attention_head_dim": 16, "hidden_size": 20, "num_layers": 2, "ffn_dim": 28,
         "in_channels": 4, "audio_in_channels": 5, "text_dim": 12, "freq_dim": 16, "time_embed_hidden_dim": 14,
         "time_embed_dim": 10, "rope_freq_dim": 2},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "pooled_projection_dim": 15,
         "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 10, "max_sequence_length": 200},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 32, "sample_size": 16, "caption_channels": 12},
    ),
    "latte": (
        "LatteTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 32, "attention_bias": True, "sample_size": 16, "patch_size": 2, "video_length": 16,
         "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
         "norm_eps": 1e-6, "caption_channels": 12, "num_embeds_ada_norm": 1000},
    ),
    "cogvideox i2v": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 4,
         "time_embed_dim": 14, "text_embed_dim": 12, "num_layers": 2, "use_rotary_positional_embeddings": True,
         "use_learned_positional_embeddings": True, "sample_width": 6, "sample_height": 10, "sample_frames": 9,
         "max_text_seq_length": 5},
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
    assert public(tmp_path / "out") == public(tmp_path / "published")
    assert all(float(line.rsplit(" ", 1)[1]) < 2e-5 for line in lines)
    again = tmp_path / "again"
    export(tmp_path / "run", again, format="kinema", weights="raw")
    assert_bit_equal(kinema.load(again).state_dict(), kinema.load(tmp_path / "published").state_dict())
