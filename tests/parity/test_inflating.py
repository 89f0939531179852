"""An image model as a model of videos: in every frame it is what it was, and what is new can learn."""

import diffusers
import pytest
import torch

import kinema
from kinema.interop.importing import import_model
from kinema.models.dit import AttentionPattern, DiT

PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 32, "sample_size": 16, "caption_channels": 12,
}  # fmt: skip
INFLATED = [AttentionPattern.full, AttentionPattern.factorised, AttentionPattern.alternating]


@pytest.fixture(name="image")
def image_model(tmp_path):
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(**PIXART).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
    model.save_pretrained(tmp_path / "image")
    return model


def inflated(tmp_path, attention) -> DiT:
    import_model(tmp_path / "image", tmp_path / attention.name, inflate=attention)
    return kinema.load(tmp_path / attention.name)


def given(frames):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, frames, 6, 10, generator=g)
    return latents, torch.tensor([0.3, 0.8]), torch.randn(2, 5, 12, generator=g)


@pytest.mark.parametrize(("attention", "frames"), [(a, 1) for a in INFLATED] + [(a, 3) for a in INFLATED[1:]])
def test_every_frame_is_the_image_models(tmp_path, image, attention, frames):
    latents, timesteps, text = given(frames)
    found = torch.stack(inflated(tmp_path, attention).predict(list(latents), timesteps, list(text)))
    for frame in range(frames):
        expected = image(latents[:, :, frame], text, timesteps * 1000).sample
        assert (found[:, :, frame] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("attention", INFLATED)
def test_it_learns_to_see_time(tmp_path, image, attention):
    """A few steps later a frame depends on the others, and every parameter has moved."""
    model = inflated(tmp_path, attention).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    latents, timesteps, text = given(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        sum((x - 1).square().mean() for x in model.predict(list(latents), timesteps, list(text))).backward()
        optimizer.step()
    stuck = [n for n, p in model.named_parameters() if torch.equal(p, start[n]) and not n.endswith("key.bias")]
    assert stuck == []
    with torch.no_grad():
        before = model(list(latents), timesteps, list(text))[0]
        latents[:, :, 2] += 1
        after = model(list(latents), timesteps, list(text))[0]
    assert (after - before)[:, 0].abs().max() > 1e-4


def test_weights_in_space_are_the_image_models_to_the_bit(tmp_path, image):
    whole, apart = (inflated(tmp_path, a).state_dict() for a in (INFLATED[0], INFLATED[2]))
    assert whole.keys() == kinema.load(tmp_path / "image").state_dict().keys()
    assert all(torch.equal(whole[k], x) for k, x in kinema.load(tmp_path / "image").state_dict().items())
    assert torch.equal(apart["blocks.2.sublayers.2.operation.expand.weight"],
                       image.state_dict()["transformer_blocks.1.ff.net.0.proj.weight"])  # fmt: skip


@pytest.mark.parametrize("attention", [AttentionPattern.windowed])
def test_what_cannot_be_inflated_is_refused(tmp_path, image, attention):
    with pytest.raises(ValueError, match=r"--inflate windowed: type one of full, factorised, alternating"):
        inflated(tmp_path, attention)
    assert not (tmp_path / attention.name).exists()


def test_a_video_model_is_not_an_image_model(tmp_path):
    wan = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 12,
           "freq_dim": 16, "ffn_dim": 40, "num_layers": 1}  # fmt: skip
    diffusers.WanTransformer3DModel(**wan).save_pretrained(tmp_path / "wan")
    with pytest.raises(ValueError, match=r"--inflate is for models of images.*, not model\.rope=axes"):
        import_model(tmp_path / "wan", tmp_path / "to", inflate=AttentionPattern.full)
