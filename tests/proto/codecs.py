"""The nodes' own way of reading and writing the messages of each protocol."""

from __future__ import annotations

from typing import Any

import msgspec

from meshnode.wire import artifacts, join, messages, preface, stage_protocol
from meshnode.wire.manifest import Manifest, decode_manifest, encode_manifest
from tools.contract.protocols import protocols
from tools.contract.schema import message_name

KINDS = {(protocol.name, message_name(kind)): kind for protocol in protocols() for kind in protocol.messages}
"""(protocol, message) -> its type."""


def read(protocol: str, message: str, data: bytes) -> Any:
    """`data` as the node that receives it reads it."""
    kind = KINDS[protocol, message]
    match protocol:
        case "link":
            return preface.decode_hello(data)
        case "join":
            asks = issubclass(kind, join.Redeem | join.Renew)
            return join.decode_request(data) if asks else join.decode_join(data, kind)
        case "control":
            return messages.decode(data)
        case "bulk" if kind is Manifest:
            return decode_manifest(data)
        case "bulk":
            asks = issubclass(kind, artifacts.Request)
            return artifacts.decode_request(data) if asks else artifacts.decode_reply(data)
        case "stage":
            asks = issubclass(kind, stage_protocol.Request)
            return stage_protocol.decode_request(data) if asks else stage_protocol.decode_reply(data)
        case _:
            # Bodies inside signed messages, parts of activation frames, heads of passed requests.
            return msgspec.msgpack.decode(data, type=kind)


def write(protocol: str, value: Any) -> bytes:
    """The bytes that a node sends for `value`, without the length in front of a frame."""
    match protocol:
        case "link":
            return preface.encode_hello(value)
        case "join":
            return join.encode_join(value)
        case "control":
            return messages.encode(value)
        case "bulk":
            return encode_manifest(value) if isinstance(value, Manifest) else artifacts.encode(value)
        case "stage":
            whole = stage_protocol.encode(value)
            body = whole[stage_protocol.LENGTH_BYTES :]
            assert stage_protocol.body_length(whole[: stage_protocol.LENGTH_BYTES]) == len(body)
            return body
        case _:
            return msgspec.msgpack.encode(value)
