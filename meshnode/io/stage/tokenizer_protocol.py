"""What a node and its tokenizer process say to each other: one request, one reply, in order.

A message is a 4-byte big-endian length and one MessagePack map with `op`. There are no ids: the parent sends the next
request when it has the reply, and ends the process when a reply does not come.
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshnode.core.serving.text import Conversation, Vocabulary

LENGTH_BYTES: Final = 4
MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""A conversation fills a request body of 32 MiB at most; a vocabulary of 256k tokens takes 4 MiB."""


class TokenizerMessage(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower):
    """Base of all messages."""


class Open(TokenizerMessage, frozen=True):
    """Load the vocabulary of this GGUF (whole model or key-values only) -> Described."""

    path: str


class Tokenize(TokenizerMessage, frozen=True):
    """-> Tokens."""

    text: str
    add_special: bool
    parse_special: bool


class Render(TokenizerMessage, frozen=True):
    """-> Rendered."""

    conversation: Conversation


class Check(TokenizerMessage, frozen=True):
    """-> Checked, or Refused with kind `request`: no answer can keep to this grammar."""

    grammar: str
    gbnf: bool = False
    """In llama.cpp's language, to be translated."""


class Shutdown(TokenizerMessage, frozen=True):
    """End the process; no reply, exit code 0."""


class Described(TokenizerMessage, frozen=True):
    """The loaded vocabulary."""

    vocabulary: Vocabulary


class Tokens(TokenizerMessage, frozen=True):
    """Token ids."""

    ids: tuple[int, ...]


class Rendered(TokenizerMessage, frozen=True):
    """Prompt text."""

    text: str


class Checked(TokenizerMessage, frozen=True):
    """The grammar as stages read it."""

    grammar: str


class Refused(TokenizerMessage, frozen=True):
    """Not done. kind: `model` (the file), `request` (what was asked), `template` (the model's own template)."""

    kind: str
    message: str


Request = Open | Tokenize | Render | Check | Shutdown
Reply = Described | Tokens | Rendered | Checked | Refused

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """Length and body; the body may pass MESSAGE_BYTES, which the sender must check with `fits`."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES) + body


def fits(encoded: bytes) -> bool:
    """Whether the other side will read it."""
    return len(encoded) <= LENGTH_BYTES + MESSAGE_BYTES


def decode_request(body: bytes) -> Request:
    """A request; msgspec.MsgspecError for anything else."""
    return _requests.decode(body)


def decode_reply(body: bytes) -> Reply:
    """A reply; msgspec.MsgspecError for anything else."""
    return _replies.decode(body)
