from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from rich.console import Console

from meshnode.app.bench.delay import DelayedLink
from meshnode.app.bench.planning import PlanCase, PlanOptions, PlanReport, PlanRig, _case, print_plan, run_plan
from meshnode.app.bench.quota import Quotas
from meshnode.demo import MODEL
from meshnode.errors import ConfigError, ModelError


@pytest.mark.native
def test_a_pipeline_is_predicted_by_the_planner_and_measured_over_slow_links() -> None:
    report = run_plan(PlanOptions(MODEL, rounds=1, rigs=(PlanRig((100, 100), delay_ms=20.0),)))
    (case,) = report.cases
    # Two hops of 20 ms each: to the second stage and back. That the rest fits is for a quiet machine to say.
    assert case.measured_ms > 40
    assert case.predicted_ms > 40
    assert (case.name, case.skipped, len(case.errors_percent)) == ("2 stages, 100/100 %, 20 ms", "", 1)
    assert case.within == (abs(case.error_percent) <= 15)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_with_too_few_layers_is_refused_before_anything_is_measured(layers: int) -> None:
    said: list[str] = []
    with pytest.raises(ModelError, match="cannot be split") as refused:
        run_plan(PlanOptions(layers=layers, embd=256), said.append)
    assert refused.value.hint == "take one of 4 layers or more"
    assert said == [f"writing noise-{layers}x256-q8_0.gguf"]


async def test_a_delayed_link_keeps_order_and_ends(nursery: trio.Nursery) -> None:
    link = DelayedLink(nursery, 0.0)
    near, far = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in await link.connect()]
    async with near, far:
        sent = b"".join(number.to_bytes(4) for number in range(50_000))
        nursery.start_soon(near.send_all, sent)
        got = bytearray()
        while len(got) < len(sent):
            got += await far.receive_some()
        assert bytes(got) == sent
        await near.send_eof()
        assert await far.receive_some() == b""
        await far.send_all(b"still heard")
        assert await near.receive_some() == b"still heard"


async def test_a_link_is_measured_through_its_own_delay(nursery: trio.Nursery) -> None:
    way = await DelayedLink(nursery, 0.005).measure()
    assert way.rtt_us >= 10_000
    assert way.bytes_per_s > 0


def test_a_group_that_was_made_is_gone_afterwards(tmp_path: Path) -> None:
    quotas = Quotas()
    if not quotas.available:
        pytest.skip("this user may make no control group")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    quotas.put(process.pid, 50)
    group = next(line for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines() if "meshnode" in line)
    assert group.endswith(f"meshnode-bench-{os.getpid()}-50")
    process.communicate(b"\n", timeout=60)
    quotas.close()
    assert not list(Path("/sys/fs/cgroup").rglob(f"meshnode-bench-{os.getpid()}-*"))
    assert not Quotas(tmp_path).available, "where nothing can be made, nothing is"


def test_the_error_is_the_median_of_the_rounds_and_decides() -> None:
    case = _case(PlanRig((100, 50), 5.0), [11_000.0, 9_000.0, 13_000.0], [10_000.0, 10_000.0, 10_000.0])
    assert (case.predicted_ms, case.measured_ms, case.error_percent) == (11.0, 10.0, 10.0)
    assert case.errors_percent == (10.0, -10.0, 30.0)
    assert case.within
    assert not _case(PlanRig((100,)), [20_000.0], [10_000.0]).within


def test_a_report_says_what_was_left_out_and_what_is_too_far() -> None:
    cases = (
        PlanCase("one", (100,), 0.0, 12.0, 10.0, 20.0, (20.0,)),
        PlanCase("two", (100, 25), 0.0, skipped="no quota of a processor can be set here"),
    )
    text = io.StringIO()
    print_plan(PlanReport("m", 1, 1, 15, cases, within=False), Console(file=text, width=140))
    assert "too far" in text.getvalue()
    assert "skipped: no quota" in text.getvalue()


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        PlanOptions(rounds=0)
