"""Inputs damaged in every known way: none crashes, hangs or vanishes. Decoded and quarantined are what was given."""

from collections import Counter
from functools import cache

import pytest

from data_prep.pipeline.isolation import IsolatedStage
from data_prep.pipeline.stage import Place
from data_prep.stages.probe import Probe
from kinema.data.dataset.shards import DatasetIndex, ShardWriter
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.decode.decoders.video import Decoder
from kinema.data.geometry import ClipShape
from kinema.data.packs.loading import make_loader
from kinema.data.verbs.check import check_dataset
from tests.faults.corpus import MUTATIONS, mutants
from tests.unit.clips import make_plan, record

SOME, MANY = 51, 2006
"""Inputs that each decoder gets: three of each kind, and a hundred."""
RULES = {"timeout_seconds": 20.0, "max_mib": 64}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    @cache
    def corpus(count: int, without: tuple[str, ...] = ()) -> DatasetIndex:
        folder = tmp_path_factory.mktemp("corpus") / "set"
        with ShardWriter(folder, max_samples=64) as writer:
            for mutant in mutants(count, without=without):
                writer.write(record(mutant.name, mutant.content, source=mutant.kind), mutant.content)
        return DatasetIndex.load(folder)

    return corpus


@pytest.mark.parametrize("decoder", list(Decoder), ids=lambda decoder: decoder.name)
@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.soak)])
def test_every_input_is_decoded_or_quarantined(build, decoder, count):
    index = build(count)
    steps = count // 17
    plan = make_plan(index, lanes=1, clips_per_step=17, max_pack_tokens=10**6, shapes=[ClipShape(9, 32, 32)])
    loader = make_loader(
        index, plan, [0], 0, steps, fps=5, seed=0, num_workers=0, decoding=DecodingRules(decoder, **RULES)
    )
    given, decoded, quarantined, died = Counter(), Counter(), Counter(), Counter()
    for (pack,) in loader:
        sources = {key: index_source(index, key) for key in pack.keys}
        failed = {failure.key: failure for failure in pack.failures}
        for key, weight in zip(pack.keys, pack.weights.tolist(), strict=True):
            given[sources[key]] += 1
            assert (weight == 0) == (key in failed)
            (quarantined if key in failed else decoded)[sources[key]] += 1
            died[sources[key]] += key in failed and failed[key].fatal
    told = {kind: f"{decoded[kind]} decoded, {quarantined[kind]} quarantined, {died[kind]} killed" for kind in given}
    print(
        f"\n{decoder.name}: given {given.total()}, decoded {decoded.total()}, quarantined {quarantined.total()}, ",
        end="",
    )
    print(f"of which {died.total()} killed or hung a process", *sorted(told.items()), sep="\n  ")
    assert given.total() == len(index.entries) == steps * 17
    assert set(given) == set(MUTATIONS)
    assert decoded.total() + quarantined.total() == given.total()
    assert decoded["sound"] == given["sound"]
    for kind in ("empty", "wrong extension", "no video stream", "huge header", "bomb"):
        assert quarantined[kind] == given[kind], kind


def index_source(index, key):
    return index.entries[int(key[-5:])].record.source


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.soak)])
def test_the_check_of_a_data_set_reports_every_input(build, count):
    result = check_dataset(build(count, without=("bomb",)).folder)  # which it would decode: slow, and no fault
    causes = Counter(problem.cause for problem in result.problems)
    print(f"\nkinema data check: kept {result.kept} of {len(result.reports)}, {dict(causes)}")
    assert len(result.reports) == count
    assert result.kept + causes.total() == count
    kinds = {problem.key: index_source(result.index, problem.key) for problem in result.problems}
    assert {"empty", "wrong extension", "no video stream", "huge header", "truncated"} <= set(kinds.values())


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.soak)])
def test_the_probe_of_data_preparation_takes_or_refuses_every_input(tmp_path, count):
    probe = IsolatedStage(2, None, Probe(), Place(tmp_path, "probe"))
    taken, failed, dropped = Counter(), Counter(), Counter()
    for mutant in mutants(count):
        path = tmp_path / f"{mutant.name}.mp4"
        path.write_bytes(mutant.content)
        result = probe.run({"key": mutant.name, "path": str(path)}, timeout_seconds=30.0)
        taken[mutant.kind] += len(result.get("rows", []))
        dropped[mutant.kind] += len(result.get("dropped", []))
        failed[mutant.kind] += "failed" in result
        path.unlink()
    probe.kill()
    print(f"\nprobe: taken {taken.total()}, dropped {dropped.total()}, failed {failed.total()} of {count}")
    assert taken.total() + dropped.total() + failed.total() == count
    assert taken["sound"] == count // len(MUTATIONS)
    for kind in ("empty", "wrong extension", "no video stream"):
        assert failed[kind] == count // len(MUTATIONS), kind
