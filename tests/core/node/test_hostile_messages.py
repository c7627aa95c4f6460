"""A member that says anything: its peer neither falls over nor says what cannot be sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from meshnode.core.membership.announcement import Body, Reserved, Served
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.limits import CONTROL_FRAME
from meshnode.wire.messages import (
    Announce,
    AnyMessage,
    Claim,
    ClaimedStage,
    Failed,
    Introduce,
    Leave,
    Message,
    Prepare,
    Progress,
    Refuse,
    RunOptions,
    Unrecognised,
    decode,
    encode,
)
from tests.core.node.mesh import MESH, HashAuthority, World, name_to_id

NUMBERS = (0, 1, 2, 3, -1, -(2**63), 2**31, 2**53, 2**63, 2**64 - 1, 1001)
TEXTS = ("", "d1", "model", "x" * 17, "x" * 600, "x" * 60_000, "\x1b[2J", "a..b:1", "0" * 16, "f" * 16)
LEDGER_BYTES = 64 * 1024
"""What the data directory keeps."""
ACTIONS = 400


class Liar:
    """The member `c` of a mesh in which `a` serves over all."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.world = World()
        for name in ("a", "b", "c"):
            self.world.add(name, 600)
        self.world.meet("a", "b", "c")
        self.world.run(2)
        self.world.serve("a")
        self.world.run(2)
        self.node = name_to_id("c")
        self.own = HashAuthority(self.node)
        self.heard = [effect.message for _, effect in self.world.log if isinstance(effect, do.Send)]
        self.sequence = 10**6

    def tell(self, message: AnyMessage) -> None:
        """Hand it to `a` as it comes off the wire; what no frame can carry is not sent."""
        frame = encode(message)
        if len(frame) > CONTROL_FRAME:
            return
        try:
            arrived = decode(frame)
        except PeerError:
            return
        assert not isinstance(arrived, Unrecognised)
        self.world.hand("a", on.Received(self.node, arrived))

    def anything(self) -> AnyMessage:
        """A message that travelled before, with some fields changed; or an announcement that is really signed."""
        if self.draw.random() < 0.2:
            return self.announcement()
        return self.bent(self.draw.choice(self.heard))

    def bent(self, value: Any) -> Any:
        """`value` with random parts replaced by extreme ones of the same type."""
        if isinstance(value, Message | msgspec.Struct):
            changes = {
                name: self.bent(getattr(value, name))
                for name in value.__struct_fields__
                if self.draw.random() < 0.3 or isinstance(getattr(value, name), tuple)
            }
            return msgspec.structs.replace(value, **changes)
        if isinstance(value, tuple):
            return tuple(self.bent(each) for each in value) if self.draw.random() < 0.8 else value[:1] * 3
        if isinstance(value, bool) or self.draw.random() < 0.5:
            return value
        if isinstance(value, int):
            return self.draw.choice(NUMBERS)
        if isinstance(value, bytes):
            return self.draw.choice((b"", value[:-1], value + b"x", b"x" * 60_000))
        return self.draw.choice((*TEXTS, self.node, name_to_id("a"))) if isinstance(value, str) else value

    def announcement(self) -> Announce:
        """What it may sign: anything about itself."""
        self.sequence += 1
        number, text = (lambda: self.draw.choice(NUMBERS)), (lambda: self.draw.choice(TEXTS))
        body = Body(
            mesh=MESH,
            node=self.node,
            incarnation=self.draw.choice((1, 2**40)),
            sequence=self.sequence,
            name=text(),
            addresses=tuple(text() for _ in range(self.draw.randrange(3))),
            memory_usable=number(),
            reserved=(Reserved(text(), number()),),
            served=(Served(text(), text(), number(), text(), number(), number()),),
            cached={text(): ((number(), number()), (number(), number())) for _ in range(3)},
        )
        raw = msgspec.msgpack.encode(body)
        return Announce(self.node, raw, self.own.sign(Domain.ANNOUNCEMENT, raw))


@pytest.fixture(params=range(4))
def liar(request: pytest.FixtureRequest) -> Liar:
    return Liar(request.param)


def check(world: World) -> None:
    """Everything that `a` says and keeps can travel, be stored and be shown."""
    for owner, effect in world.log:
        if isinstance(effect, do.Send):
            assert len(encode(effect.message)) <= CONTROL_FRAME, f"{owner} says more than a frame holds"
        if isinstance(effect, do.Persist):
            assert len(effect.ledger) <= LEDGER_BYTES
    msgspec.json.encode(world.status("a"))
    assert len(world.nodes["a"].ledger.held) <= 64


def test_whatever_a_member_sends_its_peer_stays_up_and_speaks(liar: Liar) -> None:
    liar.world.log.clear()
    for _ in range(ACTIONS):
        liar.tell(liar.anything())
        liar.world.nodes["a"].inventory("")
        if liar.draw.random() < 0.1:
            liar.world.run(liar.draw.random())
    check(liar.world)


def test_a_liar_that_leaves_is_forgotten_and_the_model_is_served_again(liar: Liar) -> None:
    for _ in range(ACTIONS):
        liar.tell(liar.anything())
    liar.tell(Leave())
    liar.world.crash("c")
    liar.world.nodes["a"].roster.entries.pop(liar.node, None)
    liar.world.add("d", 600)
    liar.world.meet("a", "d")
    liar.world.run(700)
    assert liar.world.status("a").deployments[0].state == "serving"
    assert not [run for run in liar.world.nodes["a"].ledger.held.values() if run.claim.coordinator == liar.node]


def test_only_its_author_may_announce_and_only_a_coordinator_may_order() -> None:
    liar = Liar(0)
    entry = liar.world.nodes["a"].roster.entries[name_to_id("b")]
    for message in liar.heard:
        if isinstance(message, Prepare | Claim | Failed):
            liar.tell(message)
    liar.tell(Announce(name_to_id("b"), entry.record.body + b"x", entry.record.signature))
    liar.tell(Introduce((b"stranger", b"x")))
    liar.world.run(1)
    assert liar.world.nodes["a"].roster.entries[name_to_id("b")] == entry
    assert liar.world.status("a").deployments[0].state == "serving"


def test_nodes_that_only_a_claim_knows_are_not_dialed(liar: Liar) -> None:
    mesh = liar.world
    nobody = [name_to_id(f"nobody{number}") for number in range(20)]
    nodes = (name_to_id("a"), liar.node, *nobody)
    stages = tuple(ClaimedStage(i, node, i, i + 1, 1, 0, 1) for i, node in enumerate(nodes))
    fence = Fence(Term(1), RunId("0" * 16))
    options = RunOptions(256, 4, 128, "q8_0", flash_attention=True)
    claim = Claim(fence, "d9", "model", "ab" * 32, "cd" * 32, liar.node, len(stages), options, stages)
    mesh.hand("a", on.Received(liar.node, claim))
    a = mesh.nodes["a"]
    assert fence in a.ledger.held, "it costs what it reserves, no more"
    assert a.membership.standing.partners.isdisjoint(nobody)
    mesh.run(2)
    assert not {effect.node for effect in mesh.effects("a", do.Dial)}.intersection(nobody)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda fence: Refuse(fence, "d1", "no_room", "", 0, -5),
        lambda fence: Refuse(fence, "d1", "held", "", 0, 0, Fence(Term(-3), RunId("x"))),
        lambda fence: Progress(fence, 0, "fetching", -1, 10),
        lambda fence: Progress(fence, 0, "fetching", 1, -10),
    ],
)
def test_an_answer_with_impossible_figures_costs_its_sender_the_link(
    liar: Liar, wrong: Callable[[Fence], Refuse | Progress]
) -> None:
    mesh = liar.world
    mesh.log.clear()
    (deployment,) = mesh.nodes["a"].deployments.values()
    assert deployment.run is not None
    mesh.hand("a", on.Received(liar.node, wrong(deployment.run.fence)))
    assert mesh.nodes["a"].counters["refused_messages"] == 1
    assert [effect.peer for effect in mesh.effects("a", do.CloseLink)] == [liar.node]
