"""A plan for people: who holds what, how long a token takes, and whether splitting is worth it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from meshnode.app.cli.tables import plain_table, size
from meshnode.core.planning.choice import SPLIT_PERCENT
from meshnode.core.planning.pace import ASSUMED_DECODE_BYTES_PER_S, CHUNK_ROWS, REFERENCE_TOKENS
from meshnode.core.planning.plan import Plan, Prediction

_COLUMNS = ("STAGE", "MEMBER", "LAYERS", "WEIGHTS", "KV", "TOTAL", "OF", "COMPUTE", "WIRE")


def plan_view(plan: Plan) -> RenderableType:
    """A plan, stage by stage, and what is predicted of it; its replicas after it."""
    parts = [_pipeline(plan)]
    for number, replica in enumerate(plan.replicas, 2):
        parts += [Text(), Text(f"replica {number}"), _pipeline(replica)]
    return Group(*parts)


def _pipeline(plan: Plan) -> RenderableType:
    table = plain_table(*_COLUMNS, right=set(_COLUMNS) - {"MEMBER", "LAYERS"})
    times = plan.prediction.stages if plan.prediction is not None else ()
    for number, stage in enumerate(plan.stages):
        time = times[number] if times else None
        table.add_row(
            str(number),
            escape(stage.name),
            f"{stage.first}-{stage.last - 1}",
            size(stage.weight_bytes + stage.embedding_bytes + stage.output_bytes),
            size(stage.kv_bytes + stage.state_bytes),
            size(stage.total_bytes),
            size(stage.usable_bytes),
            "-" if time is None else milliseconds(time.compute_us),
            "-" if time is None else milliseconds(time.wire_us),
        )
    count = len(plan.stages)
    head = Text.assemble(
        (plan.model, "bold"),
        f"  {count} stage{'s' if count > 1 else ''}, context {plan.context}, {plan.lanes} lanes, KV {plan.kv_type}",
    )
    lines = [] if plan.prediction is None else prediction_lines(plan, plan.prediction)
    return Group(head, table, *(Text(line) for line in lines))


def milliseconds(microseconds: int) -> str:
    """ "0.42 ms", "13.5 ms", "240 ms" """
    value = microseconds / 1000
    return f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f} ms"


def rate(microseconds: int, times: int = 1) -> str:
    """So many `times` in so many microseconds, in a second."""
    value = times * 1e6 / max(1, microseconds)
    return f"{value:.{1 if value < 100 else 0}f}"


def prediction_lines(plan: Plan, prediction: Prediction) -> list[str]:
    """What a token takes, what several streams get, and the comparison with one node."""
    total = prediction.token_us
    lines = [
        f"a token in {milliseconds(total)} ({rate(total)} a second for one stream, {REFERENCE_TOKENS} tokens into a"
        f" conversation): compute {milliseconds(prediction.compute_us)}, wire {milliseconds(prediction.wire_us)},"
        f" return {milliseconds(prediction.return_us)}",
        f"a prompt at most {rate(max(stage.chunk_us for stage in prediction.stages), CHUNK_ROWS)} tokens a second",
    ]
    if len(plan.stages) > 1:
        streams = min(plan.lanes * 1e6 / max(1, total), 1e6 / max(1, prediction.slowest_us))
        lines.append(f"{plan.lanes} streams at once get at most {streams:.1f} tokens a second together")
    lines.append(_comparison(plan, prediction))
    guessed = [stage.name for stage, time in zip(plan.stages, prediction.stages, strict=True) if not time.measured]
    if guessed:
        lines.append(
            f"not measured, so {size(ASSUMED_DECODE_BYTES_PER_S)} of weights a second are assumed: {', '.join(guessed)}"
        )
    return lines


def _comparison(plan: Plan, prediction: Prediction) -> str:
    single = prediction.single
    if len(plan.stages) == 1:
        return f"not split: one node holds it, and no split is predicted to be {SPLIT_PERCENT} % faster"
    if single is None:
        return "no single node has room for it: this split is for memory"
    alone = f"the best single node, {single.name}, would take {milliseconds(single.token_us)} a token"
    if single.token_us <= prediction.token_us:
        return f"do NOT split: {alone}, {_times(prediction.token_us, single.token_us)} as fast"
    return f"{alone}: split, a token comes {_times(single.token_us, prediction.token_us)} as fast"


def _times(slow: int, fast: int) -> str:
    return f"{slow / max(1, fast):.2f} times"
