import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.data.account.ledger import Ledger
from kinema.data.account.licenses import is_known, licenses_named
from kinema.data.account.rights import RightsConfig, RightsPolicy, idle_words
from kinema.data.config import DataConfig
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, index_name
from kinema.data.geometry import ClipShape
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from tests.unit.clips import GEOMETRY, SHAPES, build, make_plan, record

WORDS = ["MIT", "CC-BY-4.0", "CC-BY-NC-4.0", "GPL-3.0-only"]


def clip(**facts):
    return record("clip-000", b"", **facts)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    facts = {
        "license": lambda i: "CC-BY-NC-4.0" if i == 0 else "CC-BY-4.0",
        "consent": lambda i: "refused" if i == 1 else "given",
        "generated": lambda i: "fully" if i == 2 else "no",
        "source": lambda i: "film" if i == 3 else "toy",
    }
    return build(tmp_path_factory.mktemp("data") / "set", 12, **facts)


def test_every_refused_clip_is_counted_under_the_key_that_refuses_it(index, tmp_path):
    (tmp_path / "withdrawn.txt").write_text("# 2026-02-01, by letter\nclip-005\n\nclip-01?\n")
    rights = RightsConfig(
        allowed_licenses=["cc-by-*"],
        denied_licenses=["*-NC-*"],
        allowed_consent=["given"],
        allowed_generated=["no", "unknown"],
        excluded_sources=["fil*"],
        excluded_keys=["clip-004"],
        excluded_keys_file=str(tmp_path / "withdrawn.txt"),
    )
    clips, report = plan_clips(index, SHAPES, 8, GEOMETRY, rights=rights.policy())
    assert [planned.entry_index for planned in clips] == [6, 7, 8, 9]
    assert report.dropped == {
        "license CC-BY-NC-4.0 in data.rights.denied_licenses": 1,
        "consent refused not in data.rights.allowed_consent": 1,
        "generated fully not in data.rights.allowed_generated": 1,
        "source film in data.rights.excluded_sources": 1,
        "key in data.rights.excluded_keys": 4,
    }


def test_advice_on_lengths_is_given_only_where_lengths_were_the_cause(index):
    with pytest.raises(ValueError, match=r"allowed_licenses 1\. Change what these reasons name") as refused:
        plan_clips(index, SHAPES, 8, GEOMETRY, rights=RightsConfig(allowed_licenses=["MIT"]).policy())
    assert "fewer frames" not in str(refused.value)
    with pytest.raises(ValueError, match=r"too short 12\. .*Type fewer frames, another data\.fps"):
        plan_clips(index, [ClipShape(101, 32, 32)], 8, GEOMETRY)


def test_by_default_nothing_is_refused(index):
    assert plan_clips(index, SHAPES, 8, GEOMETRY, rights=DataConfig().rights.policy())[1].kept == 12


@pytest.mark.parametrize(
    ("license", "parts"),
    [
        ("MIT OR (CC-BY-4.0 AND CC0-1.0)", ("MIT", "CC-BY-4.0", "CC0-1.0")),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ("GPL-2.0-only WITH Classpath-exception-2.0",)),
        ("LicenseRef-Contract-7", ("LicenseRef-Contract-7",)),
        ("Free (AND Easy)", ("Free (AND Easy)",)),  # no expression, hence one name
    ],
)
def test_an_expression_names_its_licences(license, parts):
    assert licenses_named(license) == parts


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.sets(st.sampled_from(WORDS)), st.booleans())
def test_of_an_expression_every_licence_must_be_allowed(parts, allowed, both):
    policy = RightsPolicy(tuple(allowed))
    refused = policy.refused_license((" AND " if both else " OR ").join(parts))
    assert (refused is None) == (set(parts) <= allowed)


def test_a_wildcard_does_not_let_a_second_licence_in():
    assert RightsPolicy(("CC-BY-*",)).refused_license("CC-BY-4.0 AND GPL-3.0-only")
    assert RightsPolicy(denied_licenses=("GPL-*",)).refused_license("MIT AND GPL-3.0-only")
    assert not RightsPolicy(("CC-BY-*",)).refused_license("cc-by-4.0")


def test_letters_that_mean_something_in_patterns_elsewhere_are_letters():
    policy = RightsPolicy(excluded_keys=("clip[0]*", "a.b"))
    assert policy.refused_key("clip[0]-x")
    assert not policy.refused_key("clip0-x")
    assert not policy.refused_key("aXb")


@pytest.mark.parametrize("name", ["allowed_licenses", "allowed_consent", "allowed_generated"])
def test_a_list_that_allows_nothing_is_refused(name):
    with pytest.raises(ValueError, match=rf"data\.rights\.{name}=\[\] allows no clip"):
        RightsConfig(**{name: []})


def test_a_misspelt_word_and_a_missing_file_are_refused():
    with pytest.raises(ValueError, match=r"data\.rights\.allowed_generated: 'none' must be one of no, partly"):
        RightsConfig(allowed_generated=["none"])
    with pytest.raises(ValueError, match=r"data\.rights\.excluded_keys_file=absent\.txt cannot be read"):
        RightsConfig(excluded_keys_file="absent.txt").policy()


def test_a_policy_goes_through_json():
    policy = RightsPolicy(("MIT",), excluded_keys=("a", "b*"))
    assert RightsPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(
    ("license", "known"),
    [("CC-BY-4.0", True), ("unknown", True), ("LicenseRef-Ours", True), ("CC-BY", False), ("Creative Commons", False)],
)
def test_licence_names_are_checked_against_the_list(license, known):
    assert is_known(license) is known


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"generated": "maybe"}, "generated='maybe' must be one of no, partly, fully, unknown"),
        ({"generated": "no", "generator": "X-1"}, "generator='X-1' made it, but generated=no"),
        ({"collected": "31.1.2026"}, "collected='31.1.2026' must be a day such as 2026-01-31"),
    ],
)
def test_a_record_with_a_wrong_statement_is_refused(facts, message):
    with pytest.raises(ValueError, match=f"Clip key=clip-000: {message}"):
        ClipRecord.from_dict(clip(**facts).to_dict())


def test_records_from_before_these_fields_read_as_unknown():
    values = clip().to_dict()
    for name in ("source_url", "collected", "generated", "generator"):
        del values[name]
    old = ClipRecord.from_dict(values)
    assert (old.generated, old.generator, old.source_url, old.collected) == ("unknown", "", "", "")


def test_a_slip_in_a_list_is_said(index):
    records = [entry.record for entry in index.entries]
    found = [[getattr(record, name) for record in records] for name in ("license", "source", "key")]
    assert idle_words(RightsPolicy(), *found) is None
    right = RightsPolicy(
        ("cc-by-4.0", "CC-BY-NC-*"), ("*-nc-*",), excluded_sources=("f?lm",), excluded_keys=("clip-003",)
    )
    assert idle_words(right, *found) is None
    wrong = RightsPolicy(("CC-BY-4.0", "CC-BY"), excluded_sources=("Film", "toy"), excluded_keys=("clip-3", "Clip-*"))
    assert idle_words(wrong, *found) == (
        "no clip has what data.rights names: allowed_licenses CC-BY; excluded_sources Film; "
        "excluded_keys clip-3, Clip-*. Is it written as in the records?"
    )


def test_all_that_a_plan_leaves_out_is_in_the_ledger_by_reason(index):
    _, report = plan_clips(index, SHAPES, 8, GEOMETRY, rights=RightsPolicy(("CC-BY-4.0",)), max_clips=5)
    ledger = Ledger()
    ledger.record_kept(report)
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again.left_out == {"license CC-BY-NC-4.0 not in data.rights.allowed_licenses": 1, "beyond data.max_clips": 6}
    assert sum(account.dropped for account in again.sources.values()) == again.left_out.total() == 12 - report.kept


# While reading


def relabelled(folder, target, shard, change):
    """A copy of a data set whose index, and manifest with it, were changed behind the tar's back."""
    import hashlib

    shutil.copytree(folder, target)
    path = target / index_name(shard)
    content = json.loads(path.read_text())
    for sample in content["samples"]:
        change(sample["record"])
    path.write_text(json.dumps(content))
    manifest = json.loads((target / "dataset.json").read_text())
    for row in manifest["shards"]:
        if row["file"] == shard:
            row["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (target / "dataset.json").write_text(json.dumps(manifest))
    return DatasetIndex.load(target)


def read(index, plan, steps, policy, workers=0):
    rows = make_loader(index, plan, [0, 1], 0, steps, fps=8, seed=0, rights=policy, num_workers=workers)
    return [pack for row in rows for pack in row]


def test_a_clip_whose_tar_contradicts_the_index_is_never_shown(index, tmp_path):
    def whiten(values):
        if values["key"] == "clip-000":
            values["license"] = "CC0-1.0"

    forged = relabelled(index.folder, tmp_path / "forged", "clips-000000.tar", whiten)
    packs = read(forged, make_plan(forged), 3, RightsPolicy(denied_licenses=("*-NC-*",)))
    (failure,) = [failure for pack in packs for failure in pack.failures]
    assert (failure.key, failure.shard) == ("clip-000", "clips-000000.tar")
    assert failure.reason == "the tar says license='CC-BY-NC-4.0', the index 'CC0-1.0'"
    shown = [key for pack in packs for key, weight in zip(pack.keys, pack.weights, strict=True) if weight]
    assert sorted(shown) == [f"clip-{number:03d}" for number in range(1, 12)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_withdrawn_after_planning_keeps_its_place_and_all_others_theirs(index, workers):
    plan = make_plan(index)
    before = read(index, plan, 3, RightsPolicy())
    after = read(index, plan, 3, RightsPolicy(excluded_keys=("clip-007",)), workers)
    assert [pack.keys for pack in after] == [pack.keys for pack in before]
    assert [(left.key, left.reason) for pack in after for left in pack.withdrawn] == [
        ("clip-007", "key in data.rights.excluded_keys")
    ]
    for old, new in zip(before, after, strict=True):
        assert not new.failures
        for key, weight, was, now in zip(new.keys, new.weights.tolist(), old.frames, new.frames, strict=True):
            assert weight == float(key != "clip-007")
            assert (now == (was if weight else 0)).all()


def test_words_that_are_nearly_usual_are_slips():
    with pytest.raises(ValueError, match=r"allowed_consent: 'givn' is no usual word. Did you mean given\?"):
        RightsConfig(allowed_consent=["givn"])
    RightsConfig(allowed_consent=["given", "givn*", "contract-7"])
    with pytest.raises(ValueError, match=r"'False' must be one of .* a bare no is a truth value: type \[\"no\"\]"):
        RightsConfig(allowed_generated=["False"])
