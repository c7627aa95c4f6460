"""Golden proofs: ids, signatures, MACs, digests, invites; computed here from hashes and keys alone, and by our code."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from meshnode.core.membership.digest import Digest
from meshnode.identity import comparison
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import MeshId, node_id_of
from meshnode.identity.invites import Invite, format_invite, invite_key, issuer_pin, mesh_pin, parse_invite
from meshnode.identity.transcript import NO_INVITE, Transcript
from meshnode.wire.messages import Announce
from tools.contract.jsonform import from_json
from tools.export_schema import PROTO

PROOFS = json.loads((PROTO / "vectors" / "proofs.json").read_text(encoding="utf-8"))


def of(what: str) -> Any:
    chosen = [proof for proof in PROOFS if proof["what"] == what]
    return pytest.mark.parametrize(
        ("given", "result"),
        [(from_json(proof["given"]), from_json(proof["result"])) for proof in chosen],
        ids=[proof["name"] for proof in chosen],
    )


def spki(seed: bytes) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def id_bytes(text: str) -> bytes:
    return base64.b32decode(text.upper() + "====")


def signed_bytes(given: dict[str, Any], data: bytes) -> bytes:
    """Label, a zero byte, 32 bytes of mesh id, data."""
    return given["domain"].encode() + b"\0" + id_bytes(given["mesh_id"]) + data


@of("id")
def test_an_id_is_the_hash_of_a_key_in_base32(given: dict[str, Any], result: dict[str, Any]) -> None:
    key = spki(given["seed"])
    assert key == result["spki"]
    assert base64.b32encode(hashlib.sha256(key).digest()).decode().rstrip("=").lower() == result["id"]
    assert node_id_of(key) == result["id"]


@of("signature")
def test_a_signature_covers_domain_mesh_and_data(given: dict[str, Any], result: dict[str, Any]) -> None:
    key = Ed25519PrivateKey.from_private_bytes(given["seed"])
    assert key.sign(signed_bytes(given, given["data"])) == result["signature"]
    domain, mesh = Domain(given["domain"]), MeshId(given["mesh_id"])
    assert sign(key, domain, mesh, given["data"]) == result["signature"]
    verify(key.public_key(), domain, mesh, given["data"], result["signature"])


@of("transcript")
def test_a_joiner_proves_its_key_and_the_invite(given: dict[str, Any], result: dict[str, Any]) -> None:
    key, public = Ed25519PrivateKey.from_private_bytes(given["seed"]), spki(given["seed"])
    parts = [given[name] for name in ("invite_id", "issuer_nonce", "joiner_nonce", "leaf_fingerprint")]
    data = signed_bytes(given, b"".join([*parts, public]))
    assert key.sign(data) == result["signature"]
    assert hmac.digest(given["mac_key"], data, hashlib.sha256) == result["mac"]
    ours = Transcript(MeshId(given["mesh_id"]), *parts, public, Domain(given["domain"]))
    assert (ours.sign(key), ours.mac(given["mac_key"])) == (result["signature"], result["mac"])


@of("invite")
def test_an_invite_is_one_line_with_pins_secret_and_addresses(given: dict[str, Any], result: dict[str, Any]) -> None:
    issuer = hashlib.sha256(b"meshnode/v1/issuer-pin\0" + given["issuer_spki"]).digest()[:16]
    pins = id_bytes(given["mesh_id"])[:16], issuer
    head = [*pins, given["invite_id"], given["secret"], given["expires"].to_bytes(4, "big")]
    body = b"".join([*head, bytes([len(given["addresses"])]), given["address_bytes"]])
    checksum = hashlib.sha256(b"meshnode/v1/invite-checksum\0" + body).digest()[:4]
    assert "mn1" + base64.b32encode(body + checksum).decode().rstrip("=").lower() == result["text"]
    assert (mesh_pin(MeshId(given["mesh_id"])), issuer_pin(given["issuer_spki"])) == pins
    expires = datetime.fromtimestamp(given["expires"], UTC)
    invite = Invite(*pins, given["invite_id"], given["secret"], expires, tuple(given["addresses"]))
    assert format_invite(invite) == result["text"]
    assert parse_invite(result["text"]) == invite


@of("invite")
def test_the_key_of_an_invite_is_derived_by_hkdf(given: dict[str, Any], result: dict[str, Any]) -> None:
    """RFC 5869 with SHA-256, no salt and one block of output."""
    extracted = hmac.digest(bytes(32), given["secret"], hashlib.sha256)
    info = b"meshnode/v1/invite-key\0" + given["invite_id"]
    assert hmac.digest(extracted, info + b"\x01", hashlib.sha256) == result["key"]
    assert invite_key(given["secret"], given["invite_id"]) == result["key"]


@of("comparison")
def test_two_people_compare_a_number_that_neither_end_could_choose(
    given: dict[str, Any], result: dict[str, Any]
) -> None:
    public, leaf = spki(given["seed"]), given["leaf_fingerprint"]
    mesh = b"\0" + id_bytes(given["mesh_id"])
    committed = hashlib.sha256(b"meshnode/v1/commitment" + mesh + leaf + given["issuer_nonce"]).digest()
    assert committed == result["commitment"]
    parts = leaf + public + given["issuer_nonce"] + given["joiner_nonce"]
    number = int.from_bytes(hashlib.sha256(b"meshnode/v1/comparison" + mesh + parts).digest(), "big") % 10**6
    assert str(number).zfill(6) == result["number"]
    assert comparison.commit(MeshId(given["mesh_id"]), leaf, given["issuer_nonce"]) == committed
    nonces = given["issuer_nonce"], given["joiner_nonce"]
    ours = Transcript(MeshId(given["mesh_id"]), NO_INVITE, *nonces, leaf, public)
    comparison.check_reveal(ours, committed)
    assert comparison.number(ours) == result["number"]


@of("digest")
def test_what_a_node_holds_is_compared_by_hashes_of_its_ids(given: dict[str, Any], result: dict[str, Any]) -> None:
    """Ids are hashes of what was signed; each of 16 parts is hashed over its sorted ids, the root over the parts."""
    ids = sorted(hashlib.sha256(body).digest()[:16] for body in given["bodies"])
    parts = [b"".join(identity for identity in ids if identity[0] >> 4 == part) for part in range(16)]
    hashes = [hashlib.sha256(part).digest()[:8] for part in parts]
    assert hashes == result["hashes"]
    assert hashlib.sha256(b"".join(hashes)).digest()[:8] == result["root"]
    ours = Digest()
    for body in given["bodies"]:
        ours.add(Announce(node_id_of(body), body, b""))
    assert (list(ours.hashes()), ours.root()) == (result["hashes"], result["root"])


def test_every_domain_has_a_proof() -> None:
    named = {proof["given"].get("domain") for proof in PROOFS} - {None}
    told_by_what = {
        "invite": {Domain.INVITE_KEY, Domain.INVITE_CHECKSUM, Domain.ISSUER_PIN},
        "comparison": {Domain.COMMITMENT, Domain.COMPARISON},
    }
    assert {proof["what"] for proof in PROOFS} >= set(told_by_what)
    assert named.union(*told_by_what.values()) == set(Domain)
