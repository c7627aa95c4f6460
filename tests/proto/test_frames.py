"""Golden bytes of what is not MessagePack alone: prefaces, framed messages, activation frames.

The reader here is built from proto/schema's layouts and knows nothing of our codecs.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import msgpack
import numpy as np
import pytest

from meshnode.wire import activation, framing, preface
from meshnode.wire.rowcodec import Dtype
from tools.contract.jsonform import from_json, to_json
from tools.export_schema import PROTO

FRAMES = json.loads((PROTO / "vectors" / "frames.json").read_text(encoding="utf-8"))
LAYOUTS = {
    name: json.loads((PROTO / "schema" / f"{protocol}.json").read_text(encoding="utf-8"))["layouts"][name]
    for protocol, name in (("link", "preface"), ("activation", "header"), ("activation", "row"))
}


def of(layout: str) -> Any:
    chosen = [frame for frame in FRAMES if frame["layout"] == layout]
    return pytest.mark.parametrize("vector", chosen, ids=[frame["name"] for frame in chosen])


def take(layout: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """The fields of a layout at the start of `data`, and the rest."""
    values: dict[str, Any] = {}
    end = 0
    for part in LAYOUTS[layout]:
        assert part["offset"] == end
        end += part["bytes"]
        raw = data[part["offset"] : end]
        if part["kind"] == "zero":
            assert not any(raw)
        else:
            signed = part["kind"] == "int"
            values[part["name"]] = (
                {"$bytes": raw.hex()} if part["kind"] == "bytes" else int.from_bytes(raw, "little", signed=signed)
            )
    return values, data[end:]


def put(layout: str, values: dict[str, Any]) -> bytes:
    """The other way round."""
    data = b""
    for part in LAYOUTS[layout]:
        value = from_json(values.get(part["name"], 0))
        signed = part["kind"] == "int"
        data += value if isinstance(value, bytes) else value.to_bytes(part["bytes"], "little", signed=signed)
    return data


def numbers(payload: bytes, dtype: int, width: int, exponent: int) -> list[float]:
    """One row of a payload, by the words of docs/protocols/activation.md."""
    match Dtype(dtype):
        case Dtype.TOKENS:
            return list(struct.unpack(f"<{width}i", payload))
        case Dtype.F16:
            values = struct.unpack(f"<{width}e", payload)
        case Dtype.F32:
            values = struct.unpack(f"<{width}f", payload)
        case _:
            values = ()
            for at in range(0, len(payload), 34):
                scale, *small = struct.unpack("<e32b", payload[at : at + 34])
                values += tuple(scale * each for each in small)
    return [each * 2.0**exponent for each in values[:width]]


def dissected(data: bytes) -> dict[str, Any]:
    """An activation frame in the form of frames.json."""
    header, rest = take("header", data)
    meta, rest = rest[: header["meta_bytes"]], rest[-(-header["meta_bytes"] // 8) * 8 :]
    rows = []
    for _ in range(header["rows"]):
        row, rest = take("row", rest)
        rows.append(row)
    assert len(rest) == header["payload_bytes"]
    size = len(rest) // len(rows) if rows else 0
    for index, row in enumerate(rows):
        part = rest[index * size : (index + 1) * size]
        row["values"] = numbers(part, header["dtype"], header["width"], row["exponent"])
    return {"header": header, "meta": to_json(msgpack.unpackb(meta)) if meta else None, "rows": rows}


@of("preface")
def test_a_preface_is_24_plain_bytes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    values, rest = take("preface", data)
    assert (values, rest) == (vector["decoded"], b"")
    assert put("preface", values) == data
    read = preface.decode_preface(data)
    assert (read.kind, read.stream_class, {"$bytes": read.token.hex()}) == (
        values["kind"],
        values["class"],
        values["token"],
    )
    assert preface.encode_preface(read) == data


@of("frame")
def test_a_frame_is_its_length_and_its_body(vector: dict[str, Any]) -> None:
    data, body = bytes.fromhex(vector["hex"]), from_json(vector["decoded"])
    assert int.from_bytes(data[:4], "big") == len(body)
    assert data[4:] == body
    assert framing.encode_frame(body, limit=len(body)) == data
    decoder = framing.FrameDecoder(len(body))
    decoder.feed(data)
    assert decoder.next_frame() == body


@of("activation")
def test_an_activation_frame_says_the_same_to_an_independent_reader(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert dissected(data) == vector["decoded"]


@of("activation")
def test_our_codec_reads_an_activation_frame_and_writes_the_same(vector: dict[str, Any]) -> None:
    data, decoded = bytes.fromhex(vector["hex"]), vector["decoded"]
    header = activation.Header.parse(data[: activation.HEADER_BYTES])
    frame = activation.decode(header, data[activation.HEADER_BYTES :])
    dtype = Dtype.F16 if header.dtype in (Dtype.NONE, Dtype.TOKENS) else header.dtype
    written = b"".join(activation.encode(frame, dtype))
    if header.dtype in (Dtype.F16, Dtype.Q8):
        # The exponents are the sender's choice: other bytes may say the same.
        before, after = dissected(data)["rows"], dissected(written)["rows"]
        assert [row["values"] for row in after] == [row["values"] for row in before]
    else:
        assert written == data
    assert frame.fence.term == decoded["header"]["term"]
    assert frame.fence.run == decoded["header"]["run"]["$bytes"]
    if isinstance(frame, activation.Rows) and decoded["rows"]:
        values = frame.activations if frame.tokens is None else np.array(frame.tokens)[:, None]
        assert values is not None
        assert values.tolist() == [row["values"] for row in decoded["rows"]]
        assert list(frame.positions) == [row["position"] for row in decoded["rows"]]
        assert list(frame.lanes) == [row["lane"] for row in decoded["rows"]]
        assert list(frame.logits) == [bool(row["flags"] & 1) for row in decoded["rows"]]


def test_every_kind_and_dtype_of_activation_frames_has_a_vector() -> None:
    headers = [frame["decoded"]["header"] for frame in FRAMES if frame["layout"] == "activation"]
    assert {header["kind"] for header in headers} == set(activation.Kind)
    assert {header["dtype"] for header in headers} == set(Dtype)


def test_every_kind_and_class_of_connection_has_a_vector() -> None:
    found = [frame["decoded"] for frame in FRAMES if frame["layout"] == "preface"]
    assert {each["kind"] for each in found} == set(preface.Kind)
    assert {each["class"] for each in found} == set(preface.StreamClass)
