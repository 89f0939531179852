"""A VAE inflated from an image model: one frame, and every frame of a video, as the image model has it."""

import diffusers
import pytest
import torch

from kinema.interop.presets.image_vae import inflate


def image_model(**settings: object) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=[8, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        scaling_factor=0.6,
        **settings,
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("settings", [{"shift_factor": 0.2}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@torch.no_grad()
def test_one_frame_is_the_image_and_every_frame_too_where_time_is_not_halved(settings):
    model = image_model(**settings)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    scale, shift = 0.6, settings.get("shift_factor", 0.0)
    expected = model.encode(image).latent_dist
    for stride in (1, 4):
        vae = inflate(dict(model.config), model.state_dict(), temporal_stride=stride)
        video = image[:, :, None].expand(-1, -1, 1 + 2 * stride, -1, -1)
        for frames in (video[:, :, :1], video):
            posterior = vae.encode(frames)
            for t in range(posterior.mean.shape[2]):
                torch.testing.assert_close(posterior.mean[:, :, t], (expected.mean - shift) * scale, rtol=0, atol=1e-5)
            decoded = vae.decode(posterior.mean)
            for t in range(decoded.shape[2]):
                torch.testing.assert_close(decoded[:, :, t], model.decode(expected.mean).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_moving_frames_are_encoded_one_by_one():
    model = image_model()
    vae = inflate(dict(model.config), model.state_dict(), temporal_stride=1)
    video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    latents = vae.encode(video).mean
    for t in range(5):
        torch.testing.assert_close(latents[:, :, t], model.encode(video[:, :, t]).latent_dist.mean * 0.6)


def test_what_does_not_fit_is_named():
    model = image_model()
    tensors = model.state_dict()
    del tensors["encoder.conv_out.weight"]
    with pytest.raises(ValueError, match=r"lacks the tensors for encoder\.output\.conv\.conv\.weight"):
        inflate(dict(model.config), tensors, temporal_stride=4)
    with pytest.raises(ValueError, match="act_fn=relu: only silu"):
        inflate(dict(model.config) | {"act_fn": "relu"}, model.state_dict(), temporal_stride=4)
