from __future__ import annotations

from typing import Any

import pytest

from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import serving


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings"])
@pytest.mark.parametrize("text", ["hi", ["a", "b"], [0, 1], [[1], [2, 3]]])
async def test_a_model_that_writes_text_says_that_it_embeds_nothing_on_every_node(path: str, text: Any) -> None:
    mesh = TwoNodes()
    for directory in (mesh.head, mesh.joiner):
        async with serving(directory) as server, server.client() as client:
            response = await client.post(path, json={"input": text, "encoding_format": "base64"})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "model")
        assert error["message"] == "the model `org/byte-model` writes text; it is no embedding model"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": "x"}, "dimensions"),
    ],
)
async def test_wrong_inputs_are_told_first(body: dict[str, Any], param: str) -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        response = await client.post("/v1/embeddings", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
