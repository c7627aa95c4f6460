"""Strangers and bad members at the mesh port of real nodes: the mesh answers as before, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from meshnode.errors import InviteError, LinkLost, MeshError, PeerError
from meshnode.identity.certificates import Authority, Role, make_node
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.identity.invites import Invite, parse_invite
from meshnode.io.artifacts import BulkClient
from meshnode.io.transport.join import redeem
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Transport
from meshnode.wire import artifacts, limits
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.framing import encode_frame
from meshnode.wire.messages import (
    Abort,
    Announce,
    Claim,
    ClaimedStage,
    Commit,
    Connect,
    Failed,
    Grant,
    Hop,
    Introduce,
    Ping,
    Prepare,
    Ready,
    Refuse,
    RunOptions,
    WhoIs,
    encode,
)
from meshnode.wire.preface import Kind, Preface, StreamClass, encode_preface
from tests.e2e.harm import Intruder, connect, is_closed_by_node, join_tls, mesh_address, unharmed
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, until
from tests.identity.mesh import TestMesh

pytestmark = pytest.mark.e2e

MEMBER = encode_preface(Preface(Kind.MEMBER, StreamClass.CONTROL))


@pytest.fixture(autouse=True)
def _unharmed(mesh: RealMesh) -> Iterator[None]:
    with unharmed(mesh):
        yield


@pytest.fixture(scope="module")
def intruder(mesh: RealMesh) -> Intruder:
    return Intruder.joins(mesh)


@pytest.fixture
def victim(mesh: RealMesh) -> RealNode:
    return mesh.nodes[1]


# --- strangers ------------------------------------------------------------------------------------------------


def test_strangers_are_closed_whatever_they_say_or_do_not_say(victim: RealNode) -> None:
    stage = encode_preface(Preface(Kind.STAGE, StreamClass.ACTIVATION, os.urandom(16)))
    unknown = victim.status()["counters"]["unknown_hop_tokens"]
    says = [b"", MEMBER[:9], MEMBER, MEMBER + b"\x16\x03\x01\x02\x00", stage[:23]]  # all their time is waited for
    says += [MEMBER + os.urandom(999), b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), bytes(24), stage]
    says += [stage + os.urandom(999), b"MESH" + bytes([9, 1, 1]) + bytes(17), b"MESH" + bytes([1, 9, 9]) + bytes(17)]
    while says:  # a few at a time: more of one address are refused unheard
        some, says = says[: limits.HANDSHAKES_PER_ADDRESS - 1], says[limits.HANDSHAKES_PER_ADDRESS - 1 :]
        opened = [connect(victim, words) for words in some]
        assert all(is_closed_by_node(each) for each in opened)
    assert victim.status()["counters"]["unknown_hop_tokens"] == unknown + 2


def test_two_hundred_connections_at_once_cost_a_bounded_number_of_handshakes(victim: RealNode) -> None:
    opened = [connect(victim, MEMBER) for _ in range(200)]
    assert victim.status()["counters"]["transport_handshakes_now"] <= limits.HANDSHAKES_PER_ADDRESS
    assert all(is_closed_by_node(each) for each in opened)


def issued_by(mesh: RealMesh, now: datetime, role: Role = Role.MEMBER) -> Credentials:
    """What the mesh's own issuer would sign at `now`."""
    mine = mesh.nodes[0].data
    files = {name: (mine / name).read_bytes() for name in ("issuer.key", "issuer.pem", "mesh.pem")}
    key = load_pem_private_key(files["issuer.key"], None)
    assert isinstance(key, Ed25519PrivateKey)
    issuer = Authority(x509.load_pem_x509_certificate(files["issuer.pem"]), key)
    chain = x509.load_pem_x509_certificates(files["mesh.pem"])
    own = Ed25519PrivateKey.generate()
    return Credentials(own, (make_node(issuer, own.public_key(), role, now), *chain[1:-1]), chain[-1])


def minted_by(member: Credentials) -> Credentials:
    """A member that plays issuer."""
    key = Ed25519PrivateKey.generate()
    leaf = make_node(Authority(member.chain[0], member.key), key.public_key(), Role.MEMBER, datetime.now(UTC))
    return Credentials(key, (leaf, *member.chain), member.root)


def test_certificates_of_other_meshes_of_the_past_and_of_a_members_own_making_let_nobody_in(
    mesh: RealMesh, victim: RealNode, intruder: Intruder
) -> None:
    node = NodeId(victim.status()["node"])

    async def dial(credentials: Credentials) -> None:
        stream = await Transport(credentials).dial(node, (mesh_address(victim),), StreamClass.CONTROL)
        await stream.aclose()

    trio.run(dial, issued_by(mesh, datetime.now(UTC)))
    foreign, old = TestMesh().node(), issued_by(mesh, datetime.now(UTC) - timedelta(days=30))
    pretends = Credentials(foreign.key, foreign.chain, intruder.credentials.root)
    for wrong in (foreign, pretends, old, minted_by(intruder.credentials)):
        with pytest.raises((PeerError, LinkLost)):
            trio.run(dial, wrong)


def test_guessing_an_invite_locks_it_and_garbage_at_the_desk_is_closed(mesh: RealMesh) -> None:
    founder = mesh.nodes[0]
    invite = parse_invite(founder.invite())

    async def ask(asked: Invite) -> None:
        await redeem(asked, Ed25519PrivateKey.generate(), datetime.now(UTC))

    for _ in range(5):
        with pytest.raises(InviteError, match="secret"):
            trio.run(ask, replace(invite, secret=secrets.token_bytes(len(invite.secret))))
    with pytest.raises(InviteError, match="locked"):
        trio.run(ask, invite)
    listed = {entry["id"]: entry["state"] for entry in founder.api("GET", "/api/invites")["invites"]}
    assert listed[invite.invite_id.hex()] == "locked"
    for words in (b"", bytes(4), b"\xff" * 64, encode_frame(b"\x81" * 2000, limits.JOIN_FRAME)):
        with join_tls(founder) as tls:
            tls.sendall(words)
            assert tls.recv(4), "the welcome comes first"
            if not words:
                continue
            assert is_closed_by_node(tls)


# --- a member: control ------------------------------------------------------------------------------------------


def test_frames_that_are_no_messages_end_the_link(victim: RealNode, intruder: Intruder) -> None:
    deep = b"\x81\xa2op" + b"\x91" * 60_000
    for frame in (b"", b"\xc1", os.urandom(999), deep, b"\x81\xa2op\x05", b"\x82\xa2op\xa4ping\xa5nonce\xa1x"):
        assert intruder.was_refused(victim, frame)

    async def too_long(stream: Stream) -> None:
        await stream.send_bytes((limits.CONTROL_FRAME + 1).to_bytes(4, "big") + bytes(1000))
        await ended(stream)

    intruder.act(victim, too_long, StreamClass.CONTROL)


async def ended(stream: Stream) -> None:
    """Read on until the other side closes."""
    with contextlib.suppress(LinkLost):
        while True:
            await stream.receive_frame()


def test_nobody_can_speak_for_another_node(mesh: RealMesh, victim: RealNode, intruder: Intruder) -> None:
    everybody = tuple(NodeId(node.status()["node"]) for node in mesh.nodes)
    heard = intruder.tell(victim, intruder.introduce(), intruder.announcement(), WhoIs(everybody))
    others = [message for message in heard if isinstance(message, Announce) and message.author in everybody]
    assert {message.author for message in others} == set(everybody)
    before = names(mesh)
    for true in others:
        chain = next(m for m in heard if isinstance(m, Introduce))
        mine = intruder.announcement(node=true.author, name="forged", incarnation=2**40)
        for forged in (
            msgspec.structs.replace(mine, author=true.author),
            msgspec.structs.replace(mine, author=intruder.node),
            msgspec.structs.replace(true, body=true.body[:-1] + b"\x01"),
            msgspec.structs.replace(true, signature=bytes(64)),
            Introduce((chain.chain[0], intruder.authority.chain[0])),
        ):
            assert intruder.was_refused(victim, intruder.introduce(), forged), forged
    theirs = [true for true in others if true.author != victim.status()["node"]]
    assert not intruder.was_refused(victim, *theirs, *theirs), "a replay is no news"
    assert names(mesh) == before


def names(mesh: RealMesh) -> set[str]:
    """What members call themselves; who has announced nothing (an intruder of a test before) is shown by its id."""
    peers = [peer for node in mesh.nodes for peer in node.status()["peers"]]
    return {peer["name"] for peer in peers if not peer["node"].startswith(peer["name"])} - {"intruder"}


def running(mesh: RealMesh) -> Fence:
    found = mesh.nodes[0].serving()
    return Fence(Term(found["term"]), RunId(found["run"]))


def test_orders_and_reports_about_the_run_of_others_change_nothing(
    mesh: RealMesh, victim: RealNode, intruder: Intruder
) -> None:
    fence = running(mesh)
    orders = (Abort(fence, "mine"), Commit(fence), Connect(fence), order(fence, intruder, victim))
    reports = (Failed(fence, 0, "x", "x"), Ready(fence, 1), Refuse(fence, "x", "x", "x", 2**60), Grant(fence, "x"))
    stale = victim.status()["counters"]["stale_orders"]
    intruder.tell(victim, intruder.introduce(), intruder.announcement(), *orders)
    intruder.tell(mesh.nodes[0], intruder.introduce(), intruder.announcement(), *reports, *orders)
    assert victim.status()["counters"]["stale_orders"] == stale + len(orders)
    assert running(mesh) == fence


def claim(intruder: Intruder, victim: RealNode, **changes: object) -> Claim:
    """One stage on `victim`, of a model that nobody has."""
    stage = ClaimedStage(0, NodeId(victim.status()["node"]), 0, 4, 0, 0, 1)
    options = RunOptions(256, 1, 32, "f16", flash_attention=False)
    made = Claim(
        fence=Fence(Term(1), RunId(secrets.token_hex(8))),
        deployment=secrets.token_hex(8),
        model="stolen",
        manifest_digest="0" * 64,
        plan_digest="0" * 64,
        coordinator=intruder.node,
        layers=4,
        options=options,
        stages=(stage,),
    )
    return msgspec.structs.replace(made, **changes)


def order(fence: Fence, intruder: Intruder, victim: RealNode, source: NodeId | None = None) -> Prepare:
    hop = Hop(os.urandom(16), "s0.mesh", NodeId(victim.status()["node"]))
    options = RunOptions(256, 1, 32, "f16", flash_attention=False)
    digest = "0" * 64
    return Prepare(fence, "x", digest, source or intruder.node, 0, 1, 0, 4, 4, options, hop, hop)


def test_a_claim_gets_no_more_than_is_free_and_nothing_in_anothers_name(
    mesh: RealMesh, victim: RealNode, intruder: Intruder
) -> None:
    hello = (intruder.introduce(), intruder.announcement())
    all_of_it = ClaimedStage(0, NodeId(victim.status()["node"]), 0, 4, 0, 0, victim.status()["memory_usable"])
    heard = intruder.tell(victim, *hello, claim(intruder, victim, stages=(all_of_it,)))
    assert [m.reason for m in heard if isinstance(m, Refuse)] == ["no_room"]
    other = NodeId(mesh.nodes[0].status()["node"])
    assert intruder.was_refused(victim, *hello, claim(intruder, victim, coordinator=other))
    far = claim(intruder, victim, fence=Fence(Term(2**63), RunId("0" * 16)))
    assert [m.reason for m in intruder.tell(victim, *hello, far) if isinstance(m, Refuse)] == ["term_jump"]
    assert running(mesh)


def test_a_coordinator_whose_model_does_not_exist_leaves_no_stage_behind(victim: RealNode, intruder: Intruder) -> None:
    """Grants of a byte, each prepared, connected and aborted at once, from a source that cannot be reached."""
    said: list[object] = [intruder.introduce(), intruder.announcement()]
    for _ in range(100):
        wanted = claim(intruder, victim)
        said += [
            wanted,
            order(wanted.fence, intruder, victim),
            Connect(wanted.fence),
            Abort(wanted.fence, "never mind"),
        ]
    last = claim(intruder, victim)
    said += [last, *[order(last.fence, intruder, victim)] * 3, *[Connect(last.fence)] * 50]
    heard = intruder.tell(victim, *said)
    assert sum(isinstance(message, Grant) for message in heard) == 101
    until("nothing is held for it", lambda: len(victim.status()["deployments"]) == 1)


def test_floods_and_a_peer_that_never_reads_are_endured(mesh: RealMesh, victim: RealNode, intruder: Intruder) -> None:
    hello = intruder.introduce()
    assert not intruder.was_refused(victim, hello, *[intruder.announcement(name=f"n{i}") for i in range(2000)])
    intruder.tell(victim, *[hello] * 2000)

    async def never_reads(stream: Stream) -> None:
        for _ in range(20_000):
            await stream.send_frame(msgspec.msgpack.encode({"op": "x" * 64}))

    with pytest.raises(LinkLost):
        intruder.act(victim, never_reads, StreamClass.CONTROL)
    intruder.tell(victim, *[Ping(number) for number in range(2000)])
    for _ in range(40):
        intruder.act(victim, nothing, StreamClass.CONTROL)
    assert running(mesh)


async def nothing(stream: Stream) -> None:
    """Dialed, and closed again."""


# --- a member: artifacts and requests -------------------------------------------------------------------------------


def test_artifacts_are_given_by_name_and_range_and_nothing_else_is(mesh: RealMesh, intruder: Intruder) -> None:
    founder = mesh.nodes[0]
    digest = model_digest(founder)

    async def asks(stream: Stream) -> None:
        client = BulkClient(stream, "founder")
        assert await client.manifest(digest)
        for wrong in (
            artifacts.GetManifest("0" * 64),
            artifacts.GetArtifact(digest, "layer.9999", 0, 1),
            artifacts.GetArtifact(digest, "layer.0", 0, artifacts.ARTIFACT_BYTES_MAX),
            artifacts.GetArtifact(digest, "layer.0", artifacts.ARTIFACT_BYTES_MAX, 1),
        ):
            await stream.send_frame(artifacts.encode(wrong))
            assert isinstance(artifacts.decode_reply(await stream.receive_frame()), artifacts.Refused)
        assert await client.manifest(digest), "the stream is usable after refusals"

    async def lies(stream: Stream) -> None:
        for name in ("../../node.key", "/etc/passwd", "layer.0/../../node.key", "layer.0\0", "a" * 9999):
            frame = msgspec.msgpack.encode(
                {"op": "get_artifact", "digest": digest, "artifact": name, "offset": 0, "length": 9}
            )
            other = await intruder.dial(founder, StreamClass.BULK)
            await other.send_frame(frame)
            with pytest.raises(LinkLost):
                await other.receive_frame()
            await other.aclose()
        await stream.send_frame(b"\xc1")

    intruder.act(founder, asks, StreamClass.BULK)
    intruder.act(founder, lies, StreamClass.BULK)


def model_digest(founder: RealNode) -> str:
    """Of the model it serves: its slices lie in a folder of that name."""
    return next(path.name for path in (founder.data / "cache").iterdir() if len(path.name) == 64)


def test_a_request_of_a_member_reaches_generation_only_and_lies_about_bodies_end_it(
    mesh: RealMesh, intruder: Intruder
) -> None:
    founder = mesh.nodes[0]
    asked = {"method": "POST", "path": "/v1/chat/completions", "headers": (), "body_bytes": 2}
    chat = b'{"messages":[{"role":"user","content":"A"}],"stream":true,"max_tokens":1000,"ignore_eos":true}'

    async def answered(stream: Stream, body: bytes, **changes: object) -> object:
        await stream.send_frame(msgspec.msgpack.encode({**asked, "body_bytes": len(body), **changes}))
        await stream.send_frame(body)
        return msgspec.msgpack.decode(await stream.receive_frame())

    async def paths(_: Stream) -> None:
        for path in (
            "/api/status",
            "/api/shutdown",
            "/v1/models",
            "",
            "//",
            "/v1/chat/completions/../../../api/status",
        ):
            stream = await intruder.dial(founder, StreamClass.REQUEST)
            answer = await answered(stream, b"{}", path=path)
            assert isinstance(answer, dict)
            assert answer["status"] == 404, path
            await stream.aclose()

    async def lies(_: Stream) -> None:
        for changes in (
            {"body_bytes": 1},
            {"body_bytes": -1},
            {"body_bytes": 2**40},
            {"headers": (("x", "\r\ny: z"),)},
            {"headers": (("\u20ac", "x"),)},
            {"path": "x" * 9999},
            {"method": 7},
        ):
            stream = await intruder.dial(founder, StreamClass.REQUEST)
            with pytest.raises(MeshError):
                await answered(stream, b"{}", **changes)
            await stream.aclose()

    async def vanishes(_: Stream) -> None:
        for _ in range(20):
            stream = await intruder.dial(founder, StreamClass.REQUEST)
            await answered(stream, chat)
            await trio.aclose_forcefully(stream._tls.transport_stream)

    async def floods(_: Stream) -> None:
        held = []
        try:
            for _ in range(limits.STREAMS_PER_PEER + 6):
                held.append(await intruder.dial(founder, StreamClass.REQUEST))
        except PeerError:
            pass
        assert len(held) < limits.STREAMS_PER_PEER
        for stream in held:
            await trio.aclose_forcefully(stream._tls.transport_stream)

    for act in (paths, lies, vanishes, floods):
        intruder.act(founder, act, StreamClass.REQUEST)


def models(node: RealNode) -> list[str]:
    return [model["id"] for model in httpx.get(f"{node.url}/v1/models").json()["data"]]


def test_a_client_draws_no_requests_and_gets_no_artifacts(mesh: RealMesh) -> None:
    client = Intruder.joins(mesh, role="client")
    victim = mesh.nodes[0]
    serves = client.announcement(
        served=({"deployment": "d", "model": "bait", "term": 1, "run": "0" * 16, "context": 9, "created": 1},)
    )
    seen: list[str] = []

    async def baits(stream: Stream) -> None:
        await stream.send_frame(encode(client.introduce()))
        await stream.send_frame(encode(serves))
        while not any(peer["name"] == "intruder" and peer["state"] == "linked" for peer in victim.status()["peers"]):
            await trio.lowlevel.checkpoint()
        seen.extend(await trio.to_thread.run_sync(models, victim))

    client.act(victim, baits, StreamClass.CONTROL)
    assert seen == ["meshnode-demo"]
    assert client.was_refused(victim, client.introduce(), claim(client, victim))

    async def no_artifacts(stream: Stream) -> None:
        with pytest.raises(LinkLost), trio.fail_after(WAIT_S):
            await BulkClient(stream, "founder").manifest("0" * 64)

    client.act(victim, no_artifacts, StreamClass.BULK)
