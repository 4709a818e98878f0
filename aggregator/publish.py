"""The operator's visit to the broker: put a release file there, see the aggregator take it, read what is newest.

A visit is one short connection as `_operator`. It never builds or signs anything and never writes another topic than
`models/release`.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aggregator.release import Description
from shared import signing, topics, wire
from shared.cli import Exit, Failure
from shared.driver import Mailbox
from shared.errors import LinkError, RemoteProtocolError
from shared.messages import AggregatorStatus, Release, ReleaseMessage, TaskManifest
from shared.mqtt import Link, LinkBroken, LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published
from shared.trust import Trust

Say = Callable[[str], None]


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
    data: bytes, found: Description, trust: Trust, settings: LinkSettings, *, wait: float, prefix: str, say: Say
) -> Taken | NotTaken:
    """Publish a verified release file, retained, and wait up to `wait` seconds until the aggregator announces it.

    `found` describes `data`. Failure (refused) when the broker says no, or when the fleet already follows another
    manifest that is not older; LinkError when the broker cannot be reached or does not confirm.
    """
    task, version, digest = found.manifest.task, found.manifest.version, signing.digest(found.message.manifest)
    with visit(settings) as here:
        _fits(data, here.up)
        here.link.subscribe(topics.task_release(task), topics.Topics(prefix).aggregator_status(0))
        mid = here.link.publish(topics.RELEASE, data, qos=1, retain=True)
        begun = time.monotonic()
        _confirmed(here, mid, max(settings.connect_timeout, 10.0))
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


def newest(task: str, settings: LinkSettings, *, wait: float) -> bytes:
    """The bytes of the newest retained release of `task`, unverified; Failure if none comes within `wait` seconds."""
    with visit(settings) as here:
        here.link.subscribe(topics.task_release(task))
        for event in here.events(wait):
            if event.payload:
                return event.payload
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


def _fits(data: bytes, up: LinkUp) -> None:
    # paho would reconnect and send again for ever, and a broker may drop the message and still acknowledge it.
    size = len(data) + 128
    if up.packet_max is not None and size > up.packet_max:
        raise Failure(
            Exit.REFUSED,
            f"the release has {len(data)} bytes and the broker takes {up.packet_max} in one message: raise "
            "max_packet_size in mosquitto.conf, or make the model smaller",
        )


def _confirmed(here: Visit, mid: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while mid not in here.answers and (left := end - time.monotonic()) > 0:
        here.take(left)
    refusal = here.answers.get(mid)
    if refusal:
        raise Failure(
            Exit.REFUSED, f"the broker refuses the release: {refusal}; may this client write {topics.RELEASE}?"
        )
    if refusal is None:
        raise LinkError(f"the broker did not confirm the release within {seconds:g} s; publish it again")


def _announced(payload: bytes, trust: Trust) -> tuple[TaskManifest, Release, ReleaseMessage] | None:
    """What an announcement says, or None where it does not verify: only the fleet's own word counts."""
    try:
        message = wire.unpack(payload, ReleaseMessage)
        manifest = trust.manifest(message.manifest, time.time())
        return manifest, trust.release(message.release, message.manifest, manifest), message
    except RemoteProtocolError:
        return None


def _online(payload: bytes, known: bool | None) -> bool | None:
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
