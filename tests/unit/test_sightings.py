import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.data.account.ledger import Ledger
from kinema.data.account.rights import RightsPolicy
from kinema.data.account.sightings import SeenKeys, Sightings, hash_of
from kinema.data.dataset.mixture import JoinedIndex
from kinema.interop.data_card import data_section, licenses_seen
from kinema.training.checkpoints.store import CheckpointStore, json_writer
from kinema.training.records.seen import KEYS, Seen, Start, data_seen, keys_writer
from kinema.training.records.seen_table import Question, answer
from tests.unit.clips import build
from tests.unit.test_ledger import pack

KEYS_OF_SET = [f"clip-{number:03d}" for number in range(8)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    facts = {"source": lambda i: "film" if i < 4 else "toy", "license": lambda i: "MIT" if i % 2 else "CC0-1.0"}
    return build(tmp_path_factory.mktemp("data") / "set", 8, **facts)


def table(counts: Counter) -> SeenKeys:
    """The slow way: one key after the other."""
    rows = sorted((hash_of(key), times) for key, times in counts.items())
    return SeenKeys(np.array([h for h, _ in rows], np.uint64), np.array([t for _, t in rows], np.int32))


@given(st.lists(st.sampled_from(KEYS_OF_SET)), st.lists(st.sampled_from(KEYS_OF_SET)))
def test_times_of_every_key_add_up(first, second):
    whole = table(Counter(first)).plus(table(Counter(second)))
    for key in [*KEYS_OF_SET, "another"]:
        assert whole.times_of(key) == (first + second).count(key)


def test_clips_of_one_key_in_two_data_sets_are_summed(index):
    joined = replace(index, entries=[*index.entries, *index.entries])
    sightings = Sightings(16)
    times = np.arange(16, dtype=np.int32)
    sightings.new_clips(times, joined)
    seen = sightings.seen(times)
    assert [seen.times_of(key) for key in KEYS_OF_SET] == [2 * number + 8 for number in range(8)]


def test_in_a_mixture_a_key_is_that_of_every_data_set_or_of_one(index, tmp_path):
    joined = JoinedIndex.of({"films": index, "toys": index})
    ledger, sightings = Ledger(), Sightings(16)
    for shown in ([3, 11, 4], [3]):
        one = pack(shown)
        ledger.record(one, joined)
        sightings.add_shown(one)
    sightings.new_clips(sightings.times, joined)
    save(tmp_path, 1, Seen(ledger, sightings.seen(sightings.times)), Start())
    asked = {"clip-003": 3, "films/clip-003": 2, "toys/clip-003": 1, "clip-004": 1, "toys/clip-004": 0, "clip-005": 0}
    assert {key: answer(tmp_path, Question(key=key)).rows[0].shown for key in asked} == asked


def steps_of_a_run():
    """Numbers shown by each of two ranks in each of six steps, every clip several times."""
    order = np.random.default_rng(0).integers(0, 8, (6, 2, 3))
    return order.tolist()


def train(index, steps, ranks, start=None):
    """Ledger and keys at the end, as the trainer keeps them: one of each a rank, added up when it saves."""
    ledgers, sightings = [Ledger() for _ in range(ranks)], [Sightings(8) for _ in range(ranks)]
    if start is not None:
        ledgers[0], sightings[0] = start.ledger, Sightings(8, start.keys)
    for lanes in steps:
        for lane, numbers in enumerate(lanes):
            shown = pack(numbers, failed=[7])
            ledgers[lane % ranks].record(shown, index)
            sightings[lane % ranks].add_shown(shown)
    times = np.sum([one.times for one in sightings], axis=0, dtype=np.int32)
    ledgers[0].record_distinct(sightings[0].new_clips(times, index))
    whole = Ledger()
    for ledger in ledgers:
        whole.merge(Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))))
    return Seen(whole, sightings[0].seen(times))


@pytest.mark.parametrize("parts", [((6, 2),), ((6, 1),), ((2, 1), (4, 2)), ((1, 2), (2, 1), (3, 2))])
def test_ledger_and_keys_are_the_same_however_the_run_was_cut(index, parts):
    steps, seen = steps_of_a_run(), None
    numbers = [n for lanes in steps for lane in lanes for n in lane if n != 7]
    for length, ranks in parts:
        seen = train(index, steps[:length], ranks, seen)
        steps = steps[length:]
    for number, key in enumerate(KEYS_OF_SET):
        assert seen.keys.times_of(key) == numbers.count(number)
    for name, members in (("film", range(4)), ("toy", range(4, 8))):
        account = seen.ledger.sources[name]
        assert account.decoded == sum(numbers.count(n) for n in members)
        assert account.distinct == len(set(numbers) & set(members))
        assert account.epochs == account.decoded / account.distinct
    for name, odd in (("MIT", 1), ("CC0-1.0", 0)):
        account = seen.ledger.accounts["licenses"][name]
        assert account.decoded == sum(n % 2 == odd for n in numbers) == account.licenses[name]
        assert account.distinct == len({n for n in numbers if n % 2 == odd})
    assert seen.keys_are_complete


def save(folder, step, seen, start):
    """The files of a checkpoint that the verb reads."""
    training = {"step": step, "ledger": seen.ledger.to_dict(), "start": start.to_dict()}
    writers = {"training.json": json_writer(training), KEYS: keys_writer(seen.keys, start.seen.keys)}
    return CheckpointStore(folder).publish(step, writers)


@pytest.fixture
def base(index, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "base", step, train(index, [[[0, step]]] * step, 1), Start())
    return tmp_path / "base"


def test_the_verb_says_which_checkpoints_saw_a_clip(base):
    found = answer(base, Question(key="clip-003"))
    assert [(row.weights, row.shown) for row in found.rows] == [
        ("step-00000001", 0), ("step-00000002", 0), ("step-00000003", 3),
    ]  # fmt: skip
    assert found.verdict() == (
        "SEEN key clip-003: by 1 of 3 checkpoint(s), first step-00000003, 3 times by step-00000003"
    )
    unseen = answer(base, Question(key="clip-006"))
    assert unseen.verdict() == "NOT SEEN key clip-006: by none of 3 checkpoint(s)"
    assert answer(base, Question(source="film")).verdict().endswith("first step-00000001, 6 times by step-00000003")
    assert answer(base, Question()).verdict() == "SEEN 6 clips by step-00000003"


def test_weights_that_start_from_others_have_seen_what_those_saw(base, index, tmp_path):
    store = CheckpointStore(base)
    start = Start.of(store.open(3))
    save(tmp_path / "child", 1, train(index, [[[5]]], 1), start)
    grandchild = Start.of(CheckpointStore(tmp_path / "child").open(1))
    save(tmp_path / "grandchild", 1, train(index, [[[3]]], 1), grandchild)
    assert answer(tmp_path / "child", Question(key="clip-003")).seeing == ["step-00000001"]
    assert answer(tmp_path / "child", Question(key="clip-006")).verdict().startswith("NOT SEEN")
    assert answer(tmp_path / "grandchild", Question(key="clip-003")).verdict().endswith("4 times by step-00000001")


def test_nobody_vouches_for_what_is_not_written_down(base, index, tmp_path):
    published = CheckpointStore(tmp_path / "published").publish(1, {"training.json": json_writer({"step": 0})})
    save(tmp_path / "tuned", 1, train(index, [[[5]]], 1), Start.of(published))
    unknown = answer(tmp_path / "tuned", Question(key="clip-003"))
    assert unknown.verdict().startswith("NOT KNOWN key clip-003: by none of 1 checkpoint(s) (start ")
    assert not unknown.is_known
    (base / "checkpoints/step-00000002" / KEYS).write_bytes(b"")
    damaged = answer(base, Question(key="clip-006"))
    assert damaged.verdict() == (
        "NOT KNOWN key clip-006: by none of 3 checkpoint(s) (step-00000002: seen.safetensors has 0 bytes instead of "
        f"{(base / 'checkpoints/step-00000003' / KEYS).stat().st_size})"
    ), damaged.doubts


def test_exported_weights_know_their_sums_and_not_their_keys(base, index, tmp_path):
    own = train(index, [[[5]]], 1)
    data = data_seen(own.ledger.to_dict(), Start.of(CheckpointStore(base).open(3)))
    exported = CheckpointStore(tmp_path / "exported").publish(0, {"manifest.json": json_writer({"data": data})})
    save(tmp_path / "tuned", 1, own, Start.of(exported))
    found = answer(tmp_path / "tuned", Question(source="film"))
    assert [row.shown for row in found.rows] == [6, 0]
    assert found.verdict().endswith("first step-00000001, 6 times by step-00000001")
    assert answer(tmp_path / "tuned", Question(key="clip-003")).verdict().startswith("NOT KNOWN key clip-003")


def test_a_run_from_before_keys_were_kept_says_so(index, tmp_path):
    seen = train(index, [[[0, 1]]], 1)
    save(tmp_path / "old", 1, Seen(seen.ledger), Start())
    assert answer(tmp_path / "old", Question(key="clip-003")).verdict().endswith("not all of its keys are kept)")


def test_a_withdrawn_clip_is_neither_shown_nor_damaged(index):
    ledger, sightings = Ledger(), Sightings(8)
    one = pack([0, 1, 2], failed=[1], withdrawn=[2])
    ledger.record(one, index)
    sightings.add_shown(one)
    film = ledger.sources["film"]
    assert (film.decoded, film.failed, film.withdrawn, film.clips) == (1, 1, 1, 2)
    assert ledger.withdrawn == {"withdrawn": 1}
    assert sightings.times.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert ledger.reasons == {"no video stream": 1}


def test_names_beyond_the_limit_share_an_account_and_the_answer_says_so(index, monkeypatch):
    monkeypatch.setattr("kinema.data.account.ledger.MOST_NAMES", 1)
    ledger = Ledger()
    ledger.record(pack([0, 4]), index)
    assert ledger.total.decoded == 2
    assert "more names than it keeps" in Question(source="toy").doubt(Seen(ledger))


def test_the_card_names_what_was_seen_before_and_what_was_allowed(base, index):
    own = train(index, [[[5]]], 1)
    start = Start.of(CheckpointStore(base).open(3))
    seen = data_seen(own.ledger.to_dict(), start)
    manifest = {"data": {"rights": RightsPolicy(("MIT", "CC0-1.0"), excluded_keys=("a", "b")).to_dict(), **seen}}
    card = data_section(manifest)
    assert licenses_seen(manifest) == ["CC0-1.0", "MIT"]
    now, before = card.split("### Before it, in `")
    assert "| MIT | 1 | 1 | 1.1 | 100.0% |" in now
    assert "| CC0-1.0 | 1 | 3 | 3.4 | 50.0% |" in before
    assert "| film | 2 | 6 | 6.8 | 100.0% |" in before
    assert "- allowed_licenses: MIT, CC0-1.0" in before
    assert "- excluded_keys: 2 key(s)" in before
    assert data_section({"data": {}}) == "## Data seen\n\nNot known."
    assert data_section({"published": {}}) == ""
