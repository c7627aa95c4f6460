"""Everything that two nodes, or a node and its stage, say to each other: which types, in which frames.

A union that is named here brings its members along, so a new message of a known union needs no line in this file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_args

from meshnode.app.passing import Answering, Asked
from meshnode.core.membership.announcement import Body
from meshnode.core.membership.suspicion import Suspicion
from meshnode.identity.domains import Domain
from meshnode.identity.revocation import RevocationList
from meshnode.wire import activation, artifacts, join, limits, messages, preface, stage_protocol
from meshnode.wire.demand import Demand
from meshnode.wire.framing import LENGTH_BYTES
from meshnode.wire.manifest import Manifest
from meshnode.wire.rowcodec import Dtype


@dataclass(frozen=True)
class Protocol:
    """One conversation. `messages` are what its frames hold; records inside them are found by themselves."""

    name: str
    carried: str
    messages: tuple[type, ...]
    constants: dict[str, int]
    tables: tuple[type[Enum], ...] = ()
    """Numbers and labels that travel."""
    layouts: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """Parts of fixed size: rows of name, offset, bytes, kind."""
    canonical: frozenset[str] = frozenset()
    """Records that are compared byte by byte: not even a new field with a default keeps them the same."""


def layout(form: str, names: str) -> tuple[dict[str, Any], ...]:
    """Rows of a `struct` format that begins with its byte order; `x` is a zero byte and needs no name."""
    order, kinds, rows, offset = form[0], _split(form[1:]), [], 0
    words = iter(names.split())
    for kind in kinds:
        size = struct.calcsize(order + kind)
        name = "zero" if kind == "x" else next(words)
        rows.append({"name": name, "offset": offset, "bytes": size, "kind": _KINDS[kind[-1]]})
        offset += size
    assert next(words, None) is None, "more names than parts"
    assert offset == struct.calcsize(form)
    return tuple(rows)


_KINDS = {"s": "bytes", "x": "zero", "b": "int"} | dict.fromkeys("BHIQ", "uint") | dict.fromkeys("hiq", "int")


def _split(form: str) -> list[str]:
    parts, digits = [], ""
    for letter in form:
        if letter.isdigit():
            digits += letter
        else:
            parts.append(digits + letter)
            digits = ""
    return parts


def protocols() -> tuple[Protocol, ...]:
    """All of them, outermost first."""
    return (*_admission(), *_between_members(), *_of_stages())


def _admission() -> tuple[Protocol, ...]:
    return (
        Protocol(
            "link",
            "every TCP connection: the preface in plain; on MEMBER connections one HELLO (or its refusal) inside TLS",
            get_args(preface.Hello | preface.Refused),
            {
                "preface_bytes": preface.PREFACE_BYTES,
                "preface_version": preface.PREFACE_VERSION,
                "protocol_oldest": preface.PROTOCOL_OLDEST,
                "protocol": preface.PROTOCOL,
                "frame_length_bytes": LENGTH_BYTES,
                "frame_bytes_max": limits.HELLO_FRAME,
            },
            tables=(preface.Kind, preface.StreamClass),
            layouts={"preface": layout(">4sBBBx16s", "magic version kind class token")},
        ),
        Protocol(
            "join",
            "JOIN connection inside TLS, one message a frame",
            get_args(join.JoinMessage),
            {"frame_bytes_max": limits.JOIN_FRAME},
        ),
    )


def _between_members() -> tuple[Protocol, ...]:
    return (
        Protocol(
            "control",
            "MEMBER connection of class CONTROL, one message a frame",
            get_args(messages.AnyMessage),
            {
                "frame_bytes_max": limits.CONTROL_FRAME,
                "unknown_op_characters": messages.OP_CHARACTERS,
                "gossip_id_bytes": messages.GOSSIP_ID,
                "gossip_ids_max": messages.GOSSIP_IDS,
                "gossip_buckets": messages.GOSSIP_BUCKETS,
            },
        ),
        Protocol(
            "signed",
            "what an author signs and others pass on byte by byte, inside messages of control",
            (Body, Suspicion, RevocationList, Demand),
            {},
            tables=(Domain,),
        ),
        Protocol(
            "bulk",
            "MEMBER connection of class BULK: requests and replies one a frame, raw bytes behind each chunk",
            (*get_args(artifacts.Request), *get_args(artifacts.Reply), Manifest),
            {"frame_bytes_max": limits.BULK_FRAME, "chunk_bytes_max": artifacts.CHUNK_BYTES},
            canonical=frozenset({"Manifest", "Artifact", "TensorEntry"}),
        ),
        Protocol(
            "request",
            "MEMBER connection of class REQUEST: asked, body in frames; answering, body in frames, an empty frame",
            (Asked, Answering),
            {"frame_bytes_max": limits.REQUEST_FRAME, "body_bytes_max": limits.REQUEST_BODY},
        ),
    )


def _of_stages() -> tuple[Protocol, ...]:
    return (
        Protocol(
            "activation",
            "STAGE connection inside TLS: header, meta, row table, payload; all numbers little-endian",
            (*get_args(activation.AnyOperation), activation.LaneSample, activation.Failure),
            {
                "version": activation.VERSION,
                "meta_bytes_max": activation.META_BYTES,
                "scored_rows_max": limits.SCORED_ROWS,
                "rows_max": limits.MICROBATCH_ROWS,
                "width_max": limits.ACTIVATION_WIDTH,
                "lanes_max": limits.LANES,
            },
            tables=(activation.Kind, Dtype),
            layouts={
                "header": layout(
                    activation._HEADER.format,
                    "magic version kind dtype term run microbatch rows width meta_bytes payload_bytes",
                ),
                "row": layout(activation._ROW.format, "position lane flags exponent"),
            },
        ),
        Protocol(
            "stage",
            "socket pair between a node and its stage process, one message a frame",
            (*get_args(stage_protocol.Request), *get_args(stage_protocol.Reply)),
            {"protocol": stage_protocol.PROTOCOL, "frame_bytes_max": stage_protocol.MESSAGE_BYTES},
        ),
    )
