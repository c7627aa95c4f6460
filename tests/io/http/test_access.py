from __future__ import annotations

import msgspec
import pytest

from meshnode.errors import CapacityError, ConfigError
from meshnode.io.http.access import Access, admin_route
from meshnode.io.http.body import decode, read_body
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.serving import serving

TOKEN = "a-token-of-this-node"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8421", "LOCALHOST:1", "[::1]:8421"])
async def test_loopback_names_are_served_on_any_port(host: str) -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": ""},
        {"host": "localhost:"} | {"origin": "http://evil.example"},
        {"origin": "https://localhost.evil.example:8421"},
        {"origin": "null"},
        {"origin": "http://[bad"},
    ],
)
async def test_foreign_hosts_and_origins_are_403(headers: dict[str, str]) -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


async def test_pages_of_this_machine_may_ask() -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        response = await client.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert response.status_code == 200


async def test_with_keys_every_host_may_ask_that_knows_one() -> None:
    access = Access(any_host=True, keys=frozenset({"first", "second"}))
    async with serving(ByteDirectory(ByteModel()), access=access) as server, server.client() as client:
        given = [
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first"},
            {"x-api-key": "firs"},
            {"authorization": "Bearer first"},
            {"x-api-key": "second"},
        ]
        responses = [await client.get("/v1/models", headers={"host": "box.lan", **headers}) for headers in given]
        health = await client.get("/health", headers={"host": "box.lan"})
    assert [response.status_code for response in responses] == [401, 401, 401, 401, 200, 200]
    error = responses[0].json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert responses[0].headers["www-authenticate"] == "Bearer"
    assert health.status_code == 200


class Wanted(msgspec.Struct):
    name: str


async def _answer(request):
    match decode(await read_body(request), Wanted).name:
        case "nothing":
            return None
        case "config":
            raise ConfigError("no such thing", "choose another")
        case "capacity":
            raise CapacityError("short by 2.0 GB")
        case name:
            return Wanted(name)


async def test_admin_routes_need_the_token_and_answer_json() -> None:
    route = admin_route("/api/things", ["POST"], TOKEN, _answer)
    async with serving(ByteDirectory(), [route]) as server, server.client() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"x-api-key": TOKEN}):
            response = await client.post("/api/things", json={"name": "x"}, headers=headers)
            assert response.status_code == 401
            assert TOKEN not in response.text
        client.headers["authorization"] = f"Bearer {TOKEN}"
        answers = [
            await client.post("/api/things", json={"name": name}) for name in ("x", "nothing", "config", "capacity")
        ]
        wrong = await client.post("/api/things", json={})
    assert [answer.status_code for answer in answers] == [200, 204, 400, 409]
    assert answers[0].json() == {"name": "x"}
    assert (answers[2].json()["error"]["code"], answers[2].json()["error"]["hint"]) == ("config", "choose another")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "name")
