"""The command line's side of a running node's `/api/...`: found by its data directory, spoken over loopback HTTP."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec
import psutil

from meshnode.app.admin import (
    NODE_FILE,
    TOKEN_FILE,
    ApproveRequest,
    CutoverAnswer,
    CutoverRequest,
    DrainRequest,
    InviteIssued,
    InviteListings,
    InviteRequest,
    IssuerListing,
    IssuerListings,
    IssuerRequest,
    LoadAnswer,
    LoadRequest,
    PendingListing,
    PendingListings,
    PingAnswer,
    PingRequest,
    PlanAnswer,
    PlanRequest,
    RevokeRequest,
    RunningNode,
    UnloadAnswer,
    UnloadRequest,
)
from meshnode.core.node.status import NodeStatus
from meshnode.errors import ConfigError, MeshError, Unavailable

# A loopback answer that takes longer than this comes from a node that hangs.
ANSWER_S = 10.0
# It dials another node and waits for its disk: 5 s each.
APPOINT_S = 20.0

# A vocabulary of 150k tokens opens in 0.5 s; from a cold disk on a busy machine it takes up to the node's own limit.
LOAD_S = 75.0

Answer = TypeVar("Answer")


class _ErrorBody(msgspec.Struct):
    message: str = ""
    type: str = ""
    hint: str = ""


class _Envelope(msgspec.Struct):
    error: _ErrorBody


def running_node(data: Path) -> RunningNode | None:
    """The node that runs in `data`, or None. A file left by a node that was killed counts as none."""
    try:
        node = msgspec.json.decode((data / NODE_FILE).read_bytes(), type=RunningNode)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    return node if psutil.pid_exists(node.pid) else None


class Control:
    """A connection to one node's admin routes. Methods raise ConfigError (refused), Unavailable (no answer)."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=ANSWER_S,
            # A proxy of the environment is for the outside world; the token must not pass through it.
            trust_env=False,
        )

    @classmethod
    def of(cls, data: Path) -> Control:
        """Control of the node that runs in `data`. Raises ConfigError when none does."""
        node = running_node(data)
        if node is None:
            what = (
                "the node here is dead: it ended without a word"
                if (data / NODE_FILE).exists()
                else "no node is running"
            )
            raise ConfigError(
                f"{what} (data directory {data})",
                hint="start one with `meshnode serve MODEL.gguf` or `meshnode join INVITE`, or say where with --data",
            )
        try:
            token = (data / TOKEN_FILE).read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read the token of the running node: {error.strerror}",
                hint="use the account that started the node",
            ) from error
        return cls(node.api_url or f"http://127.0.0.1:{node.api_port}", token)

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the connection."""
        self._client.close()

    def status(self) -> NodeStatus:
        """What the node knows now."""
        return self._call("GET", "/api/status", NodeStatus)

    def invite(self, request: InviteRequest) -> InviteIssued:
        """Make an invite; its line is in no later answer."""
        return self._call("POST", "/api/invites", InviteIssued, request)

    def invites(self) -> InviteListings:
        """Every invite that the node still remembers."""
        return self._call("GET", "/api/invites", InviteListings)

    def revoke_invite(self, identity: str) -> None:
        """Make an invite worthless."""
        self._send("DELETE", f"/api/invites/{identity}", None)

    def revoke(self, node: str) -> None:
        """Bar the node with this whole id from the mesh."""
        self._send("POST", "/api/revocations", RevokeRequest(node))

    def issuers(self) -> IssuerListings:
        """Who may let others in."""
        return self._call("GET", "/api/issuers", IssuerListings)

    def add_issuer(self, node: str) -> IssuerListing:
        """Make the member with this whole id one."""
        return self._call("POST", "/api/issuers", IssuerListing, IssuerRequest(node), patience_s=APPOINT_S)

    def revoke_issuer(self, issuer: str) -> None:
        """Bar the issuer with this whole id, and whom it let in."""
        self._send("POST", "/api/issuers/revoke", IssuerRequest(issuer))

    def ping(self, node: str) -> PingAnswer:
        """Measure the way to the member with this whole id."""
        return self._call("POST", "/api/ping", PingAnswer, PingRequest(node))

    def pending(self) -> PendingListings:
        """Who asks to join by number."""
        return self._call("GET", "/api/pending", PendingListings)

    def approve(self, request: ApproveRequest) -> PendingListing:
        """Let it in."""
        return self._call("POST", "/api/pending/approve", PendingListing, request)

    def plan(self, request: PlanRequest) -> PlanAnswer:
        """What this mesh would do with a model."""
        return self._call("POST", "/api/plan", PlanAnswer, request)

    def load(self, request: LoadRequest) -> LoadAnswer:
        """Serve one more model. Reading its vocabulary may take a while."""
        return self._call("POST", "/api/models", LoadAnswer, request, patience_s=LOAD_S)

    def unload(self, model: str) -> UnloadAnswer:
        """Serve it no more."""
        return self._call("POST", "/api/models/unload", UnloadAnswer, UnloadRequest(model))

    def drain(self, request: DrainRequest) -> None:
        """Give a member no more work, or give it work again."""
        self._send("POST", "/api/drain", request)

    def cutover(self, model: str) -> CutoverAnswer:
        """Compare what runs with what would be planned now."""
        return self._call("POST", "/api/cutover", CutoverAnswer, CutoverRequest(model))

    def shutdown(self) -> None:
        """Ask the node to drain and leave."""
        self._send("POST", "/api/shutdown", None)

    def _call(
        self,
        method: str,
        path: str,
        kind: type[Answer],
        body: msgspec.Struct | None = None,
        *,
        patience_s: float = ANSWER_S,
    ) -> Answer:
        try:
            return msgspec.json.decode(self._send(method, path, body, patience_s), type=kind)
        except msgspec.DecodeError as error:
            raise MeshError(f"the node's answer to {path} is not understood: {error}") from error

    def _send(self, method: str, path: str, body: msgspec.Struct | None, patience_s: float = ANSWER_S) -> bytes:
        content = msgspec.json.encode(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            response = self._client.request(method, path, content=content, headers=headers, timeout=patience_s)
        except httpx.TransportError as error:
            text = (
                f"the node's process is alive but does not answer ({type(error).__name__}): it is starting or unhealthy"
            )
            raise Unavailable(text) from error
        if response.is_success:
            return response.content
        raise _refusal(response, f"{method} {path}")


def _refusal(response: httpx.Response, what: str) -> MeshError:
    try:
        told = msgspec.json.decode(response.content, type=_Envelope).error
    except msgspec.DecodeError:
        told = _ErrorBody(message=f"the node answered {what} with status {response.status_code}")
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return Unavailable(told.message)
    return ConfigError(told.message, hint=told.hint)
