"""Which slices the architecture allows (STAGES, the table of traits)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshnode.core.planning.footprint import ModelFootprint
from meshnode.errors import ConfigError


@dataclass(frozen=True)
class Cuts:
    """The slices that behave as the same layers of the whole model would."""

    ends: tuple[tuple[int, ...], ...]
    """`ends[first]`: every `last` for which [first, last) is allowed, ascending; empty where no slice may begin."""

    @property
    def stages_max(self) -> int:
        """No plan has more stages than this."""
        return sum(1 for ends in self.ends if ends)


def cuts_of(footprint: ModelFootprint) -> Cuts:
    """The allowed slices. The whole model is always one of them: it is loaded as it is."""
    count = len(footprint.layers)
    positions = () if footprint.whole_only else tuple(sorted(set(footprint.boundaries)))
    starts = (0, *positions)
    stops = (*positions, count)
    forbidden = frozenset(footprint.forbidden_lengths)
    complete = _complete_at(footprint)
    ends: list[tuple[int, ...]] = [() for _ in range(count)]
    for start in starts:
        ends[start] = tuple(
            stop
            for stop in stops[bisect_right(stops, start) :]
            if (start, stop) == (0, count) or (stop - start not in forbidden and stop >= complete[start])
        )
    return Cuts(tuple(ends))


def pinned_cuts(footprint: ModelFootprint, wanted: tuple[int, ...]) -> Cuts:
    """The slices of one way to cut, or every allowed one where no cuts are wanted.

    Errors: ConfigError for cuts that this architecture does not allow; says which are.
    """
    cuts = cuts_of(footprint)
    if not wanted:
        return cuts
    if footprint.whole_only:
        raise ConfigError(f"{footprint.name} cannot be cut: {footprint.whole_only}", "Leave --cuts out.")
    count = len(footprint.layers)
    if not all(0 < cut < count for cut in wanted) or list(wanted) != sorted(set(wanted)):
        raise ConfigError(
            f"cuts {_listed(wanted)} are not ascending layers of {footprint.name}, which has {count}",
            f"A cut is the first layer of a stage: 1 to {count - 1}.",
        )
    ends: list[tuple[int, ...]] = [() for _ in range(count)]
    for first, last in pairwise((0, *wanted, count)):
        if last not in cuts.ends[first]:
            raise ConfigError(
                f"{footprint.name} does not allow a stage of layers {first} to {last - 1}", _instead(footprint, cuts)
            )
        ends[first] = (last,)
    return Cuts(tuple(ends))


def _instead(footprint: ModelFootprint, cuts: Cuts) -> str:
    """What could be asked for. A position may be allowed, and yet not together with another."""
    positions = [cut for cut in footprint.boundaries if cuts.ends[cut]]
    return f"Cuts are possible at {_listed(positions)}; leave --cuts out to let them be chosen."


def _listed(positions: Sequence[int]) -> str:
    """ "3, 6, 9", or "1 to 31" where nothing is left out."""
    if len(positions) > 2 and list(positions) == list(range(positions[0], positions[-1] + 1)):
        return f"{positions[0]} to {positions[-1]}"
    return ", ".join(map(str, positions)) or "no layer"


def _complete_at(footprint: ModelFootprint) -> list[int]:
    """For each first layer the smallest `last` that gives a slice every kind of layer it must hold."""
    count = len(footprint.layers)
    if not footprint.all_kinds_in_each_slice:
        return [0] * count
    kinds = {layer.kind for layer in footprint.layers}
    following = dict.fromkeys(kinds, count)  # index of the next layer of that kind; `count`: none, never complete
    complete = [0] * count
    for index in range(count - 1, -1, -1):
        following[footprint.layers[index].kind] = index
        complete[index] = max(following.values()) + 1
    return complete
