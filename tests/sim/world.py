"""The world of a simulation: one virtual clock, one seeded dice, a broker and the links to it. No thread, no socket.

The broker keeps what MQTT promises and breaks what it does not: a connection may be cut at any moment with all that is
on its way, QoS 1 comes twice, QoS 0 gets lost, one topic overtakes another, and a broker that restarts may have kept
everything, nothing, all but the sessions, or an older snapshot. Retained messages, wills, durable sessions with a
window of 20 unacknowledged messages, and manual acknowledgement are as mosquitto has them.
"""

import functools
import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from shared.errors import LinkError
from shared.machine import Instant
from shared.mqtt import LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published, Will

EPOCH = 1_800_000_000.0
"""The UTC second at which every simulation begins."""
WINDOW = 20
"""Messages that a client may leave unacknowledged."""


class Crash(BaseException):
    """kill -9, wherever the program is just then."""


class Node(Protocol):
    """A program of the world."""

    name: str

    def step(self) -> None:
        """Between any two steps of its shell; may raise Crash."""

    def sends(self, topic: str, payload: bytes) -> None:
        """It hands a message to its link."""

    def wake(self) -> None:
        """Something was left in its mailbox."""


class World:
    """Virtual time, a dice, and what is to happen when. `trace` takes a line for everything worth reading."""

    current: ClassVar["World"]

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed, self.dice = seed, random.Random(seed)
        self.now, self.skew = 1000.0, 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._trace = trace
        self.traced = trace is not None
        self.running: Node | None = None
        """The program whose code runs now."""
        self.archive: dict[bytes, bytes] = {}
        """Blobs that the aggregator has deleted, for whoever judges the outcome."""
        World.current = self

    def instant(self, skew: float = 0.0) -> Instant:
        """Now; `skew` is how far a machine's wall clock is off."""
        return Instant(self.now, EPOCH + self.now - 1000.0 + skew)

    def at(self, delay: float, act: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._heap, (self.now + max(0.0, delay), next(self._count), act))

    def run(self, until: float, done: Callable[[], bool]) -> bool:
        """Let things happen until `done()` or the virtual second `until`; whether it was done."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, act = heapq.heappop(self._heap)
            act()
            if done():
                return True
        self.now = max(self.now, until)
        return done()

    def chance(self, probability: float) -> bool:
        """Whether something happens that does so with this probability."""
        return self.dice.random() < probability

    def say(self, text: str) -> None:
        """A line of the trace."""
        if self._trace is not None:
            self._trace(f"{self.now - 1000.0:12.3f}  {text}")

    def random_bytes(self, count: int) -> bytes:
        """In place of os.urandom."""
        return self.dice.randbytes(count)


@dataclass(slots=True)
class Faults:
    """What may go wrong, as probabilities and rates; all zero in the quiet time at the end."""

    cut: float = 0.0
    """Of each message: that its connection is cut, and all on its way is lost."""
    twice: float = 0.0
    """Of each QoS 1 delivery: that it comes again."""
    lost: float = 0.0
    """Of each QoS 0 message: that it comes never."""
    reorder: bool = False
    """Each message takes a time of its own."""
    delay: float = 0.05
    """Seconds that a message takes, at most ten times as many."""


@dataclass(slots=True)
class _Kept:
    """A durable session that waits for its client."""

    filters: set[str] = field(default_factory=set)
    waiting: "deque[tuple[str, bytes, bool, int]]" = field(default_factory=deque)


@dataclass(slots=True)
class _Session:
    link: "FakeLink"
    epoch: int
    filters: set[str]
    waiting: "deque[tuple[str, bytes, bool, int]]"
    flying: "OrderedDict[int, tuple[str, bytes, bool, int]]" = field(default_factory=OrderedDict)


class Broker:
    """See the module."""

    def __init__(self, world: World, faults: Faults, packet_max: int = 4096, queue_max: int = 1000) -> None:
        """`queue_max` are the messages that a client may leave to the broker before it has confirmed any."""
        self.world, self.faults = world, faults
        self.packet_max, self.queue_max = packet_max, queue_max
        self.retained: dict[str, bytes] = {}
        self.up = True
        self._sessions: dict[str, _Session] = {}
        self._kept: dict[str, _Kept] = {}
        self._snapshots: list[tuple[dict[str, bytes], dict[str, _Kept]]] = []
        self._mids = itertools.count(1)

    # -- connections --

    def connect(self, link: "FakeLink") -> None:
        """A client's CONNECT arrives."""
        name = link.settings.client_id
        if name in self._sessions:
            self._lose(name)
        kept = self._kept.pop(name, None) if link.settings.durable else None
        session = _Session(link, link.epoch, kept.filters if kept else set(), kept.waiting if kept else deque())
        self._sessions[name] = session
        link.arrives(lambda: link.up(kept is not None), first=True)
        self._push(session)

    def gone(self, link: "FakeLink") -> None:
        """A client's connection has ended, and the broker notices."""
        if (session := self._sessions.get(link.settings.client_id)) is not None and session.link is link:
            self._lose(link.settings.client_id)

    def stop(self, how: str) -> None:
        """The broker ends. It has `kept` all, nothing (`empty`), no session (`forgetful`), or what was (`older`)."""
        self.world.say(f"broker stops, {how}")
        for name in list(self._sessions):
            session = self._sessions[name]
            self._lose(name, will=False)
            session.link.down("the broker is gone")
        self.up = False
        if how == "empty":
            self.retained, self._kept = {}, {}
        elif how == "forgetful":
            self._kept = {}
        elif how == "older" and self._snapshots:
            self.retained, self._kept = self._snapshots.pop(self.world.dice.randrange(len(self._snapshots)))

    def start(self) -> None:
        """It is there again."""
        self.up = True
        self.world.say("broker starts")

    def save(self) -> None:
        """What a later restart may fall back to."""
        kept = {name: _Kept(set(each.filters), deque(each.waiting)) for name, each in self._kept.items()}
        for name, session in self._sessions.items():
            if session.link.settings.durable:
                kept[name] = _Kept(set(session.filters), deque([*session.flying.values(), *session.waiting]))
        self._snapshots = [*self._snapshots[-3:], (dict(self.retained), kept)]

    def _lose(self, name: str, *, will: bool = True) -> None:
        session = self._sessions.pop(name)
        if session.link.settings.durable:
            waiting = deque([*session.flying.values(), *session.waiting])
            self._kept[name] = _Kept(session.filters, waiting)
        if will and session.link.will is not None:
            self._route(session.link.will.topic, session.link.will.payload, 0, retain=True)

    # -- messages --

    def subscribe(self, name: str, filters: tuple[str, ...]) -> None:
        """A SUBSCRIBE arrives; what is retained follows."""
        if (session := self._sessions.get(name)) is None:
            return
        session.filters.update(filters)
        for topic, payload in self.retained.items():
            if any(matches(each, topic) for each in filters):
                session.waiting.append((topic, payload, True, 1))
        self._push(session)

    def unsubscribe(self, name: str, filters: tuple[str, ...]) -> None:
        """An UNSUBSCRIBE arrives."""
        if (session := self._sessions.get(name)) is not None:
            session.filters.difference_update(filters)

    def publish(self, name: str, mid: int, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        """A PUBLISH arrives; a PUBACK says that the broker has it, and nothing else."""
        if qos or not self.world.chance(self.faults.lost):
            self._route(topic, payload, qos, retain)
        if qos and (session := self._sessions.get(name)) is not None:
            session.link.arrives(lambda: session.link.taken(mid), "PUBACK")

    def acknowledge(self, name: str, mid: int) -> None:
        """A PUBACK of a client arrives."""
        if (session := self._sessions.get(name)) is not None:
            session.flying.pop(mid, None)
            self._push(session)

    def _route(self, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for session in list(self._sessions.values()):
            if any(matches(each, topic) for each in session.filters):
                session.waiting.append((topic, payload, False, qos))
                self._push(session)
        for kept in self._kept.values():
            if qos and any(matches(each, topic) for each in kept.filters):
                kept.waiting.append((topic, payload, False, qos))

    def _push(self, session: _Session) -> None:
        while session.waiting and len(session.flying) < WINDOW:
            topic, payload, retain, qos = session.waiting.popleft()
            mid = next(self._mids)
            if qos:
                session.flying[mid] = (topic, payload, retain, qos)
            times = 2 if qos and self.world.chance(self.faults.twice) else 1
            for _ in range(times):
                arrived = (topic, payload, retain, qos, mid)
                session.link.arrives(lambda arrived=arrived: session.link.message(*arrived), topic)  # type: ignore[misc]


class FakeLink:
    """In the place of shared.mqtt.Link; paho's habits included: what was not acknowledged is sent again."""

    def __init__(self, settings: LinkSettings, post: object, will: Will | None = None) -> None:
        self.settings, self.will = settings, will
        self._post = post.post  # type: ignore[attr-defined]
        self._world = World.current
        assert self._world.running is not None
        self._node = self._world.running
        self.broker: Broker = self._node.broker  # type: ignore[attr-defined]
        self.epoch = 0
        self.connected = self.alive = False
        self._packet_max: int | None = None
        self._out: OrderedDict[int, tuple[str, bytes, int, bool]] = OrderedDict()
        self._mids = itertools.count(1)
        self._last: dict[str, float] = {}
        """When the newest message on a lane arrives: nothing on it comes sooner."""
        self._began = 0.0
        """When the CONNACK arrives: nothing comes sooner."""

    # -- what the daemons call --

    def start(self) -> None:
        """Begin to connect."""
        self.alive = True
        self._connect()

    def stop(self) -> None:
        """Never called: every end here is a crash."""
        raise AssertionError("a simulated daemon does not end in order")

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Ask for topics."""
        self._node.step()
        self._send(lambda: self.broker.subscribe(self.settings.client_id, filters))

    def unsubscribe(self, *filters: str) -> None:
        """Ask for no more of these topics."""
        self._node.step()
        self._send(lambda: self.broker.unsubscribe(self.settings.client_id, filters))

    def publish(self, topic: str, payload: bytes | bytearray, *, qos: int = 1, retain: bool = False) -> int:
        """Send a message."""
        self._node.step()
        if self._packet_max is not None and len(payload) + len(topic) + 64 > self._packet_max:
            raise LinkError(f"{len(payload)} bytes for {topic} are more than the broker takes")
        if qos and len(self._out) >= self.broker.queue_max:
            raise LinkError(f"{len(self._out)} messages wait for the broker already; {topic} was not sent")
        self._node.sends(topic, bytes(payload))
        mid = next(self._mids)
        if qos:
            self._out[mid] = (topic, bytes(payload), qos, retain)
        self._transmit(mid, topic, bytes(payload), qos, retain)
        return mid

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message is dealt with."""
        self._node.step()
        if self.settings.durable and message.qos and message.generation == self.epoch:
            self._send(lambda: self.broker.acknowledge(self.settings.client_id, message.mid))

    def bytes_moved(self) -> tuple[int, int]:
        """Nobody counts here."""
        return 0, 0

    # -- what the world does --

    def arrives(self, act: Callable[[], None], topic: str = "", *, first: bool = False) -> None:
        """Something is on its way from the broker to here; lost if this connection ends before."""
        arrival = self._travel("in", act, topic)
        if first:
            self._began = arrival

    def up(self, session_present: bool) -> None:
        """CONNACK."""
        self.connected, self._packet_max = True, self.broker.packet_max
        self._hand(LinkUp(session_present, self.broker.packet_max))
        for mid, (topic, payload, qos, retain) in list(self._out.items()):
            self._transmit(mid, topic, payload, qos, retain)

    def down(self, cause: str) -> None:
        """The connection is gone; try again later."""
        self.epoch += 1
        was, self.connected = self.connected, False
        if self.alive:
            if was:
                self._hand(LinkDown(cause))
            self._world.at(self._world.dice.uniform(0.5, 60.0), self._connect)

    def cut(self) -> None:
        """The connection breaks, with all that is on its way."""
        self.down("the connection was cut")
        self.broker.gone(self)

    def message(self, topic: str, payload: bytes, retain: bool, qos: int, mid: int) -> None:
        """PUBLISH from the broker."""
        self._hand(Message(topic, payload, retain, qos, mid, self.epoch))
        if qos and not self.settings.durable:
            self._send(lambda: self.broker.acknowledge(self.settings.client_id, mid))

    def taken(self, mid: int) -> None:
        """PUBACK."""
        self._out.pop(mid, None)
        self._hand(Published(mid, ""))

    def die(self) -> None:
        """Its process is gone."""
        self.alive = self.connected = False
        self.epoch += 1
        self._world.at(self._world.dice.uniform(0.0, 30.0), lambda: self.broker.gone(self))

    def _connect(self) -> None:
        if not self.alive or self.connected:
            return
        if not self.broker.up or not self._node.admitted:  # type: ignore[attr-defined]
            self._world.at(self._world.dice.uniform(1.0, 60.0), self._connect)
            return
        self.epoch = epoch = self.epoch + 1
        self._travel("out", lambda: self.broker.connect(self), "")
        # A CONNECT or CONNACK that was lost: nobody waits for ever.
        self._world.at(20.0, lambda: self.cut() if self.epoch == epoch and not self.connected else None)

    def _transmit(self, mid: int, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        self._send(lambda: self.broker.publish(self.settings.client_id, mid, topic, payload, qos, retain), topic)

    def _send(self, act: Callable[[], None], topic: str = "") -> None:
        if self.connected:
            self._travel("out", act, topic)

    def _travel(self, way: str, act: Callable[[], None], topic: str) -> float:
        world, faults, epoch = self._world, self.broker.faults, self.epoch
        if world.chance(faults.cut):
            world.at(0.0, lambda: self.cut() if self.epoch == epoch else None)
        delay = faults.delay * world.dice.choice((0.1, 0.2, 0.5, 1.0, 1.0, 10.0))
        arrival = world.now + delay
        lane = way + topic if faults.reorder else way
        arrival = self._last[lane] = max(arrival, self._began, self._last.get(lane, 0.0))
        world.at(arrival - world.now, lambda: act() if self.epoch == epoch and self.broker.up else None)
        return arrival

    def _hand(self, event: LinkEvent) -> None:
        self._post(event)
        self._node.wake()


@functools.lru_cache(1 << 16)
def matches(filter_: str, topic: str) -> bool:
    """Whether a topic is one that a filter asks for."""
    wanted, found = filter_.split("/"), topic.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(found) or part not in ("+", found[index]):
            return False
    return len(wanted) == len(found)
