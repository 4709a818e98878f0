"""The aggregator's shell: decodes what the link brings, carries out what the coordinator decides, keeps it on disk.

One owner thread (shared.driver). Order of every decision: blobs and key files, then one database transaction, then
publishing, receipts and the fold, then the acknowledgement to the broker. kill -9 anywhere leaves rows and blobs from
which the next start continues.
"""

import collections
import contextlib
import heapq
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, assert_never

from aggregator import control, gate, intake, ports, validate
from aggregator import coordinator as core
from aggregator.blobs import Blobs
from aggregator.config import AggregatorConfig
from aggregator.coordinator import Coordinator, Effect, Task
from aggregator.deny import DenyList
from aggregator.distribution import Distribution
from aggregator.download import Downloads
from aggregator.intake import Intake
from aggregator.ports import BlobLost, Contribution, StoredRelease, StoredTask
from aggregator.quarantine import Quarantine
from aggregator.reassembler import Reassembler
from aggregator.round import Round
from aggregator.store import Store
from shared import chunks, identity, logs, sealing, signing, systemd, tensors, wire
from shared.control import ControlRequest
from shared.driver import Driver, Mailbox, on_termination, read_clock
from shared.errors import ConfigError, LinkError, LocalProtocolError, Reason, RemoteProtocolError, StorageError
from shared.events import Event
from shared.files import hold, write_durably
from shared.logs import tell
from shared.machine import Instant, Tick
from shared.messages import (
    AggregatorStatus,
    DeviceStatus,
    OfferState,
    Outcome,
    Release,
    ReleaseMessage,
    Root,
    RootMessage,
    RoundOffer,
    Signed,
    TaskManifest,
)
from shared.mqtt import Link, LinkBroken, LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published, Will
from shared.topics import RELEASE, TASK_RELEASES, TASK_ROUNDS, Topics, parse_task, shard_client, task_round
from shared.trust import Trust, next_root
from shared.version import VERSION

SHARD = 0
_HEARTBEAT = 30.0
"""Seconds after which the owner loop turns though nothing happens; the watchdog may ask for less."""
_RETRY_EVERY = 5.0
"""Seconds between two tries to write to a disk that is full."""
_DAY = 86_400.0
_DRIFT = 3600.0
"""Seconds by which the clock may have been set since yesterday and still says what is old."""
_EXPIRES_SOON = 30
"""Days of validity below which it is told."""
_SHOW_EVERY = 1.0
"""Seconds between two writings of the status file at the least."""
_PAGE, _PAGE_BYTES = 500, 512 << 10
"""Devices, and bytes of JSON, that one answer holds."""
_OBSTACLES = 32
"""Kinds of obstacles that are counted by name: devices choose the names."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A signal asked the daemon to end."""

    signal: int


ServiceEvent = LinkEvent | core.Event | control.ControlRequest | Stop
R = TypeVar("R")


class Service:
    """Machine and shell of the daemon: `handle` decodes and asks the coordinator, the rest carries out."""

    def __init__(self, config: AggregatorConfig, now: Instant) -> None:
        self._config = config
        state = Path(config.state.directory)
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._state = state
        self._keys = state / "keys"
        self._keys.mkdir(mode=0o700, exist_ok=True)
        self._lock = _alone(state / "lock")
        self._store: ports.Store = Store(config.database)
        self._blobs: ports.Blobs = Blobs(state / "blobs")
        self._topics = Topics(config.broker.prefix)
        private = identity.load_signing_key(Path(config.trust.signing_key))
        self._roots = state / "roots"
        self._roots.mkdir(mode=0o700, exist_ok=True)
        trust = Trust(self._walk_roots(identity.load_root(Path(config.trust.root))))
        self._coordinator = Coordinator(
            trust,
            core.signer(private),
            sealing.generate,
            signing.public_bytes(private),
            reassembler=Reassembler(intake.bounds(config.limits)),
        )
        self._deny = DenyList(Path(config.trust.deny) if config.trust.deny else None)
        self._counts: collections.Counter[str] = collections.Counter()
        self._intake = Intake(
            self._store,
            self._blobs,
            identity.load_certificates(config.device_ca),
            self._deny,
            self._key_file,
            self._counts,
        )
        known = self._store.tasks()
        for stored in known:
            task = self._restore(stored, now)
            current = task.round or task.closing
            if current is not None:
                task.keyless = not self._key_file(stored.name, stored.manifest_version, current.number).exists()
            self._coordinator.tasks[stored.name] = task
        self._sweep(known)
        self._refused: collections.Counter[str] = collections.Counter()
        self._started = now
        self._session, self._link_cause = os.urandom(8), ""
        self._quarantine = Quarantine(state)
        self._ending = threading.Event()
        self._packet_max: int | None = None
        self._daily_due = now.mono
        self._looked: Instant | None = None
        """When the daily look was taken before."""
        self._days_left: dict[str, int] = {}
        """Of our certificates, by file name."""
        self._early: list[Message] = []
        """Releases that came before the broker was read back; acknowledged in their second turn."""
        self.mailbox: Mailbox[ServiceEvent] = Mailbox(config.limits.inbound_messages, config.limits.inbound_bytes)
        self._link = Link(
            LinkSettings(
                host=config.broker.host,
                port=config.broker.port,
                client_id=shard_client(SHARD),
                ca=Path(config.broker.ca),
                cert=Path(config.broker.cert),
                key=Path(config.broker.key),
                keepalive=config.broker.keepalive,
                connect_timeout=config.broker.connect_timeout,
                message_max=config.broker.message_max,
                durable=True,
            ),
            self.mailbox,
            Will(self._topics.aggregator_status(SHARD), self._presence(online=False)),
        )
        self._distribution = Distribution(
            self._store,
            self._blobs,
            self._topics,
            self._publish,
            config.limits,
            self.mailbox.post,
        )
        self._distribution.resume(self._coordinator.tasks.values(), now)
        self._downloads = Downloads(
            state / "spool", self._topics, self._blobs, self._link.subscribe, self._link.unsubscribe
        )
        self._driver: Driver[ServiceEvent, Effect] = Driver(self.mailbox, self, self)
        self._control = control.server(state, self.mailbox.post)
        self._shown: dict[str, object] = {}
        self._manager = systemd.ServiceManager(os.environ)

    def end(self, by: int) -> None:
        """End in order, because of this signal; for any thread."""
        self._ending.set()
        self.mailbox.post(Stop(by))

    def run(self) -> None:
        """Work until `end`."""
        wait = min(_HEARTBEAT, self._manager.watchdog or _HEARTBEAT)
        self._control.start()
        self._link.start()
        self._manager.ready()
        self._manager.status("connecting to the broker")
        tell(Event.DAEMON_STARTED, version=VERSION, tasks=sorted(self._coordinator.tasks))
        try:
            stale, due = True, 0.0
            while not self._driver.stopping:
                now = read_clock().mono
                if stale and now >= due:
                    self._show()
                    stale, due = False, now + _SHOW_EVERY
                stale |= self._driver.turn(min(wait, due - now) if stale else wait)
                if self._link.alive:
                    self._manager.alive()
        except (ConfigError, StorageError) as error:
            self._quarantine.close()  # no message is to blame
            if not (isinstance(error, StorageError) and self._ending.is_set()):
                raise
        else:
            self._quarantine.close()
        finally:
            self._manager.stopping()
            if self._link.connected:
                self._link.publish(
                    self._topics.aggregator_status(SHARD), self._presence(online=False), retain=True, qos=0
                )
            self._control.stop()
            self.mailbox.close()  # first: the network thread may wait there for a credit
            self._link.stop()
            self._store.close()
            self._blobs.close()
            (self._state / "status.json").unlink(missing_ok=True)
        tell(Event.DAEMON_STOPPED)

    # -- the machine's side ------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """The earliest of the coordinator's and of what is on its way to or from the broker."""
        due = (self._coordinator.deadline, self._distribution.deadline, self._downloads.deadline)
        return min([self._daily_due, *(each for each in due if each is not None)])

    def handle(self, event: ServiceEvent | Tick, now: Instant) -> list[Effect]:
        """Decode what is still bytes, then let the coordinator decide."""
        match event:
            case Message():
                if len(self._quarantine) and self._quarantine.holds(intake.suspicion(self._topics, event)):
                    return self._condemned(event, now)
                return [effect for found in self._decode(event, now) for effect in self._decide(found, now)]
            case LinkUp():
                return self._link_up(event, now)
            case LinkDown(cause=cause):
                if cause != self._link_cause:
                    tell(Event.LINK_DOWN, cause=cause)
                self._link_cause = cause
                self._downloads.disconnected()
                return []
            case LinkBroken(cause=cause):
                raise LocalProtocolError(f"the network thread failed: {cause}")
            case Published(mid=mid, refusal=refusal):
                if refusal:
                    self._count("publish_refused")
                    tell(Event.PUBLISH_REFUSED, cause=refusal)
                self._distribution.published(mid, refusal, now)
                return []
            case Tick():
                if self._daily_due <= now.mono:
                    self._daily(now)
                self._distribution.tick(now)
                effects = [effect for found in self._downloads.tick(now) for effect in self._decide(found, now)]
                return effects + self._decide(event, now)
            case Stop():
                self._driver.stop()
                return []
            case ControlRequest():
                return self._commanded(event, now) if event.begin() else []
            case _:
                return self._decide(event, now)

    def _decide(self, event: core.Event | Tick, now: Instant) -> list[Effect]:
        ready = self._coordinator.ready
        effects = self._coordinator.handle(event, now)
        if self._coordinator.ready and not ready:
            # What the broker knows of its tasks is known now, so nothing older can take its place.
            for message in self._downloads.pending():
                self.mailbox.post(core.ReleaseReceived(message))
            for early in self._early:
                self.mailbox.post(early)
        return effects

    def _condemned(self, message: Message, now: Instant) -> list[Effect]:
        """A message that must not be handled: whoever pulls an update's chunks gives it up, all else is refused."""
        upload = intake.chunk_of(self._topics, message)
        if upload is not None:
            return self._coordinator.handle(core.UpdateCondemned(upload.device, upload.update), now)
        raise RemoteProtocolError(Reason.QUARANTINED, f"{len(message.payload)} bytes that killed the process before")

    def _commanded(self, event: control.ControlRequest, now: Instant) -> list[Effect]:
        """The operator wants to see devices, or something of a task."""
        request, target = event.request, None
        if request.verb == "devices":
            event.reply(self._devices(request, now))
            return []
        if request.task is None:
            event.reply({"error": f"{request.verb} is for a task, and none is named"})
            return []
        task = self._coordinator.tasks.get(request.task)
        if request.verb == "rollback" and task is not None:
            kept = self._store.releases(request.task, task.manifest.version, self._config.limits.keep_releases)
            number = before(task.release, kept) if request.to is None else request.to
            found = next((each for each in kept if each.number == number), None)
            if found is None or not self._holds(found.weights):
                others = [str(each.number) for each in kept if each.number != task.release.number]
                what = "there is no earlier release" if number is None else f"release {number} is no longer kept"
                event.reply({"error": f"{request.task}: {what}; kept are {', '.join(others) or 'no others'}"})
                return []
            target = found.signed
        return self._decide(core.TaskCommand(request.task, request.verb, target, event.reply), now)

    def _devices(self, request: control.Request, now: Instant) -> dict[str, object]:
        """A page of the devices by name, as they said themselves; a whole fleet does not fit into one answer."""
        devices, size = self._coordinator.devices, 0
        page: list[dict[str, object]] = []

        def waits(status: DeviceStatus) -> bool:
            return status.online and not status.eligible

        names = (n for n, each in devices.items() if n > request.after and (not request.waiting or waits(each.status)))
        chosen = heapq.nsmallest(_PAGE + 1, names)
        for name in chosen[:_PAGE]:
            status, heard = devices[name].status, devices[name].heard
            row = {
                "device": name,
                "online": status.online,
                "eligible": status.online and status.eligible,
                "obstacles": status.obstacles,
                "datasets": status.datasets,
                "version": status.version,
                "heard": round(now.utc - (now.mono - heard)),
            }
            size += len(json.dumps(row))
            if page and size > _PAGE_BYTES:
                break
            page.append(row)
        return {"devices": page, "more": len(chosen) > len(page)}

    def _holds(self, blob: bytes) -> bool:
        try:
            return bool(self._blobs.get(blob))
        except BlobLost:
            return False

    def _link_up(self, event: LinkUp, now: Instant) -> list[Effect]:
        self._link_cause, self._packet_max, self._early = "", event.packet_max, []
        tell(Event.LINK_UP, session_present=event.session_present, packet_max=event.packet_max)
        own = self._topics.aggregator_status(SHARD)
        # What is retained comes in this order, and our own word after all of it.
        self._link.subscribe(TASK_RELEASES, TASK_ROUNDS, self._topics.root("+"), own, RELEASE)
        self._link.subscribe(self._topics.uploads(SHARD), self._topics.device_status("+"))
        asked = self._distribution.connected(event.packet_max)
        if asked is not None:
            self._link.subscribe(asked)
        self._downloads.connected(now)
        # Never dropped: whoever still reads the will holds everything back.
        self._distribution.retain(own, self._presence(online=True))
        return self._coordinator.handle(core.LinkReady(), now)

    def _decode(self, message: Message, now: Instant) -> list[core.Event]:
        """What a message says; RemoteProtocolError if it is not what belongs on its topic."""
        topic, payload, limit = message.topic, message.payload, self._config.broker.message_max
        if len(payload) > limit:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"{len(payload)} bytes, the limit is {limit}")
        if topic == RELEASE:
            if self._coordinator.ready:
                self._early = [each for each in self._early if each is not message]
                return [core.ReleaseReceived(wire.unpack(payload, ReleaseMessage, limit))]
            self._early.append(message)
            return []
        branch = topic.removeprefix(f"{self._topics.prefix}/").partition("/")[0]
        if topic.startswith("models/"):
            return self._decode_own(topic, payload, limit)
        match branch:
            case "dev":
                device = self._topics.parse_device_status(topic)
                if not payload or self._deny.has(device):
                    return [core.StatusReceived(device, None)]
                return [core.StatusReceived(device, wire.unpack(payload, DeviceStatus, 65_536), message.retain)]
            case "agg":
                own = not message.retain and self._presence(online=True) == payload
                return [core.ReadBackDone()] if own and topic == self._topics.aggregator_status(SHARD) else []
            case "root":
                version = self._topics.parse_root(topic)
                return [core.RootFound(version, wire.unpack(payload, RootMessage))] if payload else []
            case "blob":
                if self._distribution.seen(topic, payload):
                    self._link.unsubscribe(topic)
                    return []
                return self._downloads.arrived(*self._topics.parse_chunk(topic), payload, now)
            case _:
                return [intake.decode(self._topics, message, limit)]

    def _decode_own(self, topic: str, payload: bytes | bytearray, limit: int) -> list[core.Event]:
        """What we put there ourselves, if the broker did not lose or change it."""
        if not payload:
            return []
        if topic.endswith("/round"):
            return [core.OfferFound(parse_task(topic, "round"), wire.unpack(payload, Signed))]
        return [core.ReleaseFound(parse_task(topic, "release"), wire.unpack(payload, ReleaseMessage, limit))]

    # -- the shell's side --------------------------------------------------------------------------------------

    def refused(self, event: ServiceEvent | Tick, error: RemoteProtocolError) -> None:
        """Count and tell; nothing has changed."""
        self._refused[error.reason.value] += 1
        topic = event.topic if isinstance(event, Message) else type(event).__name__
        tell(Event.MESSAGE_REFUSED, topic=topic, reason=error.reason.value, detail=error.detail)

    def portions(self, batch: Sequence[ServiceEvent | Tick]) -> Iterable[Sequence[ServiceEvent | Tick]]:
        """All at once, but whatever is suspected of killing the process alone."""
        # A chunk is only put in its place, which kills nobody, unless it is the last that its update misses.
        numbers: dict[tuple[str, str], set[int]] = {}
        chunks = {id(event): intake.chunk_of(self._topics, event) for event in batch if isinstance(event, Message)}
        for chunk in chunks.values():
            if chunk is not None and chunk.chunk is not None:
                numbers.setdefault((chunk.device, chunk.update), set()).add(chunk.chunk)
        whole = {key for key, found in numbers.items() if self._coordinator.reassembler.completes(*key, found)}

        def name_of(event: ServiceEvent | Tick) -> str | None:
            if not isinstance(event, Message):
                return None
            chunk = chunks[id(event)]
            if chunk is not None and (chunk.device, chunk.update) not in whole:
                return None
            return intake.suspicion(self._topics, event)

        return self._quarantine.portions(batch, name_of)

    def settle(self, event: ServiceEvent | Tick) -> None:
        """Acknowledge what came from the broker."""
        # Numbers that no contribution took. Not sooner: one head may come twice in a batch, with a bad body and a good.
        self._intake.opened.clear()
        if isinstance(event, Message):
            if not any(event is each for each in self._early):
                self._link.acknowledge(event)
        elif isinstance(event, core.ReleaseReceived):
            self._downloads.tidy()

    def commit(self, effects: Sequence[Effect]) -> None:
        """Blobs and keys first, then everything else in one transaction; waits for a disk that is full."""
        durable = [each for each in effects if isinstance(each, Durable)]
        if durable:
            self._insist(lambda: self._commit(durable))

    def _commit(self, durable: "Sequence[Durable]") -> None:
        received = [each.received for each in durable if isinstance(each, core.Contribute)]
        self._blobs.put_all({each.head.sha256: each.body for each in received if each.body is not None})
        now = read_clock().utc
        rows: list[Contribution] = []
        with self._store.transaction():
            for effect in durable:
                match effect:
                    case core.AdoptRelease():
                        self._distribution.adopt(effect, now)
                    case core.OpenRound(offer=offer):
                        key = self._key_file(offer.task, effect.manifest_version, offer.round)
                        _keep(key, effect.private_key)
                        self._store.open_round(offer.task, effect.manifest_version, offer.round, effect.signed, now)
                    case core.ReviseRound(offer=offer):
                        self._store.revise_round(
                            offer.task,
                            effect.manifest_version,
                            offer.round,
                            effect.state,
                            effect.signed,
                            effect.extensions,
                        )
                    case core.Contribute():
                        rows.append(intake.counted(effect, now))
                    case core.Reject():
                        rows.append(intake.rejected(effect, now))
                    case core.StoreRelease(release=release):
                        self._store.add_release(
                            release.task,
                            effect.manifest_version,
                            release.number,
                            effect.signed,
                            release.weights.sha256,
                            now,
                        )
                        self._store.end_round(
                            release.task, effect.manifest_version, effect.round_number, "released", now
                        )
                    case core.RestoreRelease(release=release):
                        self._store.add_release(
                            release.task,
                            effect.manifest_version,
                            release.number,
                            effect.signed,
                            release.weights.sha256,
                            now,
                            effect.restores,
                        )
                    case core.MarkRound(offer=offer):
                        where = (offer.task, effect.manifest_version, offer.round)
                        if effect.known:
                            self._store.revise_round(*where, "superseded", effect.signed, 0)
                        else:
                            self._store.open_round(*where, effect.signed, now)
                        self._store.end_round(*where, "superseded", now)
                    case core.Recovered():
                        self._store.set_restored(effect.task, False)
                    case core.AdoptRoot():
                        _keep(self._root_file(effect.version), wire.pack(effect.message))
                    case core.SetTaskState():
                        self._store.set_task_state(effect.task, effect.state)
                    case core.AbandonRound():
                        self._store.end_round(effect.task, effect.manifest_version, effect.number, effect.how, now)
                    case _:
                        assert_never(effect)
            self._intake.recorded = self._store.contribute(rows)

    def perform(self, effect: Effect) -> Iterable[core.Event]:
        """Carry one effect out; again from its beginning where the disk refused, which each of them bears."""
        return self._insist(lambda: list(self._perform(effect)))

    def _insist(self, work: Callable[[], R]) -> R:
        """Do what needs the disk, again and again as long as it refuses; StorageError if it must be mended first.

        Nothing is acknowledged meanwhile, so nothing is lost; whoever stops the daemon stops this too.
        """
        told = False
        while True:
            try:
                done = work()
            except StorageError as error:
                if not told:
                    self._count("storage_failed")
                    tell(Event.STORAGE_FAILED, path=error.path, detail=error.detail)
                    self._manager.status(f"waiting for the disk: {error}")
                told = True
                if not error.passing or self._ending.wait(_RETRY_EVERY):
                    raise
                self._manager.alive()
            else:
                if told:
                    tell(Event.STORAGE_RECOVERED)
                    self._shown = {}
                return done

    def _perform(self, effect: Effect) -> Iterable[core.Event]:
        match effect:
            case core.AdoptRelease(manifest=manifest):
                self._count("releases_adopted")
                number = effect.release.number
                tell(Event.TASK_ADOPTED, task=manifest.task, version=manifest.version, release=number)
                self._downloads.tidy()
            case core.FetchWeights():
                yield from self._downloads.begin(effect.found, read_clock())
            case core.SeekParts():
                self._count("releases_damaged")
                remedy = (
                    f"the broker is asked for what it retains; if `aggregator task show {effect.task}` still says "
                    f"damaged then: `aggregator task rollback {effect.task}`, a higher version of the task, or "
                    "`aggregator restore`"
                )
                tell(
                    Event.RELEASE_DAMAGED,
                    task=effect.task,
                    release=effect.release,
                    updates=effect.updates,
                    cause=effect.detail,
                    remedy=remedy,
                )
                self._link.subscribe(TASK_RELEASES)  # what is retained comes with every subscription
            case core.MendParts(message=message):
                self._distribution.mend(message)
            case core.RestoreRelease(release=release):
                tell(Event.RELEASE_RESTORED, task=release.task, release=release.number, restores=effect.restores)
            case core.MarkRound(offer=offer):
                self._distribution.retain(task_round(offer.task), wire.pack(effect.signed))
            case core.Recovered():
                tell(
                    Event.TASK_RECOVERED,
                    task=effect.task,
                    release=effect.release,
                    round=effect.round,
                    needs_manifest=effect.needs_manifest,
                )
            case core.AdoptRoot():
                tell(Event.ROOT_ADOPTED, version=effect.version)
            case core.PublishRoot():
                self._distribution.retain(self._topics.root(effect.version), self._root_message(effect.version))
            case core.SetTaskState():
                tell(_TOLD[effect.state], task=effect.task)
            case core.Answer():
                assert callable(effect.reply)
                effect.reply(effect.facts)
            case core.PublishRelease():
                task = self._coordinator.tasks[effect.task]
                # A newer one may have been made in the same batch: its own effect publishes it.
                if task.release.number == effect.number:
                    self._distribution.publish(task, read_clock(), announce=effect.announce)
            case core.OpenRound(offer=offer):
                tell(
                    Event.ROUND_OPENED,
                    task=offer.task,
                    round=offer.round,
                    eligible=effect.eligible,
                    participation=round(offer.participation / 2**32, 4),
                )
                self._distribution.retain(task_round(offer.task), wire.pack(effect.signed))
            case core.ReviseRound(offer=offer):
                if effect.told is not None:
                    tell(
                        effect.told,
                        task=offer.task,
                        round=offer.round,
                        updates=effect.updates,
                        deadline=offer.deadline,
                        participation=round(offer.participation / 2**32, 4),
                    )
                self._distribution.retain(task_round(offer.task), wire.pack(effect.signed))
            case core.PublishOffer():
                self._distribution.retain(task_round(effect.task), wire.pack(effect.signed))
            case core.Admit():
                yield self._intake.admit(effect)
            case core.Ask(device=device, missing=missing):
                self._send(self._topics.command(device, "missing"), wire.pack(missing))
            case core.Evict(received=received):
                self._count("updates_evicted")
                tell(Event.UPDATE_EVICTED, **intake.where(received.context), bytes=received.head.size)
            case core.Open():
                yield self._intake.open(effect)
            case core.Contribute():
                self._intake.contribute(effect)
            case core.Reject(received=received):
                self._tell_rejected(received, Outcome.REJECTED, effect.reason, effect.detail)
            case core.Refuse(received=received):
                self._tell_rejected(received, effect.outcome, effect.reason, effect.detail)
            case core.Reply():
                self._send(self._topics.command(effect.device, "receipt"), wire.pack(effect.receipt))
            case core.Recall(received=received):
                yield self._intake.recall(effect)
            case core.Reduce():
                yield self._reduce(effect)
            case core.StoreRelease(release=release):
                self._count("rounds_released")
                tell(
                    Event.ROUND_CLOSED,
                    task=release.task,
                    round=effect.round_number,
                    release=release.number,
                    updates=effect.updates,
                    seconds=round(effect.seconds, 3),
                    **{f"metric_{name}": round(value, 6) for name, value in release.metrics.items()},
                )
            case core.EraseRound():
                self._erase_round(effect.task, effect.manifest_version, effect.number)
                for name in self._store.weights_spent(effect.task, self._config.limits.keep_releases):
                    self._blobs.delete(name)
            case core.AbandonRound():
                self._erase_round(effect.task, effect.manifest_version, effect.number)
                tell(Event.ROUND_ABANDONED, task=effect.task, round=effect.number, how=effect.how)
                if effect.weights not in {None, *self._store.weights_in_use(self._config.limits.keep_releases)}:
                    assert effect.weights is not None
                    self._blobs.delete(effect.weights)
            case core.FinishTask():
                tell(Event.TASK_FINISHED, task=effect.task, rounds=effect.rounds, why=effect.why)
            case _:
                assert_never(effect)

    # -- releases and rounds --

    def _reduce(self, effect: core.Reduce) -> core.RoundReduced | core.RoundSpoilt | core.PartsLost:
        manifest, release = effect.manifest, effect.release
        spoilt = core.RoundSpoilt(manifest.task, manifest.version, effect.number)
        rows = self._store.contributions(manifest.task, manifest.version, effect.number)
        try:
            fold = self._intake.fold(manifest, effect.number, rows)
        except (BlobLost, RemoteProtocolError) as error:
            # What was collected is damaged on disk: the round is lost, the task goes on.
            self._tell_spoilt(spoilt, Reason.WRONG_DIGEST, str(error))
            return spoilt
        try:
            base = tensors.load(self._blobs.get(release.weights.sha256), manifest.layout)
        except BlobLost as error:
            # The round stays closing, with all that was accepted, until they are back or somebody decides otherwise.
            return core.PartsLost(manifest.task, manifest.version, str(error))
        flat = tensors.flatten(manifest.layout, base)
        mean = fold.mean()
        mean *= manifest.server.lr
        flat += mean
        try:
            weights = tensors.save(manifest.layout, tensors.unflatten(manifest.layout, flat, base))
        except RemoteProtocolError as error:
            # Every update was finite and clipped, yet their mean takes a weight out of its type's range.
            self._tell_spoilt(spoilt, error.reason, error.detail)
            return spoilt
        self._blobs.put(weights)
        metrics = validate.pooled([(row.metrics, row.holdout) for row in rows])
        piece = chunks.chunk_size(self._packet_max)
        blob = chunks.describe(weights, piece if len(weights) > min(self._config.limits.inline_max, piece) else 0)
        reports = gate.reports([row.metrics for row in rows], manifest.metric)
        return core.RoundReduced(manifest.task, manifest.version, effect.number, blob, metrics, reports)

    def _tell_spoilt(self, spoilt: core.RoundSpoilt, reason: Reason, detail: str) -> None:
        self._refused[reason.value] += 1
        tell(Event.MESSAGE_REFUSED, task=spoilt.task, round=spoilt.number, reason=reason.value, detail=detail)

    def _erase_round(self, task: str, version: int, number: int) -> None:
        self._intake.folds.pop((task, version, number), None)
        self._key_file(task, version, number).unlink(missing_ok=True)
        for row in self._store.contributions(task, version, number):
            self._blobs.delete(row.body)

    # -- small things --

    def _tell_rejected(self, received: core.HeadReceived, outcome: Outcome, reason: Reason, detail: str) -> None:
        self._refused[reason.value] += 1
        where = intake.where(received.context)
        tell(Event.UPDATE_REJECTED, **where, outcome=outcome.value, reason=reason.value, detail=detail)

    def _send(self, topic: str, payload: bytes) -> None:
        """For what is asked for again where it gets lost."""
        try:
            self._link.publish(topic, payload)
        except LinkError as error:
            self._count("publish_refused")
            tell(Event.PUBLISH_REFUSED, topic=topic, cause=str(error))

    def _publish(self, topic: str, payload: bytes, retain: bool) -> int:
        return self._link.publish(topic, payload, retain=retain)

    def _daily(self, now: Instant) -> None:
        """Look at how long our certificates are valid, and let go of rows that nobody asks for any more."""
        before, self._looked = self._looked, now
        self._daily_due = now.mono + _DAY
        for path in dict.fromkeys((Path(self._config.broker.cert), Path(self._config.broker.ca))):
            ends = min(each.not_valid_after_utc.timestamp() for each in identity.load_certificates(path))
            self._days_left[path.name] = days = int((ends - now.utc) // 86_400)
            if days < _EXPIRES_SOON:
                tell(Event.CERTIFICATE_EXPIRING, path=str(path), days=days)
        if before is None or abs((now.utc - before.utc) - (now.mono - before.mono)) > _DRIFT:
            return  # a clock that was set today deletes nothing
        with contextlib.suppress(StorageError):  # a full disk is told by whatever has to be durable
            pruned = True
            while pruned:
                with self._store.transaction():
                    pruned = self._store.prune(now.utc) > 0

    def _root_file(self, version: int) -> Path:
        return self._roots / f"{version}.root"

    def _root_message(self, version: int) -> bytes:
        """The root of that version as it travels: as it came, or the pinned one."""
        path = self._root_file(version)
        if path.exists():
            return path.read_bytes()
        pinned = wire.unpack(Path(self._config.trust.root).read_bytes(), Signed)
        return wire.pack(RootMessage(v=2, before=pinned, own=pinned))

    def _walk_roots(self, root: Root) -> Root:
        """The newest root that was adopted, beginning with the pinned one."""
        while (path := self._root_file(root.version + 1)).exists():
            try:
                root = next_root(root, wire.unpack(path.read_bytes(), RootMessage))
            except RemoteProtocolError as error:
                advice = f"does not follow the root before it ({error}); delete it, the broker brings it back"
                raise ConfigError(str(path), "", advice) from None
        return root

    def _presence(self, *, online: bool) -> bytes:
        return wire.pack(AggregatorStatus(v=1, session=self._session, online=online, version=VERSION))

    def _key_file(self, task: str, version: int, number: int) -> Path:
        return self._keys / f"{task}.{version}.{number}"

    def _count(self, what: str) -> None:
        self._counts[what] += 1

    def _restore(self, stored: StoredTask, now: Instant) -> Task:
        """A task as the store knows it."""
        manifest = wire.unpack(stored.manifest.payload, TaskManifest)
        task = Task(stored.manifest, manifest, stored.release, wire.unpack(stored.release.payload, Release))
        task.state, task.restored = stored.state, stored.restored
        for each in self._store.releases(stored.name, stored.manifest_version, 2):
            if signing.digest(each.signed) == task.release.parent:
                task.parent = (wire.unpack(each.signed.payload, Release), each.signed)
        found = stored.round
        if found is None:
            return task
        offer = wire.unpack(found.offer.payload, RoundOffer)
        task.last_round, task.offer, task.offer_signed = found.number, offer, found.offer
        collecting = found.state in ("open", "closing")
        task.reports = self._reports(task, found.number - 1 if collecting else found.number)
        if not collecting:
            task.done = offer.state is OfferState.FINISHED and found.state not in ("finished", "stopped")
            spent = found.number >= manifest.plan.rounds
            task.needs_manifest = spent and (found.state, offer.state) == ("superseded", OfferState.CLOSED)
            return task
        current = Round(
            manifest.task,
            manifest.version,
            found.number,
            manifest.plan,
            offer.participation,
            now.mono
            + max(0.0, min(offer.deadline - now.utc, float(max(manifest.plan.deadline, manifest.plan.max_extension)))),
            found.opened,
            found.extensions,
            {row.device: row.head_digest for row in stored.contributions},
            max((row.seq for row in stored.contributions), default=0),
            {row.device: (row.head_digest, row.reason) for row in stored.rejected},
        )
        if found.state == "open":
            task.round = current
        else:
            task.closing = current
        return task

    def _reports(self, task: Task, number: int) -> int:
        """How many updates the metrics of a task's newest release come from: those of the last round that had any."""
        while number > 0 and task.release.metrics:
            rows = self._store.contributions(task.manifest.task, task.manifest.version, number)
            if rows:
                return gate.reports([row.metrics for row in rows], task.manifest.metric)
            number -= 1
        return 0

    def _sweep(self, known: Sequence[StoredTask]) -> None:
        """Delete what a crash left behind: bodies, weights and keys that no open round or newest release needs."""
        wanted = self._store.weights_in_use(self._config.limits.keep_releases)
        keys = set()
        for stored in known:
            wanted |= set(self._store.model(stored.name, stored.manifest_version)[:2])
            if stored.round is not None and stored.round.state in ("open", "closing"):
                wanted |= {row.body for row in stored.contributions}
                keys.add(self._key_file(stored.name, stored.manifest_version, stored.round.number))
        for name in self._blobs.names():
            if name not in wanted:
                self._blobs.delete(name)
        for path in self._keys.iterdir():
            if path not in keys:
                path.unlink()

    def _show(self) -> None:
        """Leave a status file for `aggregator status`, when it says something new."""
        tasks = self._coordinator.tasks
        online = [each.status for each in self._coordinator.devices.values() if each.status.online]
        shown: dict[str, object] = {
            "pid": os.getpid(),
            "version": VERSION,
            "started": int(self._started.utc),
            "connected": self._link.connected,
            "broker": f"{self._config.broker.host}:{self._config.broker.port}",
            "devices": {"online": len(online), "eligible": sum(status.eligible for status in online)},
            "waiting": waiting(online),
            "tasks": {name: _summary(task) for name, task in sorted(tasks.items())},
            "certificate_days": self._days_left,
            "retained_bytes": self._distribution.retained_bytes(),
            "counts": dict(sorted(self._counts.items())),
            "refused": dict(sorted(self._refused.items())),
            "quarantined": len(self._quarantine),
        }
        if shown == self._shown:
            return
        path = self._state / "status.json"
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(shown), encoding="utf-8")
            temporary.replace(path)
            self._shown = shown
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk: what needs the room more says so
        doing = ", ".join(f"{name} {task.phase}" for name, task in sorted(tasks.items())) or "no task"
        link = "connected" if self._link.connected else "not connected"
        self._manager.status(f"{link}; {len(online)} devices online; {doing}")


Durable = (
    core.AdoptRelease
    | core.OpenRound
    | core.ReviseRound
    | core.Contribute
    | core.Reject
    | core.StoreRelease
    | core.AbandonRound
    | core.RestoreRelease
    | core.MarkRound
    | core.Recovered
    | core.AdoptRoot
    | core.SetTaskState
)
"""Effects that are on disk before anything is carried out."""

_TOLD: Mapping[core.TaskState, Event] = {
    "active": Event.TASK_RESUMED,
    "paused": Event.TASK_PAUSED,
    "stopped": Event.TASK_STOPPED,
}


def waiting(online: Iterable[DeviceStatus]) -> dict[str, int]:
    """How many devices wait for what, by obstacle, the most frequent first; one that names none is about to be ready.

    A device with two obstacles counts twice.
    """
    found: collections.Counter[str] = collections.Counter()
    for status in online:
        if not status.eligible:
            found.update(set(status.obstacles) or {"settling"})
    return dict(found.most_common(_OBSTACLES))


def _keep(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data)
    except OSError as error:
        raise StorageError.of(path, error) from error


def run(config: AggregatorConfig) -> None:
    """`aggregator run`: until SIGTERM or SIGINT."""
    logs.configure(config.log.level, config.log.format, environ=os.environ, identifier="aggregator")
    service = Service(config, read_clock())
    on_termination(service.end)
    service.run()


def before(release: Release, kept: Sequence[StoredRelease]) -> int | None:
    """The number of the release that a rollback brings back where none is named: the one before the newest.

    Where the newest brought back an older one itself, it is the one before that: going back twice goes back two.
    """
    numbers = {signing.digest(each.signed): each for each in kept}
    if release.restores is not None and release.restores in numbers:
        release = wire.unpack(numbers[release.restores].signed.payload, Release)
    found = None if release.parent is None else numbers.get(release.parent)
    return None if found is None else found.number


def _summary(task: Task) -> dict[str, object]:
    current = task.round if task.round is not None else task.closing
    plan = task.manifest.plan
    return {
        "manifest_version": task.manifest.version,
        "release": task.release.number,
        "round": task.last_round,
        "rounds": plan.rounds,
        "phase": task.phase,
        "state": task.state,
        "updates": len(current.accepted) if current is not None else 0,
        "goal": plan.goal,
        "min_updates": plan.min_updates,
        "eligible": len(task.live),
        "metrics": task.release.metrics,
    }


def _alone(path: Path) -> object:
    """Hold the state directory; two aggregators on one would both sign rounds."""
    file = hold(path)
    if file is None:
        raise ConfigError(str(path), "state.directory", "another aggregator runs on this directory")
    return file
