"""What travels between a running node's `/api/...` routes and the command line: JSON of these types, both ways.

Every route needs `Authorization: Bearer <content of <data>/api-token>`. An error is the OpenAI envelope
(`{"error": {"message", "type", "code", "hint"}}`). `GET /api/status` answers `core.node.status.NodeStatus`.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.shortfall import Shortfall

NODE_FILE = "node.json"
"""In the data directory: a `RunningNode`. Written when the endpoint answers, removed when the node ends."""
TOKEN_FILE = "api-token"  # noqa: S105 - a file's name


class RunningNode(msgspec.Struct, frozen=True):
    """Where the node of a data directory is."""

    pid: int
    mesh_port: int
    api_port: int
    api_url: str = ""
    """http://host:port of the endpoint, without `/v1`; empty: loopback."""


class InviteRequest(msgspec.Struct, frozen=True):
    """`POST /api/invites`."""

    uses: int = 1
    expires_s: int = 86400
    role: str = "member"


class InviteIssued(msgspec.Struct, frozen=True):
    """Its answer; `invite` is the line to paste and is shown this once."""

    invite: str
    id: str
    expires_at: datetime


class InviteListing(msgspec.Struct, frozen=True):
    """One line of `GET /api/invites`."""

    id: str
    role: str
    state: str
    uses: int
    used: int
    expires_at: datetime


class InviteListings(msgspec.Struct, frozen=True):
    """`GET /api/invites`."""

    invites: tuple[InviteListing, ...]


class PendingListing(msgspec.Struct, frozen=True):
    """A machine that asks to join by number; its name is what it says itself."""

    name: str
    address: str
    number: str
    expires_s: float


class PendingListings(msgspec.Struct, frozen=True):
    """`GET /api/pending`: none or one."""

    pending: tuple[PendingListing, ...]


class ApproveRequest(msgspec.Struct, frozen=True):
    """`POST /api/pending/approve`, answered by a `PendingListing`: the number as the joining machine shows it."""

    code: str


class PlanRequest(msgspec.Struct, frozen=True):
    """`POST /api/plan`: what would this mesh do with that model? Zero and empty mean automatic."""

    footprint: ModelFootprint
    context: int = 0
    lanes: int = 0
    kv_type: str = ""
    only: tuple[str, ...] = ()
    """Members by name or whole id, as in `exclude`."""
    exclude: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    replicas: int = 0


class PlanAnswer(msgspec.Struct, frozen=True):
    """Its answer: exactly one of the two."""

    plan: Plan | None = None
    shortfall: Shortfall | None = None


class LoadRequest(msgspec.Struct, frozen=True):
    """`POST /api/models`: serve the GGUF at `path` on the node's machine too. Zero and empty mean automatic."""

    path: str
    context: int = 0
    lanes: int = 0
    kv_type: str = ""
    only: tuple[str, ...] = ()
    """Members by name or whole id, as in `exclude`."""
    exclude: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    replicas: int = 1


class LoadAnswer(msgspec.Struct, frozen=True):
    """Its answer, when the file was found good; what follows is in the status."""

    model: str


class UnloadRequest(msgspec.Struct, frozen=True):
    """`POST /api/models/unload`: a name of the status."""

    model: str


class UnloadAnswer(msgspec.Struct, frozen=True):
    """Its answer."""

    model: str
    pipelines: int


class DrainRequest(msgspec.Struct, frozen=True):
    """`POST /api/drain`: the whole id of a member, this node included; `draining` false takes it back."""

    node: str
    draining: bool = True


class CutoverRequest(msgspec.Struct, frozen=True):
    """`POST /api/cutover`: what would be done with `model` now; empty: with every model of this node."""

    model: str = ""


class Cutover(msgspec.Struct, frozen=True):
    """A pipeline of this node, and the plan that would be made today."""

    deployment: str
    model: str
    verdict: str
    """keep (the same plan) | stay (another that gains too little) | replace | impossible (shortfall) | none (no run)"""
    present: Plan | None = None
    """With today's prediction, where its nodes are all there."""
    candidate: Plan | None = None
    shortfall: Shortfall | None = None


class CutoverAnswer(msgspec.Struct, frozen=True):
    """Its answer. Nothing was changed."""

    pipelines: tuple[Cutover, ...]


class RevokeRequest(msgspec.Struct, frozen=True):
    """`POST /api/revocations`: the whole id of a node, also of one that nobody has seen for long."""

    node: str


class IssuerListing(msgspec.Struct, frozen=True):
    """One issuer as the node that was asked knows it."""

    issuer: str
    """Hash of the key that it signs with."""
    node: str = ""
    """Where that key is; empty where only certificates tell of the issuer."""
    name: str = ""
    expires_at: datetime | None = None
    state: str = "active"
    """active | expired | revoked"""
    members: int = 0
    """Known nodes, this one included, whose present certificate it signed."""


class IssuerListings(msgspec.Struct, frozen=True):
    """`GET /api/issuers`."""

    issuers: tuple[IssuerListing, ...]


class IssuerRequest(msgspec.Struct, frozen=True):
    """`POST /api/issuers` with the whole id of a node, answered by an `IssuerListing`; `POST /api/issuers/revoke` with
    that of an issuer."""

    id: str


class PingRequest(msgspec.Struct, frozen=True):
    """`POST /api/ping`: the whole id of a member."""

    node: str


class PingAnswer(msgspec.Struct, frozen=True):
    """Its answer: the way from the node that was asked to `node`."""

    node: str
    name: str
    path: str
    """direct"""
    address: str
    """Where it answered."""
    rtt_ms: tuple[float, ...]
    """Of every round trip, in order, with what both programs need to answer."""
    rtt_median_ms: float
    transfer_bytes: int
    bytes_per_s: int
    """From it to here, inside TLS."""
