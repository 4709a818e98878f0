"""The operator's visit to the broker: put a release file there, see the aggregator take it, read what is newest.

A visit is one connection as `_operator`. It never builds or signs anything and never writes other topics than
`models/release` and, before that, the chunks that a release names. Large weights are read from a file piece by piece
and written to one, so that memory stays flat.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from aggregator import release as release_file
from aggregator.release import Description
from shared import chunks, signing, topics, wire
from shared.cli import Exit, Failure
from shared.driver import Mailbox
from shared.errors import LinkError, RemoteProtocolError
from shared.fetch import PATIENCE, Fetch, Progress
from shared.messages import AggregatorStatus, BlobRef, Release, ReleaseMessage, TaskManifest
from shared.mqtt import Link, LinkBroken, LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published
from shared.spool import Spool
from shared.topics import Topics
from shared.trust import Trust

Say = Callable[[str], None]

_IN_FLIGHT = 16
"""Chunks that are sent before the first of them is confirmed."""
_TELL_EVERY = 5.0
"""Seconds between two lines about how far a transfer is."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The aggregator announced the task's release `number` under the manifest that was published."""

    task: str
    version: int
    number: int
    digest: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The broker keeps the release, and that is all that is known; `why` says what to look at."""

    why: str


class Visit:
    """An open connection; made by `visit`."""

    def __init__(self, link: Link, mailbox: Mailbox[LinkEvent], up: LinkUp) -> None:
        self.link, self.up = link, up
        self.answers: dict[int, str] = {}
        """The broker's answers to our publishes, by message id; "" is yes."""
        self._mailbox = mailbox
        self._lost: str | None = None
        self._messages: collections.deque[Message] = collections.deque()

    def events(self, seconds: float) -> Iterator[Message]:
        """What the broker sends, until `seconds` are over; LinkError when the link is lost."""
        end = time.monotonic() + seconds
        while True:
            while self._messages:
                yield self._messages.popleft()
            left = end - time.monotonic()
            if left <= 0:
                return
            self.take(left)

    def take(self, seconds: float) -> None:
        """Wait for something to come, and keep it; LinkError once all that came before the link was lost is kept."""
        if self._lost is not None:
            raise LinkError(f"the link to the broker was lost: {self._lost}")
        for event in self._mailbox.take(seconds):
            match event:
                case Message():
                    self._messages.append(event)
                case Published(mid, refusal):
                    self.answers[mid] = refusal
                case LinkDown(cause) | LinkBroken(cause):
                    # Some brokers answer a forbidden message and hang up at once: the answer counts.
                    self._lost = cause
                case LinkUp():
                    pass


@contextlib.contextmanager
def visit(settings: LinkSettings) -> Iterator[Visit]:
    """Connect, or raise LinkError with the cause of the first failure: a person waits, so nothing is tried again."""
    mailbox: Mailbox[LinkEvent] = Mailbox()
    link = Link(settings, mailbox)
    link.start()
    try:
        yield Visit(link, mailbox, _first(mailbox, settings))
    finally:
        mailbox.close()
        link.stop()


def publish(
    found: Description, trust: Trust, settings: LinkSettings, *, wait: float, prefix: str, say: Say
) -> Taken | NotTaken:
    """Publish a verified release, retained, and wait up to `wait` seconds until the aggregator announces it.

    Failure (refused) when the broker says no, or when the fleet already follows another manifest that is not older;
    LinkError when the broker cannot be reached or does not confirm.
    """
    task, version, digest = found.manifest.task, found.manifest.version, signing.digest(found.message.manifest)
    data, blob = wire.pack(found.message), found.release.weights
    with visit(settings) as here:
        _fits(len(data), here.up)
        if blob.chunks:
            _send_chunks(here, found, Topics(prefix), say)
        here.link.subscribe(topics.task_release(task), Topics(prefix).aggregator_status(0))
        mid = here.link.publish(topics.RELEASE, data, qos=1, retain=True)
        begun = time.monotonic()
        _confirmed(here, {mid}, max(settings.connect_timeout, 10.0), 0, topics.RELEASE)
        say(f"the broker keeps {task} version {version} on {topics.RELEASE}")
        if wait <= 0:
            return NotTaken("nobody waited for the aggregator")
        say(f"waiting up to {wait:g} s for the aggregator to take it")
        online: bool | None = None
        for event in here.events(wait):
            if event.topic != topics.task_release(task):
                online = _online(event.payload, online)
                continue
            announced = _announced(event.payload, trust)
            if announced is None:
                continue
            manifest, release, message = announced
            if signing.digest(message.manifest) == digest:
                taken = time.monotonic() - begun
                return Taken(task, version, release.number, signing.digest(message.release), taken)
            if manifest.version >= version:
                raise Failure(
                    Exit.REFUSED,
                    f"the fleet already follows version {manifest.version} of {task}, and this file is a different "
                    f"version {version}: raise `version` in the task file, build and publish again",
                )
        return NotTaken(_why(online))


def newest(
    task: str,
    settings: LinkSettings,
    *,
    wait: float,
    prefix: str,
    part: Path,
    check: Callable[[bytes], Description],
    say: Say,
) -> Description:
    """The newest retained release of `task` with its weights; Failure if none comes within `wait` seconds.

    `check` verifies the message before a chunk is asked for. Chunks are collected in the file `part`, which stays where
    the visit was cut short, so that the next one asks only for the rest; the caller deletes it at the end.
    """
    with visit(settings) as here:
        here.link.subscribe(topics.task_release(task))
        for event in here.events(wait):
            if not event.payload:
                continue
            found = check(bytes(event.payload))
            if found.weights is not None or not found.release.weights.chunks:
                return found
            weights = _collect(here, found.release.weights, Topics(prefix), part, say)
            release_file.check_weights(weights, found.manifest, found.release)
            return replace(found, weights=weights)
    raise Failure(
        Exit.TIMED_OUT,
        f"no release of {task!r} on the broker within {wait:.0f} s; is the name right, has an aggregator taken one?",
    )


def _first(mailbox: Mailbox[LinkEvent], settings: LinkSettings) -> LinkUp:
    end = time.monotonic() + settings.connect_timeout + 5
    while (left := end - time.monotonic()) > 0:
        for event in mailbox.take(left):
            match event:
                case LinkUp():
                    return event
                case LinkDown(cause) if cause.startswith(("no connection", "the broker refuses")):
                    raise LinkError(cause)
                case LinkDown(cause) | LinkBroken(cause):
                    # With TLS 1.3 a broker that dislikes our certificate says so only after the handshake, if at all.
                    raise LinkError(
                        f"{settings.host}:{settings.port} hung up without a greeting ({cause}): is {settings.cert} "
                        "of the broker's own fleet, and not expired?"
                    )
                case _:
                    pass
    raise LinkError(f"{settings.host}:{settings.port}: no answer within {settings.connect_timeout:.0f} s")


def _send_chunks(here: Visit, found: Description, names: Topics, say: Say) -> None:
    """Publish what `found` names, retained; returns once the broker has confirmed every chunk."""
    blob = found.release.weights
    if found.weights is None:
        raise Failure(Exit.REFUSED, "the file holds no weights; publish the file that `aggregator release build` wrote")
    most = chunks.chunk_size(here.up.packet_max)
    if here.up.packet_max is not None and blob.chunk_size + chunks.PACKET_ROOM > here.up.packet_max:
        raise Failure(
            Exit.REFUSED,
            f"the release comes in chunks of {blob.chunk_size} bytes and the broker takes {here.up.packet_max} in one "
            f"message: build it again with `aggregator release build --chunk-size {most}`",
        )
    open_mids: set[int] = set()
    spoken = time.monotonic()
    for index, piece in enumerate(chunks.pieces(found.weights, blob.chunk_size)):
        topic = names.chunk(blob.sha256.hex(), index)
        open_mids.add(here.link.publish(topic, bytes(piece), qos=1, retain=True))
        _confirmed(here, open_mids, PATIENCE, _IN_FLIGHT - 1, topic)
        if time.monotonic() - spoken >= _TELL_EVERY:
            spoken = time.monotonic()
            say(f"sent {index + 1} of {len(blob.chunks)} chunks")
    _confirmed(here, open_mids, PATIENCE, 0, names.chunk(blob.sha256.hex(), len(blob.chunks) - 1))


def _collect(here: Visit, blob: BlobRef, names: Topics, part: Path, say: Say) -> memoryview:
    """The blob out of its retained chunks, in the file `part` and mapped from there."""
    # Beside it, so that `part` itself is whole whenever it is there.
    spool = Spool(part.with_name(f"{part.name}.chunks"), blob)
    name, spoken = blob.sha256.hex(), time.monotonic()
    fetch = Fetch(blob, spool.missing(), time.monotonic())
    here.link.subscribe(*(names.chunk(name, index) for index in fetch.connected(time.monotonic())))
    gone = Failure(Exit.FAILED, f"the chunks of {name[:16]} are gone from the broker; a newer release takes its place")
    while fetch.left:
        if fetch.deadline is not None and fetch.deadline <= time.monotonic():
            raise LinkError(f"no chunk of {name[:16]} came within {PATIENCE:g} s; try again: what came is kept")
        for event in here.events(1.0):
            try:
                found, index = names.parse_chunk(event.topic)
            except RemoteProtocolError:
                continue
            if found != blob.sha256:
                continue
            step = fetch.arrived(index, event.payload, time.monotonic())
            if step.progress is Progress.GONE:
                raise gone
            if step.write:
                spool.write(index, event.payload)
            if step.unsubscribe and fetch.left:
                here.link.unsubscribe(*(names.chunk(name, each) for each in step.unsubscribe))
            if step.subscribe:
                here.link.subscribe(*(names.chunk(name, each) for each in step.subscribe))
            if time.monotonic() - spoken >= _TELL_EVERY:
                spoken = time.monotonic()
                say(f"{len(blob.chunks) - fetch.left} of {len(blob.chunks)} chunks came")
            if not fetch.left:
                break
    spool.finish(part)
    return memoryview(release_file.open_file(part))


def _fits(size: int, up: LinkUp) -> None:
    # paho would reconnect and send again for ever, and a broker may drop the message and still acknowledge it.
    if up.packet_max is not None and size + 128 > up.packet_max:
        raise Failure(
            Exit.REFUSED,
            f"the release's message has {size} bytes and the broker takes {up.packet_max}: raise max_packet_size in "
            "mosquitto.conf, or make the model smaller",
        )


def _confirmed(here: Visit, mids: set[int], seconds: float, left: int, topic: str) -> None:
    """Wait until the broker has confirmed all but `left` of `mids`, which are taken out; it may fall silent for
    `seconds`."""
    end = time.monotonic() + seconds
    while True:
        for mid in mids & here.answers.keys():
            mids.remove(mid)
            refusal = here.answers.pop(mid)
            if refusal:
                raise Failure(
                    Exit.REFUSED, f"the broker refuses the release: {refusal}; may this client write {topic}?"
                )
            end = time.monotonic() + seconds
        if len(mids) <= left:
            return
        if (rest := end - time.monotonic()) <= 0:
            raise LinkError(f"the broker did not confirm the release within {seconds:g} s; publish it again")
        here.take(rest)


def _announced(payload: bytes | bytearray, trust: Trust) -> tuple[TaskManifest, Release, ReleaseMessage] | None:
    """What an announcement says, or None where it does not verify: only the fleet's own word counts."""
    try:
        message = wire.unpack(payload, ReleaseMessage)
        manifest = trust.manifest(message.manifest, time.time())
        return manifest, trust.release(message.release, message.manifest, manifest), message
    except RemoteProtocolError:
        return None


def _online(payload: bytes | bytearray, known: bool | None) -> bool | None:
    try:
        return wire.unpack(payload, AggregatorStatus).online
    except RemoteProtocolError:
        return known


def _why(online: bool | None) -> str:
    if online:
        return "the aggregator is online but has not announced it: its log says why (journalctl -u aggregator)"
    if online is None:
        return "no aggregator has ever connected to this broker; start one with: aggregator run --config FILE"
    return "the aggregator is offline; it takes the release when it comes back"
