"""How releases leave the aggregator: stored with their parts, put where devices find them, and taken away again.

Large weights go out in chunks, then the message that names them, once the broker has confirmed every chunk; a few are
in flight at a time and are read from the blobs one by one, so memory stays flat and other messages are not held up.
What cannot be sent because too much waits for the broker is sent when it has confirmed something.

    queued -> chunks in flight -> all confirmed -> message -> done
    replaced by newer ones, an hour on -> empty payloads in flight -> all confirmed -> withdrawn

It never decides what is published; the coordinator does.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from aggregator import coordinator as core
from aggregator import retention
from aggregator.config import Limits
from aggregator.coordinator import Task
from aggregator.ports import BlobLost, Blobs, Store, StoredRelease
from aggregator.retention import Kept
from shared import chunks, wire
from shared.errors import LinkError, LocalProtocolError, StorageError
from shared.events import Event
from shared.logs import tell
from shared.machine import Instant
from shared.messages import BlobRef, Graphs, Release, ReleaseMessage
from shared.topics import RELEASE, Topics, task_release

WINDOW = 16
"""Chunks that are sent before the first of them is confirmed."""
_RETRY = 60.0
"""Seconds after which what the disk refused is tried again."""

Publish = Callable[[str, bytes, bool], int]
"""Sends (topic, payload, retained) with QoS 1 and returns its id; LinkError when too much waits already."""
Lost = Callable[[core.PartsLost], None]
"""Takes the word that a release could not go out, since its parts are gone or damaged on disk; never blocks."""


@dataclass
class _Job:
    """Messages that go out together, and what follows once the broker has confirmed them all."""

    key: tuple[str, int, int]
    steps: Iterator[tuple[str, bytes]]
    done: Callable[[Instant], None]
    withdraws: bool = False
    held: tuple[str, bytes] | None = None
    """The next message, which was not taken yet."""
    open: dict[int, str] = field(default_factory=dict)
    """Topics that the broker has not confirmed, by message id."""
    last: str = ""
    """The topic that it confirmed last."""
    kept: bool = True
    """Whether the broker still has what it confirmed, as far as we know."""


class Distribution:
    """`publish` is the link's, `lost` posts to the owner; `limits` say how much stays out, and what is remembered."""

    def __init__(
        self, store: Store, blobs: Blobs, topics: Topics, publish: Publish, limits: Limits, lost: Lost
    ) -> None:
        self._store, self._blobs, self._topics, self._publish, self._lost = store, blobs, topics, publish, lost
        self._budget = limits.retained_bytes
        self._remembered = 2 * limits.keep_releases
        """Releases whose rows stay: those that are kept, and as many before them, whose weights may have to go."""
        self._jobs: collections.deque[_Job] = collections.deque()
        self._unsent: dict[str, bytes] = {}
        """Retained messages that were not taken yet, the newest for each topic."""
        self._packet_max: int | None = None
        self._again: float | None = None
        self._tasks: dict[str, int] = {}
        """How many of its newest releases each task keeps out."""
        self._retained: int | None = None
        """The bytes of them all, as long as that is known."""

    # -- storing --

    def adopt(self, effect: core.AdoptRelease, now: float) -> None:
        """Store a release with its parts; inside a transaction. Weights that are not in the message are stored."""
        message, manifest, release = effect.message, effect.manifest, effect.release
        if message.graphs is None:
            raise LocalProtocolError("a release was adopted without its graphs")
        graphs = (self._blobs.put(message.graphs.train), self._blobs.put(message.graphs.eval))
        if message.weights is not None:
            self._blobs.put(message.weights)
        self._store.adopt(manifest.task, manifest.version, message, graphs)
        self._store.add_release(
            manifest.task, manifest.version, release.number, message.release, release.weights.sha256, now
        )

    def mend(self, message: ReleaseMessage) -> None:
        """Store the parts of a message again, in the place of damaged ones."""
        for part in (message.graphs.train, message.graphs.eval) if message.graphs is not None else ():
            self._blobs.put(part)
        if message.weights is not None:
            self._blobs.put(message.weights)

    # -- sending --

    def publish(self, task: Task, now: Instant, *, announce: bool) -> None:
        """Put the newest release of a task on its topic, retained; `announce` it to people too.

        Nothing goes out whose hash is not the signed one: `lost` is told instead.
        """
        name, release = task.manifest.task, task.release
        key = (name, task.manifest.version, release.number)
        self._tasks[name] = task.manifest.plan.max_staleness + 2
        self._retained = None
        train, evaluate, weights = self._store.model(name, task.manifest.version)
        try:
            whole = ReleaseMessage(
                v=2 if release.weights.chunks else 1,
                manifest=task.manifest_signed,
                release=task.release_signed,
                graphs=Graphs(train=self._blobs.get(train), eval=self._blobs.get(evaluate)),
                weights=None if release.weights.chunks else self._blobs.get(weights),
            )
        except BlobLost as error:
            self._lost(core.PartsLost(name, task.manifest.version, str(error)))
            return
        data = wire.pack(whole)
        announcement = wire.pack(ReleaseMessage(v=1, manifest=task.manifest_signed, release=task.release_signed))

        def finish(now: Instant) -> None:
            self.retain(task_release(name), data)
            if announce:
                self._send(RELEASE, announcement)
            tell(Event.RELEASE_PUBLISHED, task=name, release=release.number, bytes=len(data) + _chunked(release))
            self._retire(name, now)

        if not self._fits(task_release(name), max(len(data), release.weights.chunk_size)):
            return
        running = next((job for job in self._jobs if job.key[0] == name and not job.withdraws), None)
        if running is not None and running.key == key and running.kept:
            return  # on its way; a cut of the link does not make it begin again
        if running is not None:
            self._jobs.remove(running)  # an older one must not come after this one
        if not release.weights.chunks:
            finish(now)
            return
        self._jobs.append(_Job(key, self._chunks(release.weights), finish))
        self.pump(now)

    def retain(self, topic: str, payload: bytes) -> None:
        """Send a retained message now, or as soon as there is room for it; a newer one on its topic replaces it."""
        if self._unsent:
            self._unsent.pop(topic, None)
            self._unsent[topic] = payload
            return
        try:
            self._publish(topic, payload, True)
        except LinkError as error:
            if self._fits(topic, len(payload)):
                self._unsent[topic] = payload
                tell(Event.PUBLISH_DELAYED, topic=topic, cause=str(error))

    def _flush(self) -> None:
        while self._unsent:
            topic = next(iter(self._unsent))
            try:
                self._publish(topic, self._unsent[topic], True)
            except LinkError:
                return
            del self._unsent[topic]

    def published(self, mid: int, refusal: str, now: Instant) -> None:
        """The broker has answered a message."""
        self._flush()
        job = next((job for job in self._jobs if mid in job.open), None)
        if job is not None:
            topic = job.open.pop(mid)
            if refusal:
                # The message must not name chunks that are not there; it is tried again on the next connection.
                self._jobs.remove(job)
            else:
                job.last = topic
        self.pump(now)

    def pump(self, now: Instant) -> None:
        """Send what there is room for."""
        while self._jobs:
            job = self._jobs[0]
            try:
                while len(job.open) < WINDOW and (step := job.held or next(job.steps, None)) is not None:
                    job.held = step
                    job.open[self._publish(step[0], step[1], True)] = step[0]
                    job.held = None
            except LinkError:
                return
            except BlobLost as error:
                # The chunks that are out already stay: the message that names them does not go.
                self._jobs.popleft()
                self._lost(core.PartsLost(*job.key[:2], str(error)))
                continue
            if job.open:
                return
            self._jobs.popleft()
            job.done(now)

    # -- the connection --

    def connected(self, packet_max: int | None) -> str | None:
        """Go on where the last connection ended; returns the topic of a chunk to ask for, see `seen`."""
        self._packet_max = packet_max
        job = next((job for job in self._jobs if not job.withdraws), None)
        if job is None or not job.last:
            return None
        job.kept = False
        return job.last

    def seen(self, topic: str, payload: bytes | bytearray) -> bool:
        """The broker still has the chunk that was confirmed last, so it has those before it; whether it was asked."""
        job = next((job for job in self._jobs if job.last == topic and not job.kept), None)
        if job is None:
            return False
        job.kept = bool(payload)
        return True

    # -- withdrawing --

    @property
    def deadline(self) -> float | None:
        """When to look again what is to be withdrawn (monotonic seconds)."""
        return self._again

    def tick(self, now: Instant) -> None:
        """Withdraw what is due."""
        if self._again is not None and self._again <= now.mono:
            self._again = None
            for name in self._tasks:
                self._retire(name, now)

    def resume(self, tasks: Iterable[Task], now: Instant) -> None:
        """After a start: what is out, and what of it is due."""
        for task in tasks:
            self._tasks[task.manifest.task] = task.manifest.plan.max_staleness + 2
        self._again, self._retained = now.mono, None

    def retained_bytes(self) -> int:
        """Of all chunks that are out."""
        if self._retained is None:
            out = {release.weights.sha256: _chunked(release) for name in self._tasks for _, release in self._out(name)}
            self._retained = sum(out.values())
        return self._retained

    def _retire(self, name: str, now: Instant) -> None:
        try:
            out = self._out(name)
            kept = [
                Kept(each.manifest_version, each.number, _chunked(release), each.replaced_at) for each, release in out
            ]
            gone, again = retention.withdrawals(kept, now.utc, self._tasks[name], self._budget)
            for each in gone:
                stored, release = out[kept.index(each)]
                self._withdraw(stored, release, now)
        except StorageError as error:
            tell(Event.STORAGE_FAILED, path=error.path, cause=error.detail)
            again = now.utc + _RETRY
        if again is not None:
            # By the steady clock, so that a wall clock that is set does not put it off for years.
            due = now.mono + max(1.0, min(again - now.utc, retention.GRACE))
            self._again = due if self._again is None else min(self._again, due)

    def _withdraw(self, stored: StoredRelease, release: Release, now: Instant) -> None:
        key = (stored.task, stored.manifest_version, stored.number)
        if any(job.key == key and job.withdraws for job in self._jobs):
            return

        def finish(now: Instant) -> None:
            try:
                with self._store.transaction():
                    self._store.mark_withdrawn(*key, now.utc)
                    self._store.forget_releases(stored.task, self._remembered)
            except StorageError as error:
                tell(Event.STORAGE_FAILED, path=error.path, cause=error.detail)
                self._again = now.mono + _RETRY
                return
            self._retained = None
            if release.weights.chunks:
                tell(Event.RELEASE_WITHDRAWN, task=stored.task, release=stored.number)

        # A release that is taken away while it is still going out goes no further.
        for job in [job for job in self._jobs if job.key == key]:
            self._jobs.remove(job)
        self._jobs.append(_Job(key, self._empties(key, release.weights), finish, withdraws=True))
        self.pump(now)

    def _empties(self, key: tuple[str, int, int], blob: BlobRef) -> Iterator[tuple[str, bytes]]:
        """Empty payloads for the chunks that no other release names; looked up when the first one is sent."""
        others = [
            len(release.weights.chunks)
            for name in self._tasks
            for stored, release in self._out(name)
            if release.weights.sha256 == blob.sha256
            and (stored.task, stored.manifest_version, stored.number) != key
            and not any(
                job.withdraws and job.key == (name, stored.manifest_version, stored.number) for job in self._jobs
            )
        ]
        for index in range(max(others, default=0), len(blob.chunks)):
            yield self._topics.chunk(blob.sha256.hex(), index), b""

    def _out(self, name: str) -> Sequence[tuple[StoredRelease, Release]]:
        """A task's releases that are not withdrawn, newest first."""
        return [(each, wire.unpack(each.signed.payload, Release)) for each in self._store.retained(name)]

    # -- small things --

    def _chunks(self, blob: BlobRef) -> Iterator[tuple[str, bytes]]:
        for index in range(len(blob.chunks)):
            start, end = chunks.span(blob.size, blob.chunk_size, index)
            piece = self._blobs.read(blob.sha256, start, end - start)
            if sha256(piece).digest() != blob.chunks[index]:
                raise BlobLost(f"blob {blob.sha256.hex()} is damaged on disk")
            yield self._topics.chunk(blob.sha256.hex(), index), piece

    def _send(self, topic: str, payload: bytes) -> None:
        try:
            self._publish(topic, payload, False)
        except LinkError as error:
            tell(Event.PUBLISH_REFUSED, topic=topic, cause=str(error))

    def _fits(self, topic: str, size: int) -> bool:
        if self._packet_max is None or size + chunks.PACKET_ROOM <= self._packet_max:
            return True
        cause = (
            f"{size} bytes are more than the broker takes in one message ({self._packet_max}): raise max_packet_size "
            "in mosquitto.conf, or build the release anew with a smaller --chunk-size"
        )
        tell(Event.PUBLISH_REFUSED, topic=topic, cause=cause)
        return False


def _chunked(release: Release) -> int:
    return release.weights.size if release.weights.chunks else 0
