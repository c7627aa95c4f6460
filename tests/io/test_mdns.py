"""mDNS: what is parsed from strangers, and real multicast on loopback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from zeroconf import ServiceInfo

from meshnode.io.mdns import MOST_HOSTS, SERVICE, Hint, open_mdns, parse_hint, service_info

HINT = Hint("m" * 16, "n" * 16, ("192.168.1.20", "fd00::5"), 8420, 1, True)


def changed(**properties: str | bytes | None) -> ServiceInfo:
    given = {"m": HINT.mesh, "n": HINT.node, "v": "1", "a": "1", **properties}
    kept = {key: value for key, value in given.items() if value is not None}
    return ServiceInfo(SERVICE, f"x.{SERVICE}", parsed_addresses=list(HINT.hosts), port=8420, properties=kept)


def test_a_hint_survives_its_records() -> None:
    assert parse_hint(service_info(HINT)) == HINT


@pytest.mark.parametrize(
    "properties",
    [
        {"m": None},
        {"m": "short"},
        {"m": "M" * 16},
        {"n": "n" * 17},
        {"n": b"\xff" * 16},
        {"n": "../../../etc/pas"},
        {"v": "0"},
        {"v": "1" * 60},
        {"v": "\u0661"},
    ],
)
def test_malformed_hints_are_none(properties: dict[str, str | bytes | None]) -> None:
    assert parse_hint(changed(**properties)) is None


def test_a_hint_without_address_or_port_is_none_and_many_addresses_are_cut() -> None:
    assert parse_hint(service_info(replace(HINT, hosts=()))) is None
    assert parse_hint(service_info(replace(HINT, port=0))) is None
    many = parse_hint(service_info(replace(HINT, hosts=tuple(f"10.0.0.{n}" for n in range(1, 30)))))
    assert many is not None
    assert len(many.hosts) == MOST_HOSTS


async def test_one_machine_hears_what_another_announces() -> None:
    """Real datagrams: both ends speak on loopback only."""
    with trio.fail_after(20):
        async with open_mdns(replace(HINT, hosts=("127.0.0.1",)), ["127.0.0.1"]), open_mdns(None, ["127.0.0.1"]) as ear:
            async for heard in ear:
                if heard.node == HINT.node:
                    break
    assert heard == replace(HINT, hosts=("127.0.0.1",))
