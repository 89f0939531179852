"""Decoders that crash, hang or grow: the clip is quarantined, its process replaced, everything else goes on."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from kinema.data.account.ledger import DataBudgetError, Ledger, Quarantine
from kinema.data.account.quarantine import condemned_clips, write_failures
from kinema.data.config import DataConfig
from kinema.data.decode import clip_decoder
from kinema.data.decode.clip_decoder import ClipDecoder, DecodingRules
from kinema.data.decode.decoders.video import DecodeError, Decoder
from kinema.data.decode.decoding import decode_clip
from kinema.data.decode.isolation import CallDied, Isolated
from kinema.data.geometry import ClipShape
from kinema.data.packs.loading import make_loader
from kinema.data.packs.pack import Failure
from tests.end_to_end.killing import killed
from tests.unit.clips import SHAPES, build, make_plan, numbered_video

HARMFUL = {13}
CLIPS = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "set", CLIPS, damaged=HARMFUL)


@pytest.fixture(scope="module")
def expected(index):
    return packs_of(index)  # in which the harmful clip is an ordinary damaged one


def packs_of(index, steps=6, **options):
    loader = make_loader(index, make_plan(index, shapes=SHAPES[:1]), [0, 1], 0, steps, fps=8, seed=0, **options)
    return [pack for row in loader for pack in row]


def failures_of(packs):
    return [failure for pack in packs for failure in pack.failures]


def harmful_decoder(monkeypatch, harm, decoders=tuple(Decoder)):
    """These decoders do harm where they meet the damaged clip; `calls` counts how often."""
    size, calls = len(numbered_video([i / 10 for i in range(20)])), multiprocessing.Value("i", 0)

    def decode_or_harm(mp4, shape, fps, start, decoder, **options):
        if len(mp4) < size and decoder in decoders:
            with calls.get_lock():
                calls.value += 1
            harm()
        elif len(mp4) < size:
            return torch.full((*shape, 3), 7, dtype=torch.uint8)
        return decode_clip(mp4, shape, fps, start, decoder, **options)

    monkeypatch.setattr(clip_decoder, "decode_clip", decode_or_harm)
    return calls


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def spin():
    while True:  # as a decoder does in native code: no signal handler would run
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (crash, r"decoding it killed the process \(exit code -11\)"),
        (lambda: os._exit(3), r"killed the process \(exit code 3\)"),
        (spin, "decoding it takes over 2 s"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_a_clip_that_kills_or_hangs_its_decoder_costs_itself_and_nothing_else(
    index, expected, monkeypatch, harm, reason, workers
):
    calls = harmful_decoder(monkeypatch, harm)
    began = time.monotonic()
    actual = packs_of(index, num_workers=workers, decoding=DecodingRules(timeout_seconds=2.0))
    assert time.monotonic() - began < 12
    assert [(failure.key, failure.fatal) for failure in failures_of(actual)] == [("clip-013", True)]
    assert re.search(reason, failures_of(actual)[0].reason)
    assert calls.value == 1
    for one, other in zip(expected, actual, strict=True):
        assert (one.keys, one.positions) == (other.keys, other.positions)
        assert torch.equal(one.weights, other.weights)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.frames, other.frames, strict=True))


def test_a_clip_whose_decoder_somebody_else_killed_is_tried_once_more(monkeypatch):
    content, shape = numbered_video([i / 10 for i in range(20)]), ClipShape(5, 32, 32)
    decode, harm, decoder = decode_clip, killed(multiprocessing.Value("i", 1)), ClipDecoder(DecodingRules())
    monkeypatch.setattr(clip_decoder, "decode_clip", lambda *given, **options: (harm(), decode(*given, **options))[1])
    decoded = decoder.decode(content, shape, 8, 0.0)
    assert decoded.refusals == [(Decoder.decord, "decord: decoding it killed the process (exit code -9)")]
    assert torch.equal(decoded.frames, decoder.decode(content, shape, 8, 0.0).frames)
    decoder.close()


def test_a_clip_whose_decoder_is_killed_twice_is_condemned(index, monkeypatch):
    calls = harmful_decoder(monkeypatch, killed(multiprocessing.Value("i", 2)))
    (failure,) = failures_of(packs_of(index))
    assert (failure.key, failure.fatal, calls.value) == ("clip-013", True, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_condemned_clip_is_not_tried_again_in_later_epochs_nor_after_resuming(index, monkeypatch, tmp_path, workers):
    calls = harmful_decoder(monkeypatch, crash)
    first = packs_of(index, steps=18, num_workers=workers)  # three epochs
    assert [failure.key for failure in failures_of(first)] == ["clip-013"] * 3
    assert calls.value == 1

    write_failures(tmp_path, 1, failures_of(first))
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"step": 2, "key": "clip-0')  # the run was killed here
    condemned = condemned_clips(tmp_path)
    assert list(condemned) == ["clip-013"]
    second = packs_of(index, steps=18, num_workers=workers, condemned=condemned)
    assert calls.value == 1
    assert failures_of(second) == failures_of(first)
    assert [pack.weights.tolist() for pack in second] == [pack.weights.tolist() for pack in first]


def test_an_ordinary_failure_condemns_nobody(tmp_path):
    write_failures(
        tmp_path, 1, [Failure("a", "s.tar", "no video stream"), Failure("b", "s.tar", "it hung", fatal=True)]
    )
    assert condemned_clips(tmp_path) == {"b": "it hung"}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text().splitlines()[0]) == {
        "step": 1, "key": "a", "shard": "s.tar", "reason": "no video stream", "fatal": False,
    }  # fmt: skip
    assert condemned_clips(tmp_path / "new run") == {}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", [crash, spin])
def test_another_decoder_steps_in_counted_by_cause(index, expected, monkeypatch, workers, harm):
    harmful_decoder(monkeypatch, harm, decoders=[Decoder.decord])
    rules = DecodingRules(Decoder.decord, [Decoder.pyav], timeout_seconds=1.0)
    packs, ledger = packs_of(index, num_workers=workers, decoding=rules), Ledger()
    for pack in packs:
        ledger.record(pack, index)
    assert not failures_of(packs)
    fallbacks = [fallback for pack in packs for fallback in pack.fallbacks]
    assert [(f.key, f.failed, f.used) for f in fallbacks] == [("clip-013", "decord", "pyav")]
    assert ledger.total.failed == 0
    assert ledger.fallbacks == {fallbacks[0].cause(): 1}
    assert fallbacks[0].cause().startswith("decord -> pyav: decord: decoding it ")
    both = Ledger.from_dict(ledger.to_dict())
    both.merge(ledger)
    assert both.fallbacks.total() == 2
    Quarantine(1.0, 0, max_fallback_fraction=0.1).check(ledger)
    with pytest.raises(DataBudgetError, match=r"1 times in 24 .*max_fallback_fraction=0\.01.*decord -> pyav"):
        Quarantine(1.0, 0, max_fallback_fraction=0.01).check(ledger)
    for one, other in zip(expected, packs, strict=True):
        for key, mine, theirs in zip(one.keys, one.frames, other.frames, strict=True):
            assert torch.equal(mine, theirs) or key == "clip-013"


def test_without_a_fallback_nothing_steps_in_and_with_one_all_reasons_are_told():
    broken, shape = numbered_video([i / 10 for i in range(20)])[:900], ClipShape(5, 32, 32)
    with pytest.raises(DecodeError, match=r"^decord: "):
        ClipDecoder(DecodingRules()).decode(broken, shape, 8, 0.0)
    with pytest.raises(DecodeError, match=r"^decord: .*; torchcodec: .*; pyav: "):
        ClipDecoder(DecodingRules(Decoder.decord, [Decoder.torchcodec, Decoder.pyav])).decode(broken, shape, 8, 0.0)


@pytest.fixture(scope="module")
def bomb():
    """Some kilobytes that decode to frames of 12 MiB each."""
    content = numbered_video([i / 10 for i in range(3)], size=(2048, 2048))
    assert len(content) < 50_000
    return content


@pytest.mark.parametrize("decoder", list(Decoder), ids=lambda decoder: decoder.name)
def test_a_decompression_bomb_is_refused_by_its_header(bomb, decoder):
    shape = ClipShape(2, 32, 32)
    with pytest.raises(DecodeError, match=r"2 frames of 2048 x 2048 take 24 MiB, more than data.max_decoded_mib=20"):
        ClipDecoder(DecodingRules(decoder, max_mib=20)).decode(bomb, shape, 10, 0.0)
    ClipDecoder(DecodingRules(decoder, max_mib=24)).decode(bomb, shape, 10, 0.0)


BOUNDED = """
import numpy as np
from kinema.data.decode.isolation import Isolated

isolated = Isolated(lambda mib: len(np.ones(mib * 2**20, np.uint8)), timeout_seconds=20, max_memory_mib=600)
for mib in (300, 700, 300):
    try:
        print(isolated(mib) == mib * 2**20)
    except MemoryError:
        print("MemoryError")
isolated.close()
"""


def test_memory_that_a_call_may_take_is_bounded():
    # In a process of its own: what the caller's heap has free comes on top of the bound.
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "MemoryError", "True"]


def test_a_call_gives_results_errors_and_the_death_of_its_process():
    def call(what):
        if what == "die":
            os.abort()
        if what == "sleep":
            time.sleep(30)
        return 1 / what, os.getpid()

    isolated = Isolated(call, timeout_seconds=0.5, max_memory_mib=500)
    first = isolated(2)
    assert first[0] == 0.5
    assert first[1] != os.getpid()
    with pytest.raises(ZeroDivisionError) as error:
        isolated(0)
    assert "in call" in error.value.__notes__[0]  # where it happened, over there
    assert isolated(2) == first  # an exception costs no process
    for what, message in [("die", r"killed the process \(exit code -6\)"), ("sleep", r"takes over 0\.5 s")]:
        with pytest.raises(CallDied, match=message):
            isolated(what)
        assert isolated(2)[1] != first[1]
    pid = isolated(2)[1]
    isolated.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_accuses_no_clip(number):
    isolated = Isolated(lambda: os.kill(os.getpid(), number) or time.sleep(0.1), timeout_seconds=5, max_memory_mib=500)
    isolated()
    isolated.close()


def test_a_process_is_replaced_after_so_many_calls():
    isolated = Isolated(os.getpid, timeout_seconds=5, max_memory_mib=500, max_calls=3)
    pids = [isolated() for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    isolated.close()


def test_a_decoding_process_does_not_outlive_its_caller_even_while_it_hangs():
    def caller(pipe):
        isolated = Isolated(lambda: pipe.send(os.getpid()) or spin(), timeout_seconds=1.0, max_memory_mib=500)
        isolated()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=caller, args=(theirs,))
    process.start()
    pid = ours.recv()
    process.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_fallback": [Decoder.decord]}, r"data\.decoder_fallback=\['decord'\].*Type"),
        ({"decoder_fallback": [Decoder.pyav, Decoder.pyav]}, r"data\.decoder_fallback="),
        ({"timeout_seconds": 20.0}, r"data\.timeout_seconds=20 must be above the 30 s"),
        ({"decode_timeout_seconds": 0.0}, r"data\.decode_timeout_seconds=0"),
        ({"max_fallback_fraction": 2.0}, r"data\.max_fallback_fraction=2"),
    ],
)
def test_rules_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
