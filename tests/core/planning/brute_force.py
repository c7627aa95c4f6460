"""Every placement there is, judged one by one: what the planner's search is held against.

python -m tests.core.planning.brute_force 10000 5 10      cases, most nodes, most layers
"""

import itertools
import random
import sys

import msgspec

from meshnode.core.planning import Inventory, LayerFootprint, NodeInventory, Shortfall, make_plan
from meshnode.core.planning.context import costs_of
from meshnode.core.planning.cuts import cuts_of, pinned_cuts
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.pace import NEVER, pace_of
from meshnode.core.planning.participants import fetch_bytes, head_of, participants_of
from meshnode.errors import ConfigError
from tests.core.planning.models import DIGEST, RESERVE, away, demand, footprint

CONTEXT = 256
LANES = 4


def key_of(pace, model, author, order, ends):
    """The sort key of a placement, as docs/protocols/planning.md states it."""
    slices = list(zip(order, (0, *ends[:-1]), ends, strict=True))
    nodes = [pace.nodes[index] for index in order]
    fetch = sum(
        fetch_bytes(model, pace.nodes[index], first, last)
        for index, first, last in slices
        if pace.nodes[index].node != author
    )
    return (
        pace.total(order, ends),
        max(pace.stage(*piece) for piece in slices),
        len(order),
        fetch,
        -sum(node.usable_bytes for node in nodes),
        tuple(node.node for node in nodes),
        ends,
    )


def best_of_all(asked, model, machines):
    """(node, first, last) of each stage of the best placement; None where there is none."""
    nodes, _ = participants_of(asked, model, machines)
    if not nodes:
        return None
    pace = pace_of(model, CONTEXT, "q8_0", nodes, (head_of(asked, machines), machines.links))
    prices, allowed, count = costs_of(model, CONTEXT, LANES, "q8_0"), pinned_cuts(model, asked.cuts), len(model.layers)

    def holds(node, first, last):
        return last in allowed.ends[first] and prices.need(first, last) <= nodes[node].usable_bytes

    alone = [
        key_of(pace, model, asked.author, (node,), (count,)) for node in range(len(nodes)) if holds(node, 0, count)
    ]
    alone = [key for key in alone if key[0] < NEVER]
    near = [key for key in alone if key[0] * 100 <= min(alone)[0] * 103]
    single = min(near, key=lambda key: (key[3], *key), default=None)
    split = None
    for stages in range(2, len(nodes) + 1):
        for order in itertools.permutations(range(len(nodes)), stages):
            for ends in every_ends(holds, order, count):
                if pace.total(order, ends) < NEVER:
                    key = key_of(pace, model, asked.author, order, ends)
                    split = key if split is None else min(split, key)
    best = split if single is None or (split is not None and split[0] < single[0] * 85 // 100) else single
    if best is None:
        return None
    return [*zip(best[5], (0, *best[6][:-1]), best[6], strict=True)]


def every_ends(holds, order, count):
    """Every way to cut the layers over nodes in this order that they have room for."""

    def rest(place, first):
        node = order[place]
        if place == len(order) - 1:
            if holds(node, first, count):
                yield (count,)
            return
        for last in range(first + 1, count):
            if holds(node, first, last):
                for more in rest(place + 1, last):
                    yield (last, *more)

    yield from rest(0, 0)


def problem(random: random.Random, nodes, layers):
    """A demand, a model and machines: small numbers, so that ties and shortfalls are common."""
    count = random.randint(1, layers)
    model = footprint(
        [
            LayerFootprint(random.randint(1, 6) * 1000, random.randint(0, 3) * 32, kind=random.randint(0, 1))
            for _ in range(count)
        ],
        trained=CONTEXT,
        embedding_bytes=random.randint(0, 15000),
        output_bytes=random.randint(0, 15000),
        shared_bytes=random.randint(0, 3) * 10,
        boundaries=tuple(cut for cut in range(1, count) if random.random() < 0.8),
        forbidden_lengths=tuple(random.sample(range(1, 5), random.randint(0, 1))),
        all_kinds_in_each_slice=random.random() < 0.2,
    )
    names = random.sample("abcdefghijkl", random.randint(1, nodes))
    # 256 tokens of 32 values in q8_0 are 8704 bytes: rooms around one to three layers' worth, seldom all of it
    scale = random.choice((30, 60, 90, 200))
    machines = [
        NodeInventory(
            name,
            name.upper(),
            RESERVE + random.randint(1, scale) * 1000,
            decode_bytes_per_s=random.choice((0, 10**6, 2 * 10**6, 5 * 10**6, 10**7)),
            layer_us=random.choice((0, 0, 500)),
            stage_us=random.choice((0, 0, 300, 900)),
            cached={DIGEST: tuple(f"layer.{index}" for index in range(count) if random.random() < 0.5)},
        )
        for name in names
    ]
    links = [
        LinkInventory(
            one,
            other,
            rtt_us=random.choice((0, 500, 1000, 4000)),
            bytes_per_s=random.choice((0, 10**6, 10**8)),
            reachable=random.random() < 0.9,
        )
        for one, other in itertools.permutations(names, 2)
        if random.random() < 0.5
    ]
    asked = demand(author=random.choice("abcz"), context=CONTEXT, lanes=LANES)
    if random.random() < 0.1:
        cuts = tuple(sorted(random.sample(model.boundaries, min(len(model.boundaries), random.randint(1, 2)))))
        asked = msgspec.structs.replace(asked, cuts=cuts)
    return asked, model, Inventory((*machines, away(layers)), tuple(links))


def compare(seed, nodes, layers):
    asked, model, machines = problem(random.Random(seed), nodes, layers)
    try:
        found = make_plan(asked, model, machines)
    except ConfigError:
        assert asked.cuts  # random cuts that this model does not allow
        return "refused"
    best = best_of_all(asked, model, machines)
    if isinstance(found, Shortfall):
        assert best is None, (seed, found.reason, best)
        return found.reason
    assert [(stage.node, stage.first, stage.last) for stage in found.stages] == best, seed
    check(found, model)
    return len(found.stages)


def check(plan, model):
    """What every plan must hold: contiguous, allowed, within the memory of each node, each node once."""
    allowed = cuts_of(model)
    assert [stage.first for stage in plan.stages] == [0, *(stage.last for stage in plan.stages[:-1])]
    assert plan.stages[-1].last == len(model.layers)
    assert len(set(plan.nodes)) == len(plan.nodes)
    for stage in plan.stages:
        assert stage.last in allowed.ends[stage.first]
        assert stage.total_bytes <= stage.usable_bytes


def main(cases, nodes, layers):
    outcomes = [compare(seed, nodes, layers) for seed in range(cases)]
    print(f"{cases} cases of up to {nodes} nodes x {layers} layers, all equal to brute force; stages or shortfall:")
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes), key=str)})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
