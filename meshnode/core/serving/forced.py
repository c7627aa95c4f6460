"""Calls in an answer that a grammar forces to be nothing else: their arguments come out while they are written.

Invariant: what comes out, joined, does not depend on how the text was cut; a call counts once it is whole.
"""

from __future__ import annotations

from meshnode.core.serving.calls import Call
from meshnode.core.serving.grammar import Frame


class ForcedSplitter:
    """Text in, (nothing, calls) out, as CallSplitter. Without `pieces` only calls that are whole come out."""

    def __init__(self, frame: Frame, *, pieces: bool) -> None:
        self._frame = frame
        self._pieces = pieces
        self._held = ""
        """Of the frame, up to where the arguments begin."""
        self._name = ""
        self._arguments = ""
        self._in_arguments = False
        self._scan = _Scan()
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after `text`."""
        calls: list[Call] = []
        while text:
            if not self._in_arguments:
                before, found, text = (self._held + text).partition(self._frame.between)
                if not found:
                    self._held = before
                    break
                self._begin(before, calls)
            end = self._scan.feed(text)
            self._take(text if end < 0 else text[:end], end >= 0, calls)
            text = "" if end < 0 else text[end:]
        return "", calls

    def finish(self) -> tuple[str, list[Call]]:
        """What is left is frame, or a call that was cut off: its end says so."""
        return "", []

    def _begin(self, before: str, calls: list[Call]) -> None:
        # In front of a name stands what ends the last call, and what begins this one.
        self._name = before.rpartition(self._frame.before)[2]
        self._held, self._arguments, self._in_arguments, self._scan = "", "", True, _Scan()
        if self._pieces:
            calls.append(Call(self._name, ""))

    def _take(self, text: str, whole: bool, calls: list[Call]) -> None:
        if self._pieces and text:
            calls.append(Call(self._name, text, more=True))
        elif not self._pieces:
            self._arguments += text
            if whole:
                calls.append(Call(self._name, self._arguments))
        if whole:
            self._in_arguments = False
            self.calls += 1


class _Scan:
    """Finds the end of one JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Characters of `text` up to its end; -1: it goes on."""
        for index, each in enumerate(text):
            if self._in_text:
                self._in_text = self._escaped or each != '"'
                self._escaped = each == "\\" and not self._escaped
            elif each == '"':
                self._in_text = True
            elif each in "{[":
                self._depth += 1
            elif each in "}]":
                self._depth -= 1
                if not self._depth:
                    return index + 1
        return -1
