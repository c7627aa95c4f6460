from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.serving.request import Sampled
from meshnode.io.http.choice import Choice, Delta
from tests.io.http.byte_model import END, VOCABULARY


def spoken(text: bytes, stops: tuple[str, ...] = (), finish: str = "stop") -> list[Delta]:
    choice = Choice(0, VOCABULARY, stops)
    tokens = [Sampled(byte, -1.0) for byte in text]
    if finish == "stop":
        tokens.append(Sampled(END, -1.0, finish="stop"))
    else:
        tokens[-1] = Sampled(text[-1], -1.0, finish="length")
    deltas = []
    for token in tokens:
        deltas.append(choice.feed(token))
        if deltas[-1].finish:
            break
    assert choice.generated == len(deltas)
    return deltas


def shown(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids(deltas: list[Delta]) -> bytes:
    return bytes(token.sampled.token for delta in deltas for token in delta.tokens)


@given(st.binary(min_size=1, max_size=30))
def test_every_token_of_an_unstopped_answer_leaves_exactly_once(text: bytes) -> None:
    deltas = spoken(text)
    assert shown(deltas) == text.decode("utf-8", "replace")
    assert ids(deltas) == text
    assert [delta.finish for delta in deltas[:-1]] == [""] * (len(deltas) - 1)


def test_the_token_that_ends_a_generation_is_not_text() -> None:
    deltas = spoken(b"ab")
    assert (shown(deltas), ids(deltas), deltas[-1].finish) == ("ab", b"ab", "stop")


def test_the_last_token_of_a_full_answer_is_text() -> None:
    deltas = spoken(b"ab", finish="length")
    assert (shown(deltas), ids(deltas), deltas[-1].finish) == ("ab", b"ab", "length")


def test_tokens_cut_off_by_a_stop_string_never_leave() -> None:
    deltas = spoken(b"one STOP two", ("STOP",))
    assert (shown(deltas), ids(deltas), deltas[-1].finish) == ("one ", b"one ", "stop")


def test_a_half_stop_at_the_end_is_text_after_all() -> None:
    deltas = spoken(b"one STO", ("STOP",))
    assert (shown(deltas), ids(deltas)) == ("one STO", b"one STO")


def test_a_stop_that_becomes_whole_at_the_token_limit_is_a_stop() -> None:
    deltas = spoken(b"aSTOP", ("STOP",), finish="length")
    assert (shown(deltas), deltas[-1].finish) == ("a", "stop")


def test_tokens_of_one_character_share_its_offset() -> None:
    deltas = spoken("aéb".encode())
    assert [token.offset for delta in deltas for token in delta.tokens] == [0, 1, 1, 2]
