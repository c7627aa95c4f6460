"""`meshnode bench link`: what a stream between two members carries. Two processes, mutual TLS over loopback.

Round trips of a framed message as large as the activations of one row, and artifacts as a joiner fetches them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Final

import msgspec
import trio
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console
from rich.table import Table

from meshnode.app.bench.echo_main import ANSWER, private_pem
from meshnode.app.bench.throwaway import member_credentials
from meshnode.errors import ConfigError
from meshnode.identity.credentials import Credentials
from meshnode.io.stage.spawn import ChildProcess
from meshnode.io.transport.transport import Transport
from meshnode.wire.artifacts import CHUNK_BYTES
from meshnode.wire.preface import StreamClass

MESSAGE_BYTES: Final = 20_000
BARS: Final = {"median_us": 250.0, "p99_us": 500.0, "mb_per_s": 350.0}
"""NETWORK, the table of bars."""
_MODULE: Final = "meshnode.app.bench.echo_main"


@dataclass(frozen=True)
class LinkOptions:
    """`trips` round trips and `megabytes` in one stream, in turns, `rounds` times."""

    trips: int = 1000
    megabytes: int = 512
    rounds: int = 5

    def __post_init__(self) -> None:
        if not (100 <= self.trips <= 1_000_000 and 1 <= self.megabytes <= 100_000 and 1 <= self.rounds <= 100):
            raise ConfigError(
                "bench link takes 100 to 1000000 trips, 1 to 100000 MB and 1 to 100 rounds", "Leave the options out."
            )


class LinkReport(msgspec.Struct, frozen=True):
    """The object of `bench link --json`; medians over rounds."""

    message_bytes: int
    rounds: int
    median_us: float
    p99_us: float
    mb_per_s: float
    """10^6 bytes."""
    within: bool
    """Every figure meets its bar."""


def run_link(options: LinkOptions, progress: Callable[[str], None] = lambda _: None) -> LinkReport:
    """Measure. Raises ConfigError, LinkLost, StageLost."""
    return trio.run(_measure, options, progress)


async def _measure(options: LinkOptions, progress: Callable[[str], None]) -> LinkReport:
    middles, tails, rates = [], [], []
    ours, theirs = member_credentials(2)
    async with _echo(theirs) as port:
        transport, address = Transport(ours), [f"127.0.0.1:{port}"]
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            trips = await _round_trips(transport, theirs, address, options.trips)
            middles.append(median(trips) * 1e6)
            tails.append(quantiles(trips, n=100)[98] * 1e6)
            rates.append(await _bulk(transport, theirs, address, options.megabytes * 1_000_000))
    found = {"median_us": median(middles), "p99_us": median(tails), "mb_per_s": median(rates)}
    within = (
        found["median_us"] <= BARS["median_us"]
        and found["p99_us"] <= BARS["p99_us"]
        and found["mb_per_s"] >= BARS["mb_per_s"]
    )
    rounded = {name: round(figure, 1) for name, figure in found.items()}
    return LinkReport(message_bytes=MESSAGE_BYTES, rounds=options.rounds, within=within, **rounded)


@asynccontextmanager
async def _echo(credentials: Credentials) -> AsyncIterator[int]:
    """The other member, in a process of its own; its port."""
    async with trio.open_nursery() as nursery:
        child = await ChildProcess.start(nursery, "the other member", _MODULE, {})
        try:
            identity = {
                "key": private_pem(credentials),
                "chain": credentials.chain_pem.decode(),
                "root": credentials.root.public_bytes(Encoding.PEM).decode(),
            }
            request = json.dumps(identity).encode() + b"\n"
            while request:
                request = request[await child.connection.send(request) :]
            told = await child.connection.recv(16)
            if not told:
                await child.ended.wait()
                raise child.lost()
            yield int(told)
        finally:
            await child.aclose()
        nursery.cancel_scope.cancel()


async def _round_trips(transport: Transport, peer: Credentials, address: list[str], count: int) -> list[float]:
    stream = await transport.dial(peer.node_id, address, StreamClass.CONTROL)
    message, seconds = bytes(MESSAGE_BYTES), []
    for _ in range(count):
        began = perf_counter()
        await stream.send_frame(message)
        await stream.receive_frame()
        seconds.append(perf_counter() - began)
    await stream.aclose()
    return seconds


async def _bulk(transport: Transport, peer: Credentials, address: list[str], size: int) -> float:
    """10^6 bytes a second, from the first byte to the other side's word that it has the last one."""
    stream = await transport.dial(peer.node_id, address, StreamClass.BULK)
    chunk = bytes(CHUNK_BYTES)
    await stream.send_frame(str(size).encode())
    began = perf_counter()
    for sent in range(0, size, CHUNK_BYTES):
        await stream.send_bytes(chunk[: size - sent])
    assert await stream.receive_frame() == ANSWER
    took = perf_counter() - began
    await stream.aclose()
    return size / 1e6 / took


def print_link(report: LinkReport, console: Console) -> None:
    """The report for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"MEDIANS OF {report.rounds} ROUNDS")
    table.add_column("MEASURED", justify="right")
    table.add_column("BAR", justify="right")
    kilobytes = f"{report.message_bytes / 1000:.0f} KB"
    table.add_row(f"round trip of {kilobytes}, median", f"{report.median_us:.0f} us", f"{BARS['median_us']:.0f} us")
    table.add_row(f"round trip of {kilobytes}, p99", f"{report.p99_us:.0f} us", f"{BARS['p99_us']:.0f} us")
    table.add_row("one bulk stream", f"{report.mb_per_s:.0f} MB/s", f"{BARS['mb_per_s']:.0f} MB/s")
    console.print(table)
