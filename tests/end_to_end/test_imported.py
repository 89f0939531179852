"""A published model comes in, is trained further by the real command, and goes out to `diffusers` again."""

import json
from pathlib import Path

import diffusers
import safetensors.torch
import torch

from kinema.interop.importing import import_model
from kinema.training.run_folder import checkpoint_of
from tests.end_to_end.runs import run

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
}  # fmt: skip
VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1, 0.2, 0.3, 0.4],
       "latents_std": [1.0, 2.0, 1.5, 0.7]}  # fmt: skip


def randomise(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
    return model


def test_an_imported_wan_is_trained_and_exported(tmp_path):
    randomise(diffusers.WanTransformer3DModel(**WAN)).save_pretrained(tmp_path / "transformer")
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(tmp_path / "vae")
    run("data_prep/toy.py", "--out", f"{tmp_path}/toy", "--clips", "4", "--heldout", "2", "--sizes", "64x64")
    paths = f"import {tmp_path}/transformer --vae {tmp_path}/vae --to {tmp_path}/imported"
    assert run("-m", "kinema.cli", *paths.split()).stdout.splitlines()[-1] == f"READY {tmp_path}/imported"
    command = (
        f"train.py --config-dir {tmp_path}/imported/configs experiment=imported name=tuned run_root={tmp_path}/runs "
        f"steps=2 data.path={tmp_path}/toy data.shapes=[[5,32,32]] text.width=12 data.clips_per_step=2 data.lanes=1 "
        "data.num_workers=0 logging=file validation.clips=2 task.samples.every_steps=0 schedule.warmup_steps=0"
    )
    run(*command.split())
    answer = run("-m", "kinema.cli", *f"export {tmp_path}/runs/tuned --weights raw --to {tmp_path}/out".split())
    lines = [line for line in answer.stdout.splitlines() if "largest difference" in line]
    assert [line.split(":")[0] for line in lines] == ["vae", "transformer", "WanPipeline"]
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-5 for line in lines)

    config = diffusers.WanTransformer3DModel.load_config(tmp_path / "out" / "transformer")
    tuned = diffusers.WanTransformer3DModel.from_config(config)
    after = safetensors.torch.load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    tuned.load_state_dict(after)
    before = safetensors.torch.load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.1  # trained on from the published weights, not from fresh ones
    kept = safetensors.torch.load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    published = safetensors.torch.load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in published.items())


def test_a_trained_release_is_sampled_as_the_release(tmp_path, monkeypatch):
    release = tmp_path / "release"
    randomise(diffusers.WanTransformer3DModel(**WAN)).save_pretrained(release / "transformer")
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(release / "vae")
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 3}
    diffusers.UniPCMultistepScheduler(**options).save_pretrained(release / "scheduler")
    (release / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    monkeypatch.chdir(tmp_path)
    import_model(Path("release"), Path("imported"))  # the training runs in another folder
    run("data_prep/toy.py", "--out", f"{tmp_path}/toy", "--clips", "4", "--heldout", "2", "--sizes", "64x64")
    command = (
        f"train.py --config-dir {tmp_path}/imported/configs experiment=imported name=tuned run_root={tmp_path}/runs "
        f"steps=1 data.path={tmp_path}/toy data.shapes=[[5,32,32]] text.width=12 data.clips_per_step=2 data.lanes=1 "
        "data.num_workers=0 logging=file validation.clips=2 task.samples.every_steps=0 schedule.warmup_steps=0"
    )
    run(*command.split())
    imported, tuned = (
        checkpoint_of(f"{tmp_path}/{folder}", "run").document("manifest") for folder in ("imported", "runs/tuned")
    )
    assert tuned["sampling"] == imported["sampling"]
    assert (tuned["sampling"]["solver"], tuned["sampling"]["guidance_scale"]) == ("unipc", 5.0)
    run("-m", "kinema.cli", *f"export {tmp_path}/runs/tuned --weights raw --to {tmp_path}/out".split())
    scheduler = diffusers.UniPCMultistepScheduler.load_config(tmp_path / "out" / "scheduler")
    assert scheduler["_class_name"] == "UniPCMultistepScheduler"
    assert {key: scheduler[key] for key in options} == options


def test_one_expert_of_an_imported_pair_is_trained(tmp_path):
    pair, parts = tmp_path / "pair", ("transformer", "transformer_2")
    for part in parts:
        randomise(diffusers.WanTransformer3DModel(**WAN)).save_pretrained(pair / part)
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(pair / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(pair / "scheduler")
    (pair / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.875}))
    run("data_prep/toy.py", "--out", f"{tmp_path}/toy", "--clips", "4", "--heldout", "2", "--sizes", "64x64")
    run("-m", "kinema.cli", "import", f"{pair}", "--to", f"{tmp_path}/imported")
    command = (
        f"train.py --config-dir {tmp_path}/imported/configs experiment=imported name=tuned run_root={tmp_path}/runs "
        f"steps=2 data.path={tmp_path}/toy data.shapes=[[5,32,32]] text.width=12 data.clips_per_step=2 data.lanes=1 "
        "data.num_workers=0 logging=file validation.clips=2 task.samples.every_steps=0 schedule.warmup_steps=0"
    )
    refused = run(*command.split(), expect=None).stderr
    assert "model.expert_boundary=0.875: one of two experts is trained at a time" in refused
    run(*command.split(), "model.expert=low")
    run("-m", "kinema.cli", *f"export {tmp_path}/runs/tuned --weights raw --to {tmp_path}/out".split())
    before, after = (
        [safetensors.torch.load_file(f / part / "diffusion_pytorch_model.safetensors") for part in parts]
        for f in (pair, tmp_path / "out")
    )
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert 0 < max((after[1][name] - tensor).abs().max().item() for name, tensor in before[1].items()) < 0.1


def test_an_imported_vae_is_what_a_vae_training_starts_from(tmp_path):
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(tmp_path / "published")
    run("-m", "kinema.cli", "import", f"{tmp_path}/published", "--to", f"{tmp_path}/imported")
    options = [f"{tmp_path}/imported/configs", "experiment=imported", "data.path=toy", "--cfg", "job"]
    composed = run("train.py", "--config-dir", *options).stdout
    assert f"init_from: {tmp_path}/imported" in composed
    assert "up: first_alone" in composed
    assert "model: null" in composed
