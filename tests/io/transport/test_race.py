from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.errors import LinkLost, PeerError
from meshnode.io.transport.race import first_success
from meshnode.wire import limits


async def discard(_: str) -> None:
    raise AssertionError("nothing to discard")


async def test_a_silent_address_delays_the_next_by_its_head_start_only(autojump_clock: MockClock) -> None:
    async def attempt(address: str) -> str:
        if address == "silent":
            await trio.sleep_forever()
        return address

    begun = trio.current_time()
    assert await first_success(["silent", "good"], attempt, discard, 5.0) == "good"
    assert trio.current_time() - begun == pytest.approx(0.25)


async def test_a_refused_address_makes_way_at_once(autojump_clock: MockClock) -> None:
    async def attempt(address: str) -> str:
        if address == "dead":
            raise LinkLost("refused")
        return address

    begun = trio.current_time()
    assert await first_success(["dead", "dead", "good"], attempt, discard, 5.0) == "good"
    assert trio.current_time() == begun


async def test_the_slower_of_two_good_addresses_is_cancelled_or_discarded(autojump_clock: MockClock) -> None:
    discarded: list[str] = []

    async def attempt(address: str) -> str:
        with trio.CancelScope(shield=True):  # cannot be cancelled any more: it will succeed too late
            await trio.sleep(1.0 if address == "slow" else 0.5)
        return address

    async def throw_away(result: str) -> None:
        discarded.append(result)

    assert await first_success(["slow", "fast"], attempt, throw_away, 5.0) == "fast"
    assert discarded == ["slow"]


async def test_what_succeeds_while_its_asker_goes_away_is_discarded(autojump_clock: MockClock) -> None:
    discarded: list[str] = []

    async def attempt(address: str) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        return address

    async def throw_away(result: str) -> None:
        discarded.append(result)

    with trio.move_on_after(0.1):
        await first_success(["slow"], attempt, throw_away, 5.0)
    assert discarded == ["slow"]


async def test_failures_are_all_named_and_a_wrong_answer_weighs_more_than_none(autojump_clock: MockClock) -> None:
    async def attempt(address: str) -> str:
        match address:
            case "silent":
                await trio.sleep_forever()
            case "wrong":
                raise PeerError("another node answers there")
        raise LinkLost("refused")

    with pytest.raises(LinkLost, match=r"silent: no answer within 5 s"):
        await first_success(["silent", "dead"], attempt, discard, 5.0)
    with pytest.raises(PeerError, match=r"wrong: another node.*dead: refused"):
        await first_success(["wrong", "dead"], attempt, discard, 5.0)
    with pytest.raises(LinkLost, match="no address is known"):
        await first_success([], attempt, discard, 5.0)


async def test_no_more_addresses_are_tried_than_allowed(autojump_clock: MockClock) -> None:
    tried: list[str] = []

    async def attempt(address: str) -> str:
        tried.append(address)
        raise LinkLost("refused")

    with pytest.raises(LinkLost):
        await first_success([str(n) for n in range(100)], attempt, discard, 5.0)
    assert len(tried) == limits.DIAL_CANDIDATES
