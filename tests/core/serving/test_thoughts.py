from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.serving.thoughts import Thinking, ThoughtSplitter, thinking_of

THINK = Thinking("<think>", "</think>", begun=False)
BEGUN = Thinking("<think>", "</think>", begun=True)


def split(thinking: Thinking, *pieces: str) -> tuple[str, str]:
    splitter = ThoughtSplitter(thinking)
    parts = [*map(splitter.feed, pieces), splitter.finish()]
    return "".join(thought for thought, _ in parts), "".join(said for _, said in parts)


CASES = [
    (THINK, "<think>\nA b.\n</think>\n\nYes. ", ("A b.", "Yes. ")),
    (THINK, "\n <think>a</think>b", ("a", "b")),
    (THINK, "<think>\n\n</think>\n\nNo.", ("", "No.")),
    (THINK, "Nothing to think </think> of.", ("", "Nothing to think </think> of.")),
    (THINK, "  spaced <think>a</think>", ("", "  spaced <think>a</think>")),
    (THINK, "<thing>", ("", "<thing>")),
    (THINK, "<thin", ("", "<thin")),
    (THINK, "<think>never ends </thi", ("never ends </thi", "")),
    (THINK, "<think>a</think>b</think>c", ("a", "b</think>c")),
    (BEGUN, "\nA <b\n\nc\n</think>\nSo.", ("A <b\n\nc", "So.")),
    (BEGUN, "cut off  ", ("cut off", "")),
    (BEGUN, "", ("", "")),
    (Thinking("[THINK]", "[/THINK]", begun=False), "[THINK]x[/THINK]y", ("x", "y")),
]


@pytest.mark.parametrize(("thinking", "text", "expected"), CASES)
def test_a_thought_is_told_from_what_is_said_however_the_text_is_cut(
    thinking: Thinking, text: str, expected: tuple[str, str]
) -> None:
    assert split(thinking, text) == expected
    assert split(thinking, *text) == expected
    for cut in range(len(text)):
        assert split(thinking, text[:cut], text[cut:]) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", " ", "\n", "a", "</"]), max_size=12),
    st.booleans(),
)
def test_no_cut_changes_anything(pieces: list[str], begun: bool) -> None:
    thinking = BEGUN if begun else THINK
    text = "".join(pieces)
    assert split(thinking, *pieces) == split(thinking, text) == split(thinking, *text)


def test_only_a_model_whose_template_knows_thoughts_has_them() -> None:
    assert thinking_of("{{ messages }}", "hi<think>") is None
    assert thinking_of("{{ x.split('</think>') }}", "assistant\n") == THINK
    assert thinking_of("{{ x.split('</think>') }}", "assistant\n<think>\n") == BEGUN
    assert thinking_of("{{ x.split('</think>') }}", "assistant\n<think>\n\n</think>\n\n") == THINK
