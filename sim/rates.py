"""How fast a plan really is: its stages as machines of given speed, under the real scheduler and the hash engine.

The planner predicts with sums; here tokens go round one by one, wait for machines that are busy, and come out as the
very tokens that `sim.tokens.answer` computes apart. So what the planner chose is compared with the best single machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Final

import msgspec

from meshnode.core.planning import Inventory, LayerFootprint, ModelFootprint, NodeInventory, Plan, make_plan
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.pace import SMALL_FRAME_BYTES, VALUE_BYTES
from meshnode.core.serving.events import TokenReady
from meshnode.core.serving.options import ServingOptions
from meshnode.core.serving.request import Generation
from meshnode.core.serving.scheduler import Scheduler
from meshnode.identity.ids import NodeId
from meshnode.wire.activation import LaneSample, Rows, SampledFrame
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.sampling import Sampling
from sim.agenda import Agenda, stream
from sim.tokens import VOCABULARY, Batch, Row, Slice, answer, embedded, token_of

TOKENS: Final = 32
PROMPT: Final = (11, 7, 5, 3)
MB: Final = 1_000_000
MODEL: Final = ModelFootprint(
    manifest_digest="d" * 64,
    name="model",
    architecture="llama",
    width=4096,
    vocabulary=VOCABULARY,
    context_trained=8192,
    layers=(LayerFootprint(120 * MB, 2048),) * 32,
    embedding_bytes=70 * MB,
    output_bytes=70 * MB,
    boundaries=tuple(range(1, 32)),
)
"""Seven billion weights in four bits and a half."""
_CONTEXT: Final = 1024
_FENCE: Final = Fence(Term(1), RunId("00" * 8))


@dataclass(frozen=True)
class Compared:
    """Tokens per second of one stream."""

    nodes: int
    """Of the plan."""
    planned: float
    best: float
    """The fastest machine that holds the model alone, with the same head."""

    @property
    def ratio(self) -> float:
        """Of the plan to the best single machine."""
        return self.planned / self.best


def inventory(random: Random) -> Inventory:
    """Two to six machines of a home or an office, one of which at least holds the model alone."""
    names = [NodeId(f"n{index}") for index in range(random.randint(2, 6))]
    nodes = [
        NodeInventory(
            name,
            name,
            random.randint(1000, 7000) * MB,
            decode_bytes_per_s=random.randint(3, 60) * 10**9,
            prefill_bytes_per_s=random.randint(40, 400) * 10**9,
            layer_us=random.randint(2, 30),
            stage_us=random.randint(300, 1000),
        )
        for name in names
    ]
    nodes[0] = msgspec.structs.replace(nodes[0], usable_bytes=8000 * MB)
    links = tuple(
        LinkInventory(one, other, random.randint(200, 8000), random.randint(3, 120) * 10**6)
        for one in names
        for other in names
        if one != other
    )
    return Inventory(tuple(nodes), links)


def measured(true: Inventory, random: Random, error: float) -> Inventory:
    """What measurements say of it: each speed off by up to `error` of itself."""

    def told(value: int) -> int:
        return max(1, round(value * random.uniform(1 - error, 1 + error)))

    nodes = tuple(
        msgspec.structs.replace(
            node,
            decode_bytes_per_s=told(node.decode_bytes_per_s),
            layer_us=told(node.layer_us),
            stage_us=told(node.stage_us),
        )
        for node in true.nodes
    )
    links = tuple(
        msgspec.structs.replace(link, rtt_us=told(link.rtt_us), bytes_per_s=told(link.bytes_per_s))
        for link in true.links
    )
    return Inventory(nodes, links)


def compare(seed: int, error: float) -> Compared:
    """One random inventory: what the planner makes of its measurements, and the truth about it."""
    random = stream(seed, "inventory")
    true = inventory(random)
    known = measured(true, random, error)
    author = random.choice(true.nodes).node
    demand = Demand(DeploymentId("d1"), 1, author, MODEL.manifest_digest, MODEL.name, context=_CONTEXT, kv_type="q8_0")
    plan = make_plan(demand, MODEL, known)
    assert isinstance(plan, Plan), "one machine holds it alone"
    alone = (make_plan(msgspec.structs.replace(demand, pins=(node.node,)), MODEL, known) for node in true.nodes)
    return Compared(
        len(plan.stages), rate(plan, true), max(rate(each, true) for each in alone if isinstance(each, Plan))
    )


def rate(plan: Plan, true: Inventory) -> float:
    """Tokens per second of one stream through `plan`, whose tokens are checked."""
    return Race(plan, true).run()


class Race:
    """One stream through one plan, in virtual time."""

    def __init__(self, plan: Plan, true: Inventory) -> None:
        self._plan = plan
        self._nodes = {node.node: node for node in true.nodes}
        self._links = {(link.source, link.target): link for link in true.links}
        self._agenda = Agenda()
        count = len(plan.stages)
        self._scheduler = Scheduler(ServingOptions(count, plan.context, VOCABULARY, lanes=plan.lanes), _FENCE)
        self._slices = [Slice(index, stage.first, stage.last) for index, stage in enumerate(plan.stages)]
        head = plan.coordinator
        self._hops = list(pairwise([head, *plan.nodes, head]))
        self._free_at = [0.0] * count
        self._times: list[float] = []
        self._ids: list[int] = []

    def run(self) -> float:
        """Tokens per second between the first token and the last."""
        request = Generation("r", PROMPT, TOKENS, Sampling(temperature=0.0))
        self._scheduler.submit(request, 0.0)
        self._send()
        self._agenda.run(600.0)
        assert self._ids == answer(PROMPT, TOKENS, len(MODEL.layers)), "the tokens are those of the whole model"
        return (TOKENS - 1) / (self._times[-1] - self._times[0])

    def _send(self) -> None:
        for frame in self._scheduler.next_frames(self._agenda.now):
            self._hop(0, _batch(frame))

    def _hop(self, index: int, batch: Batch) -> None:
        """To stage `index`, or back to the head."""
        source, target = self._hops[index]
        delay = 0.0
        if source != target:
            link = self._links[source, target]
            values = MODEL.width * len(batch.rows) if 0 < index < len(self._slices) else 0
            delay = link.rtt_us / 2e6 + (SMALL_FRAME_BYTES + VALUE_BYTES * values) / link.bytes_per_s
        act = self._answered if index == len(self._slices) else self._arrived
        self._agenda.after(delay, lambda: act(index, batch))

    def _arrived(self, index: int, batch: Batch) -> None:
        """A stage computes one microbatch after the other."""
        begins = max(self._agenda.now, self._free_at[index])
        self._free_at[index] = begins + self._computing(index, batch.rows)
        computed = self._slices[index].compute(batch, fails=False)
        self._agenda.at(self._free_at[index], lambda: self._hop(index + 1, computed))

    def _computing(self, index: int, rows: Sequence[Row]) -> float:
        stage = self._plan.stages[index]
        node = self._nodes[stage.node]
        read = sum(layer.weight_bytes for layer in MODEL.layers[stage.first : stage.last])
        read += MODEL.output_bytes if stage.last == len(MODEL.layers) else 0
        weights = read / node.decode_bytes_per_s if len(rows) == 1 else read * len(rows) / node.prefill_bytes_per_s
        return weights + ((stage.last - stage.first) * node.layer_us + node.stage_us) / 1e6 if rows else 0.0

    def _answered(self, _index: int, batch: Batch) -> None:
        drawn = tuple(LaneSample(row.lane, row.position, token_of(row.value)) for row in batch.rows if row.logits)
        events = self._scheduler.frame_received(SampledFrame(_FENCE, batch.number, drawn), self._agenda.now)
        for event in events:
            assert isinstance(event, TokenReady), "nothing fails here"
            self._ids.append(event.sampled.token)
            self._times.append(self._agenda.now)
            if not event.sampled.finish:
                self._scheduler.taken(event.id, self._agenda.now)
        self._send()


def _batch(frame: Rows) -> Batch:
    assert frame.tokens is not None
    columns = zip(frame.lanes, frame.positions, frame.logits, frame.tokens, strict=True)
    rows = (Row(int(lane), int(at), bool(logits), embedded(int(token))) for lane, at, logits, token in columns)
    return Batch(frame.fence, frame.microbatch, frame.operations, tuple(rows))
