"""Schedules, averages and identities are pure functions of what they name."""

import itertools
import json
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from kinema.data.account.quarantine import QUARANTINE, write_failures
from kinema.data.packs.pack import Failure
from kinema.identity import fingerprint, from_plain, to_plain
from kinema.training.balance import Balance
from kinema.training.ema import EMAConfig
from kinema.training.loop import due
from kinema.training.optimizers.optim import AdamW
from kinema.training.optimizers.schedule import Constant, Cosine
from kinema.training.records.metrics import LoggingConfig, MetricsFile, WandbMode, WandbTracker
from kinema.training.records.outputs import Outputs
from kinema.training.records.window import Window


def test_cosine_rises_linearly_and_falls_to_its_final_fraction():
    schedule = Cosine(warmup_steps=10, final_fraction=0.1)
    factors = [schedule.factor(step, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_no_warm_up_starts_at_the_peak():
    assert Constant(warmup_steps=0).factor(0, 5) == 1.0


class OneShardEngine:
    """What the average needs of an engine: a shard of float32 weights."""

    def __init__(self, value: float) -> None:
        self.weight = torch.full((3,), value)

    def shards(self):
        return [self.weight]


def test_ema_follows_a_known_drift_in_closed_form():
    from kinema.training.ema import EMA

    engine, decay, steps = OneShardEngine(0.0), 0.9999, 1000
    ema = EMA(EMAConfig(decay=decay, warmup=False), engine)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        engine.weight.fill_(float(step))  # the drift: the weight is the step
        ema.update(step)
    expected = sum((1 - decay) * decay ** (steps - k) * k for k in range(1, steps + 1))
    assert ema.shards[0].dtype == torch.float32
    assert float(ema.shards[0][0]) == pytest.approx(expected, rel=1e-4)  # S30


def test_ema_warm_up_is_a_pure_function_of_the_step():
    config = EMAConfig(decay=0.99)
    assert config.decay_at(1) == pytest.approx(2 / 11)
    assert config.decay_at(10_000) == 0.99


def test_only_matrices_are_decayed():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    groups = AdamW(weight_decay=0.3).build(module).param_groups
    assert {len(g["params"]): g["weight_decay"] for g in groups} == {1: 0.3, 3: 0.0}


def test_weight_decay_shrinks_a_weight_without_gradient_by_its_closed_form():
    module = torch.nn.Linear(2, 2, bias=False)
    before = module.weight.detach().clone()
    optimizer = AdamW(learning_rate=1e-2, weight_decay=0.1).build(module)
    for _ in range(50):
        module.weight.grad = torch.zeros_like(module.weight)
        optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - 1e-3) ** 50)


@dataclass
class Inner:
    values: list[int] = field(default_factory=lambda: [1])


@dataclass
class Outer:
    mode: WandbMode = WandbMode.auto
    inner: Inner = field(default_factory=Inner)


def test_plain_form_round_trips_enums_and_nesting():
    config = Outer(WandbMode.offline, Inner([4, 5]))
    plain = to_plain(config)
    assert plain == {"type": "Outer", "mode": "offline", "inner": {"values": [4, 5]}}
    assert from_plain(plain, Outer) == config
    with pytest.raises(ValueError, match="type=Outer is unknown"):
        from_plain(plain, Inner)


def test_fingerprint_changes_with_any_bit_name_shape_or_type():
    base = {"a": torch.zeros(4), "b": torch.ones(2, 2)}
    one_bit = torch.zeros(4)
    one_bit.view(torch.int32)[0] = 1
    variants = [
        {"a": one_bit, "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({fingerprint(v) for v in [base, *variants]}) == 6
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)


def test_metrics_forget_steps_that_will_be_done_again(tmp_path):
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.write({"kind": "train", "step": step})
    with metrics.path.open("a") as handle:
        handle.write('{"kind": "train", "st')  # killed while writing
    metrics.truncate_after(2)
    assert [line[-2] for line in metrics.path.read_text().splitlines()] == ["1", "2"]


def test_a_step_that_is_done_again_lists_its_failures_once(tmp_path):
    outputs = Outputs(tmp_path, is_main=True, tracker=None)
    for step in (1, 2, 3):
        outputs.write({"kind": "train", "step": step})
        write_failures(tmp_path, step, [Failure(f"clip-{step}", "s.tar", "damaged")])
    outputs.truncate_after(2)  # the checkpoint
    outputs.write({"kind": "train", "step": 3})
    write_failures(tmp_path, 3, [Failure("clip-3", "s.tar", "damaged")])
    for file in (outputs.metrics.path, tmp_path / QUARANTINE):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_tracker_without_its_server_neither_stops_nor_stalls_a_run(tmp_path, monkeypatch):
    for name, value in {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "c" * 40}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    tracker = WandbTracker(LoggingConfig(wandb=WandbMode.online), tmp_path, {})
    for step in range(2000):
        tracker.write({"kind": "train", "step": step, "loss": 1.0})
    tracker.close(0.5)
    assert time.monotonic() - began < 4
    assert "has not taken everything in the last 0.5 s" in tracker.problem
    assert tracker.dropped > 900  # it holds 1000


def test_due_includes_the_last_step_and_zero_means_never():
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert not any(due(step, 0, 7) for step in range(1, 8))


def test_lanes_are_measured_over_all_ranks():
    """Two ranks of two lanes each; each knows its own, and their sum knows all."""
    ranks = Balance(4), Balance(4)
    for lane, (cost, seconds) in enumerate([(4.0, 0.5), (3.0, 0.3), (4.0, 0.4), (1.0, 0.4)]):
        ranks[lane // 2].add(SimpleNamespace(lane=lane, cost=cost), seconds)
    values = [a + b for a, b in zip(ranks[0].values(), ranks[1].values(), strict=True)]
    assert Balance.summary(values) == pytest.approx(
        {"lanes/efficiency": 3 / 4, "lanes/slowest": 0.5 / 0.4, "lanes/seconds": 0.4}
    )


def test_a_window_is_the_mean_of_its_steps_by_group():
    window = Window()
    for efficiency, seconds in ((0.5, 1.0), (1.0, 3.0)):
        window.add({"loss": 2.0, "lanes/efficiency": efficiency, "lanes/seconds": seconds, "term_kl": 4.0})
    assert window.close() == {
        "steps": 2, "loss": 2.0, "terms": {"kl": 4.0}, "lanes": {"efficiency": 0.75, "seconds": 2.0},
    }  # fmt: skip
