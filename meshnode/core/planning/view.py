"""A plan as rows of plain values, for tables and JSON."""

from __future__ import annotations

import msgspec

from meshnode.core.planning.plan import Plan


class PlanRow(msgspec.Struct, frozen=True):
    """One stage; sizes in bytes."""

    stage: int
    node: str
    name: str
    first: int
    last: int
    weight_bytes: int
    """With embedding and output, where the stage holds them."""
    kv_bytes: int
    """With recurrent state."""
    reserve_bytes: int
    total_bytes: int
    usable_bytes: int

    @property
    def percent(self) -> int:
        """Of what the node offers."""
        return self.total_bytes * 100 // self.usable_bytes


class PlanView(msgspec.Struct, frozen=True):
    """A plan for people and programs."""

    model: str
    manifest_digest: str
    digest: str
    coordinator: str
    context: int
    lanes: int
    kv_type: str
    flash_attention: bool
    total_bytes: int
    stages: tuple[PlanRow, ...]


def view_plan(plan: Plan) -> PlanView:
    """The same numbers that the nodes book."""
    rows = tuple(
        PlanRow(
            stage=index,
            node=stage.node,
            name=stage.name,
            first=stage.first,
            last=stage.last,
            weight_bytes=stage.weight_bytes + stage.embedding_bytes + stage.output_bytes,
            kv_bytes=stage.kv_bytes + stage.state_bytes,
            reserve_bytes=stage.reserve_bytes,
            total_bytes=stage.total_bytes,
            usable_bytes=stage.usable_bytes,
        )
        for index, stage in enumerate(plan.stages)
    )
    return PlanView(
        model=plan.model,
        manifest_digest=plan.manifest_digest,
        digest=plan.digest,
        coordinator=plan.coordinator,
        context=plan.context,
        lanes=plan.lanes,
        kv_type=plan.kv_type,
        flash_attention=plan.flash_attention,
        total_bytes=sum(row.total_bytes for row in rows),
        stages=rows,
    )
