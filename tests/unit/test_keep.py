"""The keep table against counting by hand."""

import numpy as np
import pytest

from data_prep.scores.keep import Range, apply_filters, histogram, nearest_inside, score_values, spread

FILTERS = {"motion": Range(min=0.1, max=0.8), "sharpness": Range(min=20), "text_share": Range(max=0.01)}


def random_scores(count=500, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "motion": None if rng.random() < 0.1 else float(rng.random()),
            "sharpness": float(rng.gamma(2, 20)),
            "text_share": float(max(0, rng.normal(0, 0.01))),
        }
        for _ in range(count)
    ]


def passes(one, name):
    value, allowed = one[name], FILTERS[name]
    if value is None:
        return allowed.allow_missing
    return (allowed.min is None or value >= allowed.min) and (allowed.max is None or value <= allowed.max)


def test_every_line_counts_alone_and_after_those_before():
    scores = random_scores()
    table = apply_filters(scores, FILTERS)
    left = list(range(len(scores)))
    for line in table.lines:
        assert line.alone == sum(not passes(one, line.name) for one in scores)
        stays = [i for i in left if passes(scores[i], line.name)]
        assert (line.after, line.left) == (len(left) - len(stays), len(stays))
        assert line.after > 0
        left = stays
    assert [i for i, name in enumerate(table.removed_by) if not name] == left
    assert table.kept + sum(line.after for line in table.lines) == table.given == len(scores)


def test_a_reason_names_the_first_filter_and_its_bound():
    scores = [
        {"motion": 0.05, "sharpness": 1.0, "text_share": 0.0},
        {"motion": 0.9, "sharpness": 30.0, "text_share": 0.0},
        {"motion": None, "sharpness": 30.0, "text_share": 0.0},
        {"motion": 0.5, "sharpness": 19.9, "text_share": 0.5},
        {"motion": 0.1, "sharpness": 20.0, "text_share": 0.01},
    ]
    table = apply_filters(scores, FILTERS)
    reasons = ["motion below 0.1", "motion above 0.8", "motion has no value", "sharpness below 20", ""]
    assert table.reasons == reasons
    assert table.removed_by == ["motion", "motion", "motion", "sharpness", ""]
    assert table.text().splitlines()[1].split() == ["motion", "3", "3", "2", "0.1", "to", "0.8"]


def test_a_range_without_bounds_is_no_filter():
    assert apply_filters([{"motion": 1.0}], {"motion": Range(), "none_such": Range()}).lines == []


def test_clips_without_a_value_stay_where_that_is_allowed():
    table = apply_filters([{"motion": None}], {"motion": Range(min=0.1, allow_missing=True)})
    assert table.kept == 1


@pytest.mark.parametrize(
    ("allowed", "why"),
    [(Range(2, 1), "is above"), (Range(1), "no clip has this score. There are a")],
)
def test_a_filter_that_makes_no_sense_is_refused(allowed, why):
    with pytest.raises(ValueError, match=rf"filter\.thresholds\.b.*{why}"):
        apply_filters([{"a": 1.0}], {"b": allowed})


def test_a_histogram_counts_every_value_and_shows_the_bounds():
    values = np.append(np.random.default_rng(0).normal(10, 1, 999), [1e6, np.nan])
    found = histogram(values, bounds=(3.0,))
    assert sum(found["counts"]) == found["clips"] == 1000
    assert found["edges"][0] == pytest.approx(3.0)
    assert found["edges"][-1] < 20  # the outlier lies in the last bin and does not stretch it
    assert histogram(np.array([np.nan])) is None
    assert sum(histogram(np.full(7, 2.0))["counts"]) == 7


@pytest.mark.parametrize("bounds", [(), (0.013,), (0.2, 0.77), (-3.0,), (5.0,)])
def test_bounds_are_edges_of_the_bins(bounds):
    found = histogram(np.random.default_rng(0).random(500), bounds)
    edges = np.array(found["edges"])
    assert all(np.abs(edges - bound).min() < 1e-5 for bound in bounds)
    np.testing.assert_allclose(np.diff(edges), np.diff(edges)[0], rtol=1e-3)
    assert 20 <= len(edges) <= 90
    assert sum(found["counts"]) == 500


def test_clips_just_inside_a_bound_come_first():
    values = score_values([{"x": v} for v in (0.5, 0.12, 0.05, 0.79, None, 0.3)], "x")
    passed = [True, True, False, True, True, True]
    assert nearest_inside(values, passed, (0.1, 0.8), 3) == [3, 1, 5]
    assert len(nearest_inside(values, passed, (0.1,), 99)) == 4


def test_spread_takes_the_ends():
    assert spread(range(101), 3) == [0, 50, 100]
    assert spread([4, 5], 3) == [4, 5]
