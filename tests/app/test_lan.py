"""What a node makes of hints, and a whole join over real multicast on loopback."""

from __future__ import annotations

from dataclasses import replace

import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.lan import LOOK_S, Found, Lan, addresses_of, alone, browse, follow, remember
from meshnode.core.node.events import AddressesChanged, PeerFound
from meshnode.errors import ConfigError
from meshnode.identity.certificates import Role
from meshnode.identity.ids import MeshId, NodeId
from meshnode.io.mdns import PREFIX_CHARACTERS, Hint, open_mdns
from meshnode.io.transport.comparison import join_by_number
from meshnode.io.transport.comparison_desk import ComparisonDesk
from tests.io.transport.issuer import Issuer

MESH, SELF, PEER = MeshId("m" * 51 + "a"), NodeId("s" * 51 + "a"), NodeId("p" * 51 + "a")
HINT = Hint(MESH[:PREFIX_CHARACTERS], PEER[:PREFIX_CHARACTERS], ("192.168.1.9",), 8420, 1, False)


async def ignore(_: PeerFound) -> None:
    raise AssertionError("nobody was looked for")


def lan(members: set[NodeId]) -> Lan:
    return Lan((MESH, SELF), False, lambda: ("127.0.0.1:8420",), lambda: members, ignore)


def test_a_known_member_at_a_new_address_is_found() -> None:
    assert lan({PEER, SELF}).found(HINT) == PeerFound(PEER, ("192.168.1.9:8420",))


def test_strangers_other_meshes_ambiguous_prefixes_and_this_node_are_not() -> None:
    assert lan(set()).found(HINT) is None
    assert lan({PEER}).found(replace(HINT, mesh="x" * 16)) is None
    assert lan({PEER, NodeId("p" * 51 + "q")}).found(HINT) is None
    assert lan({PEER, SELF}).found(replace(HINT, node=SELF[:PREFIX_CHARACTERS])) is None


def test_a_hint_never_leads_out_of_the_local_network() -> None:
    assert addresses_of(replace(HINT, hosts=("8.8.8.8", "2001:4860::1", "10.1.2.3"))) == ("10.1.2.3:8420",)
    assert lan({PEER}).found(replace(HINT, hosts=("8.8.8.8",))) is None


async def test_a_member_that_comes_up_is_heard_of(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[PeerFound](1)
    hearing = Lan((MESH, SELF), False, lambda: ("127.0.0.1:1",), lambda: {PEER}, send.send)
    nursery.start_soon(hearing.run, ("127.0.0.1",))
    async with open_mdns(replace(HINT, hosts=("127.0.0.1",)), ["127.0.0.1"]):
        with trio.fail_after(20):
            assert await receive.receive() == PeerFound(PEER, ("127.0.0.1:8420",))
    nursery.cancel_scope.cancel()


async def test_a_machine_joins_the_mesh_that_it_hears_of(nursery: trio.Nursery) -> None:
    issuer = await Issuer().start(nursery)
    desk = issuer.desk.comparisons = ComparisonDesk()
    identity = issuer.credentials.mesh_id, issuer.credentials.node_id
    nursery.start_soon(Lan(identity, True, lambda: (issuer.address,), set, ignore).run, ("127.0.0.1",))

    async def same(number: str) -> bool:
        await trio.testing.wait_all_tasks_blocked()
        desk.approve(number)
        return True

    with trio.fail_after(30):
        found: list[Hint] = []
        while not found:
            heard = await browse(("127.0.0.1",), 2.0)
            found = [hint for hint in heard if identity[1].startswith(hint.node)]
        mesh, key = found[0].mesh, Ed25519PrivateKey.generate()
        joined = await join_by_number(addresses_of(found[0]), mesh, "kitchen", key, issuer.now, same)
    assert joined.credentials.role is Role.MEMBER
    assert joined.credentials.mesh_id == identity[0]
    nursery.cancel_scope.cancel()


async def test_other_addresses_than_before_are_told_once(autojump_clock: trio.testing.MockClock) -> None:
    found = iter([("10.0.0.1:1",), ("10.0.0.1:1",), ("10.0.0.2:1",), ("10.0.0.2:1",), ("10.0.0.3:1",)])
    told: list[AddressesChanged] = []

    async def post(event: AddressesChanged) -> None:
        told.append(event)

    with trio.move_on_after(4.5 * LOOK_S):
        await follow(lambda: next(found), post)
    assert told == [AddressesChanged(("10.0.0.2:1",)), AddressesChanged(("10.0.0.3:1",))]


async def test_at_new_addresses_a_node_is_heard_of_anew(nursery: trio.Nursery) -> None:
    own = ("127.0.0.1:8420",)
    moved = trio.Event()

    async def changed() -> None:
        await moved.wait()

    lan = Lan((MESH, SELF), False, lambda: own, set, ignore, changed)
    nursery.start_soon(lan.run, ("127.0.0.1",))
    with trio.fail_after(30):
        async with open_mdns(None, ("127.0.0.1",)) as hints:
            async for hint in hints:
                if hint.node == SELF[:PREFIX_CHARACTERS] and hint.port == 8420:
                    own = ("127.0.0.1:9999",)
                    moved.set()
                if hint.node == SELF[:PREFIX_CHARACTERS] and hint.port == 9999:
                    break
    nursery.cancel_scope.cancel()


def test_a_machine_that_nobody_can_reach_is_told_what_to_do() -> None:
    (warning,) = alone(("127.0.0.1:8420", "[::1]:8420"), wan=False)
    assert "--wan" in warning
    assert "--advertise" in alone(("127.0.0.1:8420",), wan=True)[0]
    assert alone(("127.0.0.1:8420", "192.168.1.5:8420"), wan=False) == ()
    assert alone(("example.org:8420",), wan=True) == ()


async def test_addresses_that_cannot_be_kept_end_nothing() -> None:
    """A full disk once ended the node at the next change of the roster."""
    rosters = [{PEER: ("192.168.1.9:8420",)}, {PEER: ("192.168.1.10:8420",)}]
    stored: list[Found] = []
    done = trio.Event()

    def store(found: Found) -> None:
        stored.append(found)
        raise ConfigError("peers.json cannot be written", "Free some space.")

    async def changed() -> None:
        if len(stored) == len(rosters):
            done.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remember, lambda: rosters[len(stored)], store, changed)
        await done.wait()
        nursery.cancel_scope.cancel()
    assert stored == rosters
