"""What is trained is what was named, and nothing else."""

import pytest
import torch

from kinema.identity import from_plain
from kinema.models.dit import DiT, DiTConfig, make_denoiser
from kinema.training.finetune import (
    Full,
    LoRA,
    Parts,
    adapters_of,
    base_weights,
    frozen_parameters,
    merged_weights,
    trained_parameters,
)

SIZES = {"width": 24, "depth": 2, "num_heads": 2, "rope_axes": [4, 4, 4]}


def model(**choices) -> DiT:
    torch.manual_seed(0)
    return DiT(from_plain({"type": "DiTConfig", **SIZES, **choices}, DiTConfig), 4, 8)


def test_everything_is_trained_unless_told_otherwise():
    dit = model()
    count = sum(p.numel() for p in dit.parameters())
    tensors = len(list(dit.parameters()))
    assert Full().prepare(dit) == f"trains {tensors} of {tensors} tensors, {count:,} of {count:,} parameters (100.0%)"
    assert frozen_parameters(dit) == {}


def test_parts_are_chosen_by_name():
    dit = model()
    line = Parts(["blocks.*.sublayers.1.*", "head.bias"]).prepare(dit)
    expected = [name for name, _ in dit.named_parameters() if ".sublayers.1." in name or name == "head.bias"]
    assert list(trained_parameters(dit)) == expected
    assert line.startswith(f"trains {len(expected)} of ")
    assert frozen_parameters(dit).keys() == {name for name, _ in dit.named_parameters()} - set(expected)


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(ValueError, match=r"finetune\.train: head\.wieght matches none of \d+ names.*head\.weight"):
        Parts(["head.bias", "head.wieght"]).prepare(model())
    with pytest.raises(ValueError, match=r"finetune\.train=\[\] chooses nothing"):
        Parts([]).prepare(model())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_what_is_trained_by_default_reaches_the_trained_expert(expert):
    choices = {"type": "DiTConfig", **SIZES, "expert_boundary": 0.875, "expert": expert}
    pair = make_denoiser(from_plain(choices, DiTConfig), 4, 8)
    Parts().prepare(pair)
    inside = [name for name, _ in model().named_parameters() if ".operation." in name]
    assert list(trained_parameters(pair)) == [f"{expert}.{name}" for name in inside]

    pair = make_denoiser(from_plain(choices, DiTConfig), 4, 8)
    LoRA().prepare(pair)
    alone = model()
    LoRA().prepare(alone)
    assert list(adapters_of(pair)) == [f"{expert}.{name}" for name in adapters_of(alone)]

    pair = make_denoiser(from_plain(choices, DiTConfig), 4, 8)
    Parts([f"{expert}.blocks.0.*", "head.bias"]).prepare(pair)
    assert {name.split(".")[0] for name in trained_parameters(pair)} == {expert}


# Adapters


def inputs(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return [draw(4, 2, 4, 6), draw(4, 1, 4, 4)], torch.tensor([0.2, 0.7]), [draw(3, 8), draw(5, 8)]


def outputs(module) -> torch.Tensor:
    return torch.cat([clip.flatten() for clip in module(*inputs(torch.Generator().manual_seed(3)))])


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def adapted(**choices) -> DiT:
    """A model whose weights and adapters are all random."""
    dit = randomise(model())
    LoRA(rank=3, alpha=6.0, **choices).prepare(dit)
    generator = torch.Generator().manual_seed(1)
    for value in trained_parameters(dit).values():
        torch.nn.init.normal_(value, std=0.2, generator=generator)
    return dit


def test_new_adapters_change_no_bit():
    dit = randomise(model())
    before = outputs(dit)
    LoRA(rank=3, alpha=6.0).prepare(dit)
    assert torch.equal(outputs(dit), before)
    assert not torch.equal(outputs(adapted()), before)


def test_merged_weights_compute_what_the_adapters_compute():
    dit = adapted()
    expected = outputs(dit)
    plain = model()
    plain.load_state_dict(merged_weights(dit))
    difference = (outputs(plain) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 2e-6
    plain.load_state_dict(base_weights(dit))
    assert torch.equal(outputs(plain), outputs(randomise(model())))
    for name, adapter in adapters_of(dit).items():  # alpha / rank, written out
        delta = merged_weights(dit)[f"{name}.weight"] - base_weights(dit)[f"{name}.weight"]
        torch.testing.assert_close(delta, 2.0 * adapter.up @ adapter.down, rtol=1e-4, atol=1e-6)


def test_only_adapters_get_a_gradient():
    dit = adapted()
    outputs(dit).square().sum().backward()
    with_gradient = {name for name, p in dit.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == trained_parameters(dit).keys()
    assert all(value.dtype == torch.float32 for value in trained_parameters(dit).values())
    assert len(with_gradient) == 2 * 2 * 10  # A and B of ten linear layers in each of two blocks


def test_adapters_go_exactly_where_they_were_sent():
    """A refiner has blocks too, whose names end as those of the model's own blocks."""
    choices = {"depth": 3, "single_depth": 2, "refiner_depth": 2, "text": "joint", "text_embedding": "refiner"}
    dit = model(**choices, modulation="linear")
    assert any(name == "text_embedding.blocks.1.sublayers.0.operation.query" for name, _ in dit.named_modules())
    LoRA(targets=["blocks.1.*.query"]).prepare(dit)
    assert list(adapters_of(dit)) == ["blocks.1.sublayers.0.operation.query"]


def test_every_linear_layer_can_be_adapted():
    for choices in ({}, {"modulation": "linear", "head_modulation": "linear"}):
        dit = randomise(model(**choices))
        before = outputs(dit)
        LoRA(targets=["*"]).prepare(dit)
        assert torch.equal(outputs(dit), before)


def test_impossible_adapters_are_refused():
    with pytest.raises(ValueError, match=r"finetune\.targets: \*\.querry matches none of 28 names\. Near .*query"):
        LoRA(targets=["*.querry"]).prepare(model())
    with pytest.raises(ValueError, match=r"finetune\.rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"finetune\.dropout=1"):
        LoRA(dropout=1.0)
