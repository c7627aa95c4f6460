"""What a run asks of its participants, as its plan has it: the claim, and the hops between its stages."""

from __future__ import annotations

from collections.abc import Callable

from meshnode.core.coordination.orders import Hops
from meshnode.core.planning.plan import Plan, StagePlan
from meshnode.identity.certificates import head_name, stage_name
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Claim, ClaimedStage, RunOptions

CHUNK = 128
"""Rows of a prefill chunk: measured best of 64, 128, 512 over two stages (SERVING, prefill)."""

Draw = Callable[[int], bytes]


def claim_of(plan: Plan, fence: Fence, coordinator: NodeId, layers: int, releases: Fence | None) -> Claim:
    """The claim that asks for exactly what `plan` uses."""
    stages = tuple(
        ClaimedStage(
            stage=index,
            node=stage.node,
            first=stage.first,
            last=stage.last,
            weight_bytes=stage.weight_bytes + stage.embedding_bytes + stage.output_bytes,
            kv_bytes=stage.kv_bytes + stage.state_bytes,
            reserved_bytes=stage.total_bytes,
        )
        for index, stage in enumerate(plan.stages)
    )
    options = RunOptions(plan.context, plan.lanes, CHUNK, plan.kv_type, plan.flash_attention)
    return Claim(
        fence=fence,
        deployment=plan.deployment,
        model=plan.model,
        manifest_digest=plan.manifest_digest,
        plan_digest=plan.digest,
        coordinator=coordinator,
        layers=layers,
        options=options,
        stages=stages,
        releases=releases,
    )


def plan_of(claim: Claim, demand: Demand) -> Plan:
    """The plan that `claim_of` makes `claim` of, as far as a claim tells it."""
    stages = tuple(
        StagePlan(
            node=stage.node,
            name="",
            first=stage.first,
            last=stage.last,
            weight_bytes=stage.weight_bytes,
            kv_bytes=stage.kv_bytes,
            state_bytes=0,
            embedding_bytes=0,
            output_bytes=0,
            reserve_bytes=stage.reserved_bytes - stage.weight_bytes - stage.kv_bytes,
            usable_bytes=stage.reserved_bytes,
        )
        for stage in claim.stages
    )
    options = claim.options
    return Plan(
        deployment=demand.deployment,
        demand_version=demand.version,
        manifest_digest=claim.manifest_digest,
        model=claim.model,
        coordinator=claim.stages[0].node,
        stages=stages,
        context=options.context,
        lanes=options.lanes,
        kv_type=options.kv_type,
        flash_attention=options.flash_attention,
    )


def hops_of(claim: Claim, draw: Draw) -> Hops:
    """Fresh hop tokens and the certificate names of both ends of every hop."""
    run = claim.fence.run
    names = (*(stage_name(s.stage, run, s.node) for s in claim.stages), head_name(run, claim.coordinator))
    return Hops(tuple(draw(16) for _ in names), names)
