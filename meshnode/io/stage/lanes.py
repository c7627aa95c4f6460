"""What each lane of a stage holds: the next position it will accept, and on the last stage its sampler.

Invariant: `next_position[lane]` is what the engine's cache holds, also after a failed decode; a row is computed only
for an open lane and only at exactly that position, so a gap, an overlap or a replay never reaches the engine.
"""

from __future__ import annotations

from collections.abc import Callable

from meshnode.errors import StageError
from meshnode.io.stage.wiring import Engine, Sampler
from meshnode.wire.activation import AnyOperation, Close, Copy, Open, Rows, Score, Trim


class RowsRefused(StageError):
    """A microbatch that must not be computed; `lanes` are at fault."""

    def __init__(self, reason: str, message: str, lanes: tuple[int, ...]) -> None:
        super().__init__(reason, message)
        self.lanes = lanes


class LaneTable:
    """The lanes of one loaded stage. `make_sampler` is None on all stages but the last."""

    def __init__(
        self, engine: Engine, lanes: int, context: int, make_sampler: Callable[[Open], Sampler] | None
    ) -> None:
        self._engine = engine
        self._context = context
        self._make_sampler = make_sampler
        self.next_position = [0] * lanes
        self._open: list[bool] = [False] * lanes
        self.samplers: list[Sampler | None] = [None] * lanes
        # Why the last operation on a lane failed; its rows are refused with this until the next Open.
        self._defects: dict[int, StageError] = {}

    @property
    def cells_used(self) -> int:
        """Positions held by all lanes (copied prefixes counted in each)."""
        return sum(self.next_position)

    def clear(self) -> None:
        """Close and empty every lane."""
        self.apply(tuple(Close(lane) for lane in range(len(self._open))))

    def apply(self, operations: tuple[AnyOperation, ...]) -> None:
        """Do lane operations in order. One that fails condemns its lane until the next Open, never the others."""
        for operation in operations:
            lane = operation.target if isinstance(operation, Copy) else operation.lane
            if lane >= len(self._open) or (isinstance(operation, Copy) and operation.source >= len(self._open)):
                continue  # rows of a lane outside this run's range are refused by `check`
            try:
                self._apply(operation)
            except StageError as error:
                self._defects[lane] = error
                self._clear(lane)

    def _apply(self, operation: AnyOperation) -> None:
        match operation:
            case Open(lane=lane, keep=keep):
                self._defects.pop(lane, None)
                self._open[lane] = True
                self._cut(lane, keep)
                if self._make_sampler is not None:
                    self.samplers[lane] = self._make_sampler(operation)
            case Trim(lane=lane, position=position):
                self._cut(lane, position)
            case Copy(source=source, target=target, length=length):
                if length > self.next_position[source]:
                    raise StageError("position_gap", f"lane {source} holds fewer than {length} positions to copy")
                self._engine.copy(source, target, length)
                self.next_position[target] = length
            case Score():
                pass  # about the rows of its frame (step.py), not about what a lane holds
            case Close(lane=lane):
                self._open[lane] = False
                self._defects.pop(lane, None)
                self.samplers[lane] = None
                self._clear(lane)

    def _cut(self, lane: int, position: int) -> None:
        held = self.next_position[lane]
        if position > held:
            raise StageError("position_gap", f"lane {lane} holds {held} positions, {position} were to be kept")
        if position == held:
            return
        if position == 0:
            self._clear(lane)
        elif self._engine.trim(lane, position):
            self.next_position[lane] = position
        else:
            raise StageError("trim_refused", f"this model cannot cut lane {lane} back to {position}")

    def _clear(self, lane: int) -> None:
        if self.next_position[lane] or self._engine.next_position(lane):
            self._engine.clear(lane)
        self.next_position[lane] = 0

    def check(self, rows: Rows) -> dict[int, int]:
        """The position after these rows of every lane among them. Raises RowsRefused; nothing has changed then."""
        after: dict[int, int] = {}
        for lane, position in zip(rows.lanes, rows.positions, strict=True):
            expected = after[lane] if lane in after else self._first_expected(lane)
            if position != expected:
                message = f"lane {lane} got position {position}, expected {expected}"
                raise RowsRefused("position_gap", message, (lane,))
            if position >= self._context:
                raise RowsRefused("no_kv_room", f"lane {lane} has reached the end of the context", (lane,))
            after[lane] = position + 1
        return after

    def _first_expected(self, lane: int) -> int:
        if lane >= len(self._open):
            raise RowsRefused("lane_closed", f"lane {lane} is outside the {len(self._open)} of this run", (lane,))
        if defect := self._defects.get(lane):
            raise RowsRefused(defect.reason, str(defect), (lane,))
        if not self._open[lane]:
            raise RowsRefused("lane_closed", f"lane {lane} is not open", (lane,))
        return self.next_position[lane]

    def commit(self, after: dict[int, int]) -> None:
        """The rows were computed and their answer is made."""
        for lane, position in after.items():
            self.next_position[lane] = position

    def roll_back(self, lanes: dict[int, int]) -> None:
        """The rows were not computed: bring the cache of `lanes` back to what was agreed."""
        for lane in lanes:
            agreed = self.next_position[lane]
            held = self._engine.next_position(lane)
            if held == agreed:
                continue
            if held < agreed or not agreed or not self._engine.trim(lane, agreed):
                # What is left cannot be brought back: the lane starts anew, or is refused by its next position.
                self._engine.clear(lane)
                self.next_position[lane] = 0
