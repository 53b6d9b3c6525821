"""Reach: where a host is, and whether the whole Internet may ask it. What keeps requests out of private networks."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address

from anton.errors import WorldError


async def addresses(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    """Where a host is. Raises WorldError when nobody knows it."""
    with suppress(ValueError):
        return [ip_address(host)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WorldError(f"the host {host!r} is not known: {error}") from error
    return [ip_address(one[4][0].partition("%")[0]) for one in found]


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the whole Internet may ask it. An IPv4 address inside of an IPv6 one counts as itself."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address.packed[:12] == b"\0\x64\xff\x9b" + bytes(8):  # NAT64
            inner = IPv4Address(address.packed[12:])
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved
