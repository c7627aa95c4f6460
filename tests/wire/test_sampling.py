from __future__ import annotations

import math

import msgpack
import msgspec
import pytest

from meshnode.wire.sampling import GRAMMAR_BYTES, MAX_BIASES, MAX_TOP, Sampling


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0, "top_k": 1_000_000, "top_p": 1e-9, "min_p": 1.0, "typical_p": 1e-9},
        {"repeat_penalty": 100.0, "frequency_penalty": -100.0, "presence_penalty": 100.0, "penalty_window": 4096},
        {"seed": 2**64 - 1, "top_logprobs": MAX_TOP},
        {"logit_bias": ((0, -1e9),) * MAX_BIASES},
        {"grammar": "é" * (GRAMMAR_BYTES // 2)},
    ],
)
def test_what_a_request_may_ask_for_has_no_defect_and_travels(changes: dict[str, object]) -> None:
    sampling = Sampling(**changes)
    assert sampling.defect() == ""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=Sampling) == sampling
    assert msgpack.unpackb(msgspec.msgpack.encode(Sampling())) == {}, "defaults do not travel"


BEYOND: list[tuple[str, list[object]]] = [
    ("temperature", [-0.1, 100.1]),
    ("top_k", [-1, 1_000_001]),
    ("top_p", [0.0, -0.1, 1.1]),
    ("min_p", [-0.1, 1.1]),
    ("typical_p", [0.0, 1.1]),
    ("repeat_penalty", [0.0, -1.0, 101.0]),
    ("frequency_penalty", [-101.0, 101.0]),
    ("presence_penalty", [-101.0, 101.0]),
    ("penalty_window", [-1, 4097]),
    ("seed", [-1, 2**64]),
    ("top_logprobs", [-2, MAX_TOP + 1]),
    ("logit_bias", [((0, 1.0),) * (MAX_BIASES + 1)]),
    ("grammar", ["é" * (GRAMMAR_BYTES // 2) + "x"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BEYOND for value in values])
def test_a_value_beyond_its_range_is_named(name: str, value: object) -> None:
    assert name in Sampling(**{name: value}).defect()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty", "presence_penalty", "bias"],
)
def test_no_parameter_is_infinite_or_not_a_number(name: str, value: float) -> None:
    sampling = Sampling(logit_bias=((1, value),)) if name == "bias" else Sampling(**{name: value})
    assert "finite" in sampling.defect()
