"""Releases whose weights come in chunks: one download at a time, until the weights lie whole on the disk. Pure.

    waiting --its turn--> opening --SpoolRead--> asking --last chunk--> closing --Whole--> accepted, by the caller
    opening, asking, closing --gone, stalled, the disk fails--> resting --back-off, connected--> waiting

Whoever hands a release in has verified all of it but its weights. A newer release of the same task takes the place of
an older one, whatever that was doing; what lies on the disk of the same blob is not fetched again. Nothing here counts
as accepted, and nothing is remembered beyond the process: the retained release and the spool file are the memory.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from shared.errors import Reason, RemoteProtocolError
from shared.fetch import Fetch, Progress
from shared.messages import BlobRef, Release, ReleaseMessage, TaskManifest
from shared.trust import Position, advance

RETRY_FIRST, RETRY_MAX = 60.0, 3600.0
"""Seconds until a download that came to nothing is tried again; doubles."""

# -- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpoolRead:
    """The spool file of a blob was opened: these chunks are not in it."""

    task: str
    blob: bytes
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """What came on the topic of a chunk; empty: it is gone. Not verified yet."""

    blob: bytes
    index: int
    payload: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Whole:
    """The weights lie whole, and hashed, where the trainer looks for them."""

    task: str
    blob: bytes


@dataclass(frozen=True, slots=True)
class SpoolFailed:
    """The disk refused; or, if `spoilt`, the right chunks do not make the blob that they were signed for."""

    task: str
    blob: bytes
    detail: str
    spoilt: bool = False


Event = SpoolRead | ChunkArrived | Whole | SpoolFailed

# -- effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSpool:
    """Look what the disk holds of a blob: `Whole`, `SpoolRead` or `SpoolFailed` follows."""

    task: str
    blob: BlobRef


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Ask the broker for these chunks."""

    blob: bytes
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Ask for these chunks no more."""

    blob: bytes
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Put a verified chunk in its place; nothing follows, or `SpoolFailed`."""

    task: str
    blob: bytes
    index: int
    payload: bytes | bytearray


@dataclass(frozen=True, slots=True)
class FinishSpool:
    """Every chunk is there: check the whole and move it; `Whole` or `SpoolFailed` follows."""

    task: str
    blob: BlobRef


@dataclass(frozen=True, slots=True)
class DropSpool:
    """What lies on the disk of a task's release is not wanted any more."""

    task: str


@dataclass(frozen=True, slots=True)
class AskRelease:
    """Have the broker send the retained release of a task once more: it may be a newer one."""

    task: str


@dataclass(frozen=True, slots=True)
class DownloadStarted:
    """Tell that the weights of a release are fetched: `missing` of its bytes."""

    task: str
    release: int
    size: int
    missing: int


@dataclass(frozen=True, slots=True)
class DownloadStopped:
    """Tell that a download came to nothing: `gone`, `stalled`, `storage` or `spoilt`; None: it is not tried again."""

    task: str
    release: int
    why: str
    detail: str
    retry: float | None


Effect = (
    OpenSpool
    | Subscribe
    | Unsubscribe
    | WriteChunk
    | FinishSpool
    | DropSpool
    | AskRelease
    | DownloadStarted
    | DownloadStopped
)

# -- state -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coming:
    """A release of which all is verified but the weights, which are not here."""

    task: str
    message: ReleaseMessage
    manifest: TaskManifest
    release: Release
    manifest_position: Position
    position: Position


@dataclass(slots=True)
class _Entry:
    coming: Coming
    failures: int = 0
    """In a row, without a chunk in between."""
    until: float | None = None
    """Monotonic seconds until which it rests."""


class Downloads:
    """The releases that are coming, by task. `random` gives bytes; times are monotonic seconds."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self._entries: dict[str, _Entry] = {}
        self._spoilt: dict[str, bytes] = {}
        """Digests of releases whose signer contradicts himself: they would be fetched in vain for ever."""
        self._turn: str | None = None
        """The task whose blob is opened, asked for or closed."""
        self._fetch: Fetch | None = None
        """None while the shell opens or closes the file."""
        self._left = b""
        """The blob that was asked for last: what of it is still on its way is nobody's fault."""
        self._connected = False
        self._owed: list[Unsubscribe] = []
        """What was given up without a connection: the broker's session still has it."""

    @property
    def tasks(self) -> Collection[str]:
        """Those with a release that is coming."""
        return self._entries.keys()

    @property
    def deadline(self) -> float | None:
        """When `tick` is wanted; never without a connection."""
        if not self._connected:
            return None
        wanted = [entry.until for entry in self._entries.values()]
        wanted.append(None if self._fetch is None else self._fetch.deadline)
        return min((each for each in wanted if each is not None), default=None)

    @property
    def progress(self) -> tuple[str, int, int] | None:
        """(task, bytes that are here, bytes in all) of the download that goes on."""
        if self._turn is None or self._fetch is None:
            return None
        size = self._fetch.blob.size
        return self._turn, size - self._fetch.bytes_left, size

    @property
    def coming(self) -> Iterator[tuple[str, int, float | None]]:
        """(task, number of its release, monotonic seconds until which it rests after a failure); to look at."""
        return ((task, each.coming.release.number, each.until) for task, each in self._entries.items())

    def get(self, task: str) -> Coming | None:
        """The release of a task that is coming."""
        entry = self._entries.get(task)
        return None if entry is None else entry.coming

    def wants(self, coming: Coming) -> bool:
        """Whether a release is news. An older one is refused while the newer one has not failed."""
        entry = self._entries.get(coming.task)
        if self._spoilt.get(coming.task) == coming.position.digest:
            return False
        if entry is None:
            return True
        if entry.coming.position == coming.position:
            return False  # it is retained, and comes on every connect
        return entry.failures > 0 or advance(entry.coming.position, coming.position)

    def add(self, coming: Coming) -> list[Effect]:
        """Fetch the weights of a release that `wants` let through."""
        effects = self._remove(coming.task)
        self._entries[coming.task] = _Entry(coming)
        return effects + self._next()

    def discard(self, task: str) -> list[Effect]:
        """A task's release is not wanted any more."""
        if task not in self._entries:
            return []
        return [*self._remove(task), DropSpool(task), *self._next()]

    def connected(self, now: float) -> list[Effect]:
        """The broker is there; it may know of earlier subscriptions, or of none."""
        self._connected = True
        owed, self._owed = self._owed, []
        return [*owed, *(self._ask(self._fetch.connected(now)) if self._fetch is not None else [])]

    def disconnected(self) -> None:
        """The broker is gone: wait without losing patience."""
        self._connected = False
        if self._fetch is not None:
            self._fetch.disconnected()

    def handle(self, event: SpoolRead | ChunkArrived | SpoolFailed, now: float) -> list[Effect]:
        """What to do about what the disk or the broker gave; a RemoteProtocolError has changed nothing."""
        match event:
            case SpoolRead(missing=missing):
                entry = self._in_hand(event.task, event.blob)
                return [] if entry is None else self._begin(entry, missing, now)
            case ChunkArrived(blob=blob, index=index, payload=payload):
                return self._arrived(blob, index, payload, now)
            case SpoolFailed(task=task, blob=blob, detail=detail, spoilt=spoilt):
                entry = self._entries.get(task)
                if entry is None or self._turn != task or entry.coming.release.weights.sha256 != blob:
                    return []
                return self._spoil(entry, detail) if spoilt else self._rest(entry, "storage", detail, now)

    def whole(self, event: Whole) -> tuple[Coming | None, list[Effect]]:
        """The release that can be accepted now, if it is still wanted, and what to do after that."""
        entry = self._in_hand(event.task, event.blob)
        if entry is None:
            return None, []
        self._remove(event.task)
        return entry.coming, self._next()

    def tick(self, now: float) -> list[Effect]:
        """The deadline has come, or some other."""
        effects: list[Effect] = []
        fetch = self._fetch
        if self._turn is not None and fetch is not None and fetch.deadline is not None and fetch.deadline <= now:
            effects += self._rest(self._entries[self._turn], "stalled", f"{fetch.left} chunks do not come", now)
        for task, entry in self._entries.items():
            if self._connected and entry.until is not None and entry.until <= now:
                entry.until = None
                effects.append(AskRelease(task))
        return effects + self._next()

    def _in_hand(self, task: str, blob: bytes) -> _Entry | None:
        """The entry whose file the shell has opened or closed, if that is still what is wanted."""
        entry = self._entries.get(task)
        if entry is None or self._turn != task or self._fetch is not None:
            return None
        return entry if entry.coming.release.weights.sha256 == blob else None

    def _next(self) -> list[Effect]:
        if self._turn is not None:
            return []
        self._turn = next((task for task, entry in self._entries.items() if entry.until is None), None)
        if self._turn is None:
            return []
        return [OpenSpool(self._turn, self._entries[self._turn].coming.release.weights)]

    def _begin(self, entry: _Entry, missing: tuple[int, ...], now: float) -> list[Effect]:
        blob = entry.coming.release.weights
        fetch = Fetch(blob, missing, now)
        told = DownloadStarted(entry.coming.task, entry.coming.release.number, blob.size, fetch.bytes_left)
        if not missing:
            return [told, FinishSpool(entry.coming.task, blob)]
        self._fetch = fetch
        if not self._connected:
            fetch.disconnected()
            return [told]
        return [told, *self._ask(fetch.connected(now))]

    def _arrived(self, blob: bytes, index: int, payload: bytes | bytearray, now: float) -> list[Effect]:
        fetch = self._fetch
        if self._turn is None or fetch is None or fetch.blob.sha256 != blob:
            if blob == self._left:
                return []
            if not payload:
                # Withdrawn; a process before this one had asked for it.
                return [Unsubscribe(blob, (index,))]
            raise RemoteProtocolError(Reason.UNASKED, f"chunk {index} of {blob.hex()[:16]}")
        step = fetch.arrived(index, payload, now)
        entry = self._entries[self._turn]
        if step.progress is Progress.GONE:
            return self._rest(entry, "gone", f"chunk {index} was withdrawn", now)
        effects: list[Effect] = []
        if step.write:
            entry.failures = 0
            effects.append(WriteChunk(self._turn, blob, index, payload))
        effects += [Unsubscribe(blob, step.unsubscribe)] if step.unsubscribe else []
        effects += self._ask(step.subscribe)
        if step.progress is Progress.DONE:
            self._fetch, self._left = None, blob
            effects.append(FinishSpool(self._turn, entry.coming.release.weights))
        return effects

    def _ask(self, chunks: tuple[int, ...]) -> list[Effect]:
        assert self._fetch is not None
        return [Subscribe(self._fetch.blob.sha256, chunks)] if chunks else []

    def _rest(self, entry: _Entry, why: str, detail: str, now: float) -> list[Effect]:
        longest = min(RETRY_FIRST * 2.0**entry.failures, RETRY_MAX)
        retry = longest * (0.5 + int.from_bytes(self._random(4), "big") / 2**33)
        entry.failures, entry.until = entry.failures + 1, now + retry
        stopped = DownloadStopped(entry.coming.task, entry.coming.release.number, why, detail, retry)
        return [*self._let_go(), stopped, *self._next()]

    def _spoil(self, entry: _Entry, detail: str) -> list[Effect]:
        coming = entry.coming
        self._spoilt[coming.task] = coming.position.digest
        stopped = DownloadStopped(coming.task, coming.release.number, "spoilt", detail, None)
        return [*self._remove(coming.task), stopped, *self._next()]

    def _remove(self, task: str) -> list[Effect]:
        effects = self._let_go() if self._turn == task else []
        self._entries.pop(task, None)
        return effects

    def _let_go(self) -> list[Effect]:
        """End the turn of whoever has it."""
        fetch, self._turn, self._fetch = self._fetch, None, None
        if fetch is None:
            return []
        self._left = fetch.blob.sha256
        chunks = fetch.given_up()
        if chunks and not self._connected:
            self._owed.append(Unsubscribe(self._left, chunks))
        return [Unsubscribe(self._left, chunks)] if chunks and self._connected else []
