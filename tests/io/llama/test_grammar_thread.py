"""Grammars that are compiled beside the thread that computes: which ones are, and how long it waits for them."""

import threading

import pytest

from meshnode.errors import StageError
from meshnode.io.llama import grammar as module
from meshnode.io.llama.grammar import Constraint, Grammars, GrammarThread
from tests.io.llama.test_grammar import VOCABULARY, grammar_of


class Held:
    """A function that waits, each time it is called, until it may go on."""

    def __init__(self, function):
        self.function, self.calls = function, []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def on(self):
        def held(own, argument, *more):
            self.calls.append(argument)
            self.begun.set()
            assert self.go_on.wait(60)
            return self.function(own, argument, *more)

        return held


def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch):
    compiling = Held(Grammars.constrain)
    monkeypatch.setattr(Grammars, "constrain", compiling.on())
    thread = GrammarThread(lambda: VOCABULARY)
    first, left, last = (grammar_of({"const": number}) for number in range(3))
    held = [thread.constrain(each, ()) for each in (first, left, last)]
    assert compiling.begun.wait(60)
    del held[1]
    compiling.go_on.set()
    assert [each.allowed().tolist() for each in held] == [[ord("0")], [ord("2")]]
    assert compiling.calls == [first, last]


def test_an_answer_that_nobody_waits_for_any_more_is_not_gone_over_to_its_end(monkeypatch):
    accepting = Held(Constraint.accept)
    monkeypatch.setattr(Constraint, "accept", accepting.on())
    thread = GrammarThread(lambda: VOCABULARY)
    left = thread.constrain(grammar_of({"const": "abc"}), tuple(b'"abc'))
    assert accepting.begun.wait(60)
    del left
    accepting.go_on.set()
    assert thread.constrain(grammar_of({"const": 1}), ()).allowed().tolist() == [ord("1")]
    assert accepting.calls == [ord('"')]


def test_who_computes_waits_for_a_grammar_so_long_and_no_longer(monkeypatch):
    compiling = Held(Grammars.constrain)
    monkeypatch.setattr(Grammars, "constrain", compiling.on())
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    late = GrammarThread(lambda: VOCABULARY).constrain(grammar_of({"const": 1}), ())
    assert compiling.begun.wait(60)
    with pytest.raises(StageError, match="not ready") as failed:
        late.allowed()
    assert failed.value.reason == "grammar_refused"
    compiling.go_on.set()
