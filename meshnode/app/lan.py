"""The local network: tell that this node is here, find members that moved, and meshes that admit.

A hint is worth one dial: the id behind the prefix comes from what this node knows, and TLS proves it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

import trio

from meshnode.core.node.events import AddressesChanged, PeerFound
from meshnode.errors import ConfigError
from meshnode.identity.ids import MeshId, NodeId
from meshnode.io.mdns import MOST_HOSTS, PREFIX_CHARACTERS, Hint, open_mdns
from meshnode.io.transport.addresses import is_lan_host, is_loopback, join_address, split_address
from meshnode.wire.preface import PROTOCOL

log = logging.getLogger("meshnode.lan")

Found = dict[NodeId, tuple[str, ...]]
Changed = Callable[[], Awaitable[None]]

LOOK_S = 2.0
"""Between looks at this machine's own addresses (they take 0.3 ms): after a change of network others learn the new."""
AGAIN_S = 60.0
"""After multicast failed: an interface may come up."""
SEEN = 256
"""Hints remembered, so that repeated ones cost nothing; a flood of false ones only forgets sooner."""
BROWSE_S = 3.0
"""For the first answer: RFC 6762 lets a responder wait 0.5 s, Wi-Fi multicast is often sent once in 0.3 s and lost."""
QUIET_S = 1.0
"""For one more answer: whoever hears the question answers within 0.5 s, and who did not is asked again after 1 s."""


async def follow(addresses: Callable[[], tuple[str, ...]], post: Callable[[AddressesChanged], Awaitable[None]]) -> None:
    """Tell whenever this machine's addresses are others than before, until cancelled. Portably they are only polled."""
    known = addresses()
    while True:
        await trio.sleep(LOOK_S)
        if (found := addresses()) != known:
            known = found
            log.info("this machine is at %s now", ", ".join(found))
            await post(AddressesChanged(found))


async def remember(members: Callable[[], Found], store: Callable[[Found], None], changed: Changed) -> None:
    """Keep where members are on disk, for the next start, until cancelled."""
    kept: Found = {}
    while True:
        if (present := members()) != kept:
            kept = present
            try:
                await trio.to_thread.run_sync(store, present)
            except ConfigError as error:  # a full disk: the next start may need an invite's address again, no more
                log.warning("the addresses of members could not be kept: %s", error)
        await changed()


def alone(addresses: tuple[str, ...], *, wan: bool) -> tuple[str, ...]:
    """A warning where others have no way to this machine, for people."""
    if not all(map(is_loopback, addresses)):
        return ()
    way = "name its address with --advertise" if wan else "if its address is a public one, allow that with --wan"
    return (f"no other machine can reach this one: connect it to your network, or {way}",)


class Lan:
    """mDNS of one running node. `addresses()` are those that it announces now, `members()` whom it knows."""

    def __init__(
        self,
        identity: tuple[MeshId, NodeId],
        admits: bool,
        addresses: Callable[[], tuple[str, ...]],
        members: Callable[[], Collection[NodeId]],
        post: Callable[[PeerFound], Awaitable[None]],
        changed: Callable[[], Awaitable[None]] = trio.sleep_forever,
    ) -> None:
        """`changed` returns when the addresses may have changed."""
        self._mesh, self._node = identity
        self._admits = admits
        self._addresses = addresses
        self._members = members
        self._post = post
        self._changed = changed

    async def run(self, interfaces: tuple[str, ...]) -> None:
        """Until cancelled; a machine without multicast is told so once and goes on without."""
        told = False
        while True:
            try:
                await self._once(interfaces)
            except OSError as problem:
                log.log(logging.DEBUG if told else logging.INFO, "no mDNS on this network: %s", problem)
                told = True
                await trio.sleep(AGAIN_S)

    async def _once(self, interfaces: tuple[str, ...]) -> None:
        """Until this machine's addresses change: zeroconf stays on the interfaces that it began with."""
        addresses = self._addresses()
        async with open_mdns(self._hint(addresses), interfaces) as hints, trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, hints)
            while self._addresses() == addresses:
                await self._changed()
            nursery.cancel_scope.cancel()

    def _hint(self, addresses: tuple[str, ...]) -> Hint | None:
        places = [split_address(address) for address in addresses]
        hosts = tuple(host for host, _ in places if is_lan_host(host))[:MOST_HOSTS]
        if not hosts:
            return None
        mesh, node = self._mesh[:PREFIX_CHARACTERS], self._node[:PREFIX_CHARACTERS]
        return Hint(mesh, node, hosts, places[0][1], PROTOCOL, self._admits)

    async def _hear(self, hints: trio.MemoryReceiveChannel[Hint]) -> None:
        seen: dict[Hint, None] = {}
        async for hint in hints:
            found = None if hint in seen else self.found(hint)
            if found is None:
                continue
            seen[hint] = None
            if len(seen) > SEEN:
                del seen[next(iter(seen))]
            await self._post(found)

    def found(self, hint: Hint) -> PeerFound | None:
        """The member that `hint` speaks of, if this node knows it."""
        if not self._mesh.startswith(hint.mesh) or self._node.startswith(hint.node):
            return None
        known = [node for node in self._members() if node.startswith(hint.node)]
        places = addresses_of(hint)
        return PeerFound(known[0], places) if len(known) == 1 and places else None


def addresses_of(hint: Hint) -> tuple[str, ...]:
    """Where it may be dialed: a hint never leads out of the local network."""
    return tuple(join_address(host, hint.port) for host in hint.hosts if is_lan_host(host))


async def browse(interfaces: tuple[str, ...], seconds: float = BROWSE_S) -> list[Hint]:
    """Nodes that admit without an invite, each once: all that are heard of until nobody more is for `QUIET_S`.

    After `seconds` the list is complete even when it is empty.
    """
    found: dict[str, Hint] = {}
    async with open_mdns(None, interfaces) as hints:
        end = trio.current_time() + seconds
        with trio.CancelScope(deadline=end) as patience:
            async for hint in hints:
                if hint.admits and hint.protocol == PROTOCOL and addresses_of(hint) and len(found) < SEEN:
                    patience.deadline = min(end, trio.current_time() + QUIET_S)
                    found[hint.node] = hint
    return sorted(found.values(), key=lambda hint: (hint.mesh, hint.node))
