"""The choices of published autoencoders: what is refused, why, and what the counts of operations say."""

import pytest
import torch

from kinema.models.vae import (
    Attention,
    CausalVAE,
    Convolution,
    Halving,
    Norm,
    Resampling,
    SpacePadding,
    StreamState,
    VAEConfig,
    decode_tiled,
    encode_tiled,
)
from kinema.models.vae.layers import CausalAttention, LayerChoices, TimePadding

SMALL = {"latent_channels": 4, "width": 8, "decoder_width": 8, "convolution": Convolution.full}
CHOICES = LayerChoices(Convolution.full, Norm.length, 4, TimePadding.zeros, SpacePadding.zeros, causal=True)


def test_what_looks_ahead_says_so_and_is_not_streamed():
    vae = CausalVAE(VAEConfig(**SMALL, norm=Norm.group, norm_groups=4))
    reason = r"cannot encode in chunks: vae\.norm=group takes its statistics over all frames"
    with pytest.raises(ValueError, match=reason):
        next(vae.encode_chunks([torch.zeros(1, 3, 1, 16, 16)]))
    vae = CausalVAE(VAEConfig(**SMALL, decoder_causal=False))
    assert vae.config.encoder_looks_ahead() is None
    with pytest.raises(ValueError, match=r"cannot decode in chunks: vae\.decoder_causal=false"):
        next(vae.decode_chunks([torch.zeros(1, 4, 1, 2, 2)]))


@pytest.mark.parametrize("norm", [Norm.group, Norm.group_frame])
def test_norms_over_whole_frames_refuse_tiles(norm):
    vae = CausalVAE(VAEConfig(**SMALL, norm=norm, norm_groups=4))
    with pytest.raises(ValueError, match=rf"cannot work in tiles: vae\.norm={norm.value}"):
        encode_tiled(vae, torch.zeros(1, 3, 1, 64, 64), 32, 8)
    with pytest.raises(ValueError, match=rf"cannot work in tiles: vae\.norm={norm.value}"):
        decode_tiled(vae, torch.zeros(1, 4, 1, 8, 8), 32, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"halvings": [Halving.space]}, r"vae\.width_multipliers=\[1, 2, 2\] needs 2"),
        ({"decoder_halvings": [Halving.space, Halving.both]}, r"vae\.decoder_halvings=.* halves time 1 and space 2"),
        ({"res_blocks_by_level": [1, 1]}, r"vae\.res_blocks_by_level=\[1, 1\] needs 3 entries"),
        ({"up_halves_channels": True}, r"vae\.up_halves_channels=true has no place in vae\.up=separate"),
        ({"stage_shortcuts": True, "up": Resampling.packed_alone}, r"vae\.stage_shortcuts=true beside .*packed"),
        ({"latent_shortcut": True, "shared_logvar": True}, r"needs vae\.shared_logvar=false"),
        ({"norm": Norm.group, "norm_groups": 3}, r"vae\.norm_groups: 3 channels or groups must divide 64"),
        ({"down": Resampling.packed_alone, "width": 9}, r"vae\.width_multipliers: 8 channels or groups must divide 18"),
    ],
)
def test_impossible_choices_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**settings)


@torch.no_grad()
def test_causal_attention_is_attention_under_a_mask():
    torch.manual_seed(0)
    layer = CausalAttention(6, CHOICES).double()
    x = torch.randn(2, 6, 4, 2, 3, dtype=torch.float64)
    tokens = layer.norm(x).movedim(1, -1).flatten(1, 3)
    query, key, value = layer.qkv(tokens).chunk(3, dim=-1)
    frame = torch.arange(24) // 6
    scores = (query @ key.mT / 6**0.5).masked_fill(frame[:, None] < frame, -torch.inf)
    expected = x + layer.out(scores.softmax(-1) @ value).unflatten(1, (4, 2, 3)).movedim(-1, 1)
    torch.testing.assert_close(layer(x), expected)
    state = StreamState()
    streamed = torch.cat([layer(part, state) for part in x.split([1, 2, 1], dim=2)], dim=2)
    torch.testing.assert_close(streamed, expected)


@torch.no_grad()
def test_the_output_is_clamped_where_asked_and_never_in_training():
    vae = CausalVAE(VAEConfig(**SMALL, clamp_output=True))
    latents = torch.full((1, 4, 1, 2, 2), 50.0)
    assert vae.decode(latents).abs().max() == 1
    assert next(vae.decode_chunks([latents])).abs().max() == 1
    video = torch.ones(1, 3, 1, 16, 16)
    noise = torch.full((1, 4, 1, 2, 2), 1e4)
    assert vae(video, noise)[0].abs().max() > 1


def test_flops_count_attention_and_packed_steps():
    """By hand: one step, one level each side, 4 frames and sides of 8 x 4 pixels."""
    config = VAEConfig(
        latent_channels=2,
        spatial_stride=2,
        temporal_stride=1,
        pixel_patch=1,
        width=4,
        decoder_width=4,
        width_multipliers=[1, 1],
        convolution=Convolution.full,
        mid_attention=True,
        attention=Attention.causal,
        down=Resampling.packed_repeat,
        up=Resampling.packed_repeat,
        linear_output=False,
    )
    frames, large, small, c = 4, 8 * 4, 4 * 2, 4
    block = 2 * 27 * c * c
    attention = frames * small * 4 * c * c + 2 * c * small**2 * frames * (frames + 1) // 2
    encoder = frames * (large * (27 * 3 * c + block + 27 * c * 1) + small * (block + block + 27 * c * 4)) + attention
    decoder = (
        frames * (small * (27 * 2 * c + block + block + 27 * c * 4 * c) + large * (block + 27 * c * 3)) + attention
    )
    assert CausalVAE(config).flops(frames, 8, 4) == (2 * encoder, 2 * decoder)
