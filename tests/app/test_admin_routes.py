"""What the command line asks a running node, by hand."""

from __future__ import annotations

import json

import pytest
from starlette.requests import Request

from meshnode.app.admin_routes import AdminRoutes
from meshnode.errors import ConfigError
from tests.core.node.mesh import World
from tests.io.transport.issuer import Issuer


def posted(body: dict[str, object]) -> Request:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    return Request(scope, receive)


@pytest.fixture
def routes() -> AdminRoutes:
    world, issuer = World(), Issuer()
    world.add("a", 500)
    return AdminRoutes(world.nodes["a"], lambda: issuer.desk, lambda: None, lambda: None)


@pytest.mark.parametrize("seconds", [0, -1, 30 * 86400 + 1, 10**15, 2**63 - 1, -(2**63)])
async def test_an_invite_for_longer_than_any_calendar_holds_is_refused_like_any_other(
    routes: AdminRoutes, seconds: int
) -> None:
    with pytest.raises(ConfigError, match="within 30 days"):
        await routes.invite(posted({"expires_s": seconds}))
    assert (await routes.invites(posted({}))).invites == ()


async def test_an_invite_for_as_long_as_there_are_is_made(routes: AdminRoutes) -> None:
    await routes.invite(posted({"expires_s": 30 * 86400}))
    (listed,) = (await routes.invites(posted({}))).invites
    assert listed.state == "open"
