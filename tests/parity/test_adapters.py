"""Adapters in the layouts of `diffusers` and ComfyUI: loaded there they compute what our forward computes."""

import diffusers
import pytest
import safetensors.torch
import torch

import kinema
from kinema.interop.adapters import placed
from kinema.interop.presets import PRESETS
from kinema.models.dit import DiT, DiTConfig
from kinema.training.finetune import LoRA, adapters_of, base_weights, merged_weights, trained_parameters
from tests.parity.test_dit_presets import COG, HUNYUAN, LTX, WAN, WAN_IMAGE

CASES = {
    "WanTransformer3DModel": WAN,
    "LTXVideoTransformer3DModel": LTX,
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "CogVideoXTransformer3DModel": COG,
}
NAMINGS = [
    (name, original)
    for name in CASES
    for original in (False, True)
    if not original or next(preset for preset in PRESETS if preset.reference == name).original_key_map
]
"""Every case in the reference's names, and in the maker's own where they differ."""
MODULATED = {"HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"}
"""Those whose modulation is a linear layer in every block, of two in one."""
EVERY_BLOCK = ["blocks.*", "text_embedding*", "timestep_embedding.*"]


def adapted(name: str, config: dict, targets: list[str]) -> DiT:
    """Our module of a reference whose parameters are all random, with random adapters; alpha is not the rank."""
    torch.manual_seed(0)
    reference = getattr(diffusers, name)(**config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
    preset = next(preset for preset in PRESETS if preset.reference == name)
    record = {key: value for key, value in reference.config.items() if not key.startswith("_")}
    ours = preset.build(record)
    ours.load_state_dict(preset.key_map(record).to_ours(reference.state_dict()))
    LoRA(rank=3, alpha=4.0, targets=targets).prepare(ours)
    for value in trained_parameters(ours).values():
        torch.nn.init.normal_(value, std=0.2)
    ours.preset, ours.record = preset, record
    return ours


def differences(lines: list[str]) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in lines if "largest difference" in line]


@pytest.mark.parametrize("name", CASES)
def test_diffusers_loads_the_adapters_and_computes_the_same(tmp_path, name):
    ours = adapted(name, CASES[name], EVERY_BLOCK)
    lines = kinema.export(ours, tmp_path / "out", format="lora-diffusers")
    assert all(difference < 1e-5 for difference in differences(lines))
    assert len(differences(lines)) == 1
    assert float(lines[0].split("change the output by ")[1].split(":")[0]) > 0.01
    keys = safetensors.torch.load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors").keys()
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


@pytest.mark.parametrize("name", CASES)
def test_comfyui_applies_the_adapters_and_computes_the_same(tmp_path, name):
    targets = ["blocks.*"] if name == "WanTransformer3DModel" else EVERY_BLOCK
    lines = kinema.export(adapted(name, CASES[name], targets), tmp_path / "out", format="lora-comfyui")
    assert all(difference < 1e-5 for difference in differences(lines))
    assert len(differences(lines)) == (2 if name == "WanTransformer3DModel" else 1)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "lora.safetensors")
    assert {key.rsplit(".", 2 if key.endswith("weight") else 1)[1] for key in tensors} == {
        "lora_down",
        "lora_up",
        "alpha",
    }
    assert all(key.startswith("diffusion_model.") for key in tensors)


@pytest.mark.parametrize(("name", "original"), NAMINGS)
def test_placed_adapters_are_what_their_weights_change_by(name, original):
    """In every naming: theirs of the merged weights minus theirs of the base is scale * up @ down, layer by layer."""
    some = ["blocks.*.query", "blocks.*.value", "blocks.*.project", "head"]  # keys, for one, have none
    ours = adapted(name, CASES[name], some + ["blocks.*.modulation.linear"] * (name in MODULATED))
    make = ours.preset.original_key_map if original else ours.preset.key_map
    assert make is not None
    table = make(ours.record)
    found = placed(adapters_of(ours), base_weights(ours), table)
    base, merged = (
        table.to_theirs({k: v.double() for k, v in w(ours).items()}) for w in (base_weights, merged_weights)
    )
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {f"{module}.weight" for module in found}
    for module, adapter in found.items():
        delta = adapter.scale * adapter.up.double() @ adapter.down.double()
        torch.testing.assert_close(delta, merged[f"{module}.weight"] - base[f"{module}.weight"], rtol=1e-5, atol=1e-6)


def test_layers_outside_blocks_are_written_for_comfyui_too(tmp_path):
    ours = adapted("WanTransformer3DModel", WAN, EVERY_BLOCK)
    lines = kinema.export(ours, tmp_path / "out", format="lora-comfyui")
    assert [difference < 1e-5 for difference in differences(lines)] == [True]


def test_fused_layers_have_the_sum_of_the_ranks(tmp_path):
    kinema.export(adapted("HunyuanVideoTransformer3DModel", HUNYUAN, ["blocks.*"]), tmp_path / "out", "lora-comfyui")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "lora.safetensors")
    fused = "diffusion_model.single_blocks.0.linear1"
    assert tensors[f"{fused}.lora_down.weight"].shape == (4 * 3, 24)  # queries, keys, values and the MLP
    up = tensors[f"{fused}.lora_up.weight"]
    assert up.shape == (3 * 24 + 96, 4 * 3)
    assert torch.equal(up[:24, 3:], torch.zeros(24, 9))
    assert float(tensors[f"{fused}.alpha"]) == pytest.approx(4 * 4.0)


def test_what_is_no_linear_layer_there_is_refused(tmp_path):
    ours = adapted("WanTransformer3DModel", WAN_IMAGE, ["patch_embedding"])
    with pytest.raises(ValueError, match=r"the adapter of patch_embedding cannot be written.*no linear layer"):
        kinema.export(ours, tmp_path / "out", format="lora-diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_adapters_has_none_to_export(tmp_path):
    module = DiT(DiTConfig(width=24, depth=1, num_heads=2, rope_axes=[4, 4, 4]), 4, 8)
    with pytest.raises(ValueError, match="there are no adapters"):
        kinema.export(module, tmp_path / "out", format="lora-comfyui")


def test_merged_weights_are_exported_whole(tmp_path):
    ours = adapted("WanTransformer3DModel", WAN, ["blocks.*"])
    lines = kinema.export(ours, tmp_path / "out")
    assert differences(lines)[0] < 1e-5
    assert kinema.load(tmp_path / "out").config == ours.config
