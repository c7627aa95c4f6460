"""The export on a copy of proto/: it adds, it refuses, and it never rewrites a vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools import export_schema


@pytest.fixture
def proto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "proto"
    shutil.copytree(export_schema.PROTO, copy)
    monkeypatch.setattr(export_schema, "PROTO", copy)
    return copy


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["export_schema", *arguments])
    return export_schema.main()


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def store(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_nothing_is_written_when_nothing_grew(
    proto: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--check") == run(monkeypatch) == 0
    assert capsys.readouterr().out == ""


def test_a_message_that_is_new_is_recorded_with_a_vector(proto: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema, vectors = proto / "schema" / "control.json", proto / "vectors" / "control.json"
    recorded, known = load(schema), load(vectors)
    before = {path: load(path) for path in (schema, vectors)}
    del recorded["messages"]["pong"]
    store(schema, recorded)
    store(vectors, [vector for vector in known if vector["message"] != "pong"])
    assert run(monkeypatch, "--check") == 1
    assert load(schema) == recorded, "a check writes nothing"
    assert run(monkeypatch) == 0
    assert load(schema) == before[schema]
    assert sorted(load(vectors), key=str) == sorted(before[vectors], key=str)


def test_a_message_that_grew_keeps_its_vector_and_gets_another(proto: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything with a default had joined after the vector was recorded."""
    vectors = proto / "vectors" / "control.json"
    recorded = load(vectors)
    refusal = next(vector for vector in reversed(recorded) if vector["message"] == "refuse")
    known = [vector for vector in recorded if vector["message"] != "refuse" or vector is refusal]
    first = {
        "name": "refuse, first form",
        "message": "refuse",
        "hex": "85a26f70a6726566757365a566656e636582a47465726d03a372756eb030313233343536373839616263646566"
        "aa6465706c6f796d656e74a26431a6726561736f6ea76e6f5f726f6f6da76d657373616765a0",
        "decoded": {
            "op": "refuse",
            "fence": {"term": 3, "run": "0123456789abcdef"},
            "deployment": "d1",
            "reason": "no_room",
            "message": "",
        },
    }
    store(vectors, [first if vector is refusal else vector for vector in known])
    assert run(monkeypatch) == 0
    forms = [vector for vector in load(vectors) if vector["message"] == "refuse"]
    assert forms == [first, refusal | {"name": "refuse, grown 1"}]


def test_a_break_is_written_only_with_its_reason(
    proto: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = proto / "schema" / "control.json"
    recorded = load(schema)
    recorded["messages"]["ping"]["fields"]["hops"] = {"type": "int", "required": False, "default": 0}
    store(schema, recorded)
    assert run(monkeypatch) == 1
    assert "control/ping.hops: removed" in capsys.readouterr().out
    assert load(schema) == recorded
    with (proto / "CHANGES.md").open("a", encoding="utf-8") as changes:
        changes.write(f"\n## Protocol {export_schema.PROTOCOL}\n\n- `control/ping.hops`: nobody counted them\n")
    assert run(monkeypatch) == 0
    assert "hops" not in schema.read_text(encoding="utf-8")
