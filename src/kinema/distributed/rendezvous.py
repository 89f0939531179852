"""Where ranks meet: an address that nobody outside should reach, as whoever reaches it can read and write there."""

import ipaddress
import os
import socket

CONFIRMED = "KINEMA_PUBLIC_RENDEZVOUS"


class UnsafeRendezvousError(Exception):
    """Ranks would meet at an address of the open internet."""


def check_rendezvous() -> None:
    """Refuse a MASTER_ADDR that is public: torch's store and gloo ask nobody who they are, and encrypt nothing."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if os.environ.get(CONFIRMED) == "1" or not is_public(address):
        return
    raise UnsafeRendezvousError(
        f"MASTER_ADDR={address} is a public address: anyone who reaches its port can read and change what ranks tell "
        "each other. Give the address of a private network (torchrun --rdzv-endpoint, --local-addr, and "
        f"GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME), or set {CONFIRMED}=1 if a firewall stands in front of it."
    )


def is_public(address: str) -> bool:
    """Whether a host name or address is of the open internet; False for a name that nobody knows."""
    try:
        found = {ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in socket.getaddrinfo(address, None)}
    except (OSError, ValueError):
        return False
    return any(one.is_global for one in found)
