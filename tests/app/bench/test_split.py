from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from meshnode.app.bench.model import write_model
from meshnode.app.bench.rig import RigOptions, open_rig
from meshnode.app.bench.split import SplitOptions, SplitReport, print_split, run_split
from meshnode.errors import ConfigError, ModelError
from meshnode.io.llama.gguf_file import open_model

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def report():
    options = SplitOptions(layers=2, embd=256, stages=2, rounds=1, prefill_tokens=64, streams=(1, 2))
    return run_split(options)


def test_the_json_object_has_the_ratios_and_the_overhead(report) -> None:
    parsed = msgspec.json.decode(msgspec.json.encode(report))
    assert set(parsed["ratios"]) == {"one_stream_vs_plain", "two_streams_vs_one", "prefill_vs_plain"}
    assert all(isinstance(value, float) and value > 0 for value in parsed["ratios"].values())
    assert isinstance(parsed["stage_overhead_us"], float)
    assert msgspec.json.decode(msgspec.json.encode(report), type=SplitReport) == report


def test_plain_and_every_number_of_stages_are_measured(report) -> None:
    assert [case.stages for case in report.cases] == [0, 1, 2]
    assert all(set(case.decode) == {1, 2} and min(case.decode.values()) > 0 for case in report.cases)
    assert [len(case.stage_internal_us) for case in report.cases] == [0, 1, 2]


def test_every_start_of_a_round_is_a_sample_of_the_overhead_and_its_quartiles_stand_beside_it(report) -> None:
    assert report.starts == 3 * report.rounds
    low, high = report.stage_overhead_quartiles_us
    assert low <= report.stage_overhead_us <= high
    assert report.plain_spread >= 0


@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_a_machine_that_something_else_uses_is_named(report, spread) -> None:
    text = io.StringIO()
    print_split(msgspec.structs.replace(report, plain_spread=spread), Console(file=text, width=80))
    assert ("something else used this machine" in " ".join(text.getvalue().split())) == (spread > 0.1)


def test_the_table_fits_a_usual_terminal(report) -> None:
    text = io.StringIO()
    print_split(report, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("2 stages") for line in lines)


def test_impossible_measurements_are_refused_with_a_hint() -> None:
    for changes in ({"stages": 0}, {"rounds": 0}, {"streams": (2,)}, {"streams": (1, 3)}):
        with pytest.raises(ConfigError) as caught:
            SplitOptions(**changes)
        assert caught.value.hint


def test_models_that_are_missing_or_cannot_be_cut_so_often_are_refused_before_anything_runs(tmp_path) -> None:
    with pytest.raises(ModelError):
        run_split(SplitOptions(model=tmp_path / "none.gguf"))
    write_model(2, 256, "q8_0", tmp_path / "m.gguf", vocabulary=600)
    with pytest.raises(ConfigError, match="3 stages"):
        run_split(SplitOptions(model=tmp_path / "m.gguf", stages=3))


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q4_0", "f16"])
async def test_a_synthetic_model_of_each_type_runs_split(tmp_path, kind) -> None:
    path = tmp_path / "m.gguf"
    write_model(2, 256, kind, path, vocabulary=600)
    async with open_rig(path, RigOptions()) as rig:
        tokens = await rig.generate(range(1, 40), 5)
    assert all(0 <= item.token < 600 for item in tokens)
    assert {file.name for file in tmp_path.iterdir()} == {"m.gguf"}


def test_a_synthetic_model_has_a_tokenizer_and_the_shape_asked_for(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_model(3, 512, "q8_0", path)
    model = open_model(path)
    assert model.scalar("llama.block_count") == 3
    assert model.scalar("llama.embedding_length") == 512
    assert model.scalar("tokenizer.chat_template")
    assert model.by_name["output.weight"].dims == (512, 32_000)


def test_shapes_that_cannot_be_written_are_refused_with_a_hint(tmp_path) -> None:
    for layers, embd, kind in ((0, 256, "q8_0"), (1, 100, "q8_0"), (1, 256, "q3")):
        with pytest.raises(ConfigError) as caught:
            write_model(layers, embd, kind, tmp_path / "m.gguf")
        assert caught.value.hint
    assert not list(tmp_path.iterdir())
