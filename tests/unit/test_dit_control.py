"""The control tower: a new one changes nothing, a filled one reaches exactly its layers, and its work is counted."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.dit import DiT, DiTConfig, Extras

SHAPES = [(2, 4, 6), (4, 2, 4)]


def towered(layers=(0, 2), dtype=torch.float64, random=True):
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 3, "num_heads": 2, "rope_axes": [4, 4, 4]}
    config = DiTConfig(**sizes, control_layers=list(layers), control_channels=3 if layers else 0)
    model = DiT(config, 5, 7).to(dtype)
    for parameter in model.parameters() if random else []:
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    latents, text = [draw(5, *shape) for shape in SHAPES], [draw(4, 7), draw(2, 7)]
    return latents, torch.tensor([0.3, 0.8], dtype=dtype), text, Extras(control=[draw(3, *s) for s in SHAPES])


def test_a_model_with_a_new_tower_is_the_model_without():
    with_tower, without = towered(random=False), towered(layers=(), random=False)
    for parameter in without.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert {name.split(".")[0] for name in with_tower.state_dict().keys() - without.state_dict().keys()} == {"control"}
    with_tower.load_state_dict({**with_tower.state_dict(), **without.state_dict()})
    latents, timesteps, text, control = inputs()
    for a, b in zip(with_tower(latents, timesteps, text, control), without(latents, timesteps, text), strict=True):
        assert torch.equal(a, b)


def test_a_new_tower_learns_past_its_zeros():
    model = towered(random=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        latents, timesteps, text, control = inputs()
        predictions = model(latents, timesteps, text, control)
        sum((out - x).square().mean() for out, x in zip(predictions, latents, strict=True)).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


def test_a_pack_with_controls_equals_its_clips_one_by_one():
    model, (latents, timesteps, text, control) = towered(), inputs()
    for i, together in enumerate(model(latents, timesteps, text, control)):
        (alone,) = model([latents[i]], timesteps[i : i + 1], [text[i]], control.take([i]))
        torch.testing.assert_close(together, alone)


def test_a_hint_reaches_the_video_after_its_layer_only():
    model, (latents, timesteps, text, control) = towered(), inputs()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given[0]["video"], out["video"])))
    model(latents, timesteps, text, control)
    assert [torch.equal(seen[i][1], seen[i + 1][0]) for i in range(2)] == [False, True]


def test_the_towers_flops_are_counted():
    model = towered(dtype=torch.float32)
    latents, timesteps, text, control = inputs(torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents[:1], timesteps[:1], text[:1], control.take([0]))
    assert counter.get_total_flops() == model.flops((2, 2, 3), 4)
