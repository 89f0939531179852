"""Dropped captions: the declared share, really dropped, clip by clip."""

import pytest
import torch

from kinema.conditioning.dropout import drop_text, uniform_from
from kinema.conditioning.text import HashText, build_text_encoder

NULL = torch.full((1, 4), 7.0)


def text(n: int) -> list[torch.Tensor]:
    return [torch.full((1 + i % 3, 4), float(i)) for i in range(n)]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_realised_rate_is_the_declared_one(rate):
    dropped = drop_text(text(10_000), NULL, rate, range(10_000)).dropped
    assert abs(sum(dropped) / 10_000 - rate) < 3 * (rate * (1 - rate) / 10_000) ** 0.5


def test_a_dropped_clip_has_the_null_text_and_the_others_are_untouched():
    before = text(200)
    after, dropped = drop_text(before, NULL, 0.3, range(200))
    assert 0 < sum(dropped) < 200
    for old, new, drop in zip(before, after, dropped, strict=True):
        assert new is (NULL if drop else old)


def test_a_clip_is_dropped_or_not_whatever_pack_it_lies_in():
    seeds = [f"7/{position}" for position in range(300)]
    whole = drop_text(text(300), NULL, 0.4, seeds).dropped
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = drop_text(text(300), NULL, 0.4, [seeds[i] for i in order]).dropped
    assert shuffled == [whole[i] for i in order]
    assert [drop_text(text(1), NULL, 0.4, [seed]).dropped[0] for seed in seeds] == whole


def test_a_higher_rate_drops_the_same_clips_and_more():
    low, high = (drop_text(text(500), NULL, rate, range(500)).dropped for rate in (0.1, 0.4))
    assert all(b for a, b in zip(low, high, strict=True) if a)


def test_rates_0_and_1():
    assert not any(drop_text(text(50), NULL, 0.0, range(50)).dropped)
    assert all(drop_text(text(50), NULL, 1.0, range(50)).dropped)
    with pytest.raises(ValueError, match=r"text_dropout=1\.5"):
        drop_text(text(1), NULL, 1.5, [0])


def test_seeds_give_the_same_numbers_on_every_machine():
    assert [uniform_from(seed) for seed in (0, 1, "lane 3")] == GOLDEN
    numbers = torch.tensor([uniform_from(seed) for seed in range(4000)]).sort().values
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert (numbers - uniform).abs().max() < 1.63 / 4000**0.5


GOLDEN = [0.10502745234961375, 0.9920895334741048, 0.004193636244287813]


def test_training_drops_to_the_very_bytes_that_the_sampler_guides_with():
    trainer, sampler = build_text_encoder(HashText()), build_text_encoder(HashText())
    trainer.encode(["a red ball moves left", "two squares"])
    dropped = drop_text(trainer.encode(["a red ball"]), trainer.null(), 1.0, [0]).text[0]
    assert dropped.numpy().tobytes() == sampler.null().numpy().tobytes()
    assert dropped.numpy().tobytes() == sampler.encode([""])[0].numpy().tobytes()
