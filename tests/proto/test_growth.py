"""What the guard of the contract lets through and what not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tools.contract.growth import allowed, breaks

OLD: dict[str, Any] = {
    "protocol": "p",
    "constants": {"frame_bytes_max": 64},
    "tables": {"Kind": {"A": 1, "B": 2}},
    "layouts": {"head": [{"name": "magic", "offset": 0, "bytes": 4, "kind": "bytes"}]},
    "messages": {
        "ask": {
            "form": "map",
            "told_by": "op",
            "tag": "ask",
            "fields": {
                "what": {"type": "str", "required": True},
                "n": {"type": "int", "required": False, "default": 1},
            },
        },
        "pair": {
            "form": "list",
            "fields": {"x": {"type": "int", "required": True}, "y": {"type": "R", "required": True}},
        },
    },
    "records": {"R": {"form": "map", "canonical": True, "fields": {"z": {"type": "int", "required": True}}}},
}
OPTIONAL = {"type": "int", "required": False, "default": 0}


def changed(edit: str) -> list[str]:
    """Paths of what breaks after `edit`, a statement about `new`."""
    new = copy.deepcopy(OLD)
    exec(edit, {"new": new, "OPTIONAL": OPTIONAL, "messages": new["messages"], "ask": new["messages"]["ask"]})
    assert json.dumps(new) != json.dumps(OLD)
    return [path for path, _ in breaks(OLD, new)]


@pytest.mark.parametrize(
    "edit",
    [
        "ask['fields']['more'] = OPTIONAL",
        "ask['fields'] = {'more': OPTIONAL, **ask['fields']}",
        "messages['pair']['fields']['more'] = OPTIONAL",
        "messages['new'] = ask",
        "new['records']['New'] = ask",
        "new['tables']['Kind']['C'] = 3",
        "new['tables']['More'] = {}",
        "new['constants']['more'] = 1",
        "new['layouts']['more'] = []",
        "messages['R'] = new['records'].pop('R')",
    ],
)
def test_growth_is_no_break(edit: str) -> None:
    assert changed(edit) == []


@pytest.mark.parametrize(
    ("edit", "paths"),
    [
        ("del ask['fields']['n']", ["p/ask.n"]),
        ("ask['fields']['m'] = ask['fields'].pop('n')", ["p/ask.n"]),
        ("ask['fields']['n']['type'] = 'float'", ["p/ask.n"]),
        ("ask['fields']['n']['default'] = 2", ["p/ask.n"]),
        ("ask['fields']['what']['required'] = False", ["p/ask.what"]),
        ("ask['fields']['more'] = {'type': 'int', 'required': True}", ["p/ask.more"]),
        ("ask['tag'] = 'inquire'", ["p/ask"]),
        ("ask['form'] = 'list'", ["p/ask"]),
        ("del messages['ask']", ["p/ask"]),
        ("messages['inquire'] = messages.pop('ask')", ["p/ask"]),
        ("messages['pair']['fields'] = {'m': OPTIONAL, **messages['pair']['fields']}", ["p/pair"]),
        ("messages['pair']['fields'] = dict(reversed(messages['pair']['fields'].items()))", ["p/pair"]),
        ("new['records']['R']['fields']['more'] = OPTIONAL", ["p/R.more"]),
        ("del new['records']['R']", ["p/R"]),
        ("new['tables']['Kind']['B'] = 3", ["p/Kind.B"]),
        ("del new['tables']['Kind']", ["p/Kind"]),
        ("new['constants']['frame_bytes_max'] = 128", ["p/frame_bytes_max"]),
        ("new['layouts']['head'][0]['bytes'] = 8", ["p/head"]),
        ("new['layouts']['head'].append({})", ["p/head"]),
    ],
)
def test_what_an_older_node_could_not_overlook_is_named(edit: str, paths: list[str]) -> None:
    assert changed(edit) == paths


def test_a_reason_counts_for_its_protocol_version_only() -> None:
    text = (
        "intro `p/x`\n## Protocol 2\n\n- `p/ask.n`: text by now\n- `p/pair`:\n`p/y`\n## Protocol 1\n- `p/Kind.B`: x\n"
    )
    assert allowed(text, 2) == {"p/ask.n"}
    assert allowed(text, 1) == {"p/Kind.B"}
    assert allowed(text, 3) == set()
