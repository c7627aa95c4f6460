"""What a node believes of demands, and which claims it refuses for them."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from meshnode.core.coordination import demands
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.messages import Claim, DemandRecord, Grant, Refuse
from tests.core.node.mesh import HashAuthority, World, footprint, name_to_id, revocation


def record(author: str, *, role: str = "member", **more: object) -> DemandRecord:
    """As `author` would sign it."""
    authority = HashAuthority(name_to_id(author), role)
    model = footprint()
    said = {"deployment": DeploymentId("d9"), "version": 1, **more}
    wanted = Demand(author=authority.node, manifest_digest=model.manifest_digest, model=model.name, **said)
    raw = msgspec.msgpack.encode(wanted)
    return DemandRecord(authority.node, authority.chain, raw, authority.sign(Domain.DEMAND, raw))


@pytest.fixture
def world() -> World:
    made = World()
    for name in ("a", "b"):
        made.add(name, 900)
    made.meet("a", "b")
    made.run(2)
    return made


def says(world: World, told: DemandRecord) -> None:
    """b brings it to a."""
    world.hand("a", on.Received(name_to_id("b"), told))


def knows(world: World) -> bool:
    return world.nodes["a"].register.demands.find("d9") is not None


def test_a_demand_is_believed_from_an_author_whom_nobody_here_has_met(world: World) -> None:
    says(world, record("long gone"))
    assert knows(world)
    assert world.kept["a"], "and it is on disk"


def test_a_demand_of_a_client_is_dropped_and_costs_its_bringer_nothing(world: World) -> None:
    says(world, record("guest", role="client"))
    assert not knows(world)
    assert world.nodes["a"].links.up(name_to_id("b"))


def test_a_demand_of_a_revoked_author_is_dropped(world: World) -> None:
    world.hand("a", on.Revoked(revocation(1, name_to_id("thief"))))
    says(world, record("thief"))
    assert not knows(world)


def test_what_came_before_there_was_room_for_it_is_asked_for_when_there_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "WANTED", 1)
    first, late = record("a", deployment="d1"), record("b", created=5)
    gone = record("a", deployment="d1", version=2, removed=True)
    for name, told in (("a", (first, late)), ("b", (gone, late))):
        for each in told:
            world.hand(name, on.Received(name_to_id("b" if name == "a" else "a"), each))
    assert not knows(world)
    world.run(12)
    assert [each.deployment for each in world.nodes["a"].register.demands.wanted()] == ["d9"]
    assert knows(world)


def test_what_a_revoked_author_said_before_is_said_again_by_one_of_the_others(world: World) -> None:
    for name in ("a", "b"):
        world.hand(name, on.Received(name_to_id("b" if name == "a" else "a"), record("thief")))
    world.hand("a", on.Revoked(revocation(1, name_to_id("thief"))))
    world.run(3)
    told = {name: world.nodes[name].register.demands.find("d9") for name in ("a", "b")}
    assert told["a"] == told["b"]
    assert told["a"].author == min(name_to_id("a"), name_to_id("b"))
    assert told["a"].version == 2


def test_what_a_revoked_author_said_to_one_member_alone_is_said_again_by_that_one(world: World) -> None:
    last = max(("a", "b"), key=name_to_id)
    other = "a" if last == "b" else "b"
    world.hand(last, on.Received(name_to_id(other), record("thief")))
    world.hand(other, on.Revoked(revocation(1, name_to_id("thief"))))
    world.run(12)
    told = {name: world.nodes[name].register.demands.find("d9") for name in ("a", "b")}
    assert told["a"] == told["b"]
    assert told[other].author == name_to_id(last)


def test_a_forged_demand_costs_its_bringer_the_link(world: World) -> None:
    told = msgspec.structs.replace(record("a friend"), signature=hashlib.sha256(b"forged").digest())
    says(world, told)
    assert not knows(world)
    assert world.effects("a", do.CloseLink)


def claim(world: World) -> Claim:
    """The one that b made of a's memory."""
    world.serve("b", footprint(12))
    world.run(1)
    found = next(each for each in world.sent(Claim) if isinstance(each, Claim))
    assert world.sent(Grant)
    return found


def refused(world: World, changed: Claim) -> str:
    before = len(world.log)
    world.hand("a", on.Received(name_to_id("b"), changed))
    answers = [e.message for _, e in world.log[before:] if isinstance(e, do.Send)]
    return next(answer.reason for answer in answers if isinstance(answer, Refuse))


def test_a_claim_brings_its_demand_along(world: World) -> None:
    made = claim(world)
    assert made.demand is not None
    assert made.demand.author == name_to_id("b")
    order = [type(effect).__name__ for owner, effect in world.log if owner == "a"]
    assert "KeepDemands" in order[: order.index("Persist")], "it is kept before the grant is"


def test_a_claim_for_what_was_unloaded_is_refused(world: World) -> None:
    made = claim(world)
    world.hand("a", on.Withdrawn(made.deployment, 5))
    later = msgspec.structs.replace(made, fence=msgspec.structs.replace(made.fence, term=9))
    assert refused(world, later) == "not_wanted"


def test_a_claim_whose_demand_is_for_another_model_or_not_signed_is_refused(world: World) -> None:
    made = claim(world)
    other = msgspec.structs.replace(made, demand=record("b"), deployment="d8")
    assert refused(world, other) == "bad_demand"
    assert made.demand is not None
    forged = msgspec.structs.replace(made.demand, body=made.demand.body[:-1] + b"\x07")
    assert refused(world, msgspec.structs.replace(made, demand=forged)) == "bad_demand"


def test_a_demand_whose_author_cannot_be_proven_any_more_is_signed_anew_by_who_goes_on_with_it(world: World) -> None:
    says(world, record("thief"))
    register = world.nodes["a"].register
    world.hand("a", on.Revoked(revocation(1, name_to_id("thief"))))
    found = register.provable("d9", world.now)
    assert found is not None
    assert found.author == name_to_id("a")
    assert register.demands.find("d9").version == 2


def test_a_demand_whose_author_is_known_stays_in_its_words(world: World) -> None:
    says(world, record("b"))
    found = world.nodes["a"].register.provable("d9", world.now)
    assert found is not None
    assert found.author == NodeId(name_to_id("b"))
