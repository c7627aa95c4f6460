"""Three machines on one local network whose router leads nowhere: everything works, and nothing is tried elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from meshnode.wire.limits import DIAL_CANDIDATES
from tests.e2e.lan import HOME, UDP, Machine, Network, refusal
from tests.e2e.nodes import until
from tests.e2e.test_lan import Terminal

REFUSAL = refusal()
pytestmark = [pytest.mark.e2e, pytest.mark.native, pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)]
MEMORY = ("--memory", "1GB")
PUBLIC = ("203.0.113.7:8420", "[2001:db8::7]:8420", "[::ffff:203.0.113.8]:8420", "node.example:8420")
"""What a member may announce; the rest of it are addresses of this network."""
CHAT = f"""
import httpx
body = {{"messages": [{{"role": "user", "content": {QUESTION!r}}}], "temperature": 0}}
answer = httpx.post("http://127.0.0.1:8421/v1/chat/completions", json=body, timeout=60)
print(answer.json()["choices"][0]["message"]["content"], end="")
"""
ASK = """
import socket, sys
source, port, target = sys.argv[1:]
name = b"".join(bytes([len(part)]) + part for part in (b"_meshnode", b"_tcp", b"local")) + bytes(1)
ask = bytes([0, 1, 0, 0, 0, 1] + [0] * 6) + name + bytes([0, 12, 0x80, 1])  # PTR, answer to the asker alone
wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
wire.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("192.168.77.254"))
wire.bind((source, int(port)))
wire.sendto(ask, (target, 5353))
"""
HINTS = """
import sys, trio
from meshnode.io.mdns import open_mdns
async def main():
    with trio.fail_after(50):
        async with open_mdns(None, ()) as hints:
            async for hint in hints:
                if {host!r} in hint.hosts:
                    break
trio.run(main)
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def desk(network: Network) -> Machine:
    """It made the mesh and serves."""
    made = network.machine("desk", 1)
    made.start("serve", str(MODEL), *MEMORY)
    return made


@pytest.fixture
def attic(network: Network, desk: Machine) -> Machine:
    """It joined by invite."""
    made = network.machine("attic", 2)
    made.start("join", desk.ask("invite")["invite"], *MEMORY)
    until("both are linked", lambda: desk.linked_to(made) and made.linked_to(desk))
    return made


def test_the_witness_sees_what_leaves(network: Network) -> None:
    """Or the other tests would prove nothing."""
    machine = network.machine("desk", 1)
    assert not network.outward()
    send = "import socket; socket.socket(socket.AF_{}, socket.SOCK_DGRAM).sendto(b'', ({!r}, {}))"
    machine.python(send.format("INET", "203.0.113.9", 9))
    machine.python(send.format("INET6", "2001:db8::9", 9))
    machine.python("import socket\ntry: socket.getaddrinfo('node.example', 1)\nexcept OSError: pass")
    expected = {("203.0.113.9", UDP, 9), ("2001:db8::9", UDP, 9), (f"{HOME}.254", UDP, 53)}
    until("all is seen", lambda: network.outward() == expected)


def test_a_mesh_lives_on_its_network_and_tries_nothing_elsewhere(
    network: Network, desk: Machine, attic: Machine
) -> None:
    cellar = network.machine("cellar", 3)
    announced = ",".join((*PUBLIC, f"{HOME}.3:8420"))
    assert len(announced.split(",")) <= DIAL_CANDIDATES
    by_number(cellar, desk)
    cellar.start("join", *MEMORY, "--advertise", announced)
    three = (desk, attic, cellar)
    for each in three:
        until("all are linked", lambda each=each: each.linked_to(*(other for other in three if other is not each)))
        until("it answers", lambda each=each: each.ask("status")["deployments"])
        assert each.python(CHAT) == EXPECTED_ANSWER
    assert attic.peer("cellar")["addresses"] == announced.split(",")
    for each in (desk, attic):
        assert each.ask("ping", "cellar")["address"].endswith(f"{HOME}.3:8420")
    assert attic.stop() == 0
    attic.start("join", *MEMORY)
    until("it is back", lambda: all(attic.linked_to(other) for other in (desk, cellar)))
    for each in three:
        assert each.stop() == 0
    assert network.outward() == set()


def by_number(joiner: Machine, issuer: Machine) -> None:
    """Two people compare a number; the new member is stopped again."""
    terminal = Terminal(joiner.data, joiner.words("join", *MEMORY), joiner.environment())
    joiner.node = terminal.process
    terminal.type(terminal.awaited(rf"(\d+)  mesh {issuer.ask('status')['mesh'][:8]}")[1])
    number = terminal.awaited(r"show (\d{3} \d{3})\? \[y/N\]")[1]
    issuer.tell("approve", *number.split())
    terminal.type("y")
    until("it is a member", joiner.answers)
    terminal.process.send_signal(signal.SIGTERM)
    until("it has left", lambda: terminal.shows("$^") or terminal.process.poll() is not None)
    terminal.close()


@pytest.mark.parametrize("port", [5353, 40000], ids=["as a responder", "as a simple resolver"])
def test_a_question_that_says_it_comes_from_outside_is_not_answered_there(
    network: Network, desk: Machine, port: int
) -> None:
    network.switch.do("ip addr add 203.0.113.66/32 dev lo")
    for target in (f"{HOME}.1", "224.0.0.251"):
        network.switch.do(f"{sys.executable} -c '{ASK}' 203.0.113.66 {port} {target}")
        desk.python(HINTS.format(host=f"{HOME}.1"))  # answered after the first question, so that one was read
    assert network.outward() == set()


def test_with_wan_an_announced_public_address_is_dialed(network: Network, desk: Machine) -> None:
    attic = network.machine("attic", 2)
    attic.start("join", desk.ask("invite")["invite"], *MEMORY, "--wan", "--advertise", f"{PUBLIC[0]},{HOME}.2:8420")
    until("both are linked", lambda: desk.linked_to(attic))
    assert desk.stop() == 0
    assert network.outward() == set()
    desk.start("join", "--wan", *MEMORY)
    until("it was tried", lambda: any(host == "203.0.113.7" for host, _, _ in network.outward()))
    until("both are linked", lambda: desk.linked_to(attic))


def test_a_machine_that_moves_says_so_and_is_found(network: Network, desk: Machine, attic: Machine) -> None:
    attic.do(f"ip addr add {HOME}.42/24 dev eth0")
    until("its announcement says so", lambda: f"{HOME}.42:8420" in desk.peer("attic")["addresses"])
    desk.python(HINTS.format(host=f"{HOME}.42"))


def test_two_machines_that_both_moved_find_each_other_again(network: Network, desk: Machine, attic: Machine) -> None:
    desk.moves(11)
    attic.moves(12)
    until("neither link lasts", lambda: not desk.linked_to(attic))
    until("each knows where the other is", lambda: desk.linked_to(attic) and attic.linked_to(desk))
    assert desk.peer("attic")["addresses"] == [f"{HOME}.12:8420"]
    assert attic.peer("desk")["addresses"] == [f"{HOME}.11:8420"]
    assert network.outward() == set()
