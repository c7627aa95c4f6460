"""Joining without an invite: the joiner's side (the exchange is in comparison_desk).

Invariant: nothing is kept of an issuer before the person here said that both machines show the same number.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import InviteError, LinkLost, PeerError
from meshnode.identity.chains import mesh_id_of_root
from meshnode.identity.comparison import check_reveal, number
from meshnode.identity.domains import Domain
from meshnode.identity.keys import spki_of
from meshnode.identity.transcript import NO_INVITE, NONCE_BYTES, Transcript, fingerprint
from meshnode.io.transport.join import Desk, Joined, ask, find_issuer, receive
from meshnode.wire import limits
from meshnode.wire.join import Approach, Commitment, Confirm, Offer, Reveal, encode_join


async def join_by_number(
    addresses: Sequence[str],
    mesh_prefix: str,
    name: str,
    key: Ed25519PrivateKey,
    now: datetime,
    same: Callable[[str], Awaitable[bool]],
) -> Joined:
    """Become a member of the mesh that answers at `addresses`, if `same(number)` and the person there say so.

    `mesh_prefix` is what the hint said. `InviteError` when either person or the issuer says no, `PeerError` and
    `LinkLost` as of `redeem`.
    """

    def check(root: x509.Certificate, _: x509.Certificate) -> None:
        if not mesh_id_of_root(root).startswith(mesh_prefix):
            raise PeerError("another mesh answers there")

    desk = await find_issuer(addresses, check, now)
    try:
        transcript = await _exchange(desk, name, key)
        agreed = await same(number(transcript))
    except BaseException:
        await desk.aclose()
        raise
    if not agreed:
        await desk.aclose()
        raise InviteError("the numbers differ: this machine did not join", "Run `meshnode join` again.")
    credentials = await ask(desk, Confirm(transcript.sign(key)), key, now, limits.COMPARISON_S)
    return Joined(credentials, desk.node, desk.address)


async def _exchange(desk: Desk, name: str, key: Ed25519PrivateKey) -> Transcript:
    nonce, public_key = secrets.token_bytes(NONCE_BYTES), spki_of(key.public_key())
    try:
        with trio.fail_after(limits.JOIN_TIMEOUT_S):
            await desk.stream.send_frame(encode_join(Approach(name)))
            commitment = await receive(desk, Commitment)
            await desk.stream.send_frame(encode_join(Offer(public_key, nonce)))
            reveal = await receive(desk, Reveal)
    except trio.TooSlowError:
        raise LinkLost(f"the issuer did not answer within {limits.JOIN_TIMEOUT_S:g} s") from None
    mesh, leaf = mesh_id_of_root(desk.root), fingerprint(desk.leaf)
    transcript = Transcript(mesh, NO_INVITE, reveal.nonce, nonce, leaf, public_key, Domain.COMPARISON)
    check_reveal(transcript, commitment.digest)
    return transcript
