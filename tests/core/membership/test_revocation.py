from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.membership import membership
from meshnode.core.membership import revocation as module
from meshnode.core.membership.announcement import announce
from meshnode.core.membership.digest import id_of
from meshnode.core.membership.revocation import Revocations
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.snapshot import status
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.ids import NodeId, node_id_of, short
from meshnode.identity.issuers import APPOINTED
from meshnode.wire.messages import Announce, AnyMessage, Claim, Have, Refuse, Revoke, Want, WhoIs
from tests.core.node.mesh import ISSUER, MESH, HashAuthor, HashAuthority, World, name_to_id, revocation

ROOT = NodeId(MESH)
OTHER = node_id_of(b"other issuer")
A, B, C = (name_to_id(name) for name in "abc")


def known(*records: Revoke) -> Revocations:
    made = Revocations(HashAuthority(name_to_id("me")))
    for record in records:
        made.offer(record)
    return made


lists = st.lists(
    st.builds(
        lambda version, nodes, issuer: revocation(version, *sorted(nodes), issuer=issuer),
        st.integers(1, 3),
        st.sets(st.sampled_from([A, B, C, OTHER])),
        st.sampled_from([ISSUER, OTHER, ROOT]),
    ),
    max_size=8,
)


@given(lists, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(records: list[Revoke], random: Random) -> None:
    shuffled = [*records, *records]
    random.shuffle(shuffled)
    one, two = known(*records), known(*shuffled)
    assert one.records == two.records
    assert [one.bars(node) for node in (A, B, C)] == [two.bars(node) for node in (A, B, C)]


def test_the_union_of_all_issuers_counts_and_lower_versions_are_refused() -> None:
    made = known(revocation(2, A), revocation(1, B, issuer=OTHER))
    assert [made.bars(node) for node in (A, B, C)] == [True, True, False]
    assert made.offer(revocation(1)) == (False, None)
    assert made.bars(A)
    assert made.offer(revocation(3, C)) == (True, revocation(2, A))
    assert [made.bars(node) for node in (A, B, C)] == [False, True, True]


def test_the_root_revokes_an_issuer_and_everything_it_signed() -> None:
    made = known(revocation(1, B, issuer=OTHER), revocation(1, OTHER, issuer=ROOT))
    assert made.bars(A, HashAuthor(A, "member", OTHER))
    assert not made.bars(A, HashAuthor(A, "member", ISSUER))
    assert not made.bars(B), "and its list counts no longer"


def test_why_a_node_is_out_is_told_with_who_said_so() -> None:
    made = known(revocation(1, A, C), revocation(1, B, issuer=ROOT), revocation(1, C, issuer=OTHER))
    assert made.reason(A, ISSUER) == f"issuer {short(ISSUER)} revoked it"
    assert made.reason(B) == "the root of the mesh revoked it"
    assert made.reason(name_to_id("d"), ISSUER) == ""
    made.offer(revocation(2, B, ISSUER, issuer=ROOT))
    assert made.reason(name_to_id("d"), ISSUER) == f"the root of the mesh revoked its issuer {short(ISSUER)}"
    assert made.reason(A) == "", "a revoked issuer's list counts no longer"
    assert made.reason(C) == f"issuer {short(OTHER)} revoked it"


def test_whom_a_revoked_issuer_let_in_stays_out_when_its_certificate_is_forgotten(mesh: World) -> None:
    node = mesh.nodes["a"]
    mesh.hand("a", on.Revoked(revocation(1, ISSUER, issuer=ROOT)))
    revocations = node.membership.revocations
    assert B not in node.roster.authors
    assert revocations.expelled(B)
    mesh.hand("a", on.PeerFound(B, ("b:1",)))
    assert B not in node.links.links, "a hint of it is not dialed"
    assert not revocations.expelled(name_to_id("nobody knows")), "others may be of another issuer"
    revocations.readmit(B)
    assert not revocations.expelled(B), "with a certificate of another issuer it is a member again"


def test_a_node_that_is_out_says_so_and_stops_dialing(mesh: World) -> None:
    mesh.hooks.append(lambda name, effect: isinstance(effect, do.Dial))
    before = len(mesh.log)
    mesh.hand("d", on.LinkClosed(A, "revoked from the mesh", barred=True))
    mesh.run(60)
    mine = [effect for name, effect in mesh.log[before:] if name == "d"]
    assert not any(isinstance(effect, do.Dial) and effect.node == A for effect in mine)
    seen = status(mesh.nodes["d"], mesh.now, api_url="", issuer=False)
    assert next(peer.state for peer in seen.peers if peer.node == A) == "barred"
    (warning,) = seen.warnings
    assert "this node is out of the mesh" in warning
    assert "a says: revoked from the mesh" in warning
    assert "a new invite" in warning


def test_nobodys_word_is_hidden_behind_a_revoked_name(mesh: World) -> None:
    """What comes in a revoked node's name is not asked for again: it must be its own, or it would hide another's."""
    d = name_to_id("d")
    mesh.hand("a", on.Revoked(revocation(1, d)))
    mesh.run(1)
    for author, asked in ((C, True), (d, False)):
        body = mesh.nodes["c"].membership.voice.body
        assert body is not None
        record = announce(msgspec.structs.replace(body, node=author, sequence=99), HashAuthority(author))
        mesh.hand("a", on.Received(B, Announce(d, record.body, record.signature)))
        before = len(mesh.sent(Want))
        mesh.hand("a", on.Received(B, Have((id_of(record),))))
        assert (Want((id_of(record),)) in mesh.sent(Want)[before:]) == asked
    mesh.hand("a", on.Received(B, Announce(d, b"\x91" * 3000, b"")))
    assert mesh.nodes["a"].links.up(B), "what nobody looks at is no reason to part"


def test_questions_who_somebody_is_are_bounded(mesh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "ASKED_WHO", 3)
    for number in range(9):
        mesh.hand("a", on.Received(B, Announce(name_to_id(f"stranger {number}"), b"", b"")))
    assert len(mesh.sent(WhoIs)) >= 9
    assert len(mesh.nodes["a"].membership._asked_who) == 3


def test_a_plan_with_a_revoked_node_is_not_granted(mesh: World) -> None:
    mesh.hand("b", on.Revoked(revocation(1, C)))
    mesh.cut = {frozenset((name_to_id("a"), B))}
    mesh.serve("a")
    mesh.run(0.5)
    claim = next(effect.message for _, effect in mesh.log if isinstance(effect, do.Send) and _claims(effect.message))
    plan = msgspec.structs.replace(claim, stages=tuple(msgspec.structs.replace(x, node=C) for x in claim.stages))
    mesh.hand("b", on.Received(name_to_id("a"), plan))
    answers = [effect.message for name, effect in mesh.log if name == "b" and isinstance(effect, do.Send)]
    assert [each.reason for each in answers if isinstance(each, Refuse)] == ["revoked"]
    assert not mesh.nodes["b"].ledger.held


def _claims(message: AnyMessage) -> bool:
    return isinstance(message, Claim)


def test_an_issuer_cannot_revoke_an_issuer() -> None:
    assert not known(revocation(1, OTHER)).bars(A, HashAuthor(A, "member", OTHER))


def test_lists_survive_a_restart_and_a_damaged_file_is_told() -> None:
    made = known(revocation(2, A), revocation(1, B, issuer=OTHER))
    again = known()
    again.restore(made.encode())
    assert again.records == made.records
    for data in (b"", b"\xc1", made.encode()[:-1], made.encode().replace(b"issuer", b"isssuer", 3)):
        with pytest.raises(ConfigError):
            known().restore(data)


def test_the_number_of_issuers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ISSUERS", 1)
    with pytest.raises(PeerError, match="too many"):
        known(revocation(1), revocation(1, issuer=OTHER))


def test_the_root_and_all_issuers_that_it_can_make_have_a_list() -> None:
    makers = [ROOT, *(node_id_of(b"%d" % number) for number in range(1 + APPOINTED))]
    assert len(known(*(revocation(1, issuer=maker) for maker in makers)).records) == 1 + 1 + APPOINTED


@pytest.fixture
def mesh() -> World:
    world = World()
    for name in ("a", "b", "c", "d"):
        world.add(name, 600)
    world.meet("a", "b", "c", "d")
    world.run(2)
    return world


def test_a_revoked_node_is_cut_off_by_everybody_within_five_seconds(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    held = next(iter(mesh.nodes["a"].ledger.held.values())).claim
    victim = next(stage.node for stage in held.stages if stage.node != name_to_id("a"))
    mesh.hand("a", on.Revoked(revocation(1, victim)))
    mesh.run(5)
    for mediator in mesh.nodes.values():
        if mediator.node != victim:
            assert not mediator.links.up(victim)
            assert victim not in mediator.roster.entries
            assert victim not in {node.node for node in mediator.inventory("").nodes}
    run = next(iter(mesh.nodes["a"].deployments.values())).run
    assert run is not None, "the others serve without it"
    assert victim not in {stage.node for stage in run.claim.stages}


def test_a_revoked_coordinator_loses_what_it_was_granted(mesh: World) -> None:
    mesh.serve("b")
    mesh.run(2)
    mesh.hand("a", on.Revoked(revocation(1, B)))
    mesh.run(1)
    assert all(not mesh.nodes[name].ledger.held for name in ("a", "c", "d"))


def test_links_close_on_a_full_disk_too_and_a_list_is_on_disk_before_it_is_passed_on(mesh: World) -> None:
    before = len(mesh.effects("a", object))
    mesh.hand("a", on.Revoked(revocation(1, B)))
    effects = mesh.effects("a", object)[before:]
    kept = next(index for index, effect in enumerate(effects) if isinstance(effect, do.KeepRevocations))
    closed = next(index for index, effect in enumerate(effects) if isinstance(effect, do.CloseLink))
    told = next(index for index, e in enumerate(effects) if isinstance(e, do.Send) and isinstance(e.message, Have))
    assert closed < kept < told
    made = Revocations(HashAuthority(A))
    made.restore(effects[kept].lists)
    assert made.bars(B)


def test_a_revoked_node_does_not_come_back_by_restarting_or_by_others(mesh: World) -> None:
    mesh.hand("a", on.Revoked(revocation(1, B)))
    mesh.run(2)
    mesh.crash("b")
    mesh.add("b", 600, incarnation=2)
    mesh.meet("c", "b")
    mesh.run(10)
    mesh.add("e", 600)
    mesh.meet("d", "e")
    mesh.run(5)
    for name in ("a", "c", "d", "e"):
        assert not mesh.nodes[name].links.up(B)
        assert B not in mesh.nodes[name].roster.entries
    assert len({mesh.nodes[name].membership.digest.root() for name in ("a", "c", "d", "e")}) == 1


def test_who_was_away_learns_of_it_from_anti_entropy(mesh: World) -> None:
    mesh.crash("d")
    mesh.run(1)
    mesh.hand("a", on.Revoked(revocation(1, B)))
    mesh.run(2)
    mesh.add("d", 600, incarnation=2)
    mesh.meet("c", "d")
    mesh.run(8)
    assert mesh.nodes["d"].membership.barred(B)


def test_a_forged_list_closes_the_link_that_brought_it(mesh: World) -> None:
    real = revocation(1, C)
    mesh.hand("a", on.Received(B, Revoke(real.chain, real.body, b"\0" * 32)))
    assert [effect.peer for effect in mesh.effects("a", do.CloseLink)] == [B]
    assert not mesh.nodes["a"].membership.barred(C)


def test_an_author_whose_certificate_ended_is_dropped_while_the_node_runs(
    mesh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = HashAuthority.admit

    def ended(self: HashAuthority, chain: tuple[bytes, ...]) -> HashAuthor:
        author = admit(self, chain)
        if author.node == B:
            raise PeerError("a certificate is expired or not yet valid")
        return author

    monkeypatch.setattr(HashAuthority, "admit", ended)
    del mesh.nodes["b"]
    mesh.run(30)
    assert all(B not in mediator.roster.entries for mediator in mesh.nodes.values())


def test_whatever_makes_others_expelled_counts_as_a_change() -> None:
    made = known()
    steps: list[Callable[[], object]] = [
        lambda: made.offer(revocation(1, A)),
        lambda: made.offer(revocation(1, OTHER, issuer=ROOT)),
        lambda: made.expel(B, HashAuthor(B, "member", OTHER)),
        lambda: made.readmit(B),
    ]
    for step in steps:
        before, changes = [made.expelled(node) for node in (A, B)], made.changes
        step()
        assert ([made.expelled(node) for node in (A, B)] == before) or made.changes != changes
    assert made.expelled(A)
    changes = made.changes
    made.readmit(B)
    made.offer(revocation(1, A))
    assert made.changes == changes
