"""Which slices the architecture allows (STAGES, the table of traits)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from meshnode.core.planning.footprint import ModelFootprint


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
