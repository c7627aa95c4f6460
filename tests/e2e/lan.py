"""A local network of machines that share nothing but wires: a network namespace each, two bridges, a router that leads
nowhere, and a witness of every frame. Needs a kernel that lets this user make namespaces.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e import nodes
from tests.e2e.nodes import WAIT_S, until

HOME, CLOSET = "192.168.77", "10.77.0"
"""Two networks: every machine has an interface, and addresses, in both."""
ROUTER = 254
LOCAL = tuple(
    ipaddress.ip_network(each)
    for each in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)
MDNS = ("224.0.0.251", "ff02::fb")
WITNESS = """
import ipaddress, socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # every protocol, every interface
print("ready", flush=True)
seen = set()
while True:
    packet, (_, protocol, *_) = wire.recvfrom(65536)
    if protocol == 0x0800 and len(packet) >= 20:
        target, kind, rest = packet[16:20], packet[9], packet[(packet[0] & 15) * 4:]
    elif protocol == 0x86DD and len(packet) >= 40:
        target, kind, rest = packet[24:40], packet[6], packet[40:]
    else:
        continue
    port = int.from_bytes(rest[2:4], "big") if kind in (6, 17) else 0
    line = f"{ipaddress.ip_address(target)} {kind} {port}"
    if line not in seen:
        seen.add(line)
        print(line, flush=True)
"""
TCP, UDP = 6, 17


def refusal() -> str:
    """Why there can be no such network here; empty: there can."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return "util-linux and iproute2 are needed"
    tried = "ip link add one type veth peer name two && ip link add three type bridge && mount -t tmpfs none /mnt"
    done = subprocess.run(["unshare", "-rnm", "sh", "-c", tried], capture_output=True, text=True, check=False)
    return f"the kernel refuses: {done.stderr.strip()}" if done.returncode else ""


class _Holder:
    """A process that keeps namespaces alive and does nothing."""

    def __init__(self, *command: str) -> None:
        ready = [*command, "sh", "-c", "echo ready; exec cat"]
        self._process = subprocess.Popen(ready, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = self._process.pid

    def inside(self, *, mounts: bool = False) -> list[str]:
        """The beginning of a command that runs there."""
        return ["nsenter", "-t", str(self.pid), "-U", "-n", *(["-m"] if mounts else []), "--preserve-credentials", "--"]

    def do(self, command: str, *, mounts: bool = False) -> None:
        words = [*self.inside(mounts=mounts), "sh", "-ec", command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def close(self) -> None:
        self._process.communicate()


class Network:
    """The wires. Every frame on them is seen by the witness."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self.switch = _Holder("unshare", "-rn")
        for bridge, network in (("home", HOME), ("closet", CLOSET)):
            self.switch.do(f"ip link add {bridge} type bridge; ip link set {bridge} up")
            self.switch.do(f"ip addr add {network}.{ROUTER}/24 dev {bridge}")
        self.switch.do("ip -6 addr add fd77::fe/64 dev home nodad; ip link set lo up")
        self._log = folder / "witness.log"
        with self._log.open("wb") as log:
            words = [*self.switch.inside(), sys.executable, "-c", WITNESS]
            self._witness = subprocess.Popen(words, stdout=log, stdin=subprocess.DEVNULL)
        until("the witness looks", lambda: "ready" in self._log.read_text())

    def machine(self, name: str, number: int) -> Machine:
        made = Machine(self, name, number)
        self.machines.append(made)
        return made

    def packets(self) -> set[tuple[str, int, int]]:
        """(address, protocol, port) of everything that was ever sent."""
        told = [line.split() for line in self._log.read_text().splitlines()[1:]]
        return {(host, int(kind), int(port)) for host, kind, port in told}

    def outward(self) -> set[tuple[str, int, int]]:
        """What left the local network or asked for a name. The kernel's own multicast (ICMP, IGMP) is nobody's."""
        return {each for each in self.packets() if not _stays(*each)}

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        self._witness.kill()
        self._witness.wait(WAIT_S)
        self.switch.close()


def _stays(host: str, kind: int, port: int) -> bool:
    ip = ipaddress.ip_address(host)
    if ip.is_multicast:
        return kind not in (TCP, UDP) or (host in MDNS and port == 5353)
    return port != 53 and any(ip in network for network in LOCAL if network.version == ip.version)


class Machine:
    """One machine with at most one node, used as a person would: by its command line."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.data = network.folder / name
        self.log = network.folder / f"{name}.log"
        self.node: subprocess.Popen[bytes] | None = None
        names = network.folder / "resolv.conf"
        names.write_text(f"nameserver {HOME}.{ROUTER}\n")
        self._holder = _Holder(*network.switch.inside(), "unshare", "-nm")
        self._holder.do(f"mount --bind {names} /etc/resolv.conf", mounts=True)
        for own, bridge in (("eth0", "home"), ("eth1", "closet")):
            wire = f"{bridge}{number}"
            network.switch.do(f"ip link add {wire} type veth peer name {own} netns {self._holder.pid}")
            network.switch.do(f"ip link set {wire} master {bridge} up")
        self.do("ip link set lo up; ip link set eth0 up; ip link set eth1 up")
        self.do(f"ip addr add {HOME}.{number}/24 dev eth0; ip addr add {CLOSET}.{number}/24 dev eth1")
        self.do(f"ip -6 addr add fd77::{number}/64 dev eth0 nodad; ip route add default via {HOME}.{ROUTER}")
        self.do("ip -6 route add default via fd77::fe")

    def do(self, command: str) -> None:
        """A command of its administrator."""
        self._holder.do(command)

    def moves(self, number: int) -> None:
        """Another address, and nothing of the old ones left."""
        self.do("ip link set eth1 down; ip -6 addr flush dev eth0 scope global")
        self.do(f"ip addr del {HOME}.{self.number}/24 dev eth0; ip addr add {HOME}.{number}/24 dev eth0")
        self.do(f"ip route replace default via {HOME}.{ROUTER}")
        self.number = number

    def words(self, *arguments: str) -> list[str]:
        """The whole command line of `meshnode <arguments>` on this machine."""
        inside = self._holder.inside(mounts=True)
        return [*inside, sys.executable, "-m", "meshnode.app.cli", *arguments, "--data", str(self.data)]

    def environment(self) -> dict[str, str]:
        return {**nodes.environment(), "MESHNODE_MDNS": "true", "MESHNODE_NAME": self.name, "PYTHONPATH": os.getcwd()}

    def start(self, *arguments: str) -> None:
        """`meshnode <arguments>` on the ports that everybody has."""
        with self.log.open("ab") as log:
            words, given = self.words(*arguments, "--threads", "1"), self.environment()
            self.node = subprocess.Popen(words, env=given, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until(f"{self.name} answers", self.answers)

    def answers(self) -> bool:
        assert self.node is None or self.node.poll() is None, self.log.read_text()
        return (self.data / "node.json").exists()

    def ask(self, *arguments: str) -> Any:
        """The answer of `meshnode <arguments> --json`."""
        done = self.run(*self.words(*arguments, "--json"))
        return json.loads(done)

    def tell(self, *arguments: str) -> str:
        return self.run(*self.words(*arguments))

    def python(self, program: str) -> str:
        return self.run(*self._holder.inside(mounts=True), sys.executable, "-c", program)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment(), capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode == 0, done.stderr + self.log.read_text()[-2000:]
        return done.stdout

    def peer(self, name: str) -> dict[str, Any]:
        """What it says of another; empty when it knows none of that name."""
        return next((each for each in self.ask("status")["peers"] if each["name"] == name), {})

    def linked_to(self, *others: Machine) -> bool:
        linked = {each["name"] for each in self.ask("status")["peers"] if each["state"] == "linked"}
        return linked >= {other.name for other in others}

    def stop(self) -> int:
        assert self.node is not None
        self.node.send_signal(signal.SIGTERM)
        code, self.node = self.node.wait(WAIT_S), None
        return code

    def close(self) -> None:
        if self.node is not None and self.node.poll() is None:
            self.node.kill()
            self.node.wait(WAIT_S)
        self._holder.close()
