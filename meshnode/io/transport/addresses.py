"""`host:port` as people and announcements write it, and which of them belong to this network.

Invariant: an address that `is_lan` refuses leaves the local network; whoever announces it, LAN mode never dials it.
"""

from __future__ import annotations

import ipaddress
import socket

import psutil

from meshnode.errors import ConfigError
from meshnode.wire import limits

_LONGEST_HOST = 253
"""A whole DNS name (RFC 1035)."""


def split_address(address: str) -> tuple[str, int]:
    """Host (IPv6 without brackets) and port; `ConfigError` unless `HOST:PORT` or `[V6]:PORT`."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
    if not colon or not 1 <= len(host) <= _LONGEST_HOST or not 1 <= number <= 65535 or not host.isprintable():
        raise ConfigError(f"{address[:80]!r} is not an address", "Write HOST:PORT, or [IPv6]:PORT.")
    return host, number


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_LAN = tuple(
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8",
        "::1/128",
        "10.0.0.0/8",  # RFC 1918
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",  # RFC 4193
        "169.254.0.0/16",  # link-local: RFC 3927
        "fe80::/10",
    )
)

_BRIDGES = ("docker", "br-", "veth", "virbr", "lxc", "podman", "cni")
"""Interfaces for containers: other machines have the same addresses there, or none."""


def is_lan_host(host: str) -> bool:
    """True for an IP address that is loopback, link-local, RFC 1918 or RFC 4193; False for any name."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in _LAN if network.version == ip.version)


def is_lan(address: str) -> bool:
    """`is_lan_host` of a `host:port`; False when it is no address."""
    try:
        return is_lan_host(split_address(address)[0])
    except ConfigError:
        return False


def is_loopback(address: str) -> bool:
    """Whether `host:port` means this machine alone."""
    host = split_address(address)[0]
    return is_lan_host(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def local_addresses(port: int, *, wan: bool = False) -> tuple[str, ...]:
    """Where other machines may find `port` here, most likely first, at most 8.

    Private addresses of interfaces that are up, with `wan` also public ones; loopback only when there is nothing else.
    """
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    ranked: list[tuple[int, str]] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if name not in up or entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            rank = _rank(name, entry.address, wan)
            if rank is not None:
                ranked.append((rank, entry.address))
    found = tuple(join_address(host, port) for _, host in sorted(ranked, key=lambda each: each[0]))
    return found[: limits.ADDRESSES] or (join_address("127.0.0.1", port),)


def _rank(interface: str, host: str, wan: bool) -> int | None:
    """Lower is tried first; None for what no other machine can dial."""
    if "%" in host or not (wan or is_lan_host(host)):  # a zone means something on this machine only
        return None
    ip = ipaddress.ip_address(host)
    if ip.is_loopback:
        return None
    if not is_lan_host(host):
        return 2
    if interface.startswith(_BRIDGES):
        return 4
    if ip.is_link_local:
        return 3
    return 0 if ip.version == 4 else 1
