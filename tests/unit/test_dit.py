"""The DiT: a new one is the identity, nothing is dead or rounded away. Packs: test_packs.py."""

import copy
import itertools
import math
import random
import re
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.attention import attention
from kinema.models.dit import (
    Activation,
    AttentionPattern,
    CrossNorm,
    DiT,
    DiTConfig,
    Extras,
    HeadModulation,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    QKNorm,
    Rope,
    Sound,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.conditioning import (
    Condition,
    LinearModulation,
    TableModulation,
    sinusoids,
)
from kinema.models.dit.layers import HeadShape, JointAttention, Stream
from kinema.models.dit.modulating import gated_sum, modulated
from kinema.models.dit.norms import Norm
from kinema.models.dit.patches import patchify, unpatchify
from kinema.models.dit.segments import Span
from kinema.models.position import apply_rope

CHANNELS, TEXT = 5, 7
# Batch, channels, frames, rows and columns all differ, and so do the captions.
SHAPES = [(4, 6, 8), (2, 10, 4), (4, 6, 8), (6, 2, 12)]
WORDS = [3, 1, 9, 2]
VARIANTS = {
    "full": {},
    "factorised": {"attention": AttentionPattern.factorised},
    "windowed": {"attention": AttentionPattern.windowed, "window": [2, 2, 3]},
    "low rank": {
        "modulation": ModulationSource.lora,
        "modulation_rank": 5,
        "head_modulation": HeadModulation.lora,
        "timestep_norm": True,
        "timestep_channels": 10,
        "edge_bias": False,
        "bias": False,
        "padding_channel": True,
        "text_embedding": TextEmbedding.none,
        "text_channels": TEXT,
        "rope_scale": [1.0, 3.0, 3.0],
        "position_embedding": PositionEmbedding.learned_axes,
        "position_grid": [6, 6, 6],
    },
    "alternating": {
        "attention": AttentionPattern.alternating,
        "cross_norm": CrossNorm.none,
        "qk_norm": QKNorm.none,
        "rope": Rope.none,
        "position_embedding": PositionEmbedding.sincos_apart,
        "position_extent": [0, 5, 5],
        "learned_variance": True,
    },
    "linear": {"modulation": ModulationSource.linear, "patch_size": [2, 2, 2]},
    "pooled": {"pooled_text": True, "qk_norm": QKNorm.none, "activation": Activation.gelu_tanh},
    "wan": {
        "qk_norm": QKNorm.rms_all,
        "cross_norm": CrossNorm.affine,
        "head_modulation": HeadModulation.table,
        "activation": Activation.gelu_tanh,
        "text_activation": Activation.gelu_tanh,
    },
    "ltx": {
        "qk_norm": QKNorm.rms_all,
        "norm": NormKind.rms,
        "cross_norm": CrossNorm.none,
        "head_modulation": HeadModulation.table,
    },
    "joint": {"text": TextEdge.joint, "modulation": ModulationSource.linear},
    "single streams": {
        "text": TextEdge.joint,
        "modulation": ModulationSource.linear,
        "depth": 2,
        "single_depth": 1,
        "text_embedding": TextEmbedding.refiner,
    },
    "shared": {
        "text": TextEdge.shared,
        "modulation": ModulationSource.linear,
        "norm_affine": True,
        "final_norm": True,
        "text_embedding": TextEmbedding.linear,
        "timestep_width": 10,
        "rope": Rope.none,
        "width": 32,
        "position_embedding": PositionEmbedding.sincos_quarters,
    },
    "joint with one table for all blocks": {"text": TextEdge.joint},
    "joint and factorised": {"text": TextEdge.joint, "attention": AttentionPattern.factorised},
    "shared and factorised": {"text": TextEdge.shared, "attention": AttentionPattern.factorised},
    "single streams and factorised": {
        "text": TextEdge.joint,
        "attention": AttentionPattern.factorised,
        "modulation": ModulationSource.linear,
        "single_depth": 1,
    },
    "joint at two widths": {
        "text": TextEdge.joint,
        "text_channels": 10,
        "modulation": ModulationSource.linear,
        "modulation_shift": False,
        "sandwich_norm": True,
        "tanh_gates": True,
        "norm": NormKind.rms,
        "activation": Activation.swiglu,
        "qkv_bias": False,
        "rope": Rope.learned,
        "rope_side": 4.0,
        "pooled_text": True,
        "pooled_text_heads": TEXT,
        "reversed_time": True,
    },
    "swiglu": {"activation": Activation.swiglu, "bias": False, "qk_norm": QKNorm.layer_head},
    "sincos": {"position_embedding": PositionEmbedding.sincos},
    "factorised and linear": {
        "attention": AttentionPattern.factorised,
        "modulation": ModulationSource.linear,
        "pooled_text": True,
    },
}


def small(**changes) -> DiTConfig:
    fields = {"width": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "rope_axes": [4, 4, 4]}
    return DiTConfig(**(fields | {"rope_theta": 20.0} | changes))


def new_model(dtype=torch.float64, seed=0, **changes) -> DiT:
    torch.manual_seed(seed)
    return DiT(small(**changes), CHANNELS, TEXT).to(dtype)


def random_model(dtype=torch.float64, seed=0, **changes) -> DiT:
    """Every parameter random: the zeros of a new model would hide mistakes."""
    model = new_model(dtype, seed, **changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pack(shapes=SHAPES, words=WORDS, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    latents = [torch.randn(CHANNELS, *shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    text = [torch.randn(n, TEXT, generator=g, dtype=torch.float64).to(dtype) for n in words]
    return latents, torch.rand(len(shapes), generator=g, dtype=torch.float64).to(dtype), text


def is_inert(name, model):
    """A constant added to all keys of a query changes no softmax; norms and rotations make it no constant."""
    if name.startswith(("text_embedding.blocks", "pooled_text")):
        return name.endswith("key.bias")
    if model.config.qk_norm is QKNorm.layer_head:
        return name.endswith("key_norm.bias")
    return model.config.qk_norm is QKNorm.none and name.endswith("key.bias")


def clip_losses(model, latents, timesteps, text):
    predictions = model(latents, timesteps, text)
    return torch.stack([(out - x).square().mean() for out, x in zip(predictions, latents, strict=True)])


@pytest.fixture(params=VARIANTS, name="variant")
def any_variant(request):
    return VARIANTS[request.param]


# A new model


def test_a_new_model_predicts_exactly_zero_and_its_sublayers_are_the_identity(variant):
    model = new_model(torch.float32, **variant)
    seen = []
    for layer in (layer for block in model.blocks for layer in block.sublayers):
        layer.register_forward_hook(lambda _, given, out: seen.append(torch.equal(given[0]["video"], out["video"])))
    latents, timesteps, text = pack(dtype=torch.float32)
    predictions = model(latents, timesteps, text)
    assert all(torch.equal(out, torch.zeros_like(x)) for out, x in zip(predictions, latents, strict=True))
    assert len(seen) == sum(len(block.sublayers) for block in model.blocks)
    assert all(seen)


def test_a_new_model_learns_past_its_zeros(variant):
    """Zero gates and a zero head must open: after a few steps every parameter has moved."""
    model = new_model(torch.float32, **variant)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        clip_losses(model, *pack(dtype=torch.float32)).mean().backward()
        optimizer.step()
    stuck = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    # A bias of the keys adds the same to all logits of a query, unless the keys are normalised.
    assert [name for name in stuck if not is_inert(name, model)] == []


def test_no_parameter_is_dead(variant):
    model = random_model(**variant)
    clip_losses(model, *pack()).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert [name for name in dead if not is_inert(name, model)] == []


# Packs


def test_eight_clips_have_eight_timesteps():
    model = random_model()
    latents, timesteps, text = pack([(2, 4, 6)] * 8, [3] * 8)
    whole = clip_losses(model, latents, timesteps, text).mean()
    alone = [clip_losses(model, [latents[i]], timesteps[i : i + 1], [text[i]]) for i in range(8)]
    torch.testing.assert_close(whole, torch.cat(alone).mean())
    one_for_all = clip_losses(model, latents, timesteps[:1].expand(8), text).mean()
    assert not torch.isclose(whole, one_for_all, rtol=1e-3)


def test_the_caption_and_the_timestep_change_the_prediction(variant):
    model, (latents, timesteps, text) = random_model(**variant), pack()
    before = model(latents, timesteps, text)
    for after in (model(latents, timesteps, text[1:] + text[:1]), model(latents, 1 - timesteps, text)):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))


def test_patches_hold_their_own_latents_and_come_back():
    latents = pack()[0]
    patch = [2, 1, 2]
    tokens = patchify(latents, patch)
    grids = [(t // 2, h, w // 2) for t, h, w in SHAPES]
    start = sum(t * h * w for t, h, w in grids[:1])
    # The token (t=0, h=3, w=1) of the second clip holds frames 0..1, row 3, columns 2..3 of every channel.
    _, rows, columns = grids[1]
    token = tokens[start + 3 * columns + 1].view(CHANNELS, 2, 1, 2)
    assert rows == 10
    assert torch.equal(token, latents[1][:, 0:2, 3:4, 2:4])
    for back, clip in zip(unpatchify(tokens, grids, patch), latents, strict=True):
        assert torch.equal(back, clip)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 3, 2), (3, 3, 1)])
def test_every_token_gets_the_rows_of_its_clip(lengths):
    torch.manual_seed(0)
    tokens, update = torch.randn(2, sum(lengths), 8, dtype=torch.float64)
    shift, scale, gate = torch.randn(3, 3, 8, dtype=torch.float64)
    clip = [i for i, length in enumerate(lengths) for _ in range(length)]
    centred = tokens - tokens.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale[clip]) + shift[clip]
    norm = Norm(NormKind.layer, 8, 1e-6, affine=False)
    torch.testing.assert_close(modulated(norm(tokens), shift, scale, lengths), expected)
    torch.testing.assert_close(gated_sum(tokens, gate, update, lengths), tokens + gate[clip] * update)


# Attention spans


def segments_of(model, grids):
    row = torch.zeros(len(grids), 24, dtype=torch.float64)
    return model.segments(grids, {"text": (1,) * len(grids)}, Condition(row, row, None), None)


def reached(operation, segments, source: int, count: int, width: int) -> set[int]:
    """Tokens whose output depends on token `source` in one attention."""
    x = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    out = operation({"video": x}, {"video": x}, segments)["video"]
    return {i for i in range(count) if torch.autograd.grad(out[i].sum(), x, retain_graph=True)[0][source].any()}


@pytest.mark.parametrize("span", [Span.clip, Span.frame, Span.place])
def test_each_span_reaches_exactly_its_tokens(span):
    model = random_model(attention=AttentionPattern.factorised)
    grids = [(2, 3, 2), (3, 1, 4)]
    segments = segments_of(model, grids)
    operation = model.blocks[0].sublayers[0].operation
    operation.span = span

    keys = [
        (clip, frame, row, column)
        for clip, (frames, rows, columns) in enumerate(grids)
        for frame in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    shared = {Span.clip: [0], Span.frame: [0, 1], Span.place: [0, 2, 3]}[span]  # parts of the key
    for source in [(0, 1, 2, 0), (1, 2, 0, 3)]:
        expected = {i for i, key in enumerate(keys) if all(key[part] == source[part] for part in shared)}
        assert reached(operation, segments, keys.index(source), len(keys), 24) == expected


@pytest.mark.parametrize("shared", [False, True])
def test_a_frame_and_the_caption_share_a_softmax_and_the_caption_sees_all_frames(shared):
    """The same weights over whole clips, with what may not be seen masked by hand."""
    shape = HeadShape(24, 2, QKNorm.rms_head, 1e-6, bias=True)
    torch.manual_seed(0)
    streams = {name: Stream(shape, asks=True) for name in (["video"] if shared else ["video", "text"])}
    shared_by = ["text"] if shared else []
    factorised = JointAttention(streams, attention, shared_by=shared_by, span=Span.frame).double()
    grids, words = [(2, 3, 2), (3, 1, 4)], (3, 2)
    row = torch.zeros(2, 24, dtype=torch.float64)
    model = random_model(attention=AttentionPattern.factorised)
    segments = model.segments(grids, {"text": tuple(words)}, Condition(row, row, None), None)
    video = torch.randn(24, 24, dtype=torch.float64, requires_grad=True)
    text = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    given = {"video": video, "text": text}

    frames = torch.tensor([(clip, t) for clip, (n, h, w) in enumerate(grids) for t in range(n) for _ in range(h * w)])
    frames = torch.cat([frames, torch.tensor([(0, -1)] * 3 + [(1, -1)] * 2)])  # tokens of captions
    same = frames[:, None, 0] == frames[None, :, 0]
    beside = (frames[:, None, 1] == frames[None, :, 1]) | (frames[None, :, 1] < 0) | (frames[:, None, 1] < 0)
    triples = [factorised.streams[factorised.stream_of[n]](x, segments[n].rope) for n, x in given.items()]
    q, k, v = (torch.cat(parts).transpose(0, 1) for parts in zip(*triples, strict=True))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same & beside)
    mixed = mixed.transpose(0, 1).flatten(1).split([24, 5])
    expected = {n: factorised.streams[factorised.stream_of[n]].project(x) for n, x in zip(given, mixed, strict=True)}

    actual = factorised(given, given, segments)
    weights = {name: torch.randn_like(x) for name, x in expected.items()}
    for name in given:
        torch.testing.assert_close(actual[name], expected[name])
    wanted, found = (
        torch.autograd.grad(sum((x[n] * weights[n]).sum() for n in given), [video, text], retain_graph=True)
        for x in (expected, actual)
    )
    torch.testing.assert_close(found, wanted)


def same_window(grid, window, shifted):
    """(n, n) whether two tokens share a box: boxes are numbered from the clip's edge or half a side before it."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, 3)
    moved = [side - side // 2 if shifted and side < size else 0 for size, side in zip(grid, window, strict=True)]
    numbers = (places + torch.tensor(moved)) // torch.tensor(window)
    return (numbers[:, None] == numbers).all(-1)


@pytest.mark.parametrize("window", [[2, 2, 3], [1, 2, 2], [3, 1, 4], [9, 9, 9]])
def test_windows_equal_a_dense_mask(window):
    model = random_model(attention=AttentionPattern.windowed, window=window, depth=4)
    shapes = [(4, 6, 10), (5, 10, 6), (4, 6, 10), (1, 2, 14)]  # in latents; the model sorts clips by shape
    grids = sorted((t, h // 2, w // 2) for t, h, w in shapes)
    given, calls = pack(shapes, [3, 1, 9, 2]), itertools.count()

    def masked(present):
        def dense(q, k, v, q_lengths, k_lengths, *, order=None):
            if order is None:  # of captions
                return present(q, k, v, q_lengths, k_lengths)
            shifted = next(calls) % 2 == 1
            whole = torch.block_diag(*(same_window(grid, window, shifted).double() for grid in grids)).bool()
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=whole).transpose(0, 1)

        return dense

    results = []
    for replace in (lambda present: present, masked):
        model.replace_attention(replace)
        model.zero_grad()
        predictions = model(*given)
        torch.stack([out.sin().sum() for out in predictions]).sum().backward()
        results.append([*predictions, *(p.grad.clone() for p in model.parameters())])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


def test_windows_that_shift_reach_the_whole_clip():
    model = random_model(attention=AttentionPattern.windowed, window=[2, 2, 2], depth=6)
    (x,), timesteps, text = pack([(6, 12, 12)], [2])
    x.requires_grad_()
    corner = model([x], timesteps, text)[0][:, 0, 0, 0].sum()
    assert torch.autograd.grad(corner, x)[0].abs().amax(0).count_nonzero() == 6 * 12 * 12


def test_attention_can_be_replaced_from_outside():
    model, given = random_model(attention=AttentionPattern.factorised), pack()
    expected, calls = model(*given), []

    def counting(present):
        def counted(*args, **kwargs):
            calls.append(kwargs["order"] is not None)
            return present(*args, **kwargs)

        return counted

    model.replace_attention(counting)
    for a, b in zip(model(*given), expected, strict=True):
        assert torch.equal(a, b)
    assert calls == [False, True, False] * 2  # space, time, caption in each of two blocks


# Precision


def test_a_thousand_timesteps_have_a_thousand_embeddings_in_bfloat16():
    timesteps = (torch.arange(1000) / 1000).float()
    for model in (new_model(torch.float32), new_model(torch.float32).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            condition = model.condition(timesteps, [torch.zeros(1, TEXT)], Extras())
        assert condition.embedding.dtype == torch.float32
        assert len(condition.embedding.unique(dim=0)) == 1000


def test_timesteps_are_scaled_to_a_thousand():
    features = sinusoids(torch.tensor([0.25], dtype=torch.float64), channels=6, scale=1000.0)
    angles = [250.0 * 10000 ** (-i / 3) for i in range(3)]
    expected = torch.tensor([angles], dtype=torch.float64)
    torch.testing.assert_close(features, torch.cat([expected.cos(), expected.sin()], dim=1))


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "bfloat16 weights"])
def test_bfloat16_is_near_float32(variant, pure):
    model, given = random_model(torch.float32, **variant), pack(dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(0.3).copy_(parameter.bfloat16())
    expected = model(*given)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, given, out: seen.extend([given[0]["video"].dtype, out["video"].dtype, given[2][0].dtype])
        )
    half = copy.deepcopy(model).bfloat16() if pure else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
        actual = half(*given)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert 1e-6 < (a - b).norm() / b.norm() < 0.03
    # The residual stream and the modulation stay float32.
    assert set(seen) == {torch.float32}


def test_rms_norm_equals_torch():
    torch.manual_seed(0)
    norm = Norm(NormKind.rms, 6, 1e-6, affine=True).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    expected = torch.nn.functional.rms_norm(x, (6,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x), expected)
    for mine, theirs in zip(
        torch.autograd.grad(norm(x), (x, norm.weight), grad),
        torch.autograd.grad(expected, (x, norm.weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


# Against an independent model


@pytest.mark.parametrize("places", [PositionEmbedding.none, PositionEmbedding.sincos])
def test_one_block_equals_the_equations_written_out(places):
    """Peebles and Xie's adaLN-Zero block with cross-attention, one clip, in plain float64 algebra."""
    model = random_model(depth=1, position_embedding=places)
    (x,), timesteps, (words,) = pack([(2, 4, 6)], [3])
    w = dict(model.named_parameters())

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms(name, value):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def attend(name, value, source, cos_sin):
        q = rms(f"{name}.query_norm", linear(f"{name}.query", value).view(-1, 2, 12))
        k = rms(f"{name}.key_norm", linear(f"{name}.key", source).view(-1, 2, 12))
        v = linear(f"{name}.value", source).view(-1, 2, 12)
        if cos_sin:
            q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        weights = torch.einsum("nhd,mhd->hnm", q, k).div(12**0.5).softmax(-1)
        return linear(f"{name}.project", torch.einsum("hnm,mhd->nhd", weights, v).reshape(-1, 24))

    silu, gelu = nn.functional.silu, nn.functional.gelu
    time = linear("timestep_embedding.expand", sinusoids(timesteps, 256, 1000.0))
    condition = silu(linear("timestep_embedding.project", silu(time)))
    caption = linear("text_embedding.2", gelu(linear("text_embedding.0", words)))
    rows = linear("shared_modulation", condition) + w["blocks.0.modulation.table"]
    shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = rows.view(9, 24)

    patches = x.view(CHANNELS, 2, 2, 2, 3, 2).permute(1, 2, 4, 0, 3, 5).reshape(12, -1)
    rope = segments_of(model, [(2, 2, 3)])["video"].rope
    z = linear("patch_embedding", patches)
    if places is PositionEmbedding.sincos:
        for token, place in enumerate(itertools.product(range(2), range(2), range(3))):
            for axis, index in itertools.product(range(3), range(4)):  # 24 channels: 8 an axis, 4 of them sines
                angle = place[axis] * 20.0 ** (-2 * index / 8)
                z[token, 8 * axis + index] += math.sin(angle)
                z[token, 8 * axis + 4 + index] += math.cos(angle)
    layer = "blocks.0.sublayers.{}.operation"
    y = norm(z) * (1 + scale1) + shift1
    z = z + gate1 * attend(layer.format(0), y, y, rope)
    z = z + gate2 * attend(layer.format(1), norm(z) * (1 + scale2) + shift2, caption, None)
    y = gelu(linear(layer.format(2) + ".expand", norm(z) * (1 + scale3) + shift3))
    z = z + gate3 * linear(layer.format(2) + ".project", y)
    shift, scale = linear("head_modulation", condition).view(2, 24)
    out = linear("head", norm(z) * (1 + scale) + shift)
    out = out.view(2, 2, 3, CHANNELS, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(x.shape)

    torch.testing.assert_close(model([x], timesteps, [words])[0], out)


def test_modulation_sources_differ_in_weights_only():
    condition = Condition(torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 8))
    table, linear = TableModulation(4, range(2)), LinearModulation(4, [4, 4])
    nn.init.normal_(table.table)
    torch.testing.assert_close(table(condition), condition.shared + table.table)
    torch.testing.assert_close(linear(condition), condition.embedding @ linear.linear.weight.T + linear.linear.bias)


# Numbers and refusals


def test_what_joins_the_caption_is_counted_with_it():
    """The refiner and the embeddings see each its own tokens, blocks see them all."""
    streams = {"text": TextEdge.joint, "modulation": ModulationSource.linear, "text_embedding": TextEmbedding.refiner}
    model = new_model(torch.float32, glyph_width=4, glyph_hidden_width=6, image_width=3, **streams)
    extras = Extras(glyphs=[torch.randn(2, 4)], image=[torch.randn(7, 3)])
    latents, timesteps, text = pack([(2, 6, 8)], [5], torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timesteps, text, extras)
    assert counter.get_total_flops() == model.flops((2, 3, 4), 5, image_tokens=7, glyph_tokens=2)


def test_an_image_that_joins_the_caption_may_be_missing():
    model = random_model(text=TextEdge.joint, modulation=ModulationSource.linear, image_width=3)
    latents, timesteps, text = pack()
    some = [torch.randn(2 * (clip % 2), 3, dtype=torch.float64) for clip in range(4)]
    together = model(latents, timesteps, text, Extras(image=some))
    (alone,) = model(latents[:1], timesteps[:1], text[:1], Extras(image=some[:1]))
    torch.testing.assert_close(together[0], alone)
    with pytest.raises(ValueError, match=r"\(L >= 0, 3\)"):
        model(latents, timesteps, text, Extras(image=[torch.zeros(2, 4)] * 4))


@pytest.mark.parametrize("frames", [2, 3])
def test_flops_equal_torchs_count(variant, frames):
    model = new_model(torch.float32, **variant)
    pt = model.config.patch_size[0]
    latents, timesteps, text = pack([(frames * pt, 6, 8)], [5], torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timesteps, text)
    assert counter.get_total_flops() == model.flops((frames, 3, 4), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"model\.num_heads=5 must divide model\.width=24 .*\[1, 2, 3, 4, 6, 12\]"),
        ({"num_heads": 8}, r"model\.num_heads=8"),
        ({"rope_axes": [4, 4, 6]}, r"model\.rope_axes=\[4, 4, 6\] .* 12 .*Type model\.rope_axes=\[4,4,4\]"),
        ({"rope_axes": [3, 3, 6]}, r"model\.rope_axes=\[3, 3, 6\]"),
        ({"patch_size": [1, 2]}, r"model\.patch_size=\[1, 2\]"),
        ({"patch_size": [1, 0, 2]}, r"model\.patch_size=\[1, 0, 2\]"),
        ({"depth": 0}, r"model\.depth=0"),
        ({"mlp_ratio": -1.0}, r"model\.mlp_ratio=-1\.0"),
        ({"rope_theta": 0.0}, r"model\.rope_theta=0\.0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
    small()


def test_inputs_that_do_not_fit_are_refused():
    model, (latents, timesteps, text) = new_model(torch.float32), pack(dtype=torch.float32)
    with pytest.raises(ValueError, match="4 clips, 3 timesteps, 4 captions"):
        model(latents, timesteps[:3], text)
    with pytest.raises(ValueError, match="bfloat16"):
        model(latents, timesteps.bfloat16(), text)
    with pytest.raises(ValueError, match=r"\(6, 4, 6, 8\).*C=5"):
        model([torch.zeros(6, 4, 6, 8), *latents[1:]], timesteps, text)
    with pytest.raises(ValueError, match=r"model\.patch_size=\[1, 2, 2\].*Nearest: \[4, 6, 8\]"):
        model([torch.zeros(CHANNELS, 4, 6, 7), *latents[1:]], timesteps, text)
    with pytest.raises(ValueError, match=r"\(0, 7\)"):
        model(latents, timesteps, [torch.zeros(0, TEXT), *text[1:]])


# The product of the axes

LEARNED = (PositionEmbedding.learned_axes, PositionEmbedding.learned)
NOT_LEARNED = [kind for kind in PositionEmbedding if kind not in LEARNED]
PACKED = {
    "rope": Rope.packed,
    "rope_spans": [1.5, 0.5],
    "rope_fps": 0.0,
    "text": TextEdge.shared,
    "attention": AttentionPattern.full,
}
ALONE = {"rope_spans": [1.0], "audio_channels": 0}
PLAIN_HEADS = {"head_channels": 0, "rope_still": 0}
OTHER_ROPES = [kind for kind in Rope if kind not in (Rope.axes, Rope.packed, Rope.seconds)]
UNPACKED = [
    {"rope": Rope.axes, **ALONE},
    {"rope": Rope.seconds, "rope_fps": 24.0, **ALONE, **PLAIN_HEADS},
    *({"rope": kind, "rope_fps": 0.0, **ALONE, **PLAIN_HEADS} for kind in OTHER_ROPES),
]
SILENT_ELSEWHERE = {
    "modulation": ModulationSource.linear,
    "head_modulation": HeadModulation.linear,
    "timestep_norm": False,
    "first_frame_given": False,
    "guidance": False,
    "pooled_text": False,
    "pooled_text_heads": 0,
    "pooled_width": 0,
    "pooled_norm": False,
    "ofs_channels": 0,
}
AXES = {
    "attention": list(AttentionPattern),
    "window": [[2, 2, 3]],
    "activation": list(Activation),
    "bias": [True, False],
    "qkv_bias": [True, False],
    "sandwich_norm": [False, True],
    "modulation_shift": [True, False],
    "tanh_gates": [False, True],
    "reversed_time": [False, True],
    "rope_side": [4.0],
    "norm": list(NormKind),
    "norm_affine": [False, True],
    "final_norm": [False, True],
    "cross_norm": list(CrossNorm),
    "modulation": list(ModulationSource),
    "head_modulation": list(HeadModulation),
    "qk_norm": list(QKNorm),
    "rope": [*UNPACKED, PACKED, PACKED | {"rope_spans": [1.0]}],
    "sound": [UNPACKED[0], PACKED | SILENT_ELSEWHERE | {"audio_channels": 3}],
    "heads": [PLAIN_HEADS, {"head_channels": 20, "rope_still": 4}],
    "head_norm": list(NormKind),
    "timestep_hidden_width": [0, 6],
    "places": [
        *({"position_embedding": kind, "position_grid": [0, 0, 0], "position_words": 0} for kind in NOT_LEARNED),
        {"position_embedding": PositionEmbedding.learned_axes, "position_grid": [4, 6, 4], "position_words": 0},
        {"position_embedding": PositionEmbedding.learned, "position_grid": [2, 3, 2], "position_words": 3},
    ],
    "position_scale": [[1.0, 1.0, 1.0], [1.0, 1.5, 1.5]],
    "position_extent": [[0, 0, 0], [0, 5, 5]],
    "learned_variance": [False, True],
    "ofs_channels": [0, 4],
    "modulation_rank": [5],
    "timestep_norm": [False, True],
    "timestep_scale": [1000.0, 1.0],
    "edge_bias": [True, False],
    "text_channels": [0, TEXT],
    "padding_channel": [False, True],
    "rope_scale": [[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]],
    "rope_fps": [0.0, 24.0],
    "patch_size": [[1, 2, 2], [2, 1, 2]],
    "text": list(TextEdge),
    "text_to_the_end": [False, True],
    "text_queries_to_the_end": [False, True],
    "text_embedding": list(TextEmbedding),
    "text_activation": [Activation.gelu, Activation.gelu_tanh, Activation.silu],
    "single_depth": [0, 1],
    "timestep_width": [0, 10],
    "timestep_channels": [256, 6],
    "pooled_text": [False, True],
    "pooled_text_heads": [0, TEXT],
    "pooled_width": [0, 3],
    "pooled_norm": [False, True],
    "mlp_bias": [True, False],
    "guidance": [False, True],
    "first_frame_given": [False, True],
    "condition_channels": [0, 2],
    "image_width": [0, 3],
    "glyph_width": [0, 4],
    "glyph_hidden_width": [6],
    "control": [{"control_layers": layers, "control_channels": 2 if layers else 0} for layers in ([], [0], [1])],
}


def extras_for(config, latents):
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Extras(
        channels=[draw(config.condition_channels, *x.shape[1:]) for x in latents]
        if config.condition_channels
        else None,
        image=[draw(2 + i, 3) for i in range(len(latents))] if config.image_width else None,
        glyphs=[draw(3 * i, 4) for i in range(len(latents))] if config.glyph_width else None,
        pooled=[draw(3) for _ in latents] if config.pooled_width else None,
        guidance=[1.0 + i for i in range(len(latents))] if config.guidance else None,
        ofs=[2.0 - i for i in range(len(latents))] if config.ofs_channels else None,
        control=[draw(config.control_channels, *x.shape[1:]) for x in latents] if config.control_channels else None,
        audio=Sound([draw(config.audio_channels, 3 + i, 2) for i in range(len(latents))], draw(len(latents)).sigmoid())
        if config.audio_channels
        else None,
    )


def unread(name, config):
    """The last block of some published models changes captions that nobody reads any more."""
    if not name.startswith(f"blocks.{config.depth - 1}."):
        return False
    spans = len(config.spans(0))
    thin = (f".down.{2 + spans}.", f".up.{2 + spans}.")  # of the last sublayer's captions, with modulation=lora
    whole = ("streams.text.", f".sublayers.{1 + spans}.")
    marks = (*thin, *whole) if config.text_to_the_end else thin if config.text is TextEdge.shared else ()
    if config.text_queries_to_the_end:
        marks = ("streams.text.query",)
    return any(mark in name for mark in marks)


def legal_points(count, proposals=150):
    """A random walk through the product: a few axes at a time, wherever that is legal; what is not must say why."""
    draw, point, refused = random.Random(0), {}, 0
    for _ in range(count):
        for _ in range(proposals):
            moved = dict(point)
            for axis in draw.sample(list(AXES), draw.choice([1, 2, 3])):
                choice = draw.choice(AXES[axis])
                moved |= choice if isinstance(choice, dict) else {axis: choice}
            if reason := refusal(moved):
                assert re.search(r"model\.\w+=", reason), reason
                refused += 1
                continue
            if moved.get("text_embedding") is not TextEmbedding.none or moved.get("text_channels") == TEXT:
                point = moved
        yield dict(point)
    assert refused > 10 * count


WALKED = {"width": 32, "num_heads": 2, "rope_axes": [8, 4, 4]}


def refusal(changes):
    """Why a point of the product is none; None for one that is."""
    try:
        small(**WALKED, **changes)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("count", [120, pytest.param(300, marks=pytest.mark.soak)])
def test_random_points_of_the_product_of_the_axes_train(count):
    """Every legal choice runs forwards and backwards with a finite gradient other than zero in every parameter."""
    seen = set()
    for seed, changes in enumerate(legal_points(count)):
        torch.manual_seed(seed)
        config = small(**WALKED, **changes)
        seen |= {f"{axis}={choice}" for axis, choice in changes.items()}
        model = DiT(config, CHANNELS, TEXT).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)  # 0.3 saturates a softmax whose queries have no norm
        grid = [side * patch for side, patch in zip(config.position_grid, config.patch_size, strict=True)]
        latents, timesteps, text = pack([grid] * 2 if config.position_words else [(4, 6, 8), (2, 4, 4)], [3, 2])
        found = model.predict_streams(latents, timesteps, text, extras_for(config, latents))
        sum(out.square().mean() for out in [*found.video, *(found.audio or [])]).backward()
        for name, parameter in model.named_parameters():
            if is_inert(name, model) or unread(name, config):
                continue
            assert parameter.grad is not None, (name, changes)
            assert parameter.grad.isfinite().all(), (name, changes)
            assert parameter.grad.abs().max() > 1e-14, (name, changes)
    for axis, options in AXES.items():
        parts = [option if isinstance(option, dict) else {axis: option} for option in options]
        assert {f"{name}={choice}" for part in parts for name, choice in part.items()} <= seen


def test_a_timestep_for_each_frame_equals_one_for_all_when_they_are_equal():
    linear = {"modulation": ModulationSource.linear, "patch_size": [2, 1, 1]}
    streams = {"depth": 2, "single_depth": 1, "text_embedding": TextEmbedding.refiner}
    for variant in (
        {},
        {"pooled_text": True, **linear},
        {"text": TextEdge.shared, **linear},
        {"text": TextEdge.joint, **streams, **linear},
    ):
        model, (latents, timesteps, text) = random_model(**variant), pack()
        frames = [x.shape[1] // model.config.patch_size[0] for x in latents]
        each = [t.expand(count) for t, count in zip(timesteps, frames, strict=True)]
        for a, b in zip(model(latents, each, text), model(latents, timesteps, text), strict=True):
            torch.testing.assert_close(a, b)


def test_a_frame_has_its_own_timestep():
    """With attention silenced only the frame whose timestep changes may change."""
    model, (latents, timesteps, text) = random_model(), pack()
    for block in model.blocks:
        for sublayer in list(block.sublayers)[:2]:
            nn.init.zeros_(sublayer.operation.project.weight)
    each = [t.repeat(x.shape[1]) for t, x in zip(timesteps, latents, strict=True)]
    before = model(latents, each, text)
    each[1] = each[1].index_fill(0, torch.tensor(1), 0.0)
    after = model(latents, each, text)
    changed = [
        [i, t]
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        for t in range(a.shape[1])
        if not torch.equal(a[:, t], b[:, t])
    ]
    assert changed == [[1, 1]]


@pytest.mark.parametrize("text", [TextEdge.shared, TextEdge.joint])
def test_a_caption_has_the_timestep_of_its_clips_noisiest_frame(text):
    model, (latents, timesteps, words) = random_model(text=text, modulation=ModulationSource.linear), pack()
    seen = []
    model.blocks[0].register_forward_hook(lambda _, given, out: seen.append(out["text"]))
    for block in model.blocks:  # attention silenced: only its own modulation reaches a caption
        for stream in block.sublayers[0].operation.streams.values():
            if stream.project is not None:
                nn.init.zeros_(stream.project.weight)
    model(latents, timesteps, words)
    rising = [torch.linspace(0, 1, x.shape[1], dtype=torch.float64) for x in latents]
    model(latents, [t * rise for t, rise in zip(timesteps, rising, strict=True)], words)
    torch.testing.assert_close(*seen)


def test_a_given_first_frame_is_read_without_noise_and_guidance():
    """It equals frames with a timestep of 0 for the first, but for the head, which reads the clip's own."""
    choices = {"guidance": True, "text": TextEdge.joint, "modulation": ModulationSource.linear}
    given, plain = random_model(first_frame_given=True, **choices), random_model(**choices)
    for model in (given, plain):
        nn.init.zeros_(model.head_modulation.weight)
    latents, timesteps, text = pack()
    extras = Extras(guidance=[1.0, 6.0, 3.0, 2.0])
    frames = [t.repeat(x.shape[1]).index_fill(0, torch.tensor(0), 0.0) for t, x in zip(timesteps, latents, strict=True)]
    for a, b in zip(given(latents, timesteps, text, extras), plain(latents, frames, text, extras), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": TextEdge.joint, "single_depth": 1}, r"model\.modulation=table .*Type model\.modulation=linear"),
        (
            {"text": TextEdge.shared, "attention": AttentionPattern.alternating, "modulation": ModulationSource.linear},
            r"model\.text=shared .*attention=alternating",
        ),
        ({"single_depth": 1}, r"model\.single_depth=1 needs model\.text=joint"),
        ({"text_to_the_end": True}, r"model\.text_to_the_end=true"),
        ({"text_queries_to_the_end": True}, r"model\.text_queries_to_the_end=true"),
        (
            {"text": TextEdge.joint, "text_to_the_end": True, "text_queries_to_the_end": True},
            r"model\.text_queries_to_the_end=false",
        ),
        ({"text": TextEdge.joint, "text_channels": 10}, r"model\.text_channels=10 .* model\.modulation=linear"),
        ({"text": TextEdge.shared, "text_channels": 10}, r"model\.text_channels=10: only"),
        ({"pooled_text_heads": 1}, r"model\.pooled_text_heads=1 .* model\.pooled_text=false"),
        ({"sandwich_norm": True, "cross_norm": CrossNorm.plain}, r"model\.sandwich_norm=true .*cross_norm=plain"),
        ({"reversed_time": True, "learned_variance": True}, r"model\.reversed_time=true"),
        ({"modulation_shift": False, "modulation": ModulationSource.lora}, r"model\.modulation_shift=false"),
        ({"rope": Rope.none}, r"model\.rope=none .* no token would know its place"),
        ({"position_embedding": PositionEmbedding.sincos_quarters}, r"model\.width=24 .* multiple of 16"),
        ({"head_modulation": HeadModulation.table, "timestep_width": 10}, r"model\.timestep_width=10"),
        ({"text_activation": Activation.swiglu}, r"model\.text_activation=swiglu"),
        ({"image_positions": 2}, r"model\.image_positions=2 .*model\.image_width=0"),
        ({"glyph_width": 2, "text_channels": 5}, r"model\.glyph_width=2 .* model\.text_channels=5"),
        ({"timestep_channels": 7}, r"model\.timestep_channels=7"),
        ({"condition_channels": -1}, r"model\.condition_channels=-1"),
        ({"position_scale": [1.0, 2.0, 2.0]}, r"model\.position_scale=.*position_embedding=none"),
        ({"position_extent": [0, 4, 4]}, r"model\.position_extent=.*position_embedding=none"),
        ({"position_extent": [0, 4]}, r"model\.position_extent=\[0, 4\]"),
        ({"attention": AttentionPattern.alternating, "depth": 3}, r"model\.attention=alternating .*model\.depth=3"),
        ({"attention": AttentionPattern.alternating}, r"model\.modulation=table .*Type model\.cross_norm=none"),
        ({"control_layers": [0]}, r"model\.control_layers=\[0\] with model\.control_channels=0"),
        ({"control_layers": [1, 0], "control_channels": 2}, r"model\.control_layers=\[1, 0\] .* rising order"),
        ({"control_layers": [2], "control_channels": 2}, r"blocks from 0 to 1"),
        (
            {"control_layers": [0], "control_channels": 2, "text": TextEdge.shared},
            r"model\.control_layers=\[0\] needs model\.text=cross",
        ),
        ({"window": [0, 2, 2]}, r"model\.window=\[0, 2, 2\]"),
        ({"position_scale": [1.0, 1.0]}, r"model\.position_scale=\[1\.0, 1\.0\]"),
    ],
)
def test_choices_that_exclude_one_another_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_extras_are_those_that_the_model_was_built_for():
    latents, timesteps, text = pack(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model\.image_width=0 but extras\.image is given"):
        new_model(torch.float32)(latents, timesteps, text, Extras(image=[torch.zeros(2, 3)] * 4))
    model = new_model(torch.float32, condition_channels=2)
    with pytest.raises(ValueError, match=r"model\.condition_channels=2 but extras\.channels is missing"):
        model(latents, timesteps, text)
    with pytest.raises(ValueError, match=r"extras\.channels has 1 entries for 4 clips"):
        model(latents, timesteps, text, Extras(channels=[latents[0]]))
    with pytest.raises(ValueError, match=r"\(5, 4, 6, 8\) for a clip that needs \(2, 4, 6, 8\)"):
        model(latents, timesteps, text, Extras(channels=latents))
    with pytest.raises(ValueError, match="each frame of tokens needs one"):
        new_model(torch.float32)(latents, [torch.zeros(1)] * 4, text)


def test_every_choice_stands_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "model.md").read_text()
    choices = [value for each in vars(DiTConfig()).values() if isinstance(each, Enum) for value in type(each)]
    assert len(choices) > 40
    assert [str(choice) for choice in choices if f"`{choice.name}`" not in text] == []
