import socket
from types import SimpleNamespace

import psutil
import pytest

from meshnode.errors import ConfigError
from meshnode.io.transport.addresses import is_lan, join_address, local_addresses, split_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:8420", "10.0.0.1", 8420),
        ("kitchen.local:1", "kitchen.local", 1),
        ("[fd00::1]:65535", "fd00::1", 65535),
    ],
)
def test_addresses_split_and_join(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:1x",
        "host:²",
        "fd00::1:8420",
        "a\nb:1",
        "x" * 300 + ":1",
    ],
)
def test_what_is_no_address_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        split_address(text)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "::1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.9"),
        *("169.254.1.1", "fe80::1%eth0", "fd12::1", "::ffff:10.0.0.1"),
    ],
)
def test_addresses_of_the_local_network_are_told(host: str) -> None:
    assert is_lan(join_address(host, 8420))


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8:1",
        "172.32.0.1:1",
        "100.64.0.1:1",
        "[2001:db8::1]:1",
        "[::ffff:8.8.8.8]:1",
        "0.0.0.0:1",
        "name:1",
        "nonsense",
    ],
)
def test_everything_else_is_not_of_the_local_network(address: str) -> None:
    assert not is_lan(address)


def interfaces(monkeypatch: pytest.MonkeyPatch, up: dict[str, bool], hosts: dict[str, list[str]]) -> None:
    entries = {
        name: [
            SimpleNamespace(family=socket.AF_INET6 if ":" in host else socket.AF_INET, address=host) for host in found
        ]
        for name, found in hosts.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    monkeypatch.setattr(
        psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=state) for name, state in up.items()}
    )


def test_own_addresses_are_private_and_likely_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {
        "lo": ["127.0.0.1", "::1"],
        "docker0": ["172.17.0.1"],
        "eth0": ["169.254.3.4", "fd00::5", "192.168.1.5", "fe80::1%eth0", "203.0.113.9", "2001:db8::5"],
        "eth1": ["10.0.0.9"],
    }
    interfaces(monkeypatch, {"lo": True, "docker0": True, "eth0": True, "eth1": False}, hosts)
    local = ("192.168.1.5:8420", "[fd00::5]:8420", "169.254.3.4:8420", "172.17.0.1:8420")
    assert local_addresses(8420) == local
    public = ("203.0.113.9:8420", "[2001:db8::5]:8420")
    assert local_addresses(8420, wan=True) == (*local[:2], *public, *local[2:])


def test_a_machine_alone_names_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, {"lo": True}, {"lo": ["127.0.0.1"]})
    assert local_addresses(1) == ("127.0.0.1:1",)


def test_the_real_interfaces_give_addresses_that_split() -> None:
    for address in local_addresses(8420):
        assert is_lan(address)
