"""Ranks do not meet where everybody can listen."""

import pytest

from kinema.distributed.rendezvous import CONFIRMED, UnsafeRendezvousError, check_rendezvous, is_public


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.7", "fd00::1", "::1"])
def test_private_addresses_are_let_pass(monkeypatch, address):
    monkeypatch.setenv("MASTER_ADDR", address)
    check_rendezvous()


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888"])
def test_a_public_one_is_refused_unless_confirmed(monkeypatch, address):
    monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(UnsafeRendezvousError, match="private network"):
        check_rendezvous()
    monkeypatch.setenv(CONFIRMED, "1")
    check_rendezvous()


def test_an_unknown_name_is_left_to_the_rendezvous_itself():
    assert not is_public("no-such-host.invalid")
