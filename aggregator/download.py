"""How releases in chunks come in: one blob at a time, into a spool file, then into the blobs.

A publisher's release that waits for its weights lies beside the spool file, so that its message can be acknowledged and
a restart goes on with what is there. It never decides what to collect; the coordinator does.
"""

import mmap
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from aggregator import coordinator as core
from aggregator.ports import BlobLost, Blobs
from aggregator.readback import Found
from shared import tensors, wire
from shared.errors import RemoteProtocolError, StorageError
from shared.events import Event
from shared.fetch import Fetch, Progress
from shared.files import write_durably
from shared.logs import tell
from shared.machine import Instant
from shared.messages import BlobRef, ReleaseMessage
from shared.spool import Spool
from shared.topics import Topics

RESERVE = 64 << 20
"""Bytes of free space that a download leaves to the database."""
_RETRY = 60.0
"""Seconds after which what the disk refused is tried again."""

Subscribe = Callable[..., None]


class Downloads:
    """`folder` is its own; `subscribe` and `unsubscribe` are the link's."""

    def __init__(
        self, folder: Path, topics: Topics, blobs: Blobs, subscribe: Subscribe, unsubscribe: Subscribe
    ) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._topics, self._blobs = folder, topics, blobs
        self._subscribe, self._unsubscribe = subscribe, unsubscribe
        self._waiting: list[Found] = []
        """In turn; the first one is being collected."""
        self._fetch: Fetch | None = None
        self._spool: Spool | None = None
        self._connected = False
        self._retry: float | None = None

    def pending(self) -> list[ReleaseMessage]:
        """Releases of an earlier run that wait for their weights; files of no use are deleted."""
        found = []
        for path in sorted(self._folder.glob("*.release")):
            try:
                found.append(wire.unpack(path.read_bytes(), ReleaseMessage))
            except RemoteProtocolError:
                path.unlink()
        return found

    @property
    def deadline(self) -> float | None:
        """When a download is stalled, or the disk is tried again (monotonic seconds)."""
        return self._retry if self._fetch is None else self._fetch.deadline

    def begin(self, found: Found, now: Instant) -> list[core.Event]:
        """Collect a release's weights; of the same task only the newest is collected, and the others count as lost."""
        name = found.manifest.task
        overtaken = [each for each in self._waiting if each.manifest.task == name]
        if any(each.message.release.payload == found.message.release.payload for each in overtaken):
            return []
        if any(each.position.rank > found.position.rank for each in overtaken):
            return [core.WeightsLost(found)]
        if not found.kept:
            try:
                write_durably(self._file(found), wire.pack(found.message))
            except OSError as error:
                # A restart would forget it; so would one a moment ago.
                tell(Event.STORAGE_FAILED, path=str(self._folder), cause=error.strerror or str(error))
        for other in overtaken:
            self._give_up(other)
        self._waiting.append(found)
        wanted = {each.release.weights.sha256 for each in self._waiting}
        for other in overtaken:
            if other.release.weights.sha256 not in wanted:
                self._spool_of(other.release.weights).discard()
        return [*map(core.WeightsLost, overtaken), *self._next(now)]

    def connected(self, now: Instant) -> None:
        """A new connection, which knows of no subscription."""
        self._connected = True
        if self._fetch is not None:
            self._ask(self._fetch.connected(now.mono))

    def disconnected(self) -> None:
        """Wait for the next connection."""
        self._connected = False
        if self._fetch is not None:
            self._fetch.disconnected()

    def arrived(self, blob: bytes, index: int, payload: bytes | bytearray, now: Instant) -> list[core.Event]:
        """A chunk; RemoteProtocolError, and nothing has changed, for one that was not asked for or is not as signed."""
        fetch, spool = self._fetch, self._spool
        if fetch is None or spool is None or blob != fetch.blob.sha256:
            if not payload:  # withdrawn; it was given up while there was no connection to say so
                self._unsubscribe(self._topics.chunk(blob.hex(), index))
            return []  # the rest of one that was given up
        step = fetch.arrived(index, payload, now.mono)
        if step.write:
            try:
                spool.write(index, payload)
            except StorageError as error:
                return self._failed(error, now)
        self._leave(step.unsubscribe)
        self._ask(step.subscribe)
        match step.progress:
            case Progress.GOING:
                return []
            case Progress.GONE:
                return self._lost("the broker has not got its chunks any more", now)
            case Progress.DONE:
                return self._whole(spool, now)

    def tick(self, now: Instant) -> list[core.Event]:
        """Give up what is stalled; try again what the disk refused."""
        if self._fetch is not None:
            due = self._fetch.deadline
            return self._lost("no chunk of it came in time", now) if due is not None and due <= now.mono else []
        if self._retry is not None and self._retry <= now.mono:
            return self._next(now)
        return []

    def _next(self, now: Instant) -> list[core.Event]:
        if self._fetch is not None or not self._waiting:
            return []
        self._retry = None
        found = self._waiting[0]
        blob = found.release.weights
        if self._there(blob.sha256, blob.size):
            return self._done(core.WeightsArrived(found), now)
        spool = self._spool_of(blob)
        try:
            missing = spool.missing()
        except StorageError as error:
            return self._failed(error, now)
        self._spool, self._fetch = spool, Fetch(blob, missing, now.mono)
        if not missing:
            return self._whole(spool, now)
        if self._connected:
            self._ask(self._fetch.connected(now.mono))
        else:
            self._fetch.disconnected()
        return []

    def _whole(self, spool: Spool, now: Instant) -> list[core.Event]:
        found, blob = self._waiting[0], spool.blob
        target = spool.path.with_suffix(".weights")
        try:
            spool.finish(target)
            with target.open("rb") as file:
                # Unmapped once nothing refers to it; not sooner, and an error may.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            tensors.verify(memoryview(mapped), found.manifest.layout)
            self._blobs.put_file(target, blob.sha256)
        except RemoteProtocolError as error:
            target.unlink(missing_ok=True)
            return self._lost(str(error), now)
        except StorageError as error:
            return self._failed(error, now)
        return self._done(core.WeightsArrived(found), now)

    def _there(self, name: bytes, size: int) -> bool:
        """Whether the blobs have it, whole: the weights of an earlier release are brought back, say."""
        try:
            return self._blobs.size(name) == size and sha256(self._blobs.get(name)).digest() == name
        except BlobLost:
            return False

    def _lost(self, why: str, now: Instant) -> list[core.Event]:
        found = self._waiting[0]
        tell(Event.RELEASE_MISSED, task=found.manifest.task, release=found.release.number, cause=why)
        if self._fetch is not None:
            self._leave(self._fetch.given_up())
        if self._spool is not None:
            self._spool.discard()
        if not found.kept:
            self._file(found).unlink(missing_ok=True)
        return self._done(core.WeightsLost(found), now)

    def _done(self, event: core.WeightsArrived | core.WeightsLost, now: Instant) -> list[core.Event]:
        self._give_up(event.found)
        return [event, *self._next(now)]

    def _failed(self, error: StorageError, now: Instant) -> list[core.Event]:
        """The disk does not play along: what came is kept, and the rest is asked for later."""
        tell(Event.STORAGE_FAILED, path=error.path, cause=error.detail)
        if self._fetch is not None:
            self._leave(self._fetch.given_up())
        self._fetch = self._spool = None
        self._retry = now.mono + _RETRY
        return []

    def _give_up(self, found: Found) -> None:
        if self._waiting[0] is found:
            if self._fetch is not None and self._fetch.left:
                self._leave(self._fetch.given_up())
            self._fetch = self._spool = None
        self._waiting.remove(found)

    def tidy(self) -> None:
        """Forget what waits no more: it is adopted, refused or lost by now."""
        wanted = {self._file(found) for found in self._waiting}
        for path in self._folder.glob("*.release"):
            if path not in wanted:
                path.unlink()

    def _spool_of(self, blob: BlobRef) -> Spool:
        return Spool(self._folder / f"{blob.sha256.hex()}.chunks", blob, RESERVE)

    def _file(self, found: Found) -> Path:
        return self._folder / f"{found.manifest.task}.{found.manifest.version}.release"

    def _ask(self, indices: tuple[int, ...]) -> None:
        if indices and self._fetch is not None:
            self._subscribe(*(self._topics.chunk(self._fetch.blob.sha256.hex(), each) for each in indices))

    def _leave(self, indices: tuple[int, ...]) -> None:
        if indices and self._fetch is not None and self._connected:
            self._unsubscribe(*(self._topics.chunk(self._fetch.blob.sha256.hex(), each) for each in indices))
