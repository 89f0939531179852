"""What the benchmarks measure with."""

import itertools

import torch

from benchmarks import balance, pairing
from benchmarks.saved import saved_bytes


def test_a_ratio_is_taken_pair_by_pair(monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(pairing.time, "perf_counter", lambda: next(clock))
    calls = []
    found = pairing.paired(lambda: calls.append("ours"), lambda: calls.append("theirs"), seconds=0, least=3)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]  # two of them warm up
    assert found.ratios == [1.0, 1.0, 1.0]
    row = pairing.Paired([1.0, 2.0, 4.0], [2.0, 3.0, 8.0]).row("step")
    assert row == "| step | 2.000 | 3.000 | **2.00** (1.75 to 2.00) |"


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(10, 20)
    x = torch.randn(5, 10)
    assert saved_bytes(lambda: layer(x), layer) == x.nbytes
    assert saved_bytes(lambda: layer(x) + layer(x), layer) == x.nbytes
    assert saved_bytes(lambda: layer(x).exp(), layer) == x.nbytes + 5 * 20 * 4


def test_ranks_hardly_wait_on_the_published_mixture():
    clips = balance.published_mixture(40_000)
    for ranks in (8, 64):
        found = balance.measure("Kinema", clips, ranks, steps=2)
        assert found.worst > 0.99
        assert found.padding == 0
        others = [balance.measure(way, clips, ranks, steps=2) for way in ("buckets", "token packing", "padding")]
        assert all(other.balance < 0.95 for other in others)
