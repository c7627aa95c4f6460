"""POST embeddings: refused with the reason, after the request itself was checked.

No model of this version is an embedding model: the architectures that are loaded write text, and a pipeline gives
tokens back, not vectors. A client learns that from a 400 that names the model, as from vLLM.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from starlette.responses import Response

from meshnode.errors import InvalidRequest
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.body import decode

INPUTS: Final = 2048
"""Texts of one request: OpenAI's bound."""


class EmbeddingsRequest(msgspec.Struct, frozen=True):
    """POST embeddings."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def check(self) -> None:
        """InvalidRequest for what no embedding model could answer."""
        if isinstance(self.input, list):
            kinds = {type(entry) for entry in self.input}
            if len(kinds) != 1 or (kinds != {int} and len(self.input) > INPUTS):
                message = f"input is a text, token ids, or a list of at most {INPUTS} of either"
                raise InvalidRequest(message, "input")
        if not self.input or (isinstance(self.input, list) and not all(entry or entry == 0 for entry in self.input)):
            raise InvalidRequest("input holds an empty text", "input")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions must be at least 1", "dimensions")


class EmbeddingsRoutes:
    """embeddings, for a model served here."""

    async def embed(self, model: ServedModel, body: bytes) -> Response:
        """POST embeddings."""
        decode(body, EmbeddingsRequest).check()
        raise InvalidRequest(f"the model `{model.id[:128]}` writes text; it is no embedding model", "model")
