"""Published autoencoders: the same numbers and gradients as `diffusers`, whole and streamed, and every tensor named."""

import copy
import re
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

import kinema
from kinema.interop.importing import import_model
from kinema.interop.preset import Preset
from kinema.interop.presets import PRESETS
from kinema.models.vae import CausalVAE, Convolution, StreamState
from kinema.training.run_folder import Weights, checkpoint_of, load_vae

TOLERANCE = 1e-5


@dataclass
class Case:
    """A preset, a tiny config of its reference, and the sizes of its released weights."""

    preset: str
    tiny: dict[str, Any]
    released: dict[str, Any] = field(default_factory=dict)
    millions: float = 0.0
    frames: int = 9
    sides: tuple[int, int] = (32, 48)
    release: str = ""
    """Where a preset has several."""


CASES = [
    Case(
        "wan_vae",
        {
            "base_dim": 8,
            "z_dim": 5,
            "dim_mult": [1, 2, 4, 4],
            "latents_mean": [0.1, -0.2, 0.3, 0.4, -0.5],
            "latents_std": [0.5, 1.5, 2.0, 0.7, 1.0],
        },
        millions=126.9,
    ),
    Case(
        "wan_22_vae",
        {
            "base_dim": 8,
            "decoder_base_dim": 12,
            "z_dim": 4,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 1,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "is_residual": True,
            "temperal_downsample": [False, True, True],
            "scale_factor_spatial": 16,
            "latents_mean": [0.1, -0.2, 0.3, 0.4],
            "latents_std": [0.5, 1.5, 2.0, 0.7],
        },
        released={
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "is_residual": True,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        millions=704.7,
    ),
    Case(
        "hunyuan_15_vae",
        {
            "latent_channels": 4,
            "block_out_channels": [8, 16, 16, 32, 32],
            "layers_per_block": 1,
            "scaling_factor": 0.8,
        },
        millions=1260.6,
    ),
    Case(
        "hunyuan_vae",
        {
            "latent_channels": 4,
            "block_out_channels": [8, 16, 24, 24],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.8,
        },
        millions=246.5,
    ),
    Case(
        "ltx2_vae",
        {
            "latent_channels": 8,
            "block_out_channels": [16, 16, 32, 64],
            "decoder_block_out_channels": [16, 32, 64],
            "layers_per_block": [2, 1, 1, 1, 2],
            "decoder_layers_per_block": [1, 2, 1, 1],
            "decoder_causal": False,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        released={"decoder_causal": False},
        millions=1222.0,
        sides=(64, 96),
    ),
    Case(
        "ltx2_vae",
        {
            "latent_channels": 8,
            "block_out_channels": [16, 16, 32, 32],
            "decoder_block_out_channels": [16, 32, 32, 64],
            "layers_per_block": [1, 2, 1, 1, 1],
            "decoder_layers_per_block": [1, 2, 1, 1, 1],
            "decoder_spatio_temporal_scaling": [True] * 4,
            "decoder_inject_noise": [False] * 5,
            "decoder_causal": False,
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
            "upsample_residual": [False] * 4,
            "upsample_factor": [2, 2, 1, 2],
            "encoder_spatial_padding_mode": "zeros",
            "decoder_spatial_padding_mode": "zeros",
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        released={
            "block_out_channels": [256, 512, 1024, 1024],
            "decoder_block_out_channels": [256, 512, 512, 1024],
            "layers_per_block": [4, 6, 4, 2, 2],
            "decoder_layers_per_block": [4, 6, 4, 2, 2],
            "decoder_spatio_temporal_scaling": [True] * 4,
            "decoder_inject_noise": [False] * 5,
            "decoder_causal": False,
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
            "upsample_residual": [False] * 4,
            "upsample_factor": [2, 2, 1, 2],
            "decoder_spatial_padding_mode": "zeros",
        },
        millions=726.0,
        sides=(64, 96),
        release="2.3",
    ),
]


def case_id(case: Case) -> str:
    return f"{case.preset} {case.release}".strip()


def preset_of(case: Case) -> Preset:
    (found,) = (preset for preset in PRESETS if preset.name == case.preset)
    return found


def make_reference(case: Case, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    model = getattr(diffusers, preset_of(case).reference)(**settings).eval()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return model, config


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every parameter and buffer random and not trivial; gains near one."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        gain = "gamma" in name or ("norm" in name and name.endswith("weight")) or name.endswith("latents_std")
        centre, scale = (1.0, 0.3) if gain else (0.0, 0.1 if fan_in == 1 else 1.3 * fan_in**-0.5)
        tensor.copy_((centre + scale * torch.randn(tensor.shape)).abs() if gain else scale * torch.randn(tensor.shape))


@cache
def pair(name: str) -> tuple[nn.Module, CausalVAE, dict[str, Any]]:
    """The reference, ours with the same weights, and the reference's config."""
    torch.set_num_threads(1)
    case = next(case for case in CASES if case_id(case) == name)
    reference, config = make_reference(case, case.tiny)
    randomise(reference)
    ours = preset_of(case).build(config)
    assert isinstance(ours, CausalVAE)
    ours.load_state_dict(preset_of(case).key_map(config).to_ours(reference.state_dict()))
    return reference, ours.eval(), config


def clip(case: Case, frames: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, case.frames if frames is None else frames, *case.sides)
    return torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


def their_statistics(ours: CausalVAE) -> tuple[Tensor, Tensor]:
    return ours.latent_mean.view(-1, 1, 1, 1), ours.latent_std.view(-1, 1, 1, 1)


def their_latents(reference: nn.Module, ours: CausalVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance as the reference's pipelines normalise them."""
    mean, std = their_statistics(ours)
    posteriors = [reference.encode(one).latent_dist for one in video.split(1)]  # one of them takes no batches
    logvar = torch.cat([posterior.logvar for posterior in posteriors])
    return (torch.cat([posterior.mean for posterior in posteriors]) - mean) / std, logvar - 2 * std.log()


def their_video(reference: nn.Module, ours: CausalVAE, latents: Tensor) -> Tensor:
    mean, std = their_statistics(ours)
    return torch.cat([reference.decode(one).sample for one in (latents * std + mean).split(1)])


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@torch.no_grad()
def test_latents_and_videos_are_those_of_the_reference(case, frames, parity):
    reference, ours, _ = pair(case_id(case))
    video = clip(case, 1 + (frames - 1) * ours.config.temporal_stride // 4)
    mean, logvar = their_latents(reference, ours, video)
    posterior = ours.encode(video)
    found = [difference(posterior.mean, mean), difference(posterior.logvar, logvar)]
    expected = their_video(reference, ours, mean)
    assert expected.std() > 0.05
    assert (expected.abs() < 1).float().mean() > 0.5  # where the output is clamped, little is compared
    found.append(difference(ours.decode(mean), expected))
    assert max(found) <= TOLERANCE, found
    parity.note(case_id(case), case.preset, output=max(found))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_are_those_of_the_reference(case, parity):
    """Of decode(encode(x)) and the log-variance, for each parameter under its name there.

    In float64: sums of small numbers of either sign have few digits left in float32.
    """
    reference, ours, config = pair(case_id(case))
    reference, ours = (copy.deepcopy(model).double() for model in (reference, ours))
    video = clip(case, 1 + ours.config.temporal_stride, torch.float64)
    torch.manual_seed(2)
    with torch.no_grad():
        upstream, other = torch.randn_like(video), torch.randn_like(ours.encode(video).logvar)

    def gradients(model: nn.Module, reconstruction: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        loss = (reconstruction * upstream).mean() + (logvar * other).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return dict(zip(dict(model.named_parameters()), grads, strict=True))

    mean, logvar = their_latents(reference, ours, video)
    expected = gradients(reference, their_video(reference, ours, mean), logvar)
    posterior = ours.encode(video)
    mine = gradients(ours, ours.decode(posterior.mean), posterior.logvar)
    constants = preset_of(case).key_map(config).constants
    actual = preset_of(case).key_map(config).to_theirs(mine | constants)
    for name, gradient in expected.items():
        if name.endswith("to_k.bias"):  # the same number in every score of a softmax: no gradient but rounding
            assert max(gradient.abs().max(), actual[name].abs().max()) < 1e-15
            continue
        assert gradient.abs().max() > 1e-9, name
        found = difference(actual[name], gradient)
        assert found <= TOLERANCE, name
        parity.note(case_id(case), case.preset, gradients=found)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_weights_go_there_and_back_bit_for_bit(case):
    reference, ours, config = pair(case_id(case))
    preset, before = preset_of(case), reference.state_dict()
    for table in filter(None, (preset.key_map, preset.original_key_map)):
        theirs = table(config).to_theirs(ours.state_dict())
        back = table(config).to_ours(theirs)
        assert back.keys() == ours.state_dict().keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    after = preset.key_map(config).to_theirs(ours.state_dict())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def originals(name: str) -> tuple[dict[str, Tensor], nn.Module]:
    """The weights of a pair in the vendor's names, and the reference that holds them."""
    reference, ours, config = pair(name)
    table = preset_of(next(case for case in CASES if case_id(case) == name)).original_key_map
    assert table is not None
    return table(config).to_theirs(ours.state_dict()), reference


@pytest.mark.parametrize(
    ("name", "converter"),
    [("wan_vae", "convert_wan_vae_to_diffusers"), ("ltx2_vae", "convert_ltx2_vae_to_diffusers")],
)
def test_the_vendors_names_are_those_that_diffusers_converts(name, converter):
    """Where there is a converter inside the library: not for Wan 2.2, HunyuanVideo-1.5 and LTX-2.3."""
    original, reference = originals(name)
    converted = getattr(single_file_utils, converter)(original)
    assert converted.keys() == reference.state_dict().keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in reference.state_dict().items())


def test_hunyuan_15s_own_names():
    """Those that diffusers' conversion script of that release reads, one of each kind."""
    original, reference = originals("hunyuan_15_vae")
    theirs = reference.state_dict()
    for vendors, name in {
        "encoder.conv_in.conv.bias": "encoder.conv_in.conv.bias",
        "encoder.down.3.block.0.norm2.gamma": "encoder.down_blocks.3.resnets.0.norm2.gamma",
        "encoder.down.0.downsample.conv.conv.weight": "encoder.down_blocks.0.downsamplers.0.conv.conv.weight",
        "encoder.mid.block_1.conv1.conv.weight": "encoder.mid_block.resnets.0.conv1.conv.weight",
        "encoder.mid.attn_1.norm.gamma": "encoder.mid_block.attentions.0.norm.gamma",
        "decoder.mid.attn_1.k.weight": "decoder.mid_block.attentions.0.to_k.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.proj_out.bias",
        "decoder.mid.block_2.norm1.gamma": "decoder.mid_block.resnets.1.norm1.gamma",
        "decoder.up.4.block.1.conv2.conv.bias": "decoder.up_blocks.4.resnets.1.conv2.conv.bias",
        "decoder.up.1.upsample.conv.conv.bias": "decoder.up_blocks.1.upsamplers.0.conv.conv.bias",
        "decoder.norm_out.gamma": "decoder.norm_out.gamma",
    }.items():
        assert torch.equal(original.pop(vendors), theirs[name]), vendors
    left = re.compile(
        r"(encoder|decoder)\.((conv_in|conv_out)\.conv|(down|up)\.\d\.(block\.\d\.(norm\d|conv\d\.conv)|"
        r"(down|up)sample\.conv\.conv)|mid\.(block_[12]\.(norm\d|conv\d\.conv)|attn_1\.(norm|q|k|v|proj_out))|norm_out)"
        r"\.(weight|bias|gamma)"
    )
    assert [name for name in original if not left.fullmatch(name)] == []


def test_a_vendors_file_with_the_config_beside_it_is_imported(tmp_path):
    """As the vendor stores it, with statistics that nobody reads."""
    original, reference = originals("ltx2_vae")
    extra = {f"per_channel_statistics.{name}": torch.ones(8) for name in ("channel", "mean-of-stds")}
    reference.save_config(tmp_path)
    save_file(original | extra, tmp_path / "ltx2_vae.safetensors")
    ours = kinema.load(tmp_path)
    assert all(torch.equal(ours.state_dict()[k], x) for k, x in pair("ltx2_vae")[1].state_dict().items())
    save_file(original | {"per_channel_statistics.other": torch.ones(8)}, tmp_path / "ltx2_vae.safetensors")
    with pytest.raises(ValueError, match=r"1 that the model does not have: per_channel_statistics\.other"):
        kinema.load(tmp_path)


def test_ltx_23s_own_names_go_on_where_those_of_2_end():
    original, reference = originals("ltx2_vae 2.3")
    theirs = reference.state_dict()
    for vendors, name in {
        "encoder.down_blocks.8.res_blocks.0.conv1.conv.bias": "encoder.mid_block.resnets.0.conv1.conv.bias",
        "decoder.up_blocks.0.res_blocks.0.conv2.conv.bias": "decoder.mid_block.resnets.0.conv2.conv.bias",
        "decoder.up_blocks.7.conv.conv.weight": "decoder.up_blocks.3.upsamplers.0.conv.conv.weight",
        "decoder.up_blocks.8.res_blocks.0.conv1.conv.weight": "decoder.up_blocks.3.resnets.0.conv1.conv.weight",
        "per_channel_statistics.std-of-means": "latents_std",
    }.items():
        assert torch.equal(original[vendors], theirs[name]), vendors


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_config_comes_back(case):
    _, ours, config = pair(case_id(case))
    found = preset_of(case).describe(ours)
    again, _ = make_reference(case, found)
    preset_of(case).check(found)
    assert {k: tuple(v.shape) for k, v in again.state_dict().items()} == {
        k: tuple(v.shape) for k, v in pair(case_id(case))[0].state_dict().items()
    }
    wrong = {name: value for name, value in found.items() if not _equal(value, config[name])}
    assert wrong == {}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and a and isinstance(a[0], float):
        return torch.allclose(torch.tensor(a), torch.tensor(b))
    return list(a) == list(b) if isinstance(a, list | tuple) else a == b


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_released_tensor_is_named(case, parity):
    with torch.device("meta"):
        reference, config = make_reference(case, case.released)
        ours = preset_of(case).build(config)
    named = preset_of(case).key_map(config).to_ours(reference.state_dict())
    assert {k: tuple(v.shape) for k, v in named.items()} == {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    numel = sum(p.numel() for p in ours.parameters())
    assert numel == sum(p.numel() for p in reference.parameters())
    assert numel / 1e6 == pytest.approx(case.millions, rel=2e-3)
    parity.size(case_id(case), case.preset, "", dict(reference.named_parameters()))


@pytest.mark.parametrize(
    ("preset", "choice", "message"),
    [
        ("wan_vae", {"attn_scales": [0.5]}, r"attn_scales=\[0\.5\]: only \[\]"),
        ("wan_vae", {"dim_mult": [2, 2, 4, 4]}, r"dim_mult\[0\]=2: only 1 is implemented"),
        ("wan_vae", {"temperal_downsample": [True]}, r"temperal_downsample=\[True\]: dim_mult=.* one entry less"),
        ("hunyuan_15_vae", {"spatial_compression_ratio": 8}, "spatial_compression_ratio=8 needs 4 levels"),
        ("hunyuan_vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio=8: only 4"),
        ("hunyuan_15_vae", {"downsample_match_channel": False}, "downsample_match_channel=False: only True"),
        ("ltx2_vae", {"timestep_conditioning": True}, "timestep_conditioning=True: only False"),
        ("ltx2_vae", {"upsample_factor": [2, 1, 2]}, "a residual block between is not implemented"),
        ("ltx2_vae", {"upsample_residual": [True, False, True]}, "only the same for all is implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(preset, choice, message):
    case = next(case for case in CASES if case.preset == preset)
    with pytest.raises(ValueError, match=message):
        preset_of(case).build(pair(preset)[2] | choice)


def test_what_the_reference_lacks_is_named():
    for case in CASES:
        _, ours, _ = pair(case_id(case))
        other = CausalVAE(replace(ours.config, convolution=Convolution.factorised))
        with pytest.raises(ValueError, match=r"vae\.convolution=Convolution\.factorised \(there Convolution\.full\)"):
            preset_of(case).describe(other)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@torch.no_grad()
def test_a_later_frame_changes_no_earlier_one(case):
    _, ours, _ = pair(case_id(case))
    stride, video = ours.config.temporal_stride, clip(case, 1 + 2 * pair(case_id(case))[1].config.temporal_stride)
    changed = torch.cat([video[:, :, :-1], -video[:, :, -1:]], dim=2)
    before, after = ours.encode(video).mean, ours.encode(changed).mean
    unchanged = torch.equal(after[:, :, :-1], before[:, :, :-1])
    assert unchanged == (ours.config.encoder_looks_ahead() is None)
    assert not torch.equal(after[:, :, -1], before[:, :, -1])
    moved = torch.cat([before[:, :, :-1], before[:, :, -1:] + 1], dim=2)
    one, two = ours.decode(before)[:, :, :-stride], ours.decode(moved)[:, :, :-stride]
    assert torch.equal(one, two) == (ours.config.decoder_looks_ahead() is None)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@torch.no_grad()
def test_streamed_is_whole_bit_for_bit_or_refused(case, parity):
    _, ours, _ = pair(case_id(case))
    stride = ours.config.temporal_stride
    video = clip(case, 1 + 3 * stride)
    whole = ours.encode(video)
    for chunks in ([1, 1, 1, 1], [1, 3], [2, 2], [3, 1]):
        plan = [chunks[0] * stride - stride + 1, *(n * stride for n in chunks[1:])]
        if ours.config.encoder_looks_ahead() is None:
            parts = list(ours.encode_chunks(video.split(plan, dim=2), StreamState()))
            assert torch.equal(torch.cat([part.mean for part in parts], dim=2), whole.mean)
            assert torch.equal(torch.cat([part.logvar for part in parts], dim=2), whole.logvar)
            image = ours.encode(video[:, :, :1]).mean
            assert torch.equal(image, whole.mean[:, :, :1])
        else:
            with pytest.raises(ValueError, match="cannot encode in chunks: vae"):
                list(ours.encode_chunks(video.split(plan, dim=2)))
        if ours.config.decoder_looks_ahead() is None:
            frames = list(ours.decode_chunks(whole.mean.split(chunks, dim=2), StreamState()))
            assert torch.equal(torch.cat(frames, dim=2), ours.decode(whole.mean))
        else:
            with pytest.raises(ValueError, match="cannot decode in chunks: vae"):
                list(ours.decode_chunks(whole.mean.split(chunks, dim=2)))
    looks = {"encoder": ours.config.encoder_looks_ahead(), "decoder": ours.config.decoder_looks_ahead()}
    causal = ", ".join(f"{part} {'no' if reason else 'yes'}" for part, reason in looks.items())
    chunks = ", ".join(f"{part} {'refused' if reason else 'equals whole'}" for part, reason in looks.items())
    parity.note(case_id(case), case.preset, causal=causal, chunks=chunks)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_parameter_of_a_new_one_has_a_gradient(case):
    torch.manual_seed(0)
    _, reference_ours, config = pair(case_id(case))
    vae = preset_of(case).build(config)
    video = clip(case, 1 + reference_ours.config.temporal_stride)
    posterior = vae.encode_unnormalised(video)
    reconstruction, posterior = vae(video, torch.randn_like(posterior.mean))
    ((reconstruction - video).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    dead = [name for name, p in vae.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


@pytest.mark.parametrize(("preset", "parts"), [("hunyuan_vae", {"encoder", "decoder"}), ("wan_vae", set())])
def test_manifest_and_card_say_what_is_not_causal(preset, parts, tmp_path):
    pair(preset)[0].save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    checkpoint = checkpoint_of(str(tmp_path / "run"), "run")
    record = checkpoint.document("manifest")["vae"]
    assert record["looks_ahead"].keys() == parts
    assert load_vae(checkpoint, Weights.ema)[1]["looks_ahead"] == record["looks_ahead"]
    kinema.export(str(tmp_path / "run"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert {
        part for part in ("encoder", "decoder") if f"not causal: the VAE's {part} | vae.norm=group" in card
    } == parts
