"""How long plans and shortfalls take on random machines and models: python -m tools.measure_planner [CASES]

CPU time, so that a busy machine matters little. Half of the models have unequal layers, a third is cut every 4 layers;
`measured` machines differ in speed and are far apart in 16 directions each, `unmeasured` ones only differ in memory.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

from meshnode.core.planning import (
    Demand,
    DeploymentId,
    Inventory,
    LayerFootprint,
    ModelFootprint,
    NodeInventory,
    Plan,
    make_plan,
)
from meshnode.core.planning.inventory import LinkInventory

MB = 10**6
SIZES = ((6, 100), (8, 100), (64, 96), (128, 100))
SEED = 5


def model(pick: random.Random, layers: int) -> ModelFootprint:
    sizes = [pick.randint(100, 400) * MB for _ in range(layers)] if pick.random() < 0.5 else [200 * MB] * layers
    step = 4 if pick.random() < 1 / 3 else 1
    return ModelFootprint(
        manifest_digest="d" * 64,
        name="m",
        architecture="llama",
        width=8192,
        vocabulary=1000,
        context_trained=131072,
        layers=tuple(LayerFootprint(size, 2048) for size in sizes),
        embedding_bytes=500 * MB,
        output_bytes=500 * MB,
        boundaries=tuple(range(step, layers, step)),
    )


def machines(pick: random.Random, count: int, total: int, measured: bool, whole: bool) -> Inventory:
    share = total / pick.choice([2, 3, 5, 8, 20, 50])
    names = [f"n{index:03}" for index in range(count)]
    nodes = []
    for name in names:
        room = total * 2 if whole and name == names[0] else int(share * pick.uniform(0.3, 1.5)) + 150 * MB
        speeds = (pick.randint(5, 200) * 10**9, pick.randint(5, 50), pick.randint(200, 900)) if measured else (0, 0, 0)
        decode, layer, stage = speeds
        nodes.append(
            NodeInventory(name, name, room, decode_bytes_per_s=decode, layer_us=layer, stage_us=stage)  # type: ignore[arg-type]
        )
    links = [
        LinkInventory(one, other, pick.randint(200, 20_000), pick.randint(2, 120) * 10**6)  # type: ignore[arg-type]
        for one in (names if measured else ())
        for other in pick.sample(names, min(16, count))
        if one != other
    ]
    return Inventory(tuple(nodes), tuple(links))


def took(cases: int, size: tuple[int, int], measured: bool, whole: bool) -> str:
    pick = random.Random(SEED)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(cases):
        wanted = model(pick, size[1])
        total = sum(layer.weight_bytes for layer in wanted.layers)
        offered = machines(pick, size[0], total, measured, whole)
        asked = Demand(
            DeploymentId("x"), 1, offered.nodes[0].node, "d" * 64, "m", context=pick.choice([0, 0, 4096, 32768])
        )
        start = time.process_time()
        made = make_plan(asked, wanted, offered)
        times[isinstance(made, Plan)].append((time.process_time() - start) * 1000)
    parts = [
        f"{word} {statistics.median(values):.0f} / {max(values):.0f} ms ({len(values)})"
        for word, values in (("plans", times[True]), ("shortfalls", times[False]))
        if values
    ]
    return ", ".join(parts)


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("median / worst CPU time (cases)")
    for size in SIZES:
        for measured in (True, False):
            for whole in (False, True):
                kind = f"{'measured' if measured else 'unmeasured'}, {'one holds it' if whole else 'none holds it'}"
                print(f"{size[0]} nodes x {size[1]} layers, {kind}: {took(cases, size, measured, whole)}", flush=True)


if __name__ == "__main__":
    main()
