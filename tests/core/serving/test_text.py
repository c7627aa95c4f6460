from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.serving.text import Detokenizer, StopStrings, Vocabulary

VOCABULARY = Vocabulary(pieces=(b"a", b"", b"\xc3"), markers={1: b"<|end|>"}, end=frozenset({1}))


def detokenized(pieces: list[bytes]) -> str:
    detokenizer = Detokenizer()
    return "".join([detokenizer.feed(piece) for piece in pieces]) + detokenizer.finish()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stopping = StopStrings(stops)
    text = "".join(stopping.feed(piece) for piece in pieces)
    return text + ("" if stopping.stopped else stopping.finish()), stopping.stopped


@given(st.binary(max_size=40), st.lists(st.integers(0, 100), max_size=8))
def test_text_does_not_depend_on_how_bytes_were_grouped(data: bytes, places: list[int]) -> None:
    assert detokenized(cut(data, places)) == data.decode("utf-8", "replace")


def test_a_character_over_three_tokens_shows_with_its_last_byte() -> None:
    detokenizer = Detokenizer()
    assert [detokenizer.feed(bytes([byte])) for byte in "€".encode()] == ["", "", "€"]


def test_an_impossible_byte_becomes_a_replacement_character_and_the_text_goes_on() -> None:
    assert detokenized([b"a\xff", b"b"]) == "a\ufffdb"


def test_a_character_that_never_became_whole_shows_at_the_end() -> None:
    assert detokenized(["é".encode()[:1]]) == "\ufffd"


letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(letters, st.lists(st.integers(0, 100), max_size=8), stop_lists)
def test_where_the_text_stops_does_not_depend_on_how_it_was_grouped(
    text: str, places: list[int], stops: list[str]
) -> None:
    shown, found = stopped([piece.decode() for piece in cut(text.encode(), places)], stops)
    assert (shown, found) == stopped(list(text), stops) == stopped([text], stops)
    assert found == any(stop in text for stop in stops)
    if found:
        assert shown in {text[: text.find(stop)] for stop in stops if stop in text}
    else:
        assert shown == text


def test_only_what_may_still_become_a_stop_is_held_back() -> None:
    stopping = StopStrings(["END"])
    assert [stopping.feed(piece) for piece in ("one E", "N", "X ", "EN", "D more")] == ["one ", "", "ENX ", "", ""]
    assert stopping.stopped
    assert stopping.feed("later") == ""


def test_of_two_stops_the_one_that_is_whole_first_wins() -> None:
    assert stopped(["one two three"], ["three", "two"]) == ("one ", True)
    assert stopped(["abc"], ["abc", "b"]) == ("a", True)


def test_control_tokens_show_nothing_and_are_written_out() -> None:
    assert (VOCABULARY.shown(1), VOCABULARY.written(1), VOCABULARY.written(0)) == (b"", b"<|end|>", b"a")


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert [VOCABULARY.shown(token) for token in (-1, 3)] == [b"", b""]
