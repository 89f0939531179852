"""The attention door: any lengths, any order, against a softmax written as loops."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kinema.models import attention as door
from kinema.models.attention import AttentionKernel, Order, attention, attention_of, flash_attention

HEADS, DIM = 3, 4
CASES = {
    "equal": ((5, 5, 5), (5, 5, 5)),
    "equal queries and other equal keys": ((6, 6), (2, 2)),
    "equal queries, unequal keys": ((4, 4, 4), (1, 5, 3)),
    "all unequal": ((2, 7, 1, 4), (3, 1, 6, 2)),
    "runs of neighbours": ((3, 3, 8, 8, 3), (2, 4, 5, 5, 1)),
    "one clip": ((9,), (4,)),
}


def draw(q_lengths, k_lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = sum(q_lengths), sum(k_lengths), sum(k_lengths)
    return [torch.randn(size, HEADS, DIM, generator=g, dtype=torch.float64, requires_grad=True) for size in sizes]


def attention_by_loops(q, k, v, q_lengths, k_lengths):
    """softmax(q k^T / sqrt(d)) v, one query at a time."""
    out, q_start, k_start = [], 0, 0
    for n, m in zip(q_lengths, k_lengths, strict=True):
        for query in range(q_start, q_start + n):
            heads = []
            for head in range(q.shape[1]):
                keys, values = k[k_start : k_start + m, head], v[k_start : k_start + m, head]
                weights = torch.exp(keys @ q[query, head] / q.shape[2] ** 0.5)
                heads.append((weights[:, None] * values).sum(0) / weights.sum())
            out.append(torch.stack(heads))
        q_start, k_start = q_start + n, k_start + m
    return torch.stack(out)


def gradients(function, tensors):
    out = function(*tensors)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return out, torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("case", CASES)
def test_equals_a_softmax_by_loops_with_gradients(case):
    q_lengths, k_lengths = CASES[case]
    tensors = draw(q_lengths, k_lengths)
    expected, expected_grads = gradients(lambda *t: attention_by_loops(*t, q_lengths, k_lengths), tensors)
    actual, actual_grads = gradients(lambda *t: attention(*t, q_lengths, k_lengths), tensors)
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 1, 6)])
def test_an_order_reorders_before_and_restores_after(lengths):
    tensors = draw(lengths, lengths)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    place = {int(token): i for i, token in enumerate(index)}

    def by_hand(q, k, v):
        out = attention_by_loops(q[index], k[index], v[index], lengths, lengths)
        return torch.stack([out[place[token]] for token in range(12)])

    expected, expected_grads = gradients(by_hand, tensors)
    actual, actual_grads = gradients(lambda *t: attention(*t, lengths, lengths, order=Order.of(index)), tensors)
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("poisoned", range(4))
def test_a_clip_never_reads_another_even_when_that_one_is_not_a_number(poisoned):
    q_lengths, k_lengths = (3, 3, 3, 5), (2, 4, 1, 2)
    q, k, v = (t.detach() for t in draw(q_lengths, k_lengths))
    before = attention(q, k, v, q_lengths, k_lengths).split(q_lengths)
    q.split(q_lengths)[poisoned].fill_(torch.nan)
    for answers in (k, v):
        answers.split(k_lengths)[poisoned].fill_(torch.nan)
    after = attention(q, k, v, q_lengths, k_lengths).split(q_lengths)
    for clip in range(4):
        assert after[clip].isnan().all() if clip == poisoned else torch.equal(after[clip], before[clip])


def test_equal_lengths_are_one_kernel_call_without_copies(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v):  # and no mask
        calls.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return sdpa(q, k, v)

    monkeypatch.setattr(door.F, "scaled_dot_product_attention", spy)
    q, k, v = draw((4,) * 6, (3,) * 6)
    attention(q, k, v, (4,) * 6, (3,) * 6)
    assert calls == [(q.data_ptr(), k.data_ptr(), v.data_ptr())]


def test_lengths_that_do_not_cover_the_tokens_are_a_bug():
    q, k, v = draw((4, 4), (4, 4))
    for q_lengths, k_lengths in [((4, 3), (4, 4)), ((4, 4), (4, 5)), ((8,), (4, 4)), ((4, 4), (8, 0))]:
        with pytest.raises(AssertionError):
            attention(q, k, v, q_lengths, k_lengths)


def test_neighbours_of_equal_lengths_share_a_call_and_nothing_is_computed_twice(monkeypatch):
    shapes = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v):
        shapes.append((q.shape[0], q.shape[2], k.shape[2]))
        return sdpa(q, k, v)

    monkeypatch.setattr(door.F, "scaled_dot_product_attention", spy)
    q_lengths, k_lengths = (4, 4, 4, 2), (3, 3, 5, 5)
    attention(*draw(q_lengths, k_lengths), q_lengths, k_lengths)
    assert shapes == [(2, 4, 3), (1, 4, 5), (1, 2, 5)]


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """What flash-attn 2.8 says of its function of this name, done by loops: (tokens, heads, d), int32 ends."""
    for x, ends, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert (ends.dtype, ends.ndim, int(ends[0]), int(ends[-1])) == (torch.int32, 1, 0, len(x))
        assert isinstance(longest, int)
        assert longest == int(ends.diff().max())
        assert x.stride(-1) == 1
    assert k.shape == v.shape
    assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
    return attention_by_loops(q, k, v, cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())


def test_flash_gets_where_clips_end(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    q_lengths, k_lengths = (2, 7, 1, 4), (3, 1, 6, 2)
    tensors = draw(q_lengths, k_lengths)
    torch.testing.assert_close(
        door._flash_varlen(*tensors, q_lengths, k_lengths), attention(*tensors, q_lengths, k_lengths)
    )
    order = Order.of(torch.arange(14).flip(0))
    tensors = draw(q_lengths, q_lengths)
    torch.testing.assert_close(
        door._flash_varlen(*tensors, q_lengths, q_lengths, order=order),
        attention(*tensors, q_lengths, q_lengths, order=order),
    )


def test_tables_made_while_sampling_serve_training():
    with torch.inference_mode():
        made = door._cumulative((11, 13, 17), torch.device("cpu"))  # lengths that no other test uses
    assert not made.is_inference()


def test_flash_is_refused_where_it_cannot_run(monkeypatch):
    assert attention_of(AttentionKernel.sdpa) is attention
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import raises
    with pytest.raises(ValueError, match=r"model\.attention_kernel=flash needs .* model\.attention_kernel=sdpa"):
        attention_of(AttentionKernel.flash)
    with pytest.raises(ValueError, match="float64 on cpu"):
        flash_attention(*draw((2,), (2,)), (2,), (2,))
