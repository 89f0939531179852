"""Given frames: what reaches the transformer is what the published pipelines give theirs, bit for bit."""

from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import kinema
from kinema.conditioning.frames import CleanFrame, ClipSize, FrameChannels, FrameCondition, Given, PaddedClip
from kinema.conditioning.image import ImageEncoder, ImageTokens, check_image_policy
from kinema.data.geometry import ClipShape
from kinema.interop.importing import import_model
from kinema.sampling.pipeline import initial_noise
from tests.parity.published import WAN, WAN_VAE, randomise, tokenizer, umt5

PIXELS = (9, 32, 48)


def images(count: int = 2) -> list[Tensor]:
    """Pictures (3, H, W) in [-1, 1]."""
    g = torch.Generator().manual_seed(0)
    return [torch.rand(3, *PIXELS[1:], generator=g) * 2 - 1 for _ in range(count)]


def ours(condition: FrameCondition, given: list[Tensor], encode) -> Given:
    return condition.of_images(given, ClipSize(PIXELS, (4, 3, 4, 6), 4), lambda video: encode(video[None])[0])


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def wan(expand_timesteps: bool = False):
    vae = diffusers.AutoencoderKLWan(**WAN_VAE).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, expand_timesteps=expand_timesteps
    )
    mean, std = (torch.tensor(WAN_VAE[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return pipeline, lambda video: (vae.encode(video).latent_dist.mode() - mean) * (1 / std)


@pytest.mark.parametrize("last", [False, True])
def test_wan_21_image_and_first_and_last(last):
    pipeline, encode = wan()
    first, other = images()
    _, expected = pipeline.prepare_latents(
        first[None], 1, 4, 32, 48, 9, torch.float32, torch.device("cpu"), None, None, other[None] if last else None
    )
    given = ours(PaddedClip(last=last), [first, other][: 1 + last], encode)
    assert expected.shape == (1, PaddedClip().channels(4, 4), 3, 4, 6)
    assert torch.equal(given.channels, expected[0])
    assert given.frames is None


def test_wan_22_text_and_image_to_video():
    pipeline, encode = wan(expand_timesteps=True)
    (image,) = images(1)
    _, expected, mask = pipeline.prepare_latents(image[None], 1, 4, 32, 48, 9, torch.float32, torch.device("cpu"))
    given = ours(CleanFrame(), [image], encode)
    assert given.frames.shape == (4, 1, 4, 6)
    assert torch.equal(given.frames, expected[0])
    assert mask[0, 0, :, 0, 0].tolist() == [0, 1, 1]
    assert given.channels is None


def hunyuan_vae():
    config = {"latent_channels": 4, "block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "norm_num_groups": 4}
    vae = diffusers.AutoencoderKLHunyuanVideo(**config, scaling_factor=0.8).eval()
    return vae, lambda video: vae.encode(video).latent_dist.mode() * 0.8


class Stop(Exception):
    """The first call of a transformer has been seen."""


class Transformer(torch.nn.Module):
    """Holds what it was asked, as a published transformer would get it."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, **config) -> None:
        super().__init__()
        self.config = diffusers.configuration_utils.FrozenDict(config)

    def forward(self, hidden_states, **_):
        self.seen = hidden_states
        raise Stop


def test_hunyuan_video(monkeypatch):
    vae, encode = hunyuan_vae()
    transformer = Transformer(
        in_channels=9, out_channels=4, image_condition_type="latent_concat", guidance_embeds=False
    )
    pipeline = diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=None, vae=vae, text_encoder_2=None, tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), image_processor=None,
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "transformer", transformer)
    (image,) = images(1)
    words = {"prompt_embeds": torch.zeros(1, 3, 8), "pooled_prompt_embeds": torch.zeros(1, 8),
             "prompt_attention_mask": torch.ones(1, 3)}  # fmt: skip
    with pytest.raises(Stop):
        pipeline((image[None] + 1) / 2, height=32, width=48, num_frames=9, num_inference_steps=1, true_cfg_scale=1.0,
                 latents=torch.zeros(1, 4, 3, 4, 6), **words)  # fmt: skip
    given = ours(FrameChannels(), [image], encode)
    assert given.channels.shape == (FrameChannels().channels(4, 4), 3, 4, 6)
    torch.testing.assert_close(given.channels, transformer.seen[0, 4:], rtol=0, atol=1e-6)  # (x + 1) / 2 and back


def test_hunyuan_video_15():
    vae, encode = hunyuan_vae()
    given = ours(FrameChannels(), images(1), encode)

    class Processor:
        def preprocess(self, image, height, width):
            return image[None]

    class Pipeline(diffusers.HunyuanVideo15ImageToVideoPipeline):
        def __init__(self):
            self.vae, self.video_processor = vae, Processor()

    latents, mask = Pipeline.prepare_cond_latents_and_mask(
        Pipeline(), torch.zeros(1, 4, 3, 4, 6), images(1)[0], 1, 32, 48, torch.float32, torch.device("cpu")
    )
    assert torch.equal(given.channels, torch.cat([latents, mask], dim=1)[0])


def test_without_an_image_the_channels_are_those_of_hunyuan_video_15_for_text():
    """Zeros, mask and all; of Wan's padded clip the grey latents remain, with a mask of zeros."""
    encode = hunyuan_vae()[1]
    assert ours(FrameChannels(), [], encode).channels.eq(0).all()
    grey = ours(PaddedClip(), [], encode).channels
    assert grey[:4].eq(0).all()
    assert torch.equal(grey[4:], encode(torch.zeros(1, 3, *PIXELS))[0])


def test_cogvideox(monkeypatch):
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip
    # The pipeline draws from the posterior; Kinema takes its mean.
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=4, num_layers=1, text_embed_dim=8
    )
    pipeline = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    (image,) = images(1)
    _, expected = pipeline.prepare_latents(image[None], 1, 4, 9, 32, 48, torch.float32, torch.device("cpu"))
    given = ours(FrameChannels(mask=False), [image], lambda video: vae.encode(video).latent_dist.mode() * 0.7)
    assert given.channels.shape == (FrameChannels(mask=False).channels(4, 4), 3, 4, 6)
    assert torch.equal(given.channels, expected[0].transpose(0, 1))


# Whole pipelines, step for step

SHAPE = ClipShape(5, 32, 48)
WAN_KINDS = {
    "2.1": {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 32},
    "2.1, first and last": {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 32, "pos_embed_seq_len": 10},
    "2.2": {"in_channels": 12},
    "2.2, text and image": {},
}


def clip_vision():
    """An image encoder of five tokens, and its preprocessing."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return randomise(CLIPVisionModel(config)), processor


def picture(seed: int) -> Tensor:
    return torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", WAN_KINDS)
def test_an_imported_image_pipeline_samples_as_the_published_one(tmp_path, kind):
    config = WAN_KINDS[kind]
    with torch.enable_grad():
        encoder, processor = clip_vision() if "image_dim" in config else (None, None)
        whole = diffusers.WanImageToVideoPipeline(
            tokenizer=tokenizer(), text_encoder=umt5(), vae=randomise(diffusers.AutoencoderKLWan(**WAN_VAE)),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=randomise(diffusers.WanTransformer3DModel(**WAN | config)), image_encoder=encoder,
            image_processor=processor, expand_timesteps=kind == "2.2, text and image",
        )  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    whole.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    ours = kinema.load(tmp_path / "run")

    given = torch.stack([picture(0), picture(1)][: ours.condition.num_images()])
    assert len(given) == (2 if "pos_embed_seq_len" in config else 1)
    pictures = dict(zip(("image", "last_image"), (Image.fromarray(x.numpy()) for x in given), strict=False))
    settings = replace(ours.sampling, seed=7, num_steps=4, negative_prompt="blurry grey")
    expected = []
    whole(
        **pictures, prompt="a red circle", negative_prompt="blurry grey", height=32, width=48, num_frames=5,
        num_inference_steps=4, latents=initial_noise((4, 2, 4, 6), 7)[None], output_type="latent",
        callback_on_step_end=lambda pipe, step, time, values: expected.append(values["latents"][0].clone()) or {},
    )  # fmt: skip
    inputs = []
    ours.denoiser.register_forward_pre_hook(lambda module, call: inputs.append(call[0][0].clone()))
    result = ours.latents(["a red circle"], SHAPE, settings, images=[given])[0]
    free = ours.conditions(["a red circle"], SHAPE, settings, [given])[
        0
    ].num_frames  # the published loop lets given frames drift
    for actual, reference in zip([*inputs[1:], result], expected, strict=True):
        assert (actual - reference)[:, free:].abs().max() <= 1e-5 * reference.abs().max()
    other = ours.latents(["a red circle"], SHAPE, settings, images=[given.flip(1)])[0]
    assert (other - result)[:, free:].abs().max() > 1e-4 * result.abs().max()


def test_an_image_encoder_makes_the_tokens_of_the_published_pipeline(tmp_path):
    encoder, processor = clip_vision()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipeline, _ = wan()
    pipeline.image_encoder, pipeline.image_processor = encoder, processor
    given = torch.stack([picture(0), picture(1)])
    expected = pipeline.encode_image([Image.fromarray(x.numpy()) for x in given], torch.device("cpu"))
    ours = ImageEncoder(ImageTokens(path=str(tmp_path)))
    assert (ours.width, ours.num_tokens) == (16, 5)
    assert torch.equal(ours.encode(given), expected.flatten(0, 1))
    assert ours.nothing(2).shape == (10, 16)
    check_image_policy(ours, ours.policy())
    with pytest.raises(ValueError, match=r"layer=-2 \(trained with -1\)"):
        check_image_policy(ours, ours.policy() | {"layer": -1})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"condition\.image\.path=.* cannot be read"):
        ImageEncoder(ImageTokens(path=str(tmp_path)))
