"""`host:port` as people and announcements write it."""

from __future__ import annotations

from meshnode.errors import ConfigError

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
