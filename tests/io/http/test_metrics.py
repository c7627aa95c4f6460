from __future__ import annotations

import re
from typing import Any

import pytest

from meshnode.errors import StageLost
from meshnode.io.http import meter
from meshnode.io.http.access import Access
from meshnode.io.http.backend import NodeFigures, StageFigures
from meshnode.io.http.meter import Histogram, Meter, Timing
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import raw_request, serving

SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)((?:\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*\})?) ([-+\d.e]+|\+Inf)')
KEYED = Access(keys=frozenset({"first"}))


def parsed(page: str) -> dict[str, float]:
    """Samples by name and labels; AssertionError for what Prometheus would refuse."""
    families: dict[str, str] = {}
    samples: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in families, f"{name} begins twice"
            families[name] = kind
        elif not line.startswith("# HELP "):
            found = SAMPLE.fullmatch(line)
            assert found, line
            name, labels, value = found.groups()
            assert next(reversed(families)) in (name, re.sub("_(bucket|sum|count)$", "", name))
            assert name + labels not in samples, f"{name}{labels} twice"
            samples[name + labels] = float(value)
    return samples


async def scraped(directory: ByteDirectory, *bodies: Any, **options: Any) -> dict[str, float]:
    async with serving(directory, **options) as server, server.client() as client:
        for body in bodies:
            await client.post("/v1/completions", json=body)
        response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(response.text)


async def test_answers_are_measured_per_model() -> None:
    found = await scraped(ByteDirectory(ByteModel("Hello")), {"prompt": "abc"}, {"prompt": "abc", "max_tokens": 2})
    model = 'model="org/byte-model"'
    assert found[f"meshnode_prompt_tokens_total{{{model}}}"] == 8
    assert found[f"llamacpp:tokens_predicted_total{{{model}}}"] == 6 + 2
    assert found[f'meshnode_generations_total{{{model},finish="stop"}}'] == 1
    assert found[f'meshnode_generations_total{{{model},finish="length"}}'] == 1
    for name, count in (("time_to_first_token", 2), ("time_per_output_token", 6), ("e2e_request_latency", 2)):
        assert found[f"meshnode_{name}_seconds_count{{{model}}}"] == count
        assert found[f'meshnode_{name}_seconds_bucket{{{model},le="+Inf"}}'] == count
        assert found[f"meshnode_{name}_seconds_sum{{{model}}}"] >= 0
    assert found['meshnode_http_responses_total{code="200"}'] == 2


async def test_lanes_queue_and_cells_are_gauges_of_the_heads_here() -> None:
    model = ByteModel()
    model.stall_at = 1
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        async with await raw_request(server.port, {"prompt": "x"}, "/v1/completions"):
            await model.waiting.wait()
            busy = parsed((await client.get("/metrics")).text)
        await model.freed.wait()
        after = parsed((await client.get("/metrics")).text)
    assert busy['meshnode_lanes{model="org/byte-model"}'] == 4
    assert busy['meshnode_lanes_busy{model="org/byte-model"}'] == 1
    assert after['llamacpp:requests_processing{model="org/byte-model"}'] == 0
    assert after['meshnode_generations_total{model="org/byte-model",finish="left"}'] == 1


async def test_refusals_are_counted_by_reason_and_metrics_need_the_key() -> None:
    directory = ByteDirectory(ByteModel())
    directory.numbers = {"rejected_queue_full": 3, "lanes": 4}
    async with serving(directory, access=KEYED) as server, server.client() as client:
        assert (await client.get("/metrics")).status_code == 401
        found = parsed((await client.get("/metrics", headers={"x-api-key": "first"})).text)
    assert found['meshnode_rejected_total{reason="key"}'] == 1
    assert found['meshnode_rejected_total{reason="queue_full"}'] == 3
    assert found['meshnode_http_responses_total{code="401"}'] == 1
    assert 'meshnode_rejected_total{reason="lanes"}' not in found


async def test_a_prompt_that_never_fits_is_counted_with_those_that_the_head_refused() -> None:
    directory = ByteDirectory(ByteModel())
    directory.numbers = {"rejected_prompt_too_long": 2}
    found = await scraped(directory, {"prompt": "x" * 600})
    assert found['meshnode_rejected_total{reason="prompt_too_long"}'] == 3


async def test_an_error_of_the_head_is_no_finished_generation() -> None:
    model = ByteModel()
    model.stall_at, model.fails_with = 2, StageLost("a stage ended")
    found = await scraped(ByteDirectory(model), {"prompt": "x"})
    assert found['meshnode_generations_total{model="org/byte-model",finish="error"}'] == 1
    assert found['meshnode_e2e_request_latency_seconds_count{model="org/byte-model"}'] == 0


async def test_stages_and_counters_of_the_node_are_shown() -> None:
    async def figures() -> NodeFigures:
        stage = StageFigures("d1", 2, microbatches=5, rows=9, compute_us=1_500_000, cells_used=7)
        return NodeFigures((stage,), {"loop-lag worst": 12})

    found = await scraped(ByteDirectory(), figures=figures)
    assert found['meshnode_stage_rows{deployment="d1",stage="2"}'] == 9
    assert found['meshnode_stage_compute_seconds_total{deployment="d1",stage="2"}'] == 1.5
    assert found["meshnode_node_loop_lag_worst"] == 12


async def test_a_model_may_be_called_anything() -> None:
    found = await scraped(ByteDirectory(ByteModel(name='a"b\\c\nd')), {"prompt": "x"})
    assert 'meshnode_lanes{model="a\\"b\\\\c\ufffdd"}' in found


def test_models_over_the_life_of_a_node_take_no_more_room_than_thirty_two() -> None:
    measured = Meter()
    for number in range(1000):
        measured.of(f"model-{number}").prompt_tokens += 1
    assert len(measured.models) == meter.MODELS + 1
    assert measured.of("model-999").prompt_tokens == 1000 - meter.MODELS


def test_a_histogram_counts_a_value_at_its_bound_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1], 12.0)


def test_the_first_token_and_those_after_it_are_measured_apart() -> None:
    measured = Meter().of("m")
    timing = Timing(measured, 10.0)
    for now in (11.0, 11.5, 12.0):
        timing.token(now)
    timing.ended("stop")
    timing.close()
    assert (measured.first.sum, measured.token.sum, measured.whole.sum) == (1.0, 1.0, 2.0)
    assert (measured.generated_tokens, measured.finished) == (3, {"stop": 1})


async def test_props_and_slots_have_the_shape_of_llama_server_on_every_node() -> None:
    mesh = TwoNodes()
    for directory in (mesh.head, mesh.joiner):
        async with serving(directory) as server, server.client() as client:
            props = (await client.get("/props")).json()
            slots = (await client.get("/slots")).json()
        assert (props["default_generation_settings"]["n_ctx"], props["total_slots"]) == (512, 4)
        assert props["modalities"] == {"vision": False, "audio": False}
        assert {"chat_template", "model_path", "build_info"} <= props.keys()
        assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
        assert not any(slot["is_processing"] for slot in slots)


@pytest.mark.parametrize("on_head", [True, False])
async def test_slots_can_be_asked_to_fail_when_none_is_free(on_head: bool) -> None:
    mesh = TwoNodes()
    async with serving(mesh.head if on_head else mesh.joiner) as server, server.client() as client:
        assert (await client.get("/slots?fail_on_no_slot=1")).status_code == 200
        mesh.model.lanes = 4
        busy = await client.get("/slots?fail_on_no_slot=1")
        assert [slot["is_processing"] for slot in (await client.get("/slots")).json()] == [True] * 4
    assert (busy.status_code, busy.json()["error"]["type"]) == (503, "unavailable_error")
