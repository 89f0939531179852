import multiprocessing
import os
import pickle
import signal
import time

import pytest

from kinema.data.storage.address import Address, redacted
from kinema.data.storage.locking import locked
from kinema.data.storage.member_cache import KEPT_SHARE, MemberCache
from kinema.data.storage.remote import RemoteStore, StorageConfig
from kinema.data.storage.store import StoredFolder
from tests.unit.clips import build


@pytest.mark.parametrize(
    ("text", "shown", "joined"),
    [
        ("https://h/a/b/", "https://h/a/b/", "https://h/a/b/x.tar"),
        ("https://me:secret@h:1/a?sig=topsecret&v=1", "https://***@h:1/a?***", None),
        ("s3://bucket/sets/one", "s3://bucket/sets/one", "s3://bucket/sets/one/x.tar"),
        ("https://h/a?sig=topsecret", "https://h/a?***", "https://h/a/x.tar?sig=topsecret"),
    ],
)
def test_addresses_are_joined_before_their_query_and_shown_without_secrets(text, shown, joined):
    address = Address.parse(text)
    assert str(address) == redacted(text) == shown
    assert joined in (None, address.of("x.tar"))
    assert "secret" not in address.scrub(f"failed: {address.of('x.tar')}")


@pytest.mark.parametrize("name", ["retries", "timeout_seconds", "cache_gib", "concurrent_reads", "backoff_seconds"])
def test_the_storage_config_names_the_value_it_refuses(name):
    with pytest.raises(ValueError, match=rf"data\.storage\.{name}=-1"):
        StorageConfig(**{name: -1})


def test_a_worker_of_another_process_gets_a_store_without_connections(tmp_path):
    index = build(tmp_path / "set", 2)
    store = RemoteStore(Address((tmp_path / "set").as_uri()), index.hash, StorageConfig(), None)
    entry = index.entries[0]
    expected = store.read(entry.shard, entry.members["mp4"])
    copy = pickle.loads(pickle.dumps(StoredFolder(tmp_path / "set", store)))
    assert copy.store._lines is None
    assert copy.store.read(entry.shard, entry.members["mp4"]) == expected


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path):
    cache = MemberCache(tmp_path, 1000)
    for number in range(10):
        cache.put(str(number), bytes([number]) * 100)
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0") == bytes(100)  # used now: the oldest no more
    cache.put("10", bytes(100))
    assert {number for number in range(11) if cache.get(str(number)) is not None} == {0, *range(3, 11)}
    cache.put("huge", bytes(1001))
    assert cache.get("huge") is None
    assert cache.get("10") == bytes(100)


def fill(folder, limit, seed):
    cache = MemberCache(folder, limit)
    for number in range(10**6):
        name = str((number * 7 + seed) % 200)
        content = cache.get(name)
        assert content in (None, name.encode() * 500)
        cache.put(name, name.encode() * 500)


def test_killed_writers_leave_a_whole_and_bounded_cache(tmp_path):
    limit = 100_000
    for round_number in range(3):
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=fill, args=(tmp_path, limit, seed)) for seed in (1, 50)]
        for writer in writers:
            writer.start()
        time.sleep(0.3 + 0.1 * round_number)
        for writer in writers:
            assert writer.is_alive()  # nothing read was wrong
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        kept = [path for path in tmp_path.glob("??/*") if path.suffix != ".part"]
        assert 0 < sum(path.stat().st_size for path in kept) <= limit + 2 * 1500
    for path in tmp_path.glob("??/*.part"):
        os.utime(path, (0, 0))
    MemberCache(tmp_path, limit)
    assert not list(tmp_path.glob("??/*.part"))
    assert KEPT_SHARE < 1


def test_a_lock_does_not_stay_with_a_process_that_was_forked_meanwhile(tmp_path):
    with locked(tmp_path / "lock") as file:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        file.write("mine")
    began = time.monotonic()
    with locked(tmp_path / "lock") as file:
        assert time.monotonic() - began < 10
        file.seek(0)
        assert file.read() == "mine"
    assert child.is_alive()
    child.kill()
    child.join()
