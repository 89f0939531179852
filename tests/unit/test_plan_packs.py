"""Steps of a number of tokens, packs under a cap, buckets, shares and stages: what holds for any sizes."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data.geometry import ClipShape
from kinema.data.steps.candidates import Candidates, PlannedClip
from kinema.data.steps.dealing import LargestStep, Packing, deal, deal_buckets
from kinema.data.steps.plan import STAGE_POSITIONS, Plan
from kinema.data.steps.shares import PERIOD, Shares
from kinema.data.steps.stages import Stage

SIZES = [1, 3, 10, 40]
quick = settings(max_examples=25, deadline=None)


def candidates(tokens, clips_per_shard=5):
    clips = [PlannedClip(i, ClipShape(1, 16 * t, 16), t, t * (1 + t / 20)) for i, t in enumerate(tokens)]
    return Candidates.of(clips, [i // clips_per_shard for i in range(len(tokens))])


def joined(**parts):
    """One Candidates of several data sets, given by their clips' tokens, all with the same table of shapes."""
    everything = candidates([size for tokens in parts.values() for size in tokens])
    ends = np.cumsum([0, *map(len, parts.values())])
    rows = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
    columns = [[column[row] for column in (everything.entry_index, everything.shape_ids)] for row in rows]
    split = {
        name: Candidates(
            everything.shapes, everything.shape_tokens, everything.shape_costs,
            entry - entry[0], kinds, (np.arange(len(entry)) // 5).astype(np.int32),
        )
        for name, (entry, kinds) in zip(parts, columns, strict=True)
    }  # fmt: skip
    return Candidates.join(split, ends[:-1].tolist())


def plan_of(*stages, lanes=1, seed=0, block=2, balanced_lanes=1):
    return Plan(stages, seed=seed, lanes=lanes, shuffle_block_shards=block, balanced_lanes=balanced_lanes)


def slots_of(plan, steps):
    return [slot for step in steps for pack in plan.step(step) for slot in pack]


token_lists = st.lists(st.sampled_from(SIZES), min_size=5, max_size=60)


@quick
@given(token_lists, st.integers(40, 200), st.integers(0, 5))
def test_steps_of_tokens_hold_every_clip_once_an_epoch(tokens, budget, seed):
    plan = plan_of(Stage(candidates(tokens), 10**6, tokens_per_step=budget), seed=seed)
    steps = range(-(-4 * sum(tokens) // budget) + 1)
    slots = slots_of(plan, steps)
    assert sorted(slot.position for slot in slots) == list(range(len(slots)))
    for epoch in range(4):
        assert sorted(slot.clip.entry_index for slot in slots if slot.epoch == epoch) == list(range(len(tokens)))


@quick
@given(token_lists, st.integers(40, 200))
def test_the_clips_of_a_step_begin_in_its_own_stretch_of_tokens(tokens, budget):
    plan = plan_of(Stage(candidates(tokens), 10**6, tokens_per_step=budget))
    before = 0
    for step in range(30):
        slots = sorted(slots_of(plan, [step]), key=lambda slot: slot.position)
        for slot in slots:
            assert step * budget <= before < (step + 1) * budget
            before += slot.clip.tokens
        first = slots[0]
        assert plan.state(step) == {"epoch": first.epoch, "cursor": first.position % len(tokens)}


@quick
@given(st.lists(st.sampled_from(SIZES), min_size=60, max_size=120), st.integers(40, 80), st.integers(0, 5))
def test_no_step_of_tokens_repeats_a_clip_when_epochs_meet_in_it(tokens, budget, seed):
    # Many small clips, so that three steps are a small part of the data.
    plan = plan_of(Stage(candidates([*tokens, *[1] * 300, *[10] * 60]), 10**6, tokens_per_step=budget), seed=seed)
    for step in range(30):
        clips = [slot.clip.entry_index for slot in slots_of(plan, [step])]
        assert len(set(clips)) == len(clips)


@quick
@given(st.integers(0, 10**12))
def test_a_step_is_the_same_whether_or_not_those_before_it_were_made(step):
    stage = Stage(candidates(SIZES * 30), 10**6, tokens_per_step=100)
    plan, other = plan_of(stage), pickle.loads(pickle.dumps(plan_of(stage)))
    assert list(plan.step(step)) == list(plan.step(step))
    plan.step(step - 1 if step else 0)
    assert list(plan.step(step)) == list(other.step(step))
    first = min(slots_of(plan, [step]), key=lambda slot: slot.position)
    state = plan.state(step)
    assert state["epoch"] * 120 + state["cursor"] == first.position


def test_too_few_tokens_for_the_lanes_are_refused_and_so_is_an_epoch_that_leaves_a_lane_empty():
    images = candidates([1] * 400)
    plan_of(Stage(images, 99, tokens_per_step=8), lanes=8)
    with pytest.raises(ValueError, match=r"tokens_per_step=8 can be 6 clips.*lanes=8.*Type data.tokens_per_step=25"):
        plan_of(Stage(candidates([1] * 400 + [3]), 99, tokens_per_step=8), lanes=8)
    plan_of(Stage(candidates([1] * 400 + [3]), 99, tokens_per_step=25), lanes=8)
    # Not surely enough (that would be 320), but in fact.
    plan_of(Stage(candidates([1] * 400 + [40]), 999, tokens_per_step=60), lanes=8)


@quick
@given(
    st.lists(st.sampled_from(SIZES), min_size=24, max_size=80),
    st.sampled_from([(2, 1), (4, 2), (6, 3), (6, 1), (8, 8), (12, 4)]),
)
def test_every_clip_is_dealt_under_the_cap_that_is_promised_to_suffice(tokens, lanes):
    lanes, balanced = lanes
    sizes = np.array(tokens)
    cap = LargestStep.of_clips(np.sort(sizes)[::-1]).pack_tokens_needed(lanes)
    lane_of = deal(sizes * 1.0, sizes, lanes, cap, balanced_lanes=balanced)
    assert sorted(set(lane_of.tolist())) == list(range(lanes))  # none is empty
    assert np.bincount(lane_of, sizes).max() <= cap
    total = LargestStep.of_tokens(np.unique(sizes)[::-1], int(sizes.sum()))
    cap = total.pack_tokens_needed(lanes)
    assert np.bincount(deal(sizes * 1.0, sizes, lanes, cap, balanced_lanes=balanced), sizes).max() <= cap
    # Where a small clip may cost more than a large one, any order must do.
    cap = total.pack_tokens_needed(lanes, largest_first=False)
    assert np.bincount(deal(1.0 / sizes, sizes, lanes, cap, balanced_lanes=balanced), sizes).max() <= cap


def test_groups_of_lanes_cost_the_same_where_single_lanes_cannot():
    rng = np.random.default_rng(0)
    tokens = rng.choice([256, 1024, 10_000, 60_000, 140_000], 512, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    costs = tokens * (1 + tokens / 9216)
    lane_of = deal(costs, tokens, 64, 200_000, balanced_lanes=8)
    packs = np.bincount(lane_of, costs).reshape(8, 8)
    assert packs.sum(axis=1).mean() / packs.sum(axis=1).max() > 0.999
    assert packs.mean() / packs.max() < 0.8
    assert (np.diff(packs, axis=1) <= 0).all()  # dearest first
    assert np.bincount(lane_of, tokens).max() <= 200_000


@quick
@given(st.lists(st.sampled_from(SIZES), min_size=30, max_size=60), st.integers(40, 90))
def test_a_bucket_holds_one_shape_and_lanes_that_are_promised_suffice(tokens, cap):
    sizes = np.array(tokens)
    lanes = min(LargestStep.of_clips(np.sort(sizes)[::-1]).bucket_lanes_needed(cap), len(tokens))
    lane_of = deal_buckets(np.searchsorted(SIZES, sizes), sizes * 1.0, sizes, lanes, cap)
    assert sorted(set(lane_of.tolist())) == list(range(lanes))
    for lane in range(lanes):
        assert len(set(sizes[lane_of == lane])) == 1
        assert sizes[lane_of == lane].sum() <= cap


def test_a_plan_of_buckets_has_one_shape_in_a_pack_and_says_how_many_lanes_it_needs():
    stage = Stage(candidates(SIZES * 20), 120, tokens_per_step=400, packing=Packing.buckets)
    with pytest.raises(ValueError, match=r"packing=buckets with data.tokens_per_step=400 in 4 shapes can need 8 lanes"):
        plan_of(stage, lanes=7)
    plan = plan_of(stage, lanes=8)
    for step in range(20):
        assert all(len({slot.clip.shape for slot in pack}) == 1 for pack in plan.step(step))
    with pytest.raises(ValueError, match=r"max_pack_tokens=39 is less than the largest clip, 40"):
        plan_of(Stage(candidates(SIZES * 20), 39, 4, packing=Packing.buckets))


# Shares and stages


@quick
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 3 * PERIOD))
def test_after_any_number_of_clips_each_source_is_near_its_share(weights, clips):
    shares = Shares(weights)
    counts = [shares.of_clips(source, clips) for source in range(len(weights))]
    assert sum(counts) == clips
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - clips * weight / sum(weights)) <= len(weights) + clips / PERIOD


def test_shares_are_within_a_hundredth_after_ten_thousand_clips_and_spread_evenly():
    weights = [0.5, 0.3, 0.15, 0.0499, 0.0001]
    shares = Shares(weights)
    for source, weight in enumerate(weights):
        count = shares.of_clips(source, 10_000)
        assert abs(count / 10_000 - weight) <= 0.01 * weight
        gaps = np.diff([shares.of_clips(source, n) for n in range(0, 10_001, 100)])
        assert gaps.max() - gaps.min() <= 2


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e-9]])
def test_weights_that_would_never_be_drawn_are_refused(weights):
    with pytest.raises(ValueError, match=r"data\.mixture\.film\.weight="):
        Shares(weights, ["toy", "film"])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 40), st.floats(0.1, 1)), min_size=2, max_size=3), st.sampled_from([None, 90]))
def test_each_source_of_a_mixture_runs_through_epochs_of_its_own(sources, tokens_per_step):
    parts = {f"s{i}": [SIZES[(i + k) % 3] for k in range(count)] for i, (count, _) in enumerate(sources)}
    shares = Shares([weight for _, weight in sources])
    stage = Stage(joined(**parts), 10**6, 8, tokens_per_step=tokens_per_step, shares=shares)
    plan = plan_of(stage)
    slots = slots_of(plan, range(30))
    assert len({slot.position for slot in slots}) == len(slots)
    first = 0
    for source, (count, _) in enumerate(sources):
        mine = [slot for slot in slots if first <= slot.clip.entry_index < first + count]
        measure = len(mine) if tokens_per_step is None else sum(slot.clip.tokens for slot in mine)
        expected = stage.taken(source, 30)
        assert measure == expected if tokens_per_step is None else 0 <= measure - expected < 10
        shown = Counter(slot.clip.entry_index for slot in mine)
        assert max(shown.values()) - min(shown.get(first + i, 0) for i in range(count)) <= 1
        for slot in mine:
            assert slot.epoch == (slot.position // len(sources)) // count
        state = plan.state(30)[f"s{source}"]
        assert state["epoch"] * count + state["cursor"] == len(mine)
        first += count


def test_weights_that_change_with_the_step_read_on_where_the_sources_stand():
    clips = joined(toy=[1] * 50, film=[1] * 70)
    even, mostly_film = (Shares(weights) for weights in ([1, 1], [1, 9]))
    plan = plan_of(Stage(clips, 99, 10, shares=even, until_step=10), Stage(clips, 99, 10, shares=mostly_film))
    early, late = slots_of(plan, range(10)), slots_of(plan, range(10, 30))
    assert [sum(slot.clip.entry_index < 50 for slot in part) for part in (early, late)] == [50, 20]
    film = sorted(slot.clip.entry_index for slot in [*early, *late] if slot.clip.entry_index >= 50)
    assert len(film) == 230
    assert Counter(film).most_common()[0][1] - Counter(film).most_common()[-1][1] <= 1
    assert len({slot.position for slot in [*early, *late]}) == 300
    assert plan.state(10) == {"stage": 1, "toy": {"epoch": 1, "cursor": 0}, "film": {"epoch": 0, "cursor": 50}}


def test_a_stage_of_other_shapes_begins_an_epoch_of_its_own():
    small, large = candidates([1] * 40), candidates([10] * 40)
    plan = plan_of(Stage(small, 999, 8, until_step=3), Stage(large, 999, 4))
    early, late = slots_of(plan, range(3)), slots_of(plan, range(3, 13))
    assert {slot.clip.tokens for slot in early} == {1}
    assert {slot.clip.tokens for slot in late} == {10}
    assert {slot.epoch for slot in early} == {0}
    assert {slot.epoch for slot in late} == {1}  # its clips were seen before
    assert sorted(slot.clip.entry_index for slot in late) == list(range(40))
    assert min(slot.position for slot in late) >= STAGE_POSITIONS
    assert plan.state(3) == {"stage": 1, "epoch": 1, "cursor": 0}
    again = plan_of(Stage(small, 999, 8, until_step=3), Stage(large, 999, 4))
    assert list(again.step(7)) == list(plan.step(7))
    assert plan.clips is large


def test_lanes_are_balanced_in_groups_that_divide_them():
    with pytest.raises(ValueError, match=r"data\.balanced_lanes=3 must be at least 1 and divide data\.lanes=4"):
        plan_of(Stage(candidates([1] * 40), 99, 8), lanes=4, balanced_lanes=3)
