"""Two nodes of which the second has the head, joined by function calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshnode.errors import LinkLost
from meshnode.io.http.backend import PassedAnswer, PassedRequest
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.http.passing import answer_here
from tests.io.http.byte_model import ByteDirectory, ByteModel


class TwoNodes:
    """Clients ask `joiner`; `head` runs `model`."""

    def __init__(self, model: ByteModel | None = None) -> None:
        self.model = model or ByteModel("Hello.")
        self.head = ByteDirectory(self.model)
        self.joiner = ByteDirectory()
        self.joiner.elsewhere[self.model.id] = self.carry
        self.requests: list[PassedRequest] = []
        self.link_breaks_after = -1

    @asynccontextmanager
    async def carry(self, request: PassedRequest) -> AsyncIterator[PassedAnswer]:
        """The way between the two."""
        self.requests.append(request)
        async with answer_here(build_endpoint(self.head).passed, request) as answer:
            answer.chunks = self._chunks(answer.chunks)
            yield answer

    async def _chunks(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in chunks:
            if count == self.link_breaks_after:
                raise LinkLost("the other node is gone")
            count += 1
            yield chunk
