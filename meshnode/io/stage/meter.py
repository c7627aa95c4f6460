"""Counters of one loaded stage; written by the computing thread, read by the control thread."""

from __future__ import annotations

from meshnode.wire.stage_protocol import Statistics

_WEIGHT = 0.1
"""Of a new measurement in the running mean: ten microbatches forget a change of the machine's load."""


class Meter:
    """Times in nanoseconds inside, microseconds outside."""

    def __init__(self) -> None:
        self.microbatches = 0
        self.rows = 0
        self.failures = 0
        self.samples = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.overhead_ns = 0
        self.compute_ns = 0
        """Inside the engine, in all."""
        self._cost_us: dict[int, float] = {}

    def computed(self, rows: int, took_ns: int) -> None:
        """The engine computed a microbatch of `rows` rows."""
        self.microbatches += 1
        self.rows += rows
        self.compute_ns += took_ns
        took_us = took_ns / 1000
        self._cost_us[rows] = self._cost_us.get(rows, took_us) * (1 - _WEIGHT) + took_us * _WEIGHT

    def statistics(self, number: int, cells_used: int) -> Statistics:
        """The answer to request `number`."""
        return Statistics(
            id=number,
            microbatches=self.microbatches,
            rows=self.rows,
            failures=self.failures,
            samples=self.samples,
            compute_us=self.compute_ns // 1000,
            overhead_us=self.overhead_ns // 1000,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            cells_used=cells_used,
            cost_us={rows: int(cost) for rows, cost in sorted(dict(self._cost_us).items())},
        )
