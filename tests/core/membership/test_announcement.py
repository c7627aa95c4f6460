from __future__ import annotations

import msgspec
import pytest

from meshnode.core.membership.announcement import BODY_BYTES, NAME_CHARACTERS, Body, Reserved, Served, announce, read
from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.wire.fence import RunId, Term
from meshnode.wire.limits import ADDRESSES
from meshnode.wire.messages import Announce
from tests.core.node.mesh import MESH, HashAuthor, HashAuthority, name_to_id
from tests.identity.mutate import mutations

A = name_to_id("a")
OWN = HashAuthority(A)
AUTHOR = HashAuthor(A, "member")


def body(**changes: object) -> Body:
    whole = Body(
        mesh=MESH,
        node=A,
        incarnation=3,
        sequence=7,
        name="kitchen",
        addresses=("10.0.0.1:8420", "[fd00::1]:8420"),
        memory_usable=6_000_000_000,
        software="0.1.0",
        llama="0.3.36",
        reserved=(Reserved("d1", 1_000_000),),
        served=(Served("d1", "model", Term(2), RunId("00" * 8), 4096, 1_700_000_000),),
        cached={"ab" * 32: ((0, 4), (4, 9))},
    )
    return msgspec.structs.replace(whole, **changes)


def signed(raw: bytes, author: NodeId = A) -> Announce:
    return Announce(author, raw, OWN.sign(Domain.ANNOUNCEMENT, raw))


def test_what_a_node_says_is_read_by_others_as_it_was_said() -> None:
    assert read(announce(body(), OWN), AUTHOR, MESH) == body()


def test_the_signature_covers_the_very_bytes_that_travel() -> None:
    record = announce(body(), OWN)
    longer = Announce(record.author, record.body + b"\0", record.signature)
    for other in (longer, Announce(A, record.body, b""), Announce(A, record.body, record.signature[:-1])):
        with pytest.raises(PeerError, match="wrong signature"):
            read(other, AUTHOR, MESH)


def test_fields_of_later_versions_are_ignored_and_absent_ones_have_defaults() -> None:
    fields = msgspec.to_builtins(body(), builtin_types=(bytes,))
    fields["weather"] = ["fine"]
    for name in ("software", "llama", "reserved", "served", "cached", "protocol"):
        del fields[name]
    told = read(signed(msgspec.msgpack.encode(fields)), AUTHOR, MESH)
    assert told == body(software="", llama="", reserved=(), served=(), cached={})


def test_a_record_in_another_nodes_name_is_refused() -> None:
    other = name_to_id("b")
    for record in (
        signed(msgspec.msgpack.encode(body(node=other))),
        signed(msgspec.msgpack.encode(body()), author=other),
    ):
        with pytest.raises(PeerError, match="another node's name"):
            read(record, AUTHOR, MESH)


def test_a_record_of_another_mesh_is_refused() -> None:
    record = signed(msgspec.msgpack.encode(body(mesh=MeshId(node_id_of(b"other")))))
    with pytest.raises(PeerError, match="another mesh"):
        read(record, AUTHOR, MESH)


def test_an_oversized_record_is_refused_before_its_signature_is_looked_at() -> None:
    with pytest.raises(PeerError, match=f"at most {BODY_BYTES}"):
        read(Announce(A, bytes(BODY_BYTES + 1), b""), AUTHOR, MESH)


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ("10.0.0.1:1",) * (ADDRESSES + 1)},
        {"addresses": ("10.0.0.1:1\x1b[2J",)},
        {"memory_usable": -1},
        {"incarnation": -1},
        {"sequence": -1},
        {"name": "x" * (NAME_CHARACTERS + 1)},
        {"name": "\x1b[31mred"},
        {"served": (Served("d", "a\nb", Term(1), RunId("00" * 8), 1, 1),)},
        {"served": (Served("d\x1b[2J", "m", Term(1), RunId("00" * 8), 1, 1),)},
        {"served": (Served("d", "m", Term(1), RunId("\x1b[2J"), 1, 1),)},
        {"reserved": (Reserved("d\n", 1),)},
        {"reserved": (Reserved("d", -1),)},
        {"cached": {"ab" * 32: ((-(2**62), 3),)}},
    ],
)
def test_impossible_values_are_refused_although_they_are_signed(changes: dict[str, object]) -> None:
    with pytest.raises(PeerError, match="impossible values"):
        read(signed(msgspec.msgpack.encode(body(**changes))), AUTHOR, MESH)


def test_damaged_records_are_refused_and_crash_nothing() -> None:
    """The body is damaged and then signed: what a lying member can send, not only what a line can break."""
    accepted = 0
    for raw in mutations([msgspec.msgpack.encode(body()), msgspec.msgpack.encode(body(served=(), cached={}))]):
        try:
            read(signed(raw), AUTHOR, MESH)
            accepted += 1
        except PeerError:
            pass
    assert accepted < 5_000
    whole = announce(body(), OWN)
    for raw in mutations([whole.body], rounds=1_000):
        if raw != whole.body:
            with pytest.raises(PeerError):
                read(Announce(A, raw, whole.signature), AUTHOR, MESH)
