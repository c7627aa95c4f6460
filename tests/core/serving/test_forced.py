"""Calls out of answers that are nothing but calls, however their text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.serving.calls import Format
from meshnode.core.serving.forced import ForcedSplitter
from meshnode.core.serving.grammar import frame_of

FRAMES = [
    frame_of(Format.TAGGED, ""),
    frame_of(Format.LISTED, ""),
    frame_of(Format.LISTED, "[ARGS]"),
    frame_of(Format.BARE, '"parameters"'),
]
CALLS = [("add", '{"a": 1, "b": {"c": [2, {}]}}'), ("say", '{"text": "a \\"}\\\\"}'), ("no.args-at_all", "{}")]


def written(frame, calls):
    inner = [f"{frame.before}{name}{frame.between}{arguments}{frame.after}" for name, arguments in calls]
    return frame.opening + frame.separator.join(inner) + frame.closing


def read(frame, pieces, *, streamed):
    """Names and joined arguments, and how many calls counted as whole."""
    splitter, found = ForcedSplitter(frame, pieces=streamed), []
    for piece in pieces:
        text, calls = splitter.feed(piece)
        assert text == ""
        for call in calls:
            if call.more:
                found[-1] = (call.name, found[-1][1] + call.arguments)
            else:
                found.append((call.name, call.arguments))
    assert splitter.finish() == ("", [])
    return found, splitter.calls


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.before[:12])
@given(data=st.data(), streamed=st.booleans())
def test_calls_come_out_as_they_were_written_wherever_the_text_is_cut(frame, data, streamed):
    several = CALLS if frame.separator else CALLS[1:2]
    text = written(frame, several)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(frame, pieces, streamed=streamed) == (several, len(several))


def test_arguments_come_out_while_they_are_written():
    splitter = ForcedSplitter(FRAMES[0], pieces=True)
    _, calls = splitter.feed('<tool_call>\n{"name": "add", "arguments": {"a": ')
    assert [(call.name, call.arguments, call.more) for call in calls] == [("add", "", False), ("add", '{"a": ', True)]
    assert splitter.feed("1")[1][0].arguments == "1"


def test_a_call_that_was_cut_off_comes_out_as_far_as_it_went_and_counts_as_none():
    text = written(FRAMES[0], CALLS[:1]).partition("1")[0]
    assert read(FRAMES[0], [text], streamed=True) == ([("add", '{"a": ')], 0)
    assert read(FRAMES[0], [text], streamed=False) == ([], 0)
