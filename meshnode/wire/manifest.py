"""A model as content-addressed artifacts, so that any node can assemble any slice from verified byte ranges.

Artifacts: `metadata` (a GGUF of all key-values and no tensors), `embedding` (the token embedding), `output` (what only
the last slice needs), `shared` (what every slice needs), `layer.<i>`. An artifact is the concatenation of its tensors'
bytes in the order listed, without padding. The manifest's digest names the model on the wire.

Invariant: equal weights and key-values give equal canonical bytes, however the model was cut into files.
"""

from __future__ import annotations

import hashlib
from typing import Final, NewType

import msgspec

from meshnode.errors import PeerError

ManifestDigest = NewType("ManifestDigest", str)

METADATA: Final = "metadata"
EMBEDDING: Final = "embedding"
OUTPUT: Final = "output"
SHARED: Final = "shared"
LAYER_PREFIX: Final = "layer."

# A tensor entry takes about 60 bytes; 65,536 of them with their artifacts stay below this.
MANIFEST_BYTES_MAX: Final = 16 << 20
# LLAMA_MAX_LAYERS of llama.cpp.
LAYERS_MAX: Final = 512
# 1 PiB: no model is near it, and sums stay far from 64 bits.
ARTIFACT_BYTES_MAX: Final = 1 << 50
_TENSORS_MAX: Final = 65_536
_NAME_MAX: Final = 64


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor inside an artifact; `type` is a ggml type number, `dims` innermost first, offset and size in bytes."""

    name: str
    type: int
    dims: tuple[int, ...]
    offset: int
    size: int


class Artifact(msgspec.Struct, frozen=True, array_like=True):
    """Bytes that travel as one: `size` bytes whose SHA-256 is `sha256`."""

    name: str
    size: int
    sha256: bytes
    tensors: tuple[TensorEntry, ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    """All artifacts of a model, metadata first, layers last."""

    version: int
    architecture: str
    layers: int
    artifacts: tuple[Artifact, ...]

    def artifact(self, name: str) -> Artifact | None:
        """The artifact of that name, None where the model has none."""
        return next((item for item in self.artifacts if item.name == name), None)

    @property
    def bytes_total(self) -> int:
        """Bytes of all artifacts."""
        return sum(item.size for item in self.artifacts)


def layer_name(index: int) -> str:
    """Name of the artifact of layer `index`."""
    return f"{LAYER_PREFIX}{index}"


def artifact_names(layers: int) -> tuple[str, ...]:
    """Every artifact name that a model of `layers` layers may have, in order."""
    return (METADATA, EMBEDDING, OUTPUT, SHARED, *(layer_name(index) for index in range(layers)))


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes: what the digest is taken of."""
    return msgspec.msgpack.encode(manifest)


def manifest_digest(manifest: Manifest) -> ManifestDigest:
    """Lower-case hexadecimal SHA-256 of the canonical bytes."""
    return ManifestDigest(hashlib.sha256(encode_manifest(manifest)).hexdigest())


def decode_manifest(data: bytes, expected: ManifestDigest | None = None) -> Manifest:
    """Decode and check a manifest that a peer sent. Errors: PeerError."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise PeerError(f"a manifest of {len(data)} bytes is over the limit of {MANIFEST_BYTES_MAX}")
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise PeerError("the manifest is not the one that was announced (digest differs)")
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"not a manifest: {error}") from None
    _check(manifest)
    if encode_manifest(manifest) != data:
        raise PeerError("the manifest is not in canonical form")
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.version != 1:
        raise PeerError(f"manifest version {manifest.version} is not supported")
    if not 1 <= manifest.layers <= LAYERS_MAX:
        raise PeerError(f"a manifest of {manifest.layers} layers")
    if sum(len(item.tensors) for item in manifest.artifacts) > _TENSORS_MAX:
        raise PeerError("a manifest with too many tensors")
    order = {name: index for index, name in enumerate(artifact_names(manifest.layers))}
    places = [order.get(item.name, -1) for item in manifest.artifacts]
    if -1 in places or sorted(set(places)) != places:
        raise PeerError("a manifest with unknown, repeated or unordered artifacts")
    names: set[str] = set()
    for item in manifest.artifacts:
        _check_artifact(item, names)
    missing = {METADATA, EMBEDDING, *(layer_name(index) for index in range(manifest.layers))}
    missing -= {item.name for item in manifest.artifacts}
    if missing:
        raise PeerError(f"a manifest without {min(missing)}")


def _check_artifact(item: Artifact, names: set[str]) -> None:
    if len(item.sha256) != 32 or not 0 < item.size <= ARTIFACT_BYTES_MAX:
        raise PeerError(f"the artifact {item.name} has an impossible size or digest")
    end = 0
    for tensor in item.tensors:
        if tensor.offset != end or tensor.size < 1 or tensor.name in names or len(tensor.name) > _NAME_MAX:
            raise PeerError(f"the tensors of artifact {item.name} overlap, leave gaps or repeat")
        if not 1 <= len(tensor.dims) <= 4 or min(tensor.dims) < 1 or tensor.type < 0:
            raise PeerError(f"the artifact {item.name} has a tensor of impossible shape")
        names.add(tensor.name)
        end += tensor.size
    if item.tensors and end != item.size:
        raise PeerError(f"the tensors of artifact {item.name} do not fill it")
