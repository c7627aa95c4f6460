"""`meshnode bench cutover`: what clients notice while one run takes another's place. Real processes on loopback.

Three nodes, each with room for the whole model; streams run all the time, one after the other. The machine that serves
is drained, as before somebody switches it off. Pauses are between two tokens of one stream:

    before | order to drain ... the new run serves | ... the former one is gone | as long again: the control
    outside             in the hand-over                      outside                   without a cut-over

A longest pause grows with the time one looks, and this machine has other things to do: the control says what the same
streams see in a time as long in which nothing is handed over. Every token shows at once (a bias chooses one that is
text): a character that is spread over two tokens is no pause of the mesh's.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from meshnode.app.admin import DrainRequest, InviteRequest
from meshnode.app.bench.model import write_model
from meshnode.app.cli.control import Control
from meshnode.app.trial import TrialNode, awaited, on_trial
from meshnode.core.node.status import DeploymentStatus
from meshnode.errors import ConfigError, Unavailable
from meshnode.io.llama.gguf_file import open_model

BAR: Final = 2.0
"""No pause longer than so many medians, outside of the hand-over (issue 4)."""
NODES: Final = 3
MOST_STREAMS: Final = 4
"""As many as there are lanes: one more would wait, and a wait is no pause."""
MOST_THREADS: Final = 256
"""Of a stage, as many as a node takes."""
_CONTEXT: Final = 4096
_PROMPT: Final = "A"
_TOKENS: Final = 512
"""Of one stream; the next one follows."""
_QUIET_S: Final = 5.0
"""Of streams before and after the hand-over: what it is compared with."""
_STEP_S: Final = 120.0
"""For any one step: many times what it takes, so that a hang ends."""
_POLL_S: Final = 0.1
"""Each look is a request to the node whose streams are measured, and an answer decoded beside the clients."""


@dataclass(frozen=True)
class CutoverOptions:
    """What to measure."""

    model: Path | None = None
    layers: int = 12
    embd: int = 1024
    streams: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MOST_STREAMS:
            raise ConfigError(f"--streams {self.streams} is not between 1 and {MOST_STREAMS}")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"--threads {self.threads} is not between 1 and {MOST_THREADS}")


class StreamPauses(msgspec.Struct, frozen=True):
    """What one client saw; milliseconds."""

    tokens: int
    median_ms: float
    usual_ms: float
    """Ninety-nine of a hundred are no longer."""
    outside_ms: float
    """The longest pause outside of the hand-over."""
    during_ms: float
    """The longest pause in it."""
    control_ms: float
    """The longest pause in a time as long as from the order until the former run was gone, without a cut-over."""
    outside_ratio: float
    """To the median."""
    during_ratio: float
    control_ratio: float


class CutoverReport(msgspec.Struct, frozen=True):
    """The object of `bench cutover --json`."""

    streams: tuple[StreamPauses, ...]
    finished: int
    """Streams that came to their end."""
    errors: tuple[str, ...]
    serving_s: float
    """From the order to drain until the new run serves."""
    gone_s: float
    """Until the former run is gone: its streams had ended."""
    load: float
    """Processes that wanted to run on this machine at the end, over a minute, as the system counts; -1: unknown."""
    bar: float
    within: bool
    """No error, and no pause outside of the hand-over above the bar."""


@dataclass(frozen=True)
class Moments:
    """When what happened, in monotonic seconds."""

    drained: float
    """The order."""
    serving: float
    gone: float
    """The former run was. What comes later is the control."""


class Client:
    """One stream after the other, until it is stopped."""

    def __init__(self, url: str, model: str, token: int) -> None:
        """`token`: the one that is always drawn."""
        self.errors: list[str] = []
        self.finished = 0
        self.gaps: list[tuple[float, float]] = []
        """When a token came (monotonic seconds), and how long after the one before."""
        self._url = url
        self._body = {
            "model": model,
            "prompt": _PROMPT,
            "max_tokens": _TOKENS,
            "stream": True,
            "ignore_eos": True,
            "logit_bias": {str(token): 100},
        }
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After the stream that is under way."""
        self._stopped.set()
        self._thread.join(_STEP_S)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=_STEP_S, trust_env=False) as client:
            while not self._stopped.is_set():
                try:
                    self._stream(client)
                    self.finished += 1
                except (httpx.HTTPError, ValueError) as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    self._stopped.wait(0.1)

    def _stream(self, client: httpx.Client) -> None:
        last = 0.0
        with client.stream("POST", "/v1/completions", json=self._body) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {response.read()[:200]!r}")
            for line in response.iter_lines():
                now = time.monotonic()
                if line.startswith('data: {"error"'):
                    raise ValueError(line[:200])
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    if last:
                        self.gaps.append((now, now - last))
                    last = now
        raise ValueError("a stream ended before its end")


def run_cutover(options: CutoverOptions, progress: Callable[[str], None] = lambda _: None) -> CutoverReport:
    """Measure. Raises ConfigError, ModelError, Unavailable, OSError."""
    if options.model is not None:
        open_model(options.model.expanduser())  # what is no model is said before three nodes are started for it
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as name:
        folder = Path(name)
        model = options.model
        if model is None:
            progress("writing the model")
            model = folder / "bench.gguf"
            write_model(options.layers, options.embd, "q8_0", model)
        flags = ("--threads", str(options.threads), "--no-measure", "--no-mdns", "--context", str(_CONTEXT))
        nodes = [TrialNode(folder, f"node-{number}", *flags[: 4 if number else None]) for number in range(1, NODES + 1)]
        with on_trial(nodes):
            progress("starting three nodes")
            return _measured(nodes, model.expanduser().absolute(), options.streams, progress)


def _measured(nodes: list[TrialNode], model: Path, streams: int, progress: Callable[[str], None]) -> CutoverReport:
    first = nodes[0]
    first.start("serve", str(model))
    with _control(first) as control:
        for node in nodes[1:]:
            node.start("join", control.invite(InviteRequest(expires_s=600)).invite)
        _until(lambda: sum(peer.state == "linked" for peer in control.status().peers) == len(nodes) - 1, nodes, "links")
        before = _awaited_run(control, nodes, "")
        url = control.status().api_url
        # A run is told as serving while its commit is still being written; until then its requests are refused.
        look = partial(_visible_token, url, before.model)
        token = awaited(look, nodes, time.monotonic() + _STEP_S, lambda: "no request is answered", _POLL_S)
        clients = [Client(url, before.model, token) for _ in range(streams)]
        progress("streaming")
        time.sleep(_QUIET_S)
        progress("draining the machine that serves")
        drained = time.monotonic()
        control.drain(DrainRequest(before.stages[0].node))
        _awaited_run(control, nodes, before.run)
        serving = time.monotonic()
        time.sleep(_QUIET_S)
        former = f"{before.run}/"
        owner = _owner(nodes, before.stages[0].name)
        with _control(owner) as own:
            _until(
                lambda: not any(name.startswith(former) for name in own.status().stages), nodes, "the former run ends"
            )
        gone = time.monotonic()
        progress("the same time again, without a cut-over")
        time.sleep(gone - drained)
        for client in clients:
            client.stop()
    return _report(clients, Moments(drained, serving, gone))


def _visible_token(url: str, model: str) -> int:
    """A token that shows as text whatever comes before it. Raises Unavailable."""
    asked = {"model": model, "content": _PROMPT}
    try:
        with httpx.Client(base_url=url, timeout=_STEP_S, trust_env=False) as client:
            return int(client.post("/tokenize", json=asked).raise_for_status().json()["tokens"][-1])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise Unavailable(f"the model's tokens are not known: {type(error).__name__}: {error}") from None


def _report(clients: Sequence[Client], moments: Moments) -> CutoverReport:
    errors = tuple(error for client in clients for error in client.errors)
    pauses = tuple(_pauses(client.gaps, moments) for client in clients)
    return CutoverReport(
        streams=pauses,
        finished=sum(client.finished for client in clients),
        errors=errors,
        serving_s=round(moments.serving - moments.drained, 3),
        gone_s=round(moments.gone - moments.drained, 3),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        bar=BAR,
        within=not errors and all(each.tokens and each.outside_ratio <= BAR for each in pauses),
    )


def _pauses(gaps: Sequence[tuple[float, float]], moments: Moments) -> StreamPauses:
    """`gaps`: (when a token came, seconds since the one before)."""
    ranked = sorted(gap for _, gap in gaps) or [0.0]
    usual = median(ranked)
    outside = during = control = 0.0
    for at, gap in gaps:
        if at - gap >= moments.gone:
            control = max(control, gap)
        elif at <= moments.drained or at - gap >= moments.serving:
            outside = max(outside, gap)
        else:
            during = max(during, gap)
    return StreamPauses(
        tokens=len(gaps),
        median_ms=round(usual * 1000, 2),
        usual_ms=round(ranked[len(ranked) * 99 // 100] * 1000, 2),
        outside_ms=round(outside * 1000, 2),
        during_ms=round(during * 1000, 2),
        control_ms=round(control * 1000, 2),
        outside_ratio=_ratio(outside, usual),
        during_ratio=_ratio(during, usual),
        control_ratio=_ratio(control, usual),
    )


def _ratio(pause: float, usual: float) -> float:
    return round(pause / usual, 2) if usual else 0.0


def _awaited_run(control: Control, nodes: list[TrialNode], former: str) -> DeploymentStatus:
    """The run that serves and is not `former`."""

    def look() -> DeploymentStatus | None:
        found = control.status().deployments
        return next((each for each in found if each.state == "serving" and each.stages and each.run != former), None)

    deadline = time.monotonic() + _STEP_S
    return awaited(look, nodes, deadline, lambda: f"no other run serves within {_STEP_S:.0f} s", _POLL_S)


def _owner(nodes: Sequence[TrialNode], name: str) -> TrialNode:
    return next(node for node in nodes if node.name == name)


def _control(node: TrialNode) -> Control:
    return awaited(node.control, [node], time.monotonic() + _STEP_S, lambda: f"{node.name} does not answer", _POLL_S)


def _until(look: Callable[[], object], nodes: Sequence[TrialNode], what: str) -> None:
    deadline = time.monotonic() + _STEP_S
    awaited(lambda: look() or None, nodes, deadline, lambda: f"not within {_STEP_S:.0f} s: {what}", _POLL_S)


def print_cutover(report: CutoverReport, console: Console) -> None:
    """The report for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("STREAM", "TOKENS", "MEDIAN MS", "99 OF 100", "OUTSIDE", "IN THE HAND-OVER", "WITHOUT ONE"):
        table.add_column(name, justify="right")
    for number, each in enumerate(report.streams, start=1):
        table.add_row(
            str(number),
            str(each.tokens),
            f"{each.median_ms:.1f}",
            f"{each.usual_ms:.1f}",
            f"{each.outside_ms:.1f} ({each.outside_ratio:.1f} x)",
            f"{each.during_ms:.1f} ({each.during_ratio:.1f} x)",
            f"{each.control_ms:.1f} ({each.control_ratio:.1f} x)",
        )
    console.print(table)
    console.print(
        "longest pauses: outside of the hand-over, in it (from the order until the new run serves), and of the same"
        " streams afterwards in a time as long as the whole cut-over; (x): medians"
    )
    console.print(
        f"the new run served after {report.serving_s:.2f} s, the former one was gone after {report.gone_s:.2f} s;"
        f" {report.finished} streams came to their end, {len(report.errors)} errors; load of this machine"
        f" {report.load:g} on {os.cpu_count()} cores"
    )
    for error in report.errors[:5]:
        console.print(f"  {error}", markup=False)
    console.print(f"bar: no error, no pause above {report.bar:g} medians outside of the hand-over", markup=False)
