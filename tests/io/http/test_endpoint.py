from __future__ import annotations

import pytest

from meshnode.io.http.backend import ModelState
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.serving import serving


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_models_are_listed_with_and_without_v1(prefix: str) -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        listing = (await client.get(f"{prefix}/models")).json()
        one = (await client.get(f"{prefix}/models/org/byte-model")).json()
    assert listing["object"] == "list"
    assert listing["data"] == [one]
    assert (one["id"], one["object"], one["owned_by"]) == ("org/byte-model", "model", "meshnode")
    assert isinstance(one["created"], int)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "code"),
    [
        ("GET", "/v1/models/nobody", 404, "not_found_error", "model_not_found"),
        ("GET", "/v2/models", 404, "not_found_error", "unknown_url"),
        ("GET", "/", 404, "not_found_error", "unknown_url"),
        ("GET", "/v1/completions", 405, "invalid_request_error", None),
        ("DELETE", "/v1/models", 405, "invalid_request_error", None),
    ],
)
async def test_what_is_not_there_is_an_error_in_the_envelope(
    method: str, path: str, status: int, kind: str, code: str | None
) -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        response = await client.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (status, kind, code)
    assert set(error) == {"message", "type", "param", "code"}


async def test_a_wrong_method_is_told_the_right_one() -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        response = await client.get("/v1/completions")
    assert response.json()["error"]["message"] == "this path does not take GET, but POST"
    assert response.headers["allow"] == "POST"


async def test_r54_health_shows_rejections_by_reason() -> None:
    directory = ByteDirectory(ByteModel())
    directory.numbers = {"rejected_queue_full": 7}
    async with serving(directory) as server, server.client() as client:
        response = await client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "rejected_queue_full": 7})


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_r59_health_is_503_while_the_model_loads(path: str) -> None:
    directory = ByteDirectory(ByteModel())
    directory.states["org/byte-model"] = "loading"
    async with serving(directory) as server, server.client() as client:
        response = await client.get(path)
    error = response.json()["error"]
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert (error["message"], error["type"], error["code"]) == ("Loading model", "unavailable_error", 503)


@pytest.mark.parametrize(("states", "message"), [({}, "no model is served"), ({"a": "failed"}, "could not be loaded")])
async def test_r60_health_tells_having_nothing_from_having_failed(states: dict[str, ModelState], message: str) -> None:
    directory = ByteDirectory()
    directory.states = states
    async with serving(directory) as server, server.client() as client:
        response = await client.get("/health")
    assert response.status_code == 503
    assert message in response.json()["error"]["message"]
