"""A model in memory, its layouts, and streams for the tests of this folder."""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass

import trio

from meshnode.errors import LinkLost
from meshnode.io.artifacts import ModelSource
from meshnode.wire.manifest import Artifact, Manifest, TensorEntry, layer_name, manifest_digest

LAYERS = 6
LAYER_BYTES = 5_000_000


@dataclass(frozen=True)
class Extent:
    artifact: str
    artifact_offset: int
    length: int
    file_offset: int


@dataclass(frozen=True)
class Layout:
    header: bytes
    extents: tuple
    size: int


class Model:
    """Random bytes as artifacts, each of two tensors."""

    def __init__(self, layer_bytes=LAYER_BYTES, seed=1):
        draw = random.Random(seed)
        sizes = {"metadata": 4000, "embedding": 300_000, "output": 200_000, "shared": 1000}
        sizes |= {layer_name(index): layer_bytes + index for index in range(LAYERS)}
        self.data = {name: draw.randbytes(size) for name, size in sizes.items()}
        self.manifest = Manifest(1, "llama", LAYERS, tuple(self._artifact(name) for name in sizes))
        self.digest = manifest_digest(self.manifest)
        self.reads = Counter()

    def _artifact(self, name):
        data = self.data[name]
        half = len(data) // 2
        tensors = (
            TensorEntry(f"{name}.a", 0, (half,), 0, half),
            TensorEntry(f"{name}.b", 0, (len(data) - half,), half, len(data) - half),
        )
        return Artifact(name, len(data), hashlib.sha256(data).digest(), tensors if name != "metadata" else ())

    def read(self, artifact, offset, length):
        self.reads[artifact] += length
        return self.data[artifact][offset : offset + length]

    def source(self):
        return ModelSource(self.manifest, self.read)


class PlainLayouts:
    """A header that names the slice, then every tensor at a multiple of 64."""

    def __init__(self, version=b"v1"):
        self._version = version

    def slice(self, metadata, manifest, first, last):
        assert metadata.stat().st_size == manifest.artifact("metadata").size
        names = ["shared", *(layer_name(index) for index in range(first, last))]
        if last == manifest.layers:
            names.append("output")
        return self._of(manifest, names, b"slice %d %d" % (first, last))

    def embedding(self, metadata, manifest):
        return self._of(manifest, ["embedding"], b"embedding")

    def _of(self, manifest, names, title):
        header = (self._version + b" " + title).ljust(64)
        end, extents = len(header), []
        for name in names:
            for tensor in manifest.artifact(name).tensors:
                extents.append(Extent(name, tensor.offset, tensor.size, end))
                end += -(-tensor.size // 64) * 64
        return Layout(header, tuple(extents), end)


def expected(model, layout):
    """The bytes a finished file must have."""
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for extent in layout.extents:
        piece = model.data[extent.artifact][extent.artifact_offset : extent.artifact_offset + extent.length]
        data[extent.file_offset : extent.file_offset + extent.length] = piece
    return bytes(data)


class MemoryBulk:
    """One end of a BULK stream in memory: frames and raw bytes share one order, as on the wire."""

    def __init__(self, outgoing, incoming):
        self._outgoing, self._incoming, self._raw = outgoing, incoming, b""

    async def send_frame(self, payload):
        await self._put(("frame", bytes(payload)))

    async def send_bytes(self, data):
        await self._put(("bytes", bytes(data)))

    async def _put(self, item):
        try:
            await self._outgoing.send(item)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise LinkLost("closed") from None

    async def _take(self, kind):
        try:
            found, data = await self._incoming.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise LinkLost("closed") from None
        assert found == kind
        return data

    async def receive_frame(self):
        return await self._take("frame")

    async def receive_bytes(self, count):
        while len(self._raw) < count:
            self._raw += await self._take("bytes")
        data, self._raw = self._raw[:count], self._raw[count:]
        return data

    async def aclose(self):
        await self._outgoing.aclose()
        await self._incoming.aclose()


def memory_pair():
    there_send, there_receive = trio.open_memory_channel(4)
    back_send, back_receive = trio.open_memory_channel(4)
    return MemoryBulk(there_send, back_receive), MemoryBulk(back_send, there_receive)
