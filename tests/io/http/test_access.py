from __future__ import annotations

import httpx
import msgspec
import pytest
import trio

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


FIRST = {"authorization": "Bearer first"}
SECOND = {"x-api-key": "second"}


async def test_one_key_may_have_so_many_requests_at_once_and_others_their_own() -> None:
    access = Access(keys=frozenset({"first", "second"}), requests_per_key=1)
    model = ByteModel("Hi")
    model.hold_at = 1
    async with serving(ByteDirectory(model), access=access) as server, server.client() as client:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await client.post("/v1/completions", json={"prompt": "x"}, headers=FIRST))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await model.waiting.wait()
            full = await client.get("/v1/models", headers=FIRST)
            other = await client.get("/v1/models", headers=SECOND)
            model.go_on.set()
        again = await client.get("/v1/models", headers=FIRST)
        health = (await client.get("/health")).json()
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert full.json()["error"]["code"] == "rate_limit_exceeded"
    assert [answer.status_code for answer in (*answers, other, again)] == [200, 200, 200]
    assert health["rejected_key_limit"] == 1


async def test_a_client_that_leaves_gives_its_keys_place_back() -> None:
    access = Access(keys=frozenset({"first"}), requests_per_key=1)
    model = ByteModel()
    model.stall_at = 1
    async with serving(ByteDirectory(model), access=access) as server, server.client() as client:
        with trio.move_on_after(30) as leaving:

            async def leave() -> None:
                await model.waiting.wait()
                leaving.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                await client.post("/v1/completions", json={"prompt": "x"}, headers=FIRST)
        await model.freed.wait()
        while (await client.get("/v1/models", headers=FIRST)).status_code == 429:
            pass


async def test_who_was_not_let_in_is_counted_by_reason() -> None:
    access = Access(keys=frozenset({"first"}))
    async with serving(ByteDirectory(ByteModel()), access=access) as server, server.client() as client:
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {}, {"x-api-key": "no"}):
            await client.get("/v1/models", headers=headers)
        health = (await client.get("/health")).json()
    counted = {name: count for name, count in health.items() if name.startswith("rejected_")}
    assert counted == {"rejected_queue_full": 0, "rejected_host": 1, "rejected_origin": 1, "rejected_key": 2}


PAGE = "https://chat.example:8443"


def preflight(origin: str, **more: str) -> dict[str, str]:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    return {"origin": origin, **asked, **more}


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000", "http://127.0.0.1:8421"])
async def test_a_page_that_is_invited_asks_first_without_a_key_and_may_read_the_answer(origin: str) -> None:
    access = Access(keys=frozenset({"first"}), origins=frozenset({PAGE}))
    async with serving(ByteDirectory(ByteModel()), access=access) as server, server.client() as client:
        private = {"access-control-request-private-network": "true"}
        asked = await client.options("/v1/chat/completions", headers=preflight(origin, **private))
        answer = await client.get("/v1/models", headers={"origin": origin, **FIRST})
        refused = await client.get("/v1/models", headers={"origin": origin})
    assert asked.status_code == 204
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert asked.headers["access-control-allow-private-network"] == "true"
    assert (answer.status_code, refused.status_code) == (200, 401)
    for response in (asked, answer, refused):
        assert response.headers["access-control-allow-origin"] == origin
        assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", "https://chat.example", "null", f"{PAGE}.evil.example"])
@pytest.mark.parametrize("any_host", [False, True])
async def test_a_page_that_is_not_invited_is_never_told_that_it_may_read(origin: str, any_host: bool) -> None:
    access = Access(any_host=any_host, origins=frozenset({PAGE}))
    async with serving(ByteDirectory(ByteModel()), access=access) as server, server.client() as client:
        asked = await client.options("/v1/completions", headers=preflight(origin))
        answer = await client.get("/v1/models", headers={"origin": origin})
    assert (asked.status_code, answer.status_code) == ((204, 200) if any_host else (403, 403))
    assert "access-control-allow-origin" not in {*asked.headers, *answer.headers}


async def test_with_a_star_every_page_may_ask_that_has_a_key() -> None:
    access = Access(keys=frozenset({"first"}), origins=frozenset({"*"}))
    async with serving(ByteDirectory(ByteModel()), access=access) as server, server.client() as client:
        answers = [await client.get("/v1/models", headers={"origin": PAGE, **given}) for given in ({}, FIRST)]
    assert [answer.status_code for answer in answers] == [401, 200]


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
