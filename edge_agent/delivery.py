"""Updates on their way up: sealed, sent, asked for in pieces, sent again until the aggregator's word on them. Pure.

    kept --connected, its aggregator not away--> sent --Missing--> wanted --in flight, at most FLYING_MAX--> sent
    sent --back-off, or an aggregator is back--> sent          any --receipt--> answered
    any --its round is over, its body is lost, the outbox is full--> dropped

What the broker acknowledges makes room for the next chunk and never ends an update: only a receipt does. An update that
is here is sent for as long as it can count, always with the same head.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from shared import chunks
from shared.errors import Reason, RemoteProtocolError
from shared.selection import shard

RESEND_FIRST, RESEND_MAX = 10.0, 3600.0
"""Seconds without an answer after which the head is sent again; doubles. Each is shortened at random, by up to half."""
RESEND_SPREAD = 5.0
"""Seconds over which devices spread what they send when a broker or an aggregator is back."""
FLYING_MAX = 16
"""Chunks that the broker has not acknowledged; more would only wait in memory."""
WANTED_MAX = 128
"""Chunks of an update that wait for their turn; an aggregator asks for 64 at a time and refills."""
SILENCE = 300.0
"""Seconds without an acknowledgement after which chunks that are asked for no longer keep the head back."""
EXPIRED_KEPT = 86_400.0
"""Seconds for which the clock must say that a manifest has expired: one that jumps ahead costs no update."""
AGGREGATORS_MAX = 256
"""Aggregators whose presence is remembered."""


@dataclass(frozen=True, slots=True)
class Update:
    """A sealed update: `position` is its (manifest version, round), `id` names its files, `expires` is the manifest's.

    `digest` is of the head, `size` the body's in bytes. A `chunk_size` of 0 lets the body ride along.
    """

    id: str
    task: str
    position: tuple[int, int]
    head: bytes
    digest: bytes
    shards: int
    size: int
    chunk_size: int
    expires: int

    @property
    def round(self) -> int:
        """The round that it was made for."""
        return self.position[1]


# -- effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeepUpdate:
    """Sign the head and put it beside its body, durably, before it is sent for the first time."""

    update: Update


@dataclass(frozen=True, slots=True)
class SendUpdate:
    """Publish the signed head, with the body if that rides along; always the same bytes. `attempt` counts from 1."""

    update: Update
    attempt: int


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Publish a chunk that was asked for; `Delivery.taken` must follow when it is acknowledged or cannot be sent."""

    update: Update
    index: int


@dataclass(frozen=True, slots=True)
class DropUpdate:
    """An update that nobody answered and that is given up: its files can go."""

    update: Update
    why: str


Effect = KeepUpdate | SendUpdate | SendChunk | DropUpdate

# -- state -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Waiting:
    """What nobody has answered."""

    update: Update
    due: float
    """Monotonic seconds at which the head goes out, unless something keeps it back."""
    attempts: int = 0
    """Heads sent since a connection, an aggregator or a chunk gave hope."""
    sent: int = 0
    """Heads sent by this process."""
    wanted: dict[int, None] = field(default_factory=dict)
    """Chunks that were asked for and not sent, in that order."""
    flying: set[int] = field(default_factory=set)
    """Chunks that the broker has not acknowledged."""
    expired: float | None = None
    """Monotonic seconds since when the manifest counts as expired, and the update is held back."""


class Delivery:
    """The outbox as a machine. `random` gives bytes; times are monotonic seconds."""

    def __init__(self, device: str, random: Callable[[int], bytes], count: int, size: int) -> None:
        """At most `count` updates and `size` bytes of bodies wait; the newest one always does."""
        self._device, self._random = device, random
        self._count, self._size = count, size
        self._waiting: dict[bytes, Waiting] = {}
        self._aggregators: dict[int, tuple[bytes, bool]] = {}
        """Session and presence by shard, as far as known: one that was never heard of is tried."""
        self._connected = False

    @property
    def waiting(self) -> Iterator[Waiting]:
        """All that nobody has answered, the oldest first; to look at."""
        return iter(self._waiting.values())

    @property
    def deadline(self) -> float | None:
        """When `tick` is wanted."""
        return min((each.due for each in self._ready()), default=None)

    def held(self, waiting: Waiting) -> bool:
        """Whether an update waits for a broker, for its aggregator or for a clock that is right, and not for time."""
        away = self._aggregators.get(self._shard(waiting.update), (b"", True))[1] is False
        return not self._connected or away or waiting.expired is not None

    def newest(self, task: str) -> tuple[int, int]:
        """The newest (manifest version, round) of a task that an update waits for; (0, 0) if none does."""
        return max((each.update.position for each in self._of(task)), default=(0, 0))

    # -- what comes in --

    def keep(self, update: Update, now: float) -> list[Effect]:
        """A new update: store it, then send it. The oldest make room if there is too much."""
        self._waiting[update.digest] = Waiting(update, now)
        return [KeepUpdate(update), *self._evict(), *self.tick(now)]

    def resume(self, update: Update, now: float) -> list[Effect]:
        """An update that was stored by an earlier process; whether it was ever sent, nobody knows."""
        self._waiting[update.digest] = Waiting(update, now)
        return self._evict()

    def connected(self, now: float) -> list[Effect]:
        """The broker is there; what waits goes out soon, and what was asked for at once."""
        self._connected = True
        # Who was away may be back; who still is, is told by the retained status.
        self._aggregators = {number: (session, True) for number, (session, _) in self._aggregators.items()}
        for each in self._waiting.values():
            if each.wanted or each.flying:
                self._rest(each, now)
            else:
                each.attempts, each.due = 0, now + RESEND_SPREAD * self._draw()
        return [*self._fill(), *self.tick(now)]

    def disconnected(self) -> None:
        """The broker is gone; what it has not acknowledged the link sends again by itself."""
        self._connected = False

    def aggregator(self, number: int, session: bytes, online: bool, now: float) -> None:
        """The aggregator of a shard says that it is there, or was seen to leave."""
        known, there = self._aggregators.pop(number, (b"", False))
        if not online and there and known != session:
            session, online = known, True  # the late will of an earlier life
        self._aggregators[number] = (session, online)
        if len(self._aggregators) > AGGREGATORS_MAX:
            del self._aggregators[next(iter(self._aggregators))]
        if online and there and known == session:
            return
        for each in self._waiting.values():
            if self._shard(each.update) == number:
                # Whoever comes back has forgotten what it asked for, if it ever knew.
                each.wanted.clear()
                each.attempts, each.due = 0, now + RESEND_SPREAD * self._draw()

    def missing(self, digest: bytes, numbers: Iterable[int], now: float) -> list[Effect]:
        """An aggregator asks for chunks; RemoteProtocolError, and nothing has changed, for what is not there."""
        found = self._waiting.get(digest)
        if found is None:
            raise RemoteProtocolError(Reason.UNASKED, f"no update {digest.hex()[:16]} waits here")
        update = found.update
        if not update.chunk_size:
            raise RemoteProtocolError(Reason.BAD_CHUNK, "the body rode along with its head")
        asked = list(numbers)
        for index in asked:
            chunks.span(update.size, update.chunk_size, index)
        for index in asked:
            if index not in found.flying and len(found.wanted) < WANTED_MAX:
                found.wanted[index] = None
        self._rest(found, now)
        return self._fill()

    def taken(self, digest: bytes, index: int, acknowledged: bool, now: float) -> list[Effect]:
        """The broker acknowledged a chunk, or it could not be sent: there is room for the next."""
        found = self._waiting.get(digest)
        if found is not None:
            found.flying.discard(index)
            found.attempts = 0 if acknowledged else found.attempts
            self._rest(found, now)
        return self._fill()

    def answered(self, digest: bytes) -> Update | None:
        """The aggregator's receipt came: the update that it was for, which waits no longer."""
        found = self._waiting.pop(digest, None)
        return None if found is None else found.update

    def lost(self, digest: bytes) -> list[Effect]:
        """The body of an update cannot be read any more."""
        return [] if digest not in self._waiting else self._drop([digest], "storage")

    def outdated(self, task: str, position: tuple[int, int], staleness: int) -> list[Effect]:
        """A task has come to `position`: drop what is of an older manifest or more than `staleness` rounds older."""
        version, number = position

        def over(update: Update) -> bool:
            return update.position[0] < version or (update.position[0] == version and update.round + staleness < number)

        return self._drop([each.update.digest for each in self._of(task) if over(each.update)], "round_over")

    def forget(self, task: str) -> list[Effect]:
        """Drop all of a task."""
        return self._drop([each.update.digest for each in self._of(task)], "task_forgotten")

    def expire(self, utc: float, now: float) -> list[Effect]:
        """Hold back what is of a manifest that has expired at `utc` seconds, and drop it when that stays so."""
        for each in self._waiting.values():
            since = now if each.expired is None else each.expired
            each.expired = since if each.update.expires <= utc else None
        over = [
            digest
            for digest, each in self._waiting.items()
            if each.expired is not None and now - each.expired >= EXPIRED_KEPT
        ]
        return self._drop(over, "expired")

    def tick(self, now: float) -> list[Effect]:
        """Send what is due."""
        effects: list[Effect] = []
        for each in self._ready():
            if each.due > now:
                continue
            each.flying.clear()  # only a long silence gets here with any
            each.wanted.clear()
            each.attempts, each.sent = each.attempts + 1, each.sent + 1
            self._rest(each, now)
            effects.append(SendUpdate(each.update, each.sent))
        return effects

    # -- inside --

    def _ready(self) -> Iterator[Waiting]:
        """What may go out as soon as it is due."""
        return (each for each in self._waiting.values() if not self.held(each))

    def _rest(self, waiting: Waiting, now: float) -> None:
        if waiting.wanted or waiting.flying:
            waiting.due = now + SILENCE
            return
        longest = min(RESEND_FIRST * 2.0 ** min(max(0, waiting.attempts - 1), 20), RESEND_MAX)
        waiting.due = now + longest * (1.0 - 0.5 * self._draw())

    def _fill(self) -> list[Effect]:
        """Send wanted chunks as far as the window allows, update by update."""
        effects: list[Effect] = []
        room = FLYING_MAX - sum(len(each.flying) for each in self._waiting.values())
        for each in self._waiting.values():
            while self._connected and each.wanted and room > 0:
                index = next(iter(each.wanted))
                del each.wanted[index]
                each.flying.add(index)
                room -= 1
                effects.append(SendChunk(each.update, index))
        return effects

    def _evict(self) -> list[Effect]:
        count, size = len(self._waiting), sum(each.update.size for each in self._waiting.values())
        old = []
        for digest, each in list(self._waiting.items())[:-1]:
            if count <= self._count and size <= self._size:
                break
            count, size = count - 1, size - each.update.size
            old.append(digest)
        return self._drop(old, "outbox_full")

    def _drop(self, digests: Iterable[bytes], why: str) -> list[Effect]:
        return [DropUpdate(self._waiting.pop(digest).update, why) for digest in digests]

    def _of(self, task: str) -> Iterator[Waiting]:
        return (each for each in self._waiting.values() if each.update.task == task)

    def _shard(self, update: Update) -> int:
        return shard(self._device, update.shards)

    def _draw(self) -> float:
        """Evenly in [0, 1)."""
        return int.from_bytes(self._random(4), "big") / 2**32
