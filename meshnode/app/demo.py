"""`meshnode demo`: three real nodes on this machine, none of which may hold the embedded model alone, and one question.

Nothing here is special to the demonstration: child processes of the same command line, real invites, the plan that
the planner makes, the public endpoint. The embedded model knows its answer by heart, so a wrong one is a wrong split.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
from rich.console import Console

from meshnode.app.admin import InviteRequest, PlanRequest
from meshnode.app.cli.narration import changes, curl_line, standing
from meshnode.app.cli.planning import plan_here
from meshnode.app.cli.tables import deployment_view, size
from meshnode.app.config import Settings
from meshnode.app.trial import TrialNode, awaited, on_trial
from meshnode.core.node.status import DeploymentStatus, NodeStatus
from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from meshnode.errors import MeshError, Unavailable
from meshnode.io.llama.footprint import read_footprint

Found = TypeVar("Found")

NAMES = ("one", "two", "three")
# Half of what the model was trained with: enough for the longest answer in every lane.
CONTEXT = 512
# Loading takes 3 s on two cores; a machine that is 20 times slower still gets there.
START_S = 60.0
POLL_S = 0.1
# Granularity of --memory that is searched; finer would only make the number harder to read.
GRAIN_BYTES = 10**5


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    """What the demonstration reads of a streamed answer's event."""

    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


@dataclass(frozen=True)
class Spoken:
    """An answer and how fast it came."""

    text: str
    tokens: int
    first_s: float
    """From the request to the first token."""
    rest_s: float
    """From the first token to the last."""


def run_demo(stay: bool) -> int:
    """Run the demonstration; returns 0 only if the answer is the expected one."""
    console = Console(highlight=False, soft_wrap=True)
    right = False
    with tempfile.TemporaryDirectory(prefix="meshnode-demo-") as folder:
        nodes = [TrialNode(Path(folder), name, "--no-mdns", "--no-measure") for name in NAMES]
        with suppress(KeyboardInterrupt), on_trial(nodes):
            status = _start(nodes, console)
            right = _converse(status, console)
            if stay:
                _stay(nodes, status, console)
    return 0 if right else 1


def _start(nodes: list[TrialNode], console: Console) -> NodeStatus:
    limit = memory_limit(len(nodes))
    began = time.monotonic()
    console.print(
        f"three nodes, each of which may use {size(limit)}: too little for the model, enough for a third of it"
    )
    memory = ("--memory", str(limit), "--threads", "1")
    first, *joiners = nodes
    first.start("serve", str(MODEL), "--context", str(CONTEXT), *memory)
    deadline = began + START_S
    control = _await(first.control, nodes, deadline)
    with control:
        for joiner in joiners:
            joiner.start("join", control.invite(InviteRequest(expires_s=600)).invite, *memory)
        told: NodeStatus | None = None

        def served() -> NodeStatus | None:
            nonlocal told
            now = control.status()
            for line in changes(told, now):
                console.print(f"  {line}", markup=False, style="dim")
            told = now
            return now if _serving(now) is not None else None

        status = _await(served, nodes, deadline, lambda: standing(first.alive, told))
    console.print(f"\nplan, made and loaded {time.monotonic() - began:.1f} s after the start:")
    for deployment in status.deployments:
        console.print(deployment_view(deployment, {}))
    return status


def memory_limit(count: int) -> int:
    """The smallest --memory at which `count` equal nodes hold the embedded model, and fewer do not. Bytes."""
    footprint = read_footprint(MODEL)
    request = PlanRequest(footprint=footprint, context=CONTEXT, lanes=Settings(data=Path()).lanes)
    below, enough = 0, 10**9 // GRAIN_BYTES
    while enough - below > 1:
        middle = (below + enough) // 2
        fits = plan_here(request, [str(middle * GRAIN_BYTES)] * count, Settings(data=Path())).plan is not None
        below, enough = (below, middle) if fits else (middle, enough)
    return enough * GRAIN_BYTES


def _serving(status: NodeStatus) -> DeploymentStatus | None:
    return next((one for one in status.deployments if one.state == "serving"), None)


def _await(
    look: Callable[[], Found | None],
    nodes: list[TrialNode],
    deadline: float,
    why: Callable[[], str] = lambda: "no answer",
) -> Found:
    return awaited(look, nodes, deadline, lambda: f"nothing is served after {START_S:.0f} s: {why()}", POLL_S)


def _converse(status: NodeStatus, console: Console) -> bool:
    deployment = _serving(status)
    assert deployment is not None
    console.print(f"\n[bold]{QUESTION}[/]")
    spoken = ask(status.api_url, deployment.model, QUESTION, lambda piece: console.print(piece, end="", markup=False))
    rate = (spoken.tokens - 1) / spoken.rest_s if spoken.rest_s > 0 else 0.0
    console.print(
        f"\n\n{spoken.tokens} tokens, {rate:.0f} tokens per second, first one after {spoken.first_s * 1000:.0f} ms"
    )
    right = spoken.text == EXPECTED_ANSWER
    if right:
        console.print("[green]the answer is word for word what the unsplit model says[/]")
    else:
        console.print(f"[red]the unsplit model says instead:[/] {EXPECTED_ANSWER}")
    return right


def ask(api_url: str, model: str, question: str, heard: Callable[[str], None]) -> Spoken:
    """Stream the greedy answer through the OpenAI endpoint. Raises MeshError when the endpoint refuses."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[str] = []
    tokens = 0
    began = time.monotonic()
    times: list[float] = []
    try:
        for chunk in _chunks(f"{api_url}/v1/chat/completions", body):
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for piece in filter(None, (choice.delta.content for choice in chunk.choices)):
                times.append(time.monotonic())
                pieces.append(piece)
                heard(piece)
    except httpx.HTTPError as error:
        raise Unavailable(f"the endpoint broke off: {type(error).__name__}") from error
    if not times:
        raise MeshError("the endpoint answered without a single token")
    return Spoken("".join(pieces), tokens, times[0] - began, times[-1] - times[0])


def _chunks(url: str, body: dict[str, object]) -> Iterator[_Chunk]:
    with httpx.stream("POST", url, json=body, timeout=START_S, trust_env=False) as response:
        if not response.is_success:
            raise MeshError(f"the endpoint answered {response.status_code}: {response.read().decode(errors='replace')}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = msgspec.json.decode(line.removeprefix("data: "), type=_Chunk)
                if chunk.error is not None:
                    raise MeshError(f"the endpoint broke off: {chunk.error.message}")
                yield chunk


def _stay(nodes: list[TrialNode], status: NodeStatus, console: Console) -> None:
    deployment = _serving(status)
    assert deployment is not None
    console.print("\nask it yourself (any OpenAI client works; Ctrl-C ends the demonstration):\n")
    console.print(f"  {curl_line(status.api_url, deployment.model, 'What is a lane?')}\n", markup=False)
    while all(node.alive for node in nodes):
        time.sleep(POLL_S)
    ended = next(node for node in nodes if not node.alive)
    raise Unavailable(f"node {ended.name} has ended:\n{ended.last_words}")
