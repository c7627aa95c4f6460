"""A node in the foreground: how it leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.app.cli.failure import INTERRUPTED
from meshnode.app.cli.foreground import DESCRIPTORS, DRAIN_S, run_in_foreground
from meshnode.app.config import Settings
from meshnode.errors import ConfigError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, name="desk", port=0, api_port=0)


def test_ctrl_c_asks_the_node_to_drain_and_waits_for_it(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []

    async def node(given: Settings, stop: trio.Event) -> None:
        assert given is settings
        signal.raise_signal(signal.SIGINT)
        await stop.wait()
        await trio.lowlevel.checkpoint()
        steps.append("drained")

    assert run_in_foreground(settings, node) == INTERRUPTED
    assert steps == ["drained"]
    assert "leaving" in capsys.readouterr().out


def test_being_terminated_is_leaving_without_an_error(settings: Settings) -> None:
    async def node(given: Settings, stop: trio.Event) -> None:
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()

    assert run_in_foreground(settings, node) == 0


def test_a_node_that_does_not_drain_is_cancelled_in_time(settings: Settings) -> None:
    left: list[float] = []

    async def node(given: Settings, stop: trio.Event) -> None:
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
        began = trio.current_time()
        try:
            await trio.sleep_forever()
        finally:
            left.append(trio.current_time() - began)

    assert run_in_foreground(settings, node, clock=trio.testing.MockClock(autojump_threshold=0)) == 0
    assert left == [pytest.approx(DRAIN_S, abs=0.1)]


def test_a_node_that_ends_by_itself_ends_the_command(settings: Settings) -> None:
    async def node(given: Settings, stop: trio.Event) -> None:
        await trio.lowlevel.checkpoint()

    assert run_in_foreground(settings, node) == 0


def test_a_nodes_error_reaches_whoever_tells_it(settings: Settings) -> None:
    async def node(given: Settings, stop: trio.Event) -> None:
        raise ConfigError("the port is taken")

    with pytest.RaisesGroup(ConfigError):
        run_in_foreground(settings, node)


def test_an_insecure_endpoint_is_warned_of(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """R100: whatever is neither authenticated nor encrypted says so at the start."""

    async def node(given: Settings, stop: trio.Event) -> None:
        await trio.lowlevel.checkpoint()

    open_settings = Settings(data=settings.data, api_host="192.0.2.7", insecure=True)
    assert run_in_foreground(open_settings, node) == 0
    assert "unencrypted" in caplog.text
    caplog.clear()
    key = "k3" * 12
    assert run_in_foreground(Settings(data=settings.data, api_host="192.0.2.7", api_key=(key,)), node) == 0
    assert "keys cross the network unencrypted" in caplog.text
    assert key not in caplog.text


def test_a_node_may_open_what_its_own_limits_allow() -> None:
    """In a process of its own: the limit belongs to all of one."""
    resource = pytest.importorskip("resource")
    program = (
        "import resource as r; from meshnode.app.cli.foreground import allow_descriptors as allow\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]\n"
        "for soft in (min(256, hard) if hard > 0 else 256, hard):\n"
        "    r.setrlimit(r.RLIMIT_NOFILE, (soft, hard)); allow(); print(*r.getrlimit(r.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    raised, untouched = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    allowed = untouched[1] if untouched[1] != resource.RLIM_INFINITY else DESCRIPTORS
    assert raised == (min(DESCRIPTORS, allowed), untouched[1])
    assert untouched[0] == untouched[1]
