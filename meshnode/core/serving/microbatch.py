"""Microbatches: what was sent and is unanswered, and the frames made of it.

Invariant: answers come in the order of the frames, one each; a frame's number is one more than the last one's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec

from meshnode.core.serving.sequence import Sequence
from meshnode.errors import PeerError
from meshnode.wire.activation import AnyOperation, Open, Rows, Score
from meshnode.wire.fence import Fence
from meshnode.wire.sampling import MAX_BIASES

OPERATIONS: Final = 64
"""Lane operations that wait at most for a frame with rows, which may add one Open, and two for each lane that it makes
room on: the wire takes 256. Clients that come and go within one turn of the head's loop make three each."""

_NEVER: Final = -1e9
"""A bias that no logit outweighs; finite, as biases must be."""


class Span(msgspec.Struct, frozen=True, eq=False):
    """Consecutive rows of one sequence in one frame."""

    sequence: Sequence
    seating: int
    lane: int
    position: int
    rows: int
    logits: bool
    """Whether the last of the rows is sampled."""
    scored: int = 0
    """Rows of a prompt, the last ones but for one that is sampled, whose next token is scored."""

    @property
    def current(self) -> bool:
        """Whether the sequence still sits where it sat when the frame was made."""
        return self.sequence.seating == self.seating


class Microbatch(msgspec.Struct, frozen=True, eq=False):
    """One frame without an answer. `seatings`: the number of the newest seating when it was made."""

    number: int
    spans: tuple[Span, ...]
    rows: int
    """Of all spans."""
    samples: int
    """Rows among them that want logits, to be sampled or scored."""
    chunk: bool
    seatings: int


class InFlight:
    """Frames without an answer, oldest first, and the making of the next one."""

    def __init__(self, fence: Fence, end_tokens: Iterable[int]) -> None:
        self._fence = fence
        self._no_end = tuple((token, _NEVER) for token in sorted(end_tokens))
        self._unanswered: deque[Microbatch] = deque()
        self._operations: list[AnyOperation] = []
        self.number = 0
        self.chunks = 0
        """Prefill chunks among them."""
        self.rows = 0
        """Rows of all of them."""
        self.most = 0

    def __len__(self) -> int:
        return len(self._unanswered)

    @property
    def decodes(self) -> int:
        """Frames of decode rows among them."""
        return len(self._unanswered) - self.chunks

    @property
    def operations(self) -> int:
        """Lane operations that wait for a frame to ride on."""
        return len(self._operations)

    def operate(self, operations: Iterable[AnyOperation]) -> None:
        """Let operations ride ahead of the rows of the next frame."""
        self._operations += operations

    def answered_rows(self) -> dict[int, int]:
        """By seating: how many of its lane's positions are answered, where not all are that were sent."""
        first: dict[int, int] = {}
        for microbatch in self._unanswered:
            for span in microbatch.spans:
                first.setdefault(span.seating, span.position)
        return first

    def frame(self, sequences: list[Sequence], rows: int, seatings: int, *, chunk: bool = False) -> Rows:
        """Make the next frame of up to `rows` pending rows of each sequence, and count them as sent."""
        spans = tuple([self._span(sequence, rows) for sequence in sequences])
        self.number += 1
        most = len(self._operations) if spans else OPERATIONS
        operations, self._operations = tuple(self._operations[:most]), self._operations[most:]
        frame = _rows(self._fence, self.number, operations, spans)
        count = len(frame.positions)
        self._unanswered.append(Microbatch(self.number, spans, count, sum(frame.logits), chunk, seatings))
        self.chunks += chunk
        self.rows += count
        self.most = max(self.most, len(self._unanswered))
        return frame

    def answered(self, fence: Fence, number: int) -> Microbatch:
        """Take the frame that an answer is for. Raises PeerError unless it is the oldest one of this run."""
        if fence != self._fence or not self._unanswered or self._unanswered[0].number != number:
            raise PeerError("the last stage answered a microbatch out of turn")
        microbatch = self._unanswered.popleft()
        self.chunks -= microbatch.chunk
        self.rows -= microbatch.rows
        return microbatch

    def _span(self, sequence: Sequence, most: int) -> Span:
        if not sequence.opened:
            sequence.opened = True
            self._operations.append(self._open(sequence))
        position, rows = sequence.sent, min(most, sequence.pending)
        scored = self._score(sequence, position, rows) if sequence.request.scored else 0
        sequence.sent += rows
        assert sequence.sent <= sequence.reserved
        return Span(sequence, sequence.seating, sequence.lane, position, rows, sequence.pending == 0, scored)

    def _score(self, sequence: Sequence, position: int, rows: int) -> int:
        """Tell the last stage which tokens follow the rows that are to be scored; how many those are."""
        count = sequence.unscored(position, rows)
        if count:
            end = min(position + rows, len(sequence.request.prompt) - 1)
            targets = sequence.request.prompt[end - count + 1 : end + 1]
            self._operations.append(Score(sequence.lane, targets))
        return count

    def _open(self, sequence: Sequence) -> Open:
        sampling = sequence.request.sampling
        if sampling.ignore_eos:
            # Stages know no end tokens: the last one is told to draw none. Ours come first, the bound is the wire's.
            biases = (*self._no_end, *sampling.logit_bias)[:MAX_BIASES]
            sampling = msgspec.structs.replace(sampling, logit_bias=biases)
        window = sequence.ids[-sampling.penalty_window :] if sampling.penalty_window else ()
        accepted = tuple(sequence.ids[-sequence.generated :]) if sampling.grammar and sequence.generated else ()
        return Open(sequence.lane, sampling, tuple(window), sequence.generated, sequence.sent, accepted)


def _rows(fence: Fence, number: int, operations: tuple[AnyOperation, ...], spans: tuple[Span, ...]) -> Rows:
    positions: list[int] = []
    lanes: list[int] = []
    tokens: list[int] = []
    logits: list[bool] = []
    for span in spans:
        end = span.position + span.rows
        positions += range(span.position, end)
        lanes += [span.lane] * span.rows
        tokens += span.sequence.ids[span.position : end]
        wanted = span.scored + span.logits
        logits += [False] * (span.rows - wanted) + [True] * wanted
    return Rows(fence, number, operations, positions, lanes, logits, tokens)
