"""Two DiTs by noise level: each clip goes to the one of its timestep, and one at a time is trained."""

import dataclasses

import pytest
import torch
from torch import nn

from kinema.diffusion.objective import RectifiedFlow
from kinema.models.dit import DiT, DiTConfig, Expert, Experts, Extras, join_experts, make_denoiser, split_experts
from kinema.training.dit_task import DiTTask

CONFIG = DiTConfig(
    width=24, depth=1, num_heads=2, mlp_ratio=2.0, rope_axes=[4, 4, 4], condition_channels=2, expert_boundary=0.875
)


def experts(**changes) -> Experts:
    torch.manual_seed(0)
    model = make_denoiser(dataclasses.replace(CONFIG, **changes), 5, 7)
    assert isinstance(model, Experts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pack():
    g = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 6), (3, 2, 4), (2, 4, 6), (1, 6, 2)]
    latents = [torch.randn(5, *shape, generator=g) for shape in shapes]
    channels = [torch.randn(2, *shape, generator=g) for shape in shapes]
    return latents, [torch.randn(n, 7, generator=g) for n in (3, 1, 2, 2)], Extras(channels=channels)


def test_a_clip_goes_to_the_expert_of_its_timestep():
    model, (latents, text, extras) = experts(), pack()
    timesteps = torch.tensor([0.9, 0.1, 0.874, 0.875])  # the boundary itself is high
    for i, prediction in enumerate(model(latents, timesteps, text, extras)):
        expert = model.high if i in (0, 3) else model.low
        (alone,) = expert([latents[i]], timesteps[i : i + 1], [text[i]], extras.take([i]))
        torch.testing.assert_close(prediction, alone)


def test_the_noisiest_frame_of_a_clip_decides():
    model, (latents, text, extras) = experts(), pack()
    times = [torch.tensor([0.0, 0.9])]
    (prediction,) = model(latents[:1], times, text[:1], extras.take([0]))
    assert torch.equal(prediction, model.high(latents[:1], times, text[:1], extras.take([0]))[0])


@pytest.mark.parametrize("expert", [Expert.high, Expert.low])
def test_a_training_moves_one_expert_alone(expert):
    model, (latents, text, extras) = experts(expert=expert), pack()
    low, high = model.config.timestep_range
    timesteps = low + (high - low) * torch.tensor([0.1, 0.4, 0.7, 0.99])
    sum(out.square().mean() for out in model(latents, timesteps, text, extras)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is name.startswith(f"{expert.name}.")
        assert (parameter.grad is not None) is parameter.requires_grad


@pytest.mark.parametrize(("expert", "shift"), [(Expert.high, 3.0), (Expert.low, 1.0)])
def test_its_timesteps_are_the_objectives_own_within_its_range(expert, shift):
    objective = RectifiedFlow(timestep_shift=shift)
    task = DiTTask.__new__(DiTTask)  # the draw alone
    task.objective, task.timestep_range = objective, dataclasses.replace(CONFIG, expert=expert).timestep_range
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([task.timestep(generator, 10) for _ in range(2000)])
    low, high = task.timestep_range
    everywhere = objective.sample_timesteps(40000, torch.Generator().manual_seed(1), [10] * 40000)
    inside = everywhere[(everywhere >= low) & (everywhere < high)]
    assert bool(((drawn >= low) & (drawn < high)).all())
    for share in (0.25, 0.5, 0.75):
        torch.testing.assert_close(drawn.quantile(share), inside.quantile(share), atol=0.02, rtol=0)


def test_a_range_that_the_objective_never_draws_is_an_error():
    task = DiTTask.__new__(DiTTask)
    task.objective, task.timestep_range = RectifiedFlow(timestep_shift=1e-6), (0.875, 1.0)
    with pytest.raises(ValueError, match=r"the range of model\.expert.*objective\.timestep_shift"):
        task.timestep(torch.Generator().manual_seed(0), 10)


def test_tensors_are_joined_and_split():
    model = experts()
    high, low = split_experts(model.state_dict())
    assert high.keys() == model.high.state_dict().keys()
    assert join_experts(high, low).keys() == model.state_dict().keys()
    assert isinstance(make_denoiser(dataclasses.replace(CONFIG, expert_boundary=0.0), 5, 7), DiT)


def test_attention_is_replaced_in_both():
    model, calls = experts(), []

    def counting(present):
        def counted(*args, **kwargs):
            calls.append(present)
            return present(*args, **kwargs)

        return counted

    model.replace_attention(counting)
    latents, text, extras = pack()
    model(latents, torch.tensor([0.9, 0.1, 0.2, 0.95]), text, extras)
    assert len(calls) == 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_boundary": 1.0}, r"model\.expert_boundary=1\.0"),
        ({"expert_boundary": 0.0, "expert": Expert.high}, r"model\.expert=high needs two experts"),
    ],
)
def test_choices_without_two_experts_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
