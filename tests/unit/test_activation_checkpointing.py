"""Blocks that keep less for the backward: the same gradients to the last bit, and less memory."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.checkpoint import CheckpointError

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.footprint import LiveBytes
from kinema.models.dit import DiTConfig, make_denoiser
from kinema.models.vae import CausalVAE, VAEConfig
from kinema.training.finetune import LoRA
from tests.unit.test_dit import extras_for, small

CONFIGS = Path(__file__).parents[2] / "configs"
CHANNELS, TEXT = 4, 8
KINDS = list(ActivationCheckpointing)
NONE, SELECTIVE, ATTENTION, EVERY, FULL = KINDS


def presets(group, schema):
    """The configurations of a folder as their dataclass, by name."""
    loaded = {path.stem: OmegaConf.load(path) for path in sorted((CONFIGS / group).glob("*_tiny.yaml"))}
    for values in loaded.values():
        del values["defaults"]
    return {name: OmegaConf.to_object(OmegaConf.merge(schema, values)) for name, values in loaded.items()}


DITS, VAES = presets("model", DiTConfig), presets("vae", VAEConfig)


def randomised(model):
    """Every parameter random: zero gates would hide what lies behind them."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.double()


def dit(config):
    return randomised(make_denoiser(config, CHANNELS, TEXT))


def denoise(model):
    """The loss of a pack whose clips differ in all sizes."""
    patch = model.config.patch_size[0]
    shapes = [(patch, 4, 6), (2 * patch, 8, 4), (patch, 4, 6)]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    latents, text = [draw(CHANNELS, *shape) for shape in shapes], [draw(words, TEXT) for words in (3, 1, 5)]
    found = model(latents, draw(len(shapes)).sigmoid(), text, extras_for(model.config, latents))
    return sum(clip.square().mean() for clip in found)


def reconstruct(model):
    time, space = model.geometry_strides
    size = (time + 1, 2 * space, 2 * space)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, *size, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(1, *model.latent_shape(*size), dtype=torch.float64, generator=generator)
    found, posterior = model(video, noise)
    return found.square().mean() + posterior.mean.square().mean()


def backward(model, loss):
    """Bytes that wait for the backward, and every gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    with LiveBytes() as live:
        value = loss(model)
        waiting = live.now
        value.backward()
    return waiting, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_kinds(make, loss):
    found = {}
    for kind in KINDS:
        model = make()
        keep_less(model.all_blocks(), kind, every=2)
        found[kind] = backward(model, loss)
    gradients = found[NONE][1]
    assert gradients
    for kind, (_, others) in found.items():
        assert others.keys() == gradients.keys()
        assert [name for name in gradients if not torch.equal(gradients[name], others[name])] == [], kind
    waiting = {kind: bytes_ for kind, (bytes_, _) in found.items()}
    assert waiting[FULL] < waiting[EVERY] < waiting[NONE], waiting
    assert waiting[FULL] <= waiting[ATTENTION] < waiting[SELECTIVE] < waiting[NONE], waiting
    return waiting


@pytest.mark.parametrize("name", DITS)
def test_every_family_of_transformers_has_the_same_gradients_with_less_memory(name):
    waiting = check_kinds(lambda: dit(DITS[name]), denoise)
    assert waiting[FULL] < waiting[ATTENTION]


@pytest.mark.parametrize("name", VAES)
def test_every_family_of_autoencoders_has_the_same_gradients_with_less_memory(name):
    check_kinds(lambda: randomised(CausalVAE(VAES[name])), reconstruct)


def test_of_two_experts_and_beside_frozen_parameters_adapters_draw_the_same_dropout():
    def adapted():
        model = dit(small(expert_boundary=0.5, expert="both"))
        LoRA(rank=2, dropout=0.5).prepare(model)
        return randomised(model)

    waiting = check_kinds(adapted, denoise)
    assert waiting[FULL] < waiting[ATTENTION]


def test_bfloat16_products_are_made_again_in_bfloat16():
    def halved(model):
        with torch.autocast("cpu", torch.bfloat16):
            return denoise(model)

    check_kinds(lambda: dit(small()), halved)


def test_nothing_is_computed_twice_where_there_are_no_gradients():
    model = dit(small())
    keep_less(model.all_blocks(), FULL)
    with torch.no_grad(), LiveBytes() as live:
        denoise(model)
    plain = dit(small())
    with torch.no_grad(), LiveBytes() as expected:
        denoise(plain)
    assert live.peak == expected.peak


def test_a_block_that_is_not_the_same_the_second_time_is_an_error():
    block = nn.Linear(3, 3)
    lengths = iter([4, 5])
    block.forward = lambda x: nn.functional.linear(x.expand(next(lengths), 3), block.weight).sin().sum()
    keep_less([block], FULL)
    with pytest.raises(CheckpointError, match="different metadata"):
        block(torch.ones(1, 3, requires_grad=True)).backward()


def test_what_is_kept_of_an_unfused_attention_does_not_grow_with_the_square_of_its_tokens():
    """Its scores are products of batches, which are computed again."""
    counts = {}
    for tokens in (64, 128):
        model = dit(small(depth=1))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), LiveBytes() as live:
            keep_less(model.all_blocks(), SELECTIVE)
            latents = [torch.randn(CHANNELS, 1, 2, 2 * tokens, dtype=torch.float64)]
            found = model(latents, torch.rand(1).double(), [torch.randn(1, TEXT).double()])
            counts[tokens] = live.now
        del found
    assert counts[128] < 2.1 * counts[64]
