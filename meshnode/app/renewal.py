"""Certificates last a week and are renewed daily: by an issuer itself, by everybody else over JOIN from any issuer.

Invariant: what is shown on new connections is on disk first; streams that are open stay open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import trio

from meshnode.errors import ConfigError, MeshError
from meshnode.identity.certificates import NODE_VALID
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.io.disk.directory import DataDirectory, Membership
from meshnode.io.transport.join import renew

log = logging.getLogger("meshnode.identity")

LOOK_S = 3600.0
"""How often to look: a suspended laptop renews within the hour after it wakes."""
RENEW_AFTER = timedelta(days=1)


def _trusted(issuer: NodeId) -> bool:
    return False


async def renewed(
    data: DataDirectory, held: Membership, addresses: list[str], revoked: Callable[[NodeId], bool] = _trusted
) -> Membership:
    """`held` with fresh certificates, on disk. `addresses`: of other members, any of which may be an issuer.

    An issuer that is `revoked` is not asked. Raises MeshError when no issuer can be reached or it refuses.
    """
    now = datetime.now(UTC)
    if held.issuer is None or held.issuer.certificate.not_valid_after_utc <= now:
        credentials = await renew(held.credentials, addresses, now, revoked)
        await trio.to_thread.run_sync(data.renew, credentials)  # a slow disk must not hold up the event loop
    fresh = await trio.to_thread.run_sync(data.membership, now)
    assert fresh is not None, "a member stays one"
    return fresh


def is_due(credentials: Credentials) -> bool:
    """Whether a day or more of the certificate's week is over."""
    return credentials.expires - datetime.now(UTC) < NODE_VALID - RENEW_AFTER


async def require_valid(data: DataDirectory, held: Membership, addresses: list[str]) -> Membership:
    """At start: `held`, renewed when its certificate has ended. ConfigError when that is not possible."""
    if held.credentials.expires > datetime.now(UTC):
        return held
    try:
        return await renewed(data, held, addresses)
    except MeshError as error:
        ended = f"{held.credentials.expires:%Y-%m-%d}"
        raise ConfigError(
            f"this machine's certificate ended on {ended} and could not be renewed: {error}",
            "Start the machine that made the mesh and try again, or join anew: `meshnode invite` there.",
        ) from None


async def keep_renewed(
    data: DataDirectory,
    present: Callable[[], Membership],
    addresses: Callable[[], list[str]],
    use: Callable[[Membership], None],
    revoked: Callable[[NodeId], bool] = _trusted,
) -> None:
    """Renew for as long as the node runs: `present` is what it has, `use` takes what is fresh."""
    while True:
        await trio.sleep(LOOK_S)
        held = present()
        if not is_due(held.credentials):
            continue
        try:
            fresh = await renewed(data, held, addresses(), revoked)
        except (MeshError, OSError) as error:  # an issuer that is away, a disk that is full: try again in an hour
            log.warning("the certificate (until %s) could not be renewed: %s", held.credentials.expires, error)
        else:
            use(fresh)
