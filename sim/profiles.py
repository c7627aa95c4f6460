"""How bad the world is: links, clocks, and how often each fault strikes."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from sim.network import Quality


@dataclass(frozen=True)
class Profile:
    """Rates are events in a minute of the faulty phase, for the whole mesh; the first strikes at random."""

    name: str
    latency_s: tuple[float, float]
    """One way, drawn for each pair."""
    jitter_s: float
    loss: float
    tail: float
    clock_ppm: float
    faults: tuple[tuple[str, float], ...]
    stage_failure: float = 0.0
    """Of a load or a probe."""
    step_failure: float = 0.0
    """Of half a second of serving."""
    liars: int = 0

    def quality(self, random: Random) -> Quality:
        """Of one pair of machines."""
        low, high = self.latency_s
        return Quality(low + (high - low) * random.random(), self.jitter_s, self.loss, self.tail)


_MILD = (
    ("crash", 2.0),
    ("power_off", 1.0),
    ("pause", 3.0),
    ("leave", 1.0),
    ("partition", 1.0),
    ("reset", 4.0),
    ("half_close", 2.0),
    ("slow_disk", 1.0),
    ("drain", 3.0),
    ("invite", 1.0),
    ("copy", 0.3),
    ("unload", 0.5),
)
_ALL = (
    ("crash", 6.0),
    ("power_off", 4.0),
    ("pause", 6.0),
    ("leave", 2.0),
    ("partition", 4.0),
    ("one_way", 4.0),
    ("clog", 2.0),
    ("reset", 12.0),
    ("half_close", 6.0),
    ("stall", 6.0),
    ("slow_disk", 3.0),
    ("full_disk", 3.0),
    ("calendar", 2.0),
    ("revoke", 1.0),
    ("drain", 4.0),
    ("invite", 2.0),
    ("copy", 0.7),
    ("unload", 1.0),
)

CALM = Profile("calm", (0.02, 0.02), 0.001, 0.0, 0.0, 0.0, ())
"""No fault at all: what the report measures on, with a loss of its own."""

PROFILES = {
    "lan": Profile("lan", (0.0002, 0.001), 0.0002, 0.001, 1.0, 50.0, _MILD, stage_failure=0.02, step_failure=0.001),
    "wan": Profile("wan", (0.01, 0.08), 0.005, 0.02, 5.0, 100.0, _MILD, stage_failure=0.02, step_failure=0.001),
    "hostile": Profile(
        "hostile", (0.005, 0.15), 0.02, 0.05, 20.0, 20_000.0, _ALL, stage_failure=0.1, step_failure=0.005, liars=1
    ),
}
