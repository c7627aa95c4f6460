"""Several addresses of one peer: the first that proves itself wins.

A machine announces addresses that others cannot reach (container bridges, other networks); tried one after
the other, each costs a whole time-out. Here each gets a head start and then runs beside the next.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from meshnode.errors import Barred, LinkLost, MeshError, PeerError
from meshnode.wire import limits

HEAD_START_S = 0.25
"""Before the next address is tried beside this one (RFC 8305 recommends 250 ms)."""

_T = TypeVar("_T")


async def first_success(
    addresses: Sequence[str],
    attempt: Callable[[str], Awaitable[_T]],
    discard: Callable[[_T], Awaitable[None]],
    timeout_s: float,
    most: int = limits.DIAL_CANDIDATES,
) -> _T:
    """The first result of `attempt(address)`; the others are cancelled, a late second one is discarded. `discard` works
    in a cancelled task too.

    The first `most` addresses, `timeout_s` each. Without any result: `Barred` when somebody said that, `PeerError`
    when somebody answered and was wrong, else `LinkLost`; the text names every address and its problem.
    """
    results: list[_T] = []
    problems: dict[str, MeshError] = {}

    async def run(address: str, over: trio.Event) -> None:
        try:
            with trio.fail_after(timeout_s):
                result = await attempt(address)
        except trio.TooSlowError:
            problems[address] = LinkLost(f"no answer within {timeout_s:g} s")
        except MeshError as problem:
            problems[address] = problem
        else:
            results.append(result)
            nursery.cancel_scope.cancel()
        over.set()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses[:most]:
                over = trio.Event()
                nursery.start_soon(run, address, over)
                with trio.move_on_after(HEAD_START_S):
                    await over.wait()
    except BaseException:  # whoever asked has gone meanwhile: what just succeeded is nobody's
        for unwanted in results:
            await discard(unwanted)
        raise
    for late in results[1:]:
        await discard(late)
    if results:
        return results[0]
    text = "; ".join(f"{address}: {problem}" for address, problem in problems.items()) or "no address is known"
    for problem in problems.values():
        if isinstance(problem, Barred):
            raise Barred(text, problem.reason)
    wrong = any(isinstance(problem, PeerError) for problem in problems.values())
    raise (PeerError if wrong else LinkLost)(text)
