"""Stages without arithmetic: they keep the rules that real ones keep, and "sample" a function of the ids they saw."""

from __future__ import annotations

from collections import deque

from meshnode.wire import limits
from meshnode.wire.activation import (
    Close,
    Copy,
    FailedFrame,
    Failure,
    LaneSample,
    Open,
    Rows,
    SampledFrame,
    Score,
    Trim,
)
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.limits import LANE_OPERATIONS

FENCE = Fence(Term(1), RunId("00" * 8))
VOCABULARY = 1000
END = 999


def next_token(ids: list[int]) -> int:
    """What follows `ids`; depends on all of them, so that a lost, doubled or foreign id shows."""
    return (sum(ids) * 31 + len(ids) * 7) % (VOCABULARY - 1)


def score_of(ids: list[int], token: int) -> float:
    """How likely `token` is after `ids`, in this world."""
    return -float((next_token(ids) + token) % 97)


def scores(prompt: tuple[int, ...]) -> list[tuple[int, float]]:
    """What a scored prompt is told with."""
    return [(token, score_of(list(prompt[:at]), token)) for at, token in enumerate(prompt) if at]


def answer(prompt: tuple[int, ...], count: int) -> list[int]:
    """The first `count` tokens after `prompt`."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class Stages:
    """A pipeline of perfect stages that answers when told to. Checks every frame as stages do."""

    def __init__(self, context: int, chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self.lanes: dict[int, list[int]] = {}
        self.waiting: deque[Rows] = deque()
        self.number = 0
        self.opens: list[Open] = []
        self.computed = 0
        self.cuts = True
        """Whether a lane can be cut, or copied in part."""
        self.broken: set[int] = set()
        self.missing: set[int] = set()

    def take(self, frames: list[Rows]) -> None:
        for frame in frames:
            self.number += 1
            assert frame.microbatch == self.number, "microbatch numbers have no gap"
            assert len(frame.positions) <= self.chunk
            self.waiting.append(frame)

    def answer_oldest(self) -> SampledFrame | FailedFrame:
        frame = self.waiting.popleft()
        self._operate(frame)
        if not frame.positions:
            return SampledFrame(FENCE, frame.microbatch, ())
        assert frame.tokens is not None
        if missing := tuple(self.missing & {int(lane) for lane in frame.lanes}):
            return FailedFrame(FENCE, frame.microbatch, Failure(1, "position_gap", "not held", missing))
        if guilty := tuple(self.broken & {int(lane) for lane in frame.lanes}):
            return self._failed(frame, guilty)
        samples = []
        targets = {each.lane: list(each.targets) for each in frame.operations if isinstance(each, Score)}
        rows = zip(frame.positions, frame.lanes, frame.tokens, frame.logits, strict=True)
        for position, lane, token, logits in rows:
            ids = self.lanes[int(lane)]
            assert len(ids) == position, "positions of a lane are contiguous"
            ids.append(int(token))
            self.computed += 1
            if logits and targets.get(int(lane)):
                target = targets[int(lane)].pop(0)
                samples.append(LaneSample(int(lane), int(position), target, score_of(ids, target)))
            elif logits:
                samples.append(LaneSample(int(lane), int(position), next_token(ids)))
        assert len(samples) <= limits.SCORED_ROWS, "llama.cpp would abort"
        assert sum(map(len, self.lanes.values())) <= self.context, "live cells fit the cache"
        return SampledFrame(FENCE, frame.microbatch, tuple(samples))

    def fail_oldest(self, lanes: tuple[int, ...] | None = None) -> FailedFrame:
        """Fail the oldest frame; its rows are not kept. Lanes at fault: those of the frame unless given."""
        frame = self.waiting.popleft()
        self._operate(frame)
        return self._failed(frame, tuple({int(lane) for lane in frame.lanes}) if lanes is None else lanes)

    def _failed(self, frame: Rows, guilty: tuple[int, ...]) -> FailedFrame:
        self.broken |= set(guilty)
        return FailedFrame(FENCE, frame.microbatch, Failure(1, "fatal", "a decode failed", guilty))

    def _operate(self, frame: Rows) -> None:
        assert len(frame.operations) <= LANE_OPERATIONS, "a frame of more would end the stream"
        for operation in frame.operations:
            match operation:
                case Open(lane, keep=keep):
                    self.opens.append(operation)
                    self.broken.discard(lane)
                    self.missing.discard(lane)
                    self._cut(lane, keep)
                case Trim(lane, position):
                    self._cut(lane, position)
                case Copy(source, target, length):
                    self.lanes[target] = list(self.lanes[source])
                    self._cut(target, length)
                case Close(lane):
                    self.lanes.pop(lane)
                    self.broken.discard(lane)
                case Score():
                    pass

    def _cut(self, lane: int, position: int) -> None:
        held = self.lanes.setdefault(lane, [])
        if position > len(held) or (position not in (0, len(held)) and not self.cuts):
            # As io.stage.lanes does: the lane is cleared, and its rows are refused until the next Open.
            self.missing.add(lane)
            held.clear()
        else:
            del held[position:]
