"""One simulated machine: a real mediator, and around it what a runtime, a disk, a clock and a process do to it.

Invariant: effects of one event are begun before the next event is handed in, and a Persist is on disk before anything
behind it that rests on it is begun, as in app/runtime; a crash in between loses both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.left_out import in_place_of
from meshnode.core.node.mediator import Mediator, Self
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import AnyMessage, Unrecognised, decode, encode
from sim.agenda import stream
from sim.engine import Engine
from sim.keys import SimulatedAuthority
from sim.network import End

if TYPE_CHECKING:
    from sim.world import World

LAYERS = 12
"""Of the model that is served."""
DISK_S = 0.003
"""A write with fsync on a plain SSD."""


@dataclass
class Clock:
    """The monotonic clock of one machine; `offset` is when it was switched on, `rate` how fast it runs."""

    rate: float = 1.0
    offset: float = 0.0
    calendar_step_s: float = 0.0
    """How far the machine's calendar is off; certificates are judged by it."""

    def read(self, now: float) -> float:
        """What the machine believes at `now` of the world."""
        return self.offset + now * self.rate

    def when(self, local: float) -> float:
        """The time of the world at which it believes `local`."""
        return (local - self.offset) / self.rate


@dataclass
class Disk:
    """What survives a crash."""

    ledger: bytes | None = None
    revocations: bytes | None = None
    demands: bytes | None = None
    files: set[str] = field(default_factory=set)
    """Manifests of the models whose file lies here."""
    cached: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Layers that were fetched, by manifest."""
    invites: bytes | None = None
    incarnation: int = 0
    peers: dict[NodeId, tuple[str, ...]] = field(default_factory=dict)
    write_s: float = DISK_S
    full: bool = False

    def told(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """What the node says that lies here."""
        return {**self.cached, **dict.fromkeys(sorted(self.files), ((0, LAYERS),))}

    def layers(self, digest: str) -> set[int]:
        """Layers of a model that lie here."""
        return {layer for first, last in self.told().get(digest, ()) for layer in range(first, last)}

    def fetched(self, digest: str, first: int, last: int) -> None:
        """A slice more."""
        ranges = self.cached.get(digest, ())
        if (first, last) not in ranges:
            self.cached[digest] = (*ranges, (first, last))


class Machine:
    """A computer with one node on it."""

    def __init__(self, world: World, name: str, me: Self, authority: SimulatedAuthority, clock: Clock) -> None:
        self.world, self.name, self.me, self.authority, self.clock = world, name, me, authority, clock
        self.node = authority.node
        self.at = self.node
        """Its place in the network: the node's id, but for a second machine with the same key."""
        self.disk = Disk()
        self.since = world.now
        """When it came into the world."""
        self.on = True
        self.paused = False
        self.mediator: Mediator | None = None
        self.links: dict[NodeId, End] = {}
        self.engine = Engine(self)
        self.random: Random = stream(world.seed, "machine", name)
        self.life = 0
        self.last_local = 0.0
        self._inbox: deque[on.Event] = deque()
        self._draining = self._writing = False
        self._wake_at: float | None = None
        self._deadline: float | None = None
        """The mediator's, while it was handed nothing since it said so."""

    @property
    def listening(self) -> bool:
        """Whether the process runs."""
        return self.mediator is not None

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Switch the machine and its node on, with what its disk holds."""
        self.on, self.paused = True, False
        self.life += 1
        self.disk.incarnation += 1
        self._inbox.clear()
        self._draining = self._writing = False
        self._wake_at = self._deadline = None
        now = self.clock.read(self.world.now)
        self.last_local = now
        self.me = replace(self.me, incarnation=self.disk.incarnation)
        draws = stream(self.world.seed, "draw", self.name, self.life)
        self.mediator = self.world.make_mediator(self.me, self.authority, draws.randbytes, now)
        if self.disk.ledger is not None:
            self.mediator.ledger.restore(self.disk.ledger)
        if self.disk.revocations is not None:
            self.mediator.membership.restore(self.disk.revocations)
        if self.disk.demands is not None:
            self.mediator.register.restore(self.disk.demands, 0)
        self.engine = Engine(self)
        self.world.checks.started(self)
        self.hand(on.CacheChanged(self.disk.told()))
        for node, addresses in list(self.disk.peers.items()):
            self.hand(on.PeerFound(node, addresses))

    def crash(self, *, power: bool) -> None:
        """The process dies at once; with `power` the whole machine, so that nobody is told."""
        if self.mediator is None:
            return
        self.keep_peers()
        self.mediator, self.paused = None, False
        self.life += 1
        self.on = not power
        ends, self.links = list(self.links.values()), {}
        for end in ends:
            if power:
                self.world.network.abort(end)
            else:
                self.world.network.close(end)
        self.engine.stop_all()

    def keep_peers(self) -> None:
        """Write down where the others are, as a node does all the time."""
        if self.mediator is not None:
            entries = self.mediator.roster.entries
            self.disk.peers.update({node: entry.body.addresses for node, entry in entries.items()})

    def pause(self) -> None:
        """The process is frozen, or the machine suspended; its sockets stay."""
        self.paused = self.mediator is not None

    def resume(self) -> None:
        """Go on, with everything that came in the meantime."""
        if self.paused:
            self.paused = False
            self._drain()

    # --- events -------------------------------------------------------------------------------------------------

    def hand(self, event: on.Event) -> None:
        """Queue one event for the mediator."""
        if self.mediator is not None:
            self._inbox.append(event)
            if not self._draining:
                self._drain()

    def later(self, delay: float, event: on.Event) -> None:
        """Hand in an event after a while, if this life lasts so long."""
        self.after(delay, lambda: self.hand(event))

    def after(self, delay: float, act: Callable[[], None]) -> None:
        """Do something after a while, if this life lasts so long."""
        life = self.life
        self.world.agenda.after(delay, lambda: act() if self.life == life else None)

    def _drain(self) -> None:
        self._draining = True
        while self._inbox and self.mediator is not None and not self.paused and not self._writing:
            self._handle(self._inbox.popleft())
        self._draining = False
        if self.world.mint.revoked and not (self._inbox or self.paused or self._writing):
            self.world.checks.settled(self)
        self._set_alarm()

    def _handle(self, event: on.Event) -> None:
        mediator, world = self.mediator, self.world
        assert mediator is not None
        local = self.last_local = max(self.clock.read(world.agenda.now), self.last_local)
        world.note(self.name, event)
        self._deadline = None
        effects = mediator.handle(event, local)
        world.checks.handled(self, event, effects)
        if effects:
            self._execute(deque(effects))

    def _set_alarm(self) -> None:
        if self.mediator is None or self.paused or self._writing:
            return
        deadline = self._deadline = self.mediator.deadline()
        if deadline is None:
            return
        agenda, wake_at = self.world.agenda, self._wake_at
        at = max(self.clock.when(deadline), agenda.now)
        if wake_at is None or at < wake_at or wake_at < agenda.now:
            self._wake_at = at
            agenda.at(at, partial(self._alarm, self.life, at))

    def _alarm(self, life: int, at: float) -> None:
        if life != self.life or self._wake_at != at or self.mediator is None:
            return
        self._wake_at = None
        if self.paused or self._writing:
            return
        deadline = self._deadline if self._deadline is not None else self.mediator.deadline()
        local = self.clock.read(self.world.now)
        # Rounding between two clocks must not wake it a hair too early for ever.
        if deadline is not None and local < deadline <= local + 1e-6:
            self.last_local = max(self.last_local, deadline)
        if deadline is not None and deadline <= max(local, self.last_local):
            self.hand(on.TimePassed())
        else:
            self._set_alarm()

    # --- effects ------------------------------------------------------------------------------------------------

    def _execute(self, effects: deque[do.Effect]) -> None:
        written = True
        while effects:
            effect = effects.popleft()
            # Their kinds one by one: looking at a union costs ten times as much, and every effect is looked at.
            if isinstance(effect, (do.Persist, do.KeepRevocations, do.KeepDemands)):
                if self.disk.full:  # and stays full until the next event of the world: nothing below is written either
                    written = False
                    continue
                self._writing = True
                write = partial(self._written, effect)
                if self.random.random() < 0.5:  # a crash may come before or after the rename
                    self.after(0.0, write)
                self.after(self.disk.write_s, partial(self._go_on, write, effects))
                return
            if written or not isinstance(effect, do.Resting):  # as app/runtime
                self._do(effect)
            elif (instead := in_place_of(effect)) is not None:
                self.later(0.0, instead)

    def _written(self, effect: do.Write) -> None:
        match effect:
            case do.Persist():
                self.disk.ledger = effect.ledger
            case do.KeepRevocations():
                self.disk.revocations = effect.lists
            case do.KeepDemands():
                self.disk.demands = effect.demands

    def _go_on(self, write: Callable[[], None], effects: deque[do.Effect]) -> None:
        write()
        self._writing = False
        self._draining = True
        self._execute(effects)
        self._draining = False
        self._drain()

    def _do(self, effect: do.Action) -> None:
        self.world.checks.obeys(self, effect)
        match effect:
            case do.Send():
                self.send(effect.peer, effect.message)
            case do.Dial():
                self.world.network.dial(self.at, self.world.place_of(effect.node, effect.addresses))
            case do.CloseLink():
                end = self.links.pop(effect.peer, None)
                if end is not None:
                    self.world.network.close(end)
                    self.hand(on.LinkClosed(effect.peer, effect.reason))
            case do.Trace():
                pass
            case _:
                self.engine.carry_out(effect)

    def send(self, peer: NodeId, message: AnyMessage) -> None:
        """Put a message on the current link; dropped without one."""
        end = self.links.get(peer)
        if end is not None:
            frame = encode(message)
            self.world.checks.sends(self, frame)
            self.world.network.send(end, frame)

    # --- the network's side: the same rules as app/control -------------------------------------------------------

    def accepted(self, end: End) -> None:
        """A link that a peer dialed."""
        self._serve(end)

    def dialed(self, end: End) -> None:
        """A link that this node dialed; only counts in the life that dialed it."""
        if self.mediator is None:
            self.world.network.close(end)
        elif end.open:
            self._serve(end)
        else:
            self.dial_failed(end.peer, "closed")

    def dial_failed(self, place: NodeId, reason: str) -> None:
        """A dial came to nothing; of no interest where there is a link."""
        node = self.world.node_at[place]
        if node not in self.links:
            self.hand(on.LinkClosed(node, reason))

    def arrived(self, end: End, frame: bytes) -> None:
        """One message; kept by the kernel while the process stands still."""
        if self.mediator is None:
            return
        self.world.note_frame(self.name, frame)
        try:
            message = decode(frame)
        except PeerError as error:
            self._over(end, str(error))
            return
        if isinstance(message, Unrecognised):
            self.world.network.send(end, encode(message.reply))
        else:
            self.hand(on.Received(self.world.node_at[end.peer], message))

    def ended(self, end: End, reason: str) -> None:
        """The stream is over."""
        peer = self.world.node_at[end.peer]
        if self.links.get(peer) is end:
            del self.links[peer]
            self.hand(on.LinkClosed(peer, reason))

    def _over(self, end: End, reason: str) -> None:
        self.world.network.close(end)
        self.ended(end, reason)

    def _serve(self, end: End) -> None:
        peer = self.world.node_at[end.peer]
        present = self.links.get(peer)
        if present is not None:
            if present.dialer != end.dialer and self.world.node_at[present.dialer] == min(peer, self.node):
                self.world.network.close(end)
                return
            self.world.network.close(present)
        self.links[peer] = end
        self.hand(on.LinkOpened(peer))
