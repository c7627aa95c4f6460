"""The invite as text: one line that admits a machine to a mesh.

    mn1 + base32( pins 32 | invite id 8 | secret 16 | expiry 4 | count 1 | addresses | checksum 4 )

An address is 4 + 2 (IPv4), 16 + 2 (IPv6) or 1 + n + 2 (host name) bytes behind a one-byte tag. Three IPv4
addresses make 141 characters. The pins are the first 128 bits of the mesh id and of the issuer
certificate's key: the joiner sends nothing before both were shown. Whoever reads the line before it is used can join.

Invariant: neither `repr` nor any error shows the secret.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshnode.errors import InviteError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId, id_bytes

PIN_BYTES = 16
INVITE_ID_BYTES = 8
SECRET_BYTES = 16
LONGEST_TEXT = 256
MOST_ADDRESSES = 3
_CHECKSUM_BYTES = 4
_PREFIX = "mn1"
_HEAD_BYTES = 2 * PIN_BYTES + INVITE_ID_BYTES + SECRET_BYTES + 4 + 1
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,98}[A-Za-z0-9])?")
_AGAIN = "Copy the whole line again, or ask for a new one: `meshnode invite`."


@dataclass(frozen=True)
class Invite:
    """What the joiner knows about the mesh before it connects."""

    mesh_pin: bytes
    issuer_pin: bytes
    invite_id: bytes
    secret: bytes = field(repr=False)
    expires: datetime
    """To the second, UTC."""
    addresses: tuple[str, ...]
    """`host:port` of the issuer, at most three, tried in order; IPv6 in brackets."""


def mesh_pin(mesh_id: MeshId) -> bytes:
    """The 16 bytes by which an invite names its mesh."""
    return id_bytes(mesh_id)[:PIN_BYTES]


def issuer_pin(spki: bytes) -> bytes:
    """The 16 bytes by which an invite names the issuer key that redeems it."""
    return hashlib.sha256(Domain.ISSUER_PIN.value.encode() + b"\0" + spki).digest()[:PIN_BYTES]


def invite_key(secret: bytes, invite_id: bytes) -> bytes:
    """The 32-byte MAC key that both sides derive; the issuer keeps this and not the secret."""
    info = Domain.INVITE_KEY.value.encode() + b"\0" + invite_id
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def format_invite(invite: Invite) -> str:
    """The line to paste; `InviteError` when the addresses do not fit in it."""
    if not 1 <= len(invite.addresses) <= MOST_ADDRESSES:
        raise InviteError(f"an invite holds 1 to {MOST_ADDRESSES} addresses, not {len(invite.addresses)}")
    seconds = int(invite.expires.timestamp())
    body = b"".join(
        (
            invite.mesh_pin,
            invite.issuer_pin,
            invite.invite_id,
            invite.secret,
            seconds.to_bytes(4, "big"),
            bytes([len(invite.addresses)]),
            *(_address_bytes(address) for address in invite.addresses),
        )
    )
    text = _PREFIX + base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()
    if len(text) > LONGEST_TEXT:
        raise InviteError("the addresses are too long for an invite", "Give fewer or shorter addresses.")
    return text


def parse_invite(text: str) -> Invite:
    """Read a pasted line; `InviteError` says which defect it has."""
    line = "".join(text.split()).lower()
    if len(line) > LONGEST_TEXT:
        raise InviteError("this is too long for an invite", _AGAIN)
    if not line.startswith("mn"):
        raise InviteError("this is not an invite: one begins with `mn1`", _AGAIN)
    if not line.startswith(_PREFIX):
        raise InviteError("this invite has a format that this version does not know", "Update meshnode.")
    payload = line.removeprefix(_PREFIX)
    try:
        data = base64.b32decode(payload.upper() + "=" * (-len(payload) % 8))
    except ValueError:
        raise InviteError("this invite is damaged: it holds characters that no invite has", _AGAIN) from None
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(body) < _HEAD_BYTES:
        raise InviteError("this invite is cut off", _AGAIN)
    if _checksum(body) != checksum:
        raise InviteError("this invite is damaged or cut off: its checksum is wrong", _AGAIN)
    return _parse_body(body)


def check_not_expired(invite: Invite, now: datetime) -> None:
    """`InviteError` when the invite's time is over by this machine's clock."""
    if now >= invite.expires:
        ended = invite.expires.strftime("%Y-%m-%d %H:%M UTC")
        raise InviteError(f"this invite expired at {ended}", "Ask for a new one: `meshnode invite`.")


def _parse_body(body: bytes) -> Invite:
    pins, rest = body[: 2 * PIN_BYTES], body[2 * PIN_BYTES :]
    invite_id, rest = rest[:INVITE_ID_BYTES], rest[INVITE_ID_BYTES:]
    secret, rest = rest[:SECRET_BYTES], rest[SECRET_BYTES:]
    seconds, count, rest = int.from_bytes(rest[:4], "big"), rest[4], rest[5:]
    if not 1 <= count <= MOST_ADDRESSES:
        raise InviteError("this invite names no address", _AGAIN)
    addresses = []
    for _ in range(count):
        address, rest = _take_address(rest)
        addresses.append(address)
    if rest:
        raise InviteError("this invite holds more than this version knows", "Update meshnode.")
    expires = datetime.fromtimestamp(seconds, UTC)
    return Invite(pins[:PIN_BYTES], pins[PIN_BYTES:], invite_id, secret, expires, tuple(addresses))


def _address_bytes(address: str) -> bytes:
    host, _, port_text = address.rpartition(":")
    port = int(port_text) if port_text.isascii() and port_text.isdecimal() else 0
    if not 1 <= port <= 65535:
        raise InviteError(f"{address!r} is not HOST:PORT")
    tail = port.to_bytes(2, "big")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise InviteError(f"{address!r} is not HOST:PORT") from None
        return b"\0" + bytes([len(host)]) + host.encode() + tail
    if getattr(ip, "scope_id", None):
        raise InviteError(f"{address!r} is valid on one machine only", "Give an address without a zone.")
    return bytes([ip.version]) + ip.packed + tail


def _take_address(data: bytes) -> tuple[str, bytes]:
    """One address as text, and what follows it."""
    tag, data = data[:1], data[1:]
    sizes = {b"\x04": 4, b"\x06": 16, b"\0": data[0] if data else 0}
    if tag not in sizes:
        raise InviteError("this invite holds an address that this version does not know", "Update meshnode.")
    if tag == b"\0":
        data = data[1:]
    host, port, rest = data[: sizes[tag]], data[sizes[tag] : sizes[tag] + 2], data[sizes[tag] + 2 :]
    if len(port) != 2 or port == b"\0\0":
        raise InviteError("this invite is damaged: an address is cut off", _AGAIN)
    if tag == b"\x04":
        name = str(ipaddress.IPv4Address(host))
    elif tag == b"\x06":
        name = f"[{ipaddress.IPv6Address(host)}]"
    else:
        name = host.decode("ascii", errors="replace")
        if not _HOST.fullmatch(name):
            raise InviteError("this invite is damaged: an address is no host name", _AGAIN)
    return f"{name}:{int.from_bytes(port, 'big')}", rest


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(Domain.INVITE_CHECKSUM.value.encode() + b"\0" + body).digest()[:_CHECKSUM_BYTES]
