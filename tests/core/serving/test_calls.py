from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.serving import calls
from meshnode.core.serving.calls import Call, CallSplitter, Format, format_of

NAMES = frozenset({"add", "look.up"})


def split(known: Format, *pieces: str) -> tuple[str, list[Call]]:
    splitter = CallSplitter(known, NAMES)
    said, found = "", []
    for text, new in [*map(splitter.feed, pieces), splitter.finish()]:
        said += text
        found += new
    assert splitter.calls == len(found)
    return said, found


ONE = Call("add", '{"a": 1, "b": [2, "é"]}')
TWO = Call("look.up", "{}")
BODY = '{"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}'
UNKNOWN = '{"name": "drop", "arguments": {}}'

CASES = [
    (Format.TAGGED, f"<tool_call>\n{BODY}\n</tool_call>", ("", [ONE])),
    (Format.TAGGED, f"Let me see.\n<tool_call>{BODY}</tool_call>\n", ("Let me see.", [ONE])),
    (
        Format.TAGGED,
        f'<tool_call>{BODY}</tool_call>\n<tool_call>{{"name":"look.up","arguments":{{}}}}</tool_call>',
        ("", [ONE, TWO]),
    ),
    (Format.TAGGED, "no call < here <tool", ("no call < here <tool", [])),
    (Format.TAGGED, f"<tool_call>{BODY}", (f"<tool_call>{BODY}", [])),
    (Format.TAGGED, "a \n<tool_call>", ("a \n<tool_call>", [])),
    (Format.LISTED, "a [TOOL_CALLS]x", ("a [TOOL_CALLS]x", [])),
    (Format.TAGGED, "<tool_call>{]</tool_call> x", ("<tool_call>{]</tool_call> x", [])),
    (Format.TAGGED, f"<tool_call>{UNKNOWN}</tool_call>", (f"<tool_call>{UNKNOWN}</tool_call>", [])),
    (
        Format.TAGGED,
        '<tool_call>{"name":"add","arguments":"{\\"a\\": 1}"}</tool_call>',
        ("", [Call("add", '{"a": 1}')]),
    ),
    (Format.TAGGED, '<tool_call>{"name":"add","arguments":[1]}</tool_call>', None),
    (Format.TAGGED, '<tool_call>{"name":"add","arguments":{"a":NaN}}</tool_call>', None),
    (Format.LISTED, f"[TOOL_CALLS][{BODY}]", ("", [ONE])),
    (Format.LISTED, "Hm. [TOOL_CALLS]look.up[ARGS]{}", ("Hm.", [TWO])),
    (Format.LISTED, "[TOOL_CALLS]look.up[CALL_ID]abc[ARGS]{}[TOOL_CALLS]look.up[ARGS]{}", ("", [TWO, TWO])),
    (Format.LISTED, f"[TOOL_CALLS][{BODY}", (f"[TOOL_CALLS][{BODY}", [])),
    (Format.LISTED, "[TOOL_", ("[TOOL_", [])),
    (Format.BARE, BODY, ("", [ONE])),
    (Format.BARE, '\n{"name": "look.up", "parameters": {}}; {"name": "look.up"}', ("", [TWO, TWO])),
    (Format.BARE, '{"answer": 5}', ('{"answer": 5}', [])),
    (Format.BARE, f"So: {BODY}", (f"So: {BODY}", [])),
    (Format.BARE, BODY[:-1], (BODY[:-1], [])),
    (Format.BARE, "", ("", [])),
]


@pytest.mark.parametrize(("known", "text", "expected"), CASES)
def test_whole_calls_of_known_tools_are_told_from_text_however_it_is_cut(known, text, expected) -> None:
    expected = expected or (text, [])
    assert split(known, text) == expected
    assert split(known, *text) == expected
    for cut in range(len(text)):
        assert split(known, text[:cut], text[cut:]) == expected


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    BODY,
    UNKNOWN,
    "look.up",
    "{}",
    "[",
    "]",
    "<",
    " ",
    "\n",
    "a",
    ";",
]


@given(st.sampled_from(Format), st.lists(st.sampled_from(PIECES), max_size=8))
def test_no_cut_changes_anything_and_no_text_is_lost_without_a_call(known: Format, pieces: list[str]) -> None:
    text = "".join(pieces)
    said, found = split(known, *pieces)
    assert split(known, text) == split(known, *text) == (said, found)
    assert found or said == text
    assert all(call.name in NAMES and isinstance(json.loads(call.arguments), dict) for call in found)


def test_text_that_cannot_be_json_for_depth_stays_text() -> None:
    deep = '{"name":"add","arguments":' + '{"a":' * 100_000
    assert split(Format.BARE, deep) == (deep, [])


def test_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALLS", 2)
    said, found = split(Format.TAGGED, f"<tool_call>{BODY}</tool_call>" * 3)
    assert (len(found), said) == (2, f"<tool_call>{BODY}</tool_call>")


def test_the_format_is_the_one_that_the_template_teaches() -> None:
    assert format_of("{{ messages }}") is None
    assert format_of("{% if tools %}<tool_call>") is Format.TAGGED
    assert format_of("{% if tools %}[TOOL_CALLS]") is Format.LISTED
    assert format_of("{% if tools %}<|python_tag|>") is Format.BARE
    assert format_of("{% if tools %}<|channel|>") is None
