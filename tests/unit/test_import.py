"""Published weights in: what is read, what is refused, and that nothing is half written."""

import json
import zipfile

import pytest
import safetensors.torch
import torch

import kinema
from kinema.interop import importing
from kinema.interop.importing import import_model
from kinema.interop.inferring import assumed, wan_heads
from kinema.interop.presets import PRESETS
from kinema.interop.reading import read_published
from kinema.training.run_folder import Weights, checkpoint_of, load_weights

WAN = next(preset for preset in PRESETS if preset.name == "wan")
CONFIG = {
    "patch_size": [1, 2, 2], "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 4, "out_channels": 4,
    "text_dim": 6, "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
}  # fmt: skip
"""Heads of the released width, so that a single file can be told from its shapes."""


@pytest.fixture(scope="module", name="model")
def random_model():
    torch.manual_seed(0)
    model = WAN.build(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(name="tensors")
def published_tensors(model):
    return {name: tensor.clone() for name, tensor in WAN.key_map(CONFIG).to_theirs(model.state_dict()).items()}


def write_folder(folder, tensors, config=CONFIG, class_name="WanTransformer3DModel"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, "_diffusers_version": "0.0", **config}))
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_shards(folder, tensors):
    write_folder(folder, {"x": torch.zeros(1)})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names, files = list(tensors), ["diffusion_pytorch_model-00001-of-00002.safetensors", "b.safetensors"]
    weight_map = {name: files[n % 2] for n, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same(module, model):
    expected = model.state_dict()
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def refuse(path, to, message):
    with pytest.raises(ValueError, match=message):
        import_model(path, to)
    assert not to.exists()
    assert [found.name for found in to.parent.iterdir() if found.name.startswith(".writing")] == []


def test_a_folder_is_loaded_whole_or_in_shards(tmp_path, model, tensors):
    assert_same(kinema.load(write_folder(tmp_path / "whole", tensors)), model)
    assert_same(kinema.load(str(write_shards(tmp_path / "shards", tensors))), model)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_in_the_vendors_names_is_told_from_its_shapes(tmp_path, model, prefix):
    original = WAN.original_key_map(CONFIG).to_theirs(model.state_dict())
    path = tmp_path / "wan.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": tensor for name, tensor in original.items()}, path)
    assert_same(kinema.load(path), model)


def test_a_single_file_shows_that_its_model_reads_images(tmp_path):
    config = CONFIG | {"in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 128}
    model = WAN.build(config)
    original = WAN.original_key_map(config).to_theirs(model.state_dict())
    safetensors.torch.save_file(original, tmp_path / "wan.safetensors")
    found = kinema.load(tmp_path / "wan.safetensors")
    assert (found.config.image_width, found.config.condition_channels) == (10, 5)
    assert_same(found, model)


def wan_file(path, config, **more):
    """A single file in the maker's names with random weights; returns its model."""
    model = WAN.build(config)
    original = WAN.original_key_map(config).to_theirs(model.state_dict())
    safetensors.torch.save_file({f"model.diffusion_model.{n}": t for n, t in original.items()}, path, **more)
    return model


def test_heads_that_no_tensor_tells_are_assumed_aloud_or_taken_from_beside(tmp_path, capsys):
    path, config = tmp_path / "wan.safetensors", CONFIG | {"num_attention_heads": 8, "attention_head_dim": 32}
    model = wan_file(path, config)
    assert kinema.load(path).config.num_heads == 2
    assert "ASSUMED 2 heads, 128 channels each, for a Wan of width 256" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 8}))
    assert kinema.load(path).config == model.config
    (tmp_path / "config.json").unlink()
    manifest = {"model": {"config": {"num_heads": 8, "norm_eps": 1e-5}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = kinema.load(path).config
    assert (found.num_heads, found.norm_eps) == (8, 1e-5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [1536, 3072, 5120])
def test_heads_of_released_widths_are_known(width):
    shapes = {"blocks.0.self_attn.q.weight": (width, width), "patch_embedding.weight": (width, 4, 1, 2, 2)}
    assert assumed(shapes, None) is None
    assert wan_heads(width, {}) == width // 128


@pytest.mark.parametrize("heads", [7, 2])
def test_a_width_whose_heads_nobody_knows_is_refused(tmp_path, heads):
    path = tmp_path / "wan.safetensors"
    wan_file(path, CONFIG | {"num_attention_heads": heads, "attention_head_dim": 12})
    message = rf"wan\.safetensors: this Wan is {heads * 12} wide, no multiple of 128.*Put the config\.json of the"
    refuse(path, tmp_path / "to", message)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 5}))
    refuse(path, tmp_path / "to", f"num_heads=5 does not divide the width {heads * 12}")


def test_a_header_that_holds_no_config_is_refused(tmp_path):
    wan_file(tmp_path / "wan.safetensors", CONFIG, metadata={"kinema.config": "{"})
    refuse(tmp_path / "wan.safetensors", tmp_path / "to", r"wan\.safetensors: kinema\.config in its header is no JSON")


@pytest.mark.parametrize("beside", [True, False])
def test_tensors_that_a_single_file_lacks_are_listed(tmp_path, beside):
    path = tmp_path / "wan.safetensors"
    wan_file(path, CONFIG)
    tensors = safetensors.torch.load_file(path)
    for name in ("head.head.weight", "text_embedding.0.weight"):
        del tensors[f"model.diffusion_model.{name}"]
    safetensors.torch.save_file(tensors, path)
    if beside:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **CONFIG}))
    known = r"2 missing: text_embedding\.0\.weight.*head\.head\.weight"
    refuse(path, tmp_path / "to", known if beside else r"lacks head\.head\.weight, text_embedding\.0\.weight")


def test_a_folder_of_several_models_names_their_files(tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    for name in ("transformer", "vae"):
        safetensors.torch.save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    refuse(folder, tmp_path / "to", f"name {folder}/transformer.safetensors or {folder}/vae.safetensors")


def test_a_key_that_the_reference_does_not_have_is_refused_unless_it_is_off(tmp_path, model, tensors, capsys):
    pytest.importorskip("diffusers")
    folder = write_folder(tmp_path / "from", tensors, CONFIG | {"use_magic": True, "_mine": 1})
    refuse(folder, tmp_path / "to", "use_magic=True, which WanTransformer3DModel of diffusers does not have")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **CONFIG, "use_magic": False, "old": None})
    )
    assert_same(kinema.load(folder), model)
    assert "does not have use_magic, old, which is off" in capsys.readouterr().err


def test_a_file_of_several_models_asks_which(tmp_path, model):
    original = WAN.original_key_map(CONFIG).to_theirs(model.state_dict())
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    safetensors.torch.save_file(everything | {"vae.conv.weight": torch.zeros(2)}, tmp_path / "all.safetensors")
    refuse(tmp_path / "all.safetensors", tmp_path / "to", r"several models.*vae\. \(1 tensors\).*--prefix")
    lines = import_model(tmp_path / "all.safetensors", tmp_path / "to", prefix="model.diffusion_model.")
    assert "1 tensors of other parts left out" in lines[0]
    assert lines[-1] == f"READY {tmp_path / 'to'}"


def test_an_imported_folder_is_a_checkpoint_that_a_run_starts_from(tmp_path, model, tensors):
    import_model(write_folder(tmp_path / "from", tensors), tmp_path / "to")
    checkpoint = checkpoint_of(str(tmp_path / "to"), "init_from")
    fresh = WAN.build(CONFIG)
    for weights in Weights:
        mark = load_weights(fresh, checkpoint, weights)
        assert mark == checkpoint.document("manifest")["fingerprints"][weights.value]
    assert_same(fresh, model)
    assert_same(kinema.load(tmp_path / "to"), model)
    inodes = {(checkpoint.folder / f"{name}.safetensors").stat().st_ino for name in ("model", "ema")}
    assert len(inodes) == 1  # one set of weights, once on the disk


def test_weights_keep_the_type_that_they_were_published_in(tmp_path, tensors):
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "from", half)
    import_model(folder, tmp_path / "to")
    stored = checkpoint_of(str(tmp_path / "to"), "init_from").tensors("ema")
    back = WAN.key_map(CONFIG).to_theirs(stored)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in half.items())
    assert kinema.load(folder).head.weight.dtype == torch.float32


def test_a_truncated_file_is_refused(tmp_path, tensors):
    path = write_folder(tmp_path / "from", tensors) / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse(tmp_path / "from", tmp_path / "to", rf"model\.safetensors \({size} bytes\) is no whole safetensors file")


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path, tensors):
    folder = write_shards(tmp_path / "from", tensors)
    (folder / "b.safetensors").unlink()
    refuse(folder, tmp_path / "to", r"index\.json names 2 files, of which 1 are missing: b\.safetensors")


def test_an_index_that_disagrees_with_its_files_or_leads_outside_is_refused(tmp_path, tensors):
    folder = write_shards(tmp_path / "from", tensors)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = index["weight_map"].pop("proj_out.bias")
    path.write_text(json.dumps(index))
    refuse(folder, tmp_path / "to", r"disagree about 1 tensors: proj_out\.bias")
    index["weight_map"]["proj_out.bias"] = f"../from/{gone}"
    path.write_text(json.dumps(index))
    refuse(folder, tmp_path / "to", "not a file of its own folder")


def test_missing_shards_without_an_index_are_refused(tmp_path, tensors):
    folder = write_folder(tmp_path / "from", tensors)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "x-00001-of-00003.safetensors")
    refuse(folder, tmp_path / "to", "1 of 3 shards")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "wan.pth", "model.ckpt", "looks.safetensors"])
def test_a_pickle_is_never_read(tmp_path, name):
    folder = tmp_path / "from"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **CONFIG}))
    with zipfile.ZipFile(folder / name, "w") as archive:  # as torch.save packs its pickle
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\n.")
    for path in (folder, folder / name):
        refuse(path, tmp_path / "to", "is a pickle, which can run any code.*weights_only=True")


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = write_folder(tmp_path / "unet", {"x": torch.zeros(1)}, {}, "UNet2DConditionModel")
    refuse(folder, tmp_path / "to", "UNet2DConditionModel is a model of another kind.*WanTransformer3DModel")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    refuse(folder, tmp_path / "to", "another kind.*LlamaForCausalLM of transformers")
    (folder / "config.json").unlink()
    refuse(folder, tmp_path / "to", r"without a config\.json.*tensors \(x")


def test_tensors_that_do_not_fit_are_all_listed(tmp_path, tensors):
    tensors["blocks.1.attn2.to_k.weight"] = torch.zeros(128, 129)
    tensors["blocks.1.attn2.to_z.weight"] = torch.zeros(3)
    del tensors["proj_out.bias"]
    message = (
        r"1 missing: proj_out\.bias \(16,\); 1 that the model does not have: blocks\.1\.attn2\.to_z\.weight \(3,\); "
        r"1 of another shape: blocks\.1\.attn2\.to_k\.weight \(128, 129\) instead of \(128, 128\)\. Nothing was written"
    )
    refuse(write_folder(tmp_path / "from", tensors), tmp_path / "to", message)


def test_one_block_too_few_is_refused(tmp_path, tensors):
    folder = write_folder(tmp_path / "from", tensors, CONFIG | {"num_layers": 3})
    refuse(folder, tmp_path / "to", r"27 missing: .*blocks\.2\.")


def test_a_config_that_no_preset_makes_is_refused(tmp_path, tensors):
    folder = write_folder(tmp_path / "from", tensors, CONFIG | {"pos_embed_seq_len": 514})
    message = "no preset takes this WanTransformer3DModel. wan: pos_embed_seq_len=514: it needs an image_dim"
    refuse(folder, tmp_path / "to", message)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_no_json_is_refused(tmp_path, tensors, text):
    folder = write_folder(tmp_path / "from", tensors)
    (folder / "config.json").write_text(text)
    refuse(folder, tmp_path / "to", r"config\.json")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refuse(folder, tmp_path / "to", r"config\.json")


def test_nothing_is_left_when_writing_fails(tmp_path, tensors, monkeypatch):
    folder = write_folder(tmp_path / "from", tensors)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(importing, "write_yaml", fail)
    with pytest.raises(OSError, match="disk full"):
        import_model(folder, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, tensors):
    folder = write_folder(tmp_path / "from", tensors)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_model(folder, tmp_path / "to")
    assert (tmp_path / "to" / "precious").read_text() == "x"


def test_headers_are_read_without_the_numbers(tmp_path, tensors):
    folder = write_folder(tmp_path / "from", tensors)
    published = read_published(folder)
    assert published.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert published.class_name == "WanTransformer3DModel"


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    from kinema.cli import VERBS, run_verb

    status = run_verb("import", *VERBS["import"], [str(tmp_path / "nowhere"), "--to", str(tmp_path / "to")])
    assert status == 64
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere does not exist.\n"
