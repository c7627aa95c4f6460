"""`/metrics` in Prometheus' text format: what this node answered, its heads, its stages, its counters.

Names: `meshnode_*`; those that llama-server has too are also there under its names (`llamacpp:*`), so that a dashboard
made for it shows something. Label values come from bounded sets: models, stages, reasons, statuses.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.core.serving.events import Statistics
from meshnode.io.http.backend import Directory, NodeFigures
from meshnode.io.http.meter import Histogram, Meter

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_NAME = re.compile(r"[^a-zA-Z0-9_]")

Labels = Mapping[str, str]
Figures = Callable[[], Awaitable[NodeFigures]]


async def no_figures() -> NodeFigures:
    """Of an endpoint without a node around it."""
    return NodeFigures()


def counted(app: ASGIApp, meter: Meter) -> ASGIApp:
    """`app`, with the statuses of its answers counted."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                meter.statuses[message["status"]] += 1
            await send(message)

        await app(scope, receive, tell)

    return serve


def all_counters(directory: Directory, meter: Meter) -> dict[str, int]:
    """Those of the heads here, with what was refused before it reached one."""
    found = dict(directory.counters())
    for reason, count in meter.refused.items():
        name = f"rejected_{reason}"
        found[name] = found.get(name, 0) + count
    return found


class MetricsRoutes:
    """GET metrics."""

    def __init__(self, directory: Directory, meter: Meter, figures: Figures) -> None:
        self._directory = directory
        self._meter = meter
        self._figures = figures

    async def metrics(self, request: Request) -> Response:
        """Everything, now."""
        page = _Page()
        self._answers(page)
        _heads(page, self._directory)
        figures = await self._figures()
        for name in ("microbatches", "rows", "failures", "bytes_in", "bytes_out", "cells_used"):
            kind = "gauge" if name == "cells_used" else "counter"
            family = page.family(f"meshnode_stage_{name}", kind, f"Of the stages on this node: {name}.")
            for stage in figures.stages:
                family(getattr(stage, name), {"deployment": stage.deployment, "stage": str(stage.stage)})
        for name in ("compute", "overhead"):
            family = page.family(f"meshnode_stage_{name}_seconds_total", "counter", f"Stage time, {name}.")
            for stage in figures.stages:
                microseconds = getattr(stage, f"{name}_us")
                family(microseconds / 1e6, {"deployment": stage.deployment, "stage": str(stage.stage)})
        for name, value in sorted(figures.counters.items()):
            page.family(f"meshnode_node_{_NAME.sub('_', name)}", "untyped", "As in `meshnode status`.")(value)
        return Response(page.text(), media_type=None, headers={"content-type": CONTENT_TYPE})

    def _answers(self, page: _Page) -> None:
        meter = self._meter
        by_status = page.family("meshnode_http_responses_total", "counter", "Answers to clients of this node.")
        for status, count in sorted(meter.statuses.items()):
            by_status(count, {"code": str(status)})
        models = sorted(meter.models.items())
        for name, field, what in _HISTOGRAMS:
            page.family(name, "histogram", what)
            for model, measured in models:
                page.histogram(name, getattr(measured, field), {"model": model})
        ended = page.family("meshnode_generations_total", "counter", "Generations of heads here, by how they ended.")
        for model, measured in models:
            for how, count in sorted(measured.finished.items()):
                ended(count, {"model": model, "finish": how})
        for prefix in ("meshnode_", "llamacpp:"):
            for name, field in (("prompt_tokens", "prompt_tokens"), ("tokens_predicted", "generated_tokens")):
                family = page.family(f"{prefix}{name}_total", "counter", "Of generations whose head is here.")
                for model, measured in models:
                    family(getattr(measured, field), {"model": model})
        cached = page.family("meshnode_prompt_tokens_cached_total", "counter", "Of prompts: held by a lane already.")
        for model, measured in models:
            cached(measured.cached_tokens, {"model": model})
        rejected = page.family("meshnode_rejected_total", "counter", "Requests that were refused, by reason.")
        for name, count in sorted(all_counters(self._directory, meter).items()):
            if name.startswith("rejected_"):
                rejected(count, {"reason": name.removeprefix("rejected_")})


_HISTOGRAMS: Final = (
    ("meshnode_time_to_first_token_seconds", "first", "From request to first token, the queue included."),
    ("meshnode_time_per_output_token_seconds", "token", "Between two tokens of one generation."),
    ("meshnode_e2e_request_latency_seconds", "whole", "From request to last token."),
)

_GAUGES: Final = (
    ("meshnode_lanes", "lanes", "Requests that are computed at the same time."),
    ("meshnode_lanes_busy", "lanes_busy", "Lanes in use."),
    ("meshnode_requests_queued", "queued", "Requests that wait for a lane."),
    ("meshnode_requests_paused", "paused", "Requests that gave their cells to others."),
    ("meshnode_kv_cells", "context", "Cells of the KV cache in all."),
    ("meshnode_kv_cells_reserved", "cells_reserved", "Cells that belong to a lane."),
    ("meshnode_kv_cells_live", "cells_live", "Cells that hold a position."),
    ("meshnode_lanes_kept", "lanes_kept", "Lanes without a request that hold what an ended one left."),
    ("meshnode_kv_cells_kept", "cells_kept", "Cells in them, freed when others need the room."),
    ("meshnode_microbatches_in_flight", "in_flight", "Microbatches without an answer."),
    ("llamacpp:requests_processing", "lanes_busy", "Requests that are computed."),
    ("llamacpp:requests_deferred", "queued", "Requests that wait."),
)


def _heads(page: _Page, directory: Directory) -> None:
    """Sums by model: a node may have several heads of one."""
    found: dict[str, list[Statistics]] = {}
    for model in directory.here():
        found.setdefault(model.id, []).append(model.statistics())
    for name, field, what in _GAUGES:
        family = page.family(name, "gauge", what)
        for model_id, heads in sorted(found.items()):
            family(sum(getattr(head, field) for head in heads), {"model": model_id})
    for name in ("microbatches", "failed", "cancelled", "pauses", "looks", "looks_filled"):
        family = page.family(f"meshnode_head_{name}_total", "counter", f"Since the heads of now started: {name}.")
        for model_id, heads in sorted(found.items()):
            family(sum(getattr(head, name) for head in heads), {"model": model_id})


class _Page:
    """Lines of text; each family is begun once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, what: str) -> Callable[..., None]:
        """Begin a family; the result adds a sample to it."""
        self._lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]

        def add(value: float, labels: Labels | None = None) -> None:
            self._lines.append(f"{name}{_labelled((labels or {}).items())} {value}")

        return add

    def histogram(self, name: str, measured: Histogram, labels: Labels) -> None:
        """The samples of one histogram."""
        below = 0
        for bound, count in zip((*measured.bounds, "+Inf"), measured.counts, strict=True):
            below += count
            self._lines.append(f"{name}_bucket{_labelled([*labels.items(), ('le', str(bound))])} {below}")
        self._lines.append(f"{name}_sum{_labelled(labels.items())} {measured.sum}")
        self._lines.append(f"{name}_count{_labelled(labels.items())} {below}")

    def text(self) -> str:
        """The page."""
        return "\n".join(self._lines) + "\n"


def _labelled(labels: Iterable[tuple[str, str]]) -> str:
    """Quotes, backslashes and line ends are escaped: a model is called whatever its file says."""
    pairs = [f"{name}={msgspec.json.encode(_plain(value)).decode()}" for name, value in labels]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _plain(value: str) -> str:
    """Without control characters, so that JSON's escapes are Prometheus' own: quote and backslash."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in value)
