"""The causal VAE: causality, streaming, legal sizes, latent statistics."""

import pytest
import torch
from torch import Tensor, nn

from kinema.models.vae import (
    CausalVAE,
    Convolution,
    LatentStatistics,
    Norm,
    Posterior,
    StreamState,
    TimePadding,
    VAEConfig,
    psnr,
)

CHUNK_PLANS = [[1, 4, 4, 4], [1, 8, 4], [1, 12], [5, 8], [13]]
VARIANTS = [
    {"convolution": Convolution.full, "time_padding": TimePadding.zeros},
    {"convolution": Convolution.factorised, "mid_attention": True},
    {"convolution": Convolution.alternating, "norm": Norm.rms, "decoder_res_blocks": 2},
]


def tiny(**settings: object) -> CausalVAE:
    torch.manual_seed(0)
    sizes = {"latent_channels": 5, "width": 8, "decoder_width": 12, "width_multipliers": [1, 2, 3]}
    vae = CausalVAE(VAEConfig(**{**sizes, **settings}))  # type: ignore[arg-type]
    for parameter in vae.parameters():  # a fresh VAE is nearly linear: make it less so, and biases non-zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    vae.set_latent_statistics(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5))
    return vae.eval()


def clip(frames: int = 13, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, T, H, W) = (2, 3, frames, 16, 24): every size its own."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, frames, 16, 24, generator=generator, dtype=dtype) * 2 - 1


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference beside the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("settings", VARIANTS)
@torch.no_grad()
def test_shapes_of_latents_and_video(settings):
    vae = tiny(**settings)
    posterior = vae.encode(clip())
    assert vae.geometry_strides == (4, 8)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *vae.latent_shape(13, 16, 24)) == (2, 5, 4, 2, 3)
    assert vae.decode(posterior.mean).shape == (2, 3, 13, 16, 24)


@pytest.mark.parametrize(
    ("spatial", "temporal", "patch", "multipliers"),
    [(4, 1, 1, [1, 1, 2]), (8, 8, 8, [1, 1, 1, 1]), (2, 2, 1, [1, 3])],
)
@torch.no_grad()
def test_other_strides(spatial, temporal, patch, multipliers):
    vae = tiny(spatial_stride=spatial, temporal_stride=temporal, pixel_patch=patch, width_multipliers=multipliers)
    frames = 2 * temporal + 1
    latents = vae.encode(clip(frames)).mean
    assert latents.shape == (2, 5, 3, 16 // spatial, 24 // spatial)
    assert vae.decode(latents).shape == (2, 3, frames, 16, 24)


@pytest.mark.parametrize("settings", VARIANTS)
@torch.no_grad()
def test_a_changed_frame_leaves_earlier_latents_bit_for_bit(settings):
    vae = tiny(**settings)
    video, latents = clip(), vae.encode(clip())
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] *= -1
        after = vae.encode(changed)
        first = (frame + 3) // 4  # the latent frame that stands for this frame
        assert torch.equal(after.mean[:, :, :first], latents.mean[:, :, :first])
        assert torch.equal(after.logvar[:, :, :first], latents.logvar[:, :, :first])
        assert not torch.equal(after.mean[:, :, first], latents.mean[:, :, first])


@pytest.mark.parametrize("settings", VARIANTS)
@torch.no_grad()
def test_a_changed_latent_leaves_earlier_decoded_frames_bit_for_bit(settings):
    vae = tiny(**settings)
    latents = vae.encode(clip()).mean
    video = vae.decode(latents)
    for t in range(1, 4):
        changed = latents.clone()
        changed[:, :, t] += 1
        after = vae.decode(changed)
        first = 4 * t - 3
        assert torch.equal(after[:, :, :first], video[:, :, :first])
        assert not torch.equal(after[:, :, first], video[:, :, first])


@pytest.mark.parametrize("plan", CHUNK_PLANS)
@pytest.mark.parametrize("settings", VARIANTS)
@torch.no_grad()
def test_streaming_equals_the_whole_clip_whatever_the_chunks(settings, plan):
    """To rounding: a matrix product of another number of rows may add in another order."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        vae = tiny(**settings).to(dtype)
        video = clip(dtype=dtype)
        whole = vae.encode(video)
        parts = list(vae.encode_chunks(video.split(plan, dim=2)))
        for field in ("mean", "logvar"):
            streamed = torch.cat([getattr(part, field) for part in parts], dim=2)
            assert relative_difference(streamed, getattr(whole, field)) <= tolerance

        latent_plan = [(frames + 3) // 4 for frames in plan]
        decoded = list(vae.decode_chunks(whole.mean.split(latent_plan, dim=2)))
        assert [part.shape[2] for part in decoded] == plan
        assert relative_difference(torch.cat(decoded, dim=2), vae.decode(whole.mean)) <= tolerance


@torch.no_grad()
def test_two_streams_of_one_vae_do_not_meet():
    vae, one, two = tiny(), clip(), clip().flip(2)
    states = StreamState(), StreamState()
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunks in zip(one.split([1, 4, 8], dim=2), two.split([1, 4, 8], dim=2), strict=True):
        for part, chunk, state in zip(parts, chunks, states, strict=True):
            part += [posterior.mean for posterior in vae.encode_chunks([chunk], state)]
    assert relative_difference(torch.cat(parts[0], dim=2), vae.encode(one).mean) <= 1e-5
    assert relative_difference(torch.cat(parts[1], dim=2), vae.encode(two).mean) <= 1e-5


@torch.no_grad()
def test_the_first_frame_alone_is_the_first_latent_of_its_clip():
    for settings in VARIANTS:
        vae = tiny(**settings)
        whole, alone = vae.encode(clip()), vae.encode(clip()[:, :, :1])
        assert relative_difference(alone.mean, whole.mean[:, :, :1]) <= 1e-5
        torch.testing.assert_close(vae.decode(alone.mean), vae.decode(whole.mean)[:, :, :1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_grey_ramp_has_one_latent_on_every_path():
    """As an image, as the first frame of a video, streamed, and as a still video (its frames repeat)."""
    vae = tiny()
    ramp = torch.linspace(-1, 1, 24).expand(1, 3, 1, 16, 24)
    still = ramp.expand(-1, -1, 9, -1, -1)
    image = vae.encode(ramp).mean
    assert image.std() > 0.1
    video = vae.encode(still).mean
    streamed = next(iter(vae.encode_chunks(still.split([1, 8], dim=2)))).mean
    for t in range(3):
        assert relative_difference(video[:, :, t : t + 1], image) <= 1e-5
    assert relative_difference(streamed, image) <= 1e-5


@pytest.mark.parametrize(("frames", "legal"), [(4, "1 or 5"), (12, "9 or 13"), (16, "13 or 17"), (2, "1 or 5")])
def test_illegal_frame_counts_name_the_nearest_legal(frames, legal):
    with pytest.raises(ValueError, match=rf"frames={frames}.*vae.temporal_stride=4.*use {legal}"):
        tiny().encode(clip(frames))


def test_illegal_chunks_and_sides_name_the_nearest_legal():
    vae, state = tiny(), StreamState()
    list(vae.encode_chunks([clip(5)], state))
    with pytest.raises(ValueError, match=r"frames=5.*after the first chunk; use 4 or 8"):
        list(vae.encode_chunks([clip(5)], state))
    with pytest.raises(ValueError, match=r"height=12: vae.spatial_stride=8 must divide it; use 8 or 16"):
        vae.encode(clip()[..., :12, :])
    with pytest.raises(ValueError, match=r"width=7: .* use 8$"):
        vae.encode(clip()[..., :7])


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ((clip() + 1) * 127.5, r"\[-1, 1\], these lie in"),
        (((clip() + 1) * 127.5).to(torch.uint8), "float videos"),
        (clip()[:, :2], "float videos"),
        (clip()[0], "float videos"),
        (torch.full((1, 3, 1, 8, 8), float("nan")), r"these lie in \[nan"),
    ],
)
def test_every_way_in_refuses_pixels_of_another_kind(video, message):
    vae = tiny()
    noise = torch.zeros(2, 5, 4, 2, 3)
    for way_in in (
        vae.encode,
        vae.encode_unnormalised,
        lambda v: vae(v, noise),
        lambda v: next(vae.encode_chunks([v])),
    ):
        with pytest.raises(ValueError, match=message):
            way_in(video)


def test_latents_of_another_width_are_refused():
    for way_in in (tiny().decode, lambda latents: next(tiny().decode_chunks([latents]))):
        with pytest.raises(ValueError, match=r"vae\.latent_channels=5"):
            way_in(torch.zeros(1, 4, 2, 2, 2))


@torch.no_grad()
def test_measured_statistics_normalise_latents_to_mean_0_and_std_1():
    vae, video = tiny(), clip()
    raw = vae.encode_unnormalised(video)
    drawn = torch.cat([raw.sample(torch.randn_like(raw.mean)) for _ in range(500)])  # the slow way
    statistics = LatentStatistics(5)
    statistics.update(raw)
    mean, std = statistics.mean_and_std()
    torch.testing.assert_close(mean, drawn.mean((0, 2, 3, 4)), rtol=0, atol=0.02)
    torch.testing.assert_close(std, drawn.std((0, 2, 3, 4)), rtol=0.02, atol=0)

    vae.set_latent_statistics(mean, std)
    after = LatentStatistics(5)
    after.update(vae.encode(video))
    torch.testing.assert_close(after.mean_and_std()[0], torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.mean_and_std()[1], torch.ones(5), rtol=0, atol=1e-5)


def test_statistics_of_parts_add_up_to_those_of_all():
    parts, whole = LatentStatistics(5), LatentStatistics(5)
    mean, logvar = torch.randn(4, 5, 2, 3, 3), torch.randn(4, 5, 2, 3, 3)
    whole.update(Posterior(mean, logvar))
    for i in range(4):
        one = LatentStatistics(5)
        one.update(Posterior(mean[i : i + 1], logvar[i : i + 1]))
        parts.totals += one.totals
    torch.testing.assert_close(parts.mean_and_std(), whole.mean_and_std())
    with pytest.raises(ValueError, match="no clips"):
        LatentStatistics(5).mean_and_std()


@torch.no_grad()
def test_decode_takes_back_exactly_the_normalisation_that_encode_applies():
    vae, video = tiny().double(), clip(dtype=torch.float64)
    raw, normalised = vae.encode_unnormalised(video), vae.encode(video)
    mean, std = vae.latent_mean.view(-1, 1, 1, 1), vae.latent_std.view(-1, 1, 1, 1)
    torch.testing.assert_close(normalised.mean * std + mean, raw.mean)
    torch.testing.assert_close(normalised.logvar.exp().sqrt() * std, raw.logvar.exp().sqrt())
    reconstruction, posterior = vae(video, torch.zeros_like(raw.mean))  # training: no statistics
    torch.testing.assert_close(posterior.mean, raw.mean)
    torch.testing.assert_close(vae.decode(normalised.mean), reconstruction)


@torch.no_grad()
def test_statistics_survive_the_state_dict():
    vae, other = tiny(), CausalVAE(tiny().config)
    assert not torch.equal(other.encode(clip()).mean, vae.encode(clip()).mean)
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.latent_std, torch.linspace(0.5, 2, 5))
    assert torch.equal(other.encode(clip()).mean, vae.encode(clip()).mean)


@pytest.mark.parametrize(("mean", "std"), [(torch.zeros(4), torch.ones(4)), (torch.zeros(5), torch.zeros(5))])
def test_impossible_statistics_are_refused(mean, std):
    with pytest.raises(ValueError, match="latent statistics"):
        tiny().set_latent_statistics(mean, std)


def test_kl_is_that_of_torch_distributions_and_so_is_its_gradient():
    torch.manual_seed(0)
    mean = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    expected = exact.flatten(1).mean(1)
    actual = Posterior(mean, logvar).kl()
    torch.testing.assert_close(actual, expected)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    ours = torch.autograd.grad((actual * weights).sum(), [mean, logvar])
    theirs = torch.autograd.grad((expected * weights).sum(), [mean, logvar])
    torch.testing.assert_close(ours, theirs)


def test_samples_have_the_mean_and_variance_of_the_posterior():
    torch.manual_seed(0)
    posterior = Posterior(torch.tensor([[-1.0, 2.0]]), torch.tensor([[-2.0, 1.0]]))
    draws = torch.stack([posterior.sample(torch.randn(1, 2)) for _ in range(20000)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.var(0).log(), posterior.logvar, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="noise has shape"):
        posterior.sample(torch.randn(2, 2))


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_parameter_of_a_new_vae_has_a_gradient(settings):
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(latent_channels=5, width=8, decoder_width=12, **settings))
    reconstruction, posterior = vae(clip(), torch.randn(2, 5, 4, 2, 3))
    ((reconstruction - clip()).abs().mean() + 1e-3 * posterior.kl().mean()).backward()
    dead = [name for name, p in vae.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


@torch.no_grad()
def test_a_new_vae_passes_plain_colours_on():
    """Whatever its widths, and as far as its small random branches let it: blocks of colour come back."""
    blocks = torch.rand(1, 3, 2, 4, 5) * 2 - 1
    video = blocks.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4).repeat_interleave(4, dim=2)[:, :, 3:]
    for settings in VARIANTS:
        torch.manual_seed(0)
        vae = CausalVAE(VAEConfig(latent_channels=5, width=8, decoder_width=12, **settings))
        reconstruction, posterior = vae(video, torch.zeros(1, 5, 2, 4, 5))
        assert psnr(reconstruction, video)[:, 1:].min() > 20  # zeros before frame 0 darken it in one variant
        assert posterior.logvar.mean().round() == -5


def test_convolutions_equal_plain_conv3d():
    """The fast forms for flat kernels against torch's own convolution of the padded clip, gradients too."""
    from kinema.models.vae.layers import CausalConv

    torch.manual_seed(0)
    shapes = [
        ((1, 3, 3), (1, 2, 2)),
        ((3, 1, 1), (1, 1, 1)),
        ((3, 1, 1), (2, 1, 1)),
        ((3, 3, 3), (1, 1, 1)),
        ((1, 1, 1), (1, 1, 1)),
    ]
    for kernel, stride in shapes:
        layer = CausalConv(4, 6, kernel, stride, TimePadding.first).double()
        plain = nn.Conv3d(4, 6, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2)).double()
        plain.load_state_dict(layer.conv.state_dict())
        x = torch.randn(2, 4, 5, 6, 8, dtype=torch.float64, requires_grad=True)
        padded = torch.cat([x[:, :, :1]] * (kernel[0] - 1) + [x], dim=2)
        actual, expected = layer(x), plain(padded)
        torch.testing.assert_close(actual, expected)
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(actual, [x, *layer.parameters()], upstream)
        theirs = torch.autograd.grad(expected, [x, *plain.parameters()], upstream)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_stride": 6}, "vae.spatial_stride=6 must be a power of two"),
        ({"temporal_stride": 0}, "vae.temporal_stride=0 must be a power of two"),
        ({"pixel_patch": 16}, "vae.pixel_patch=16 must be at most"),
        ({"width_multipliers": [1, 2]}, r"vae.width_multipliers=\[1, 2\] needs 3 entries"),
        ({"latent_channels": 0}, "vae.latent_channels=0"),
    ],
)
def test_impossible_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**settings)


def test_flops_match_a_count_by_hand():
    config = VAEConfig(
        latent_channels=2,
        width=4,
        decoder_width=4,
        width_multipliers=[1],
        spatial_stride=2,
        temporal_stride=1,
        pixel_patch=2,
        convolution=Convolution.full,
    )
    frames, height, width = 3, 8, 6
    pixels = frames * (height // 2) * (width // 2)
    block = 2 * 27 * 4 * 4
    encoder = 27 * 12 * 4 + block + (27 + 1) * 4 * 4
    decoder = 27 * 2 * 4 + block + (27 + 1) * 4 * 12
    assert CausalVAE(config).flops(frames, height, width) == (2 * pixels * encoder, 2 * pixels * decoder)
