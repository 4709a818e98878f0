"""The agent's shell: decodes what the link brings, carries out what the machine decides, keeps it on disk.

One owner thread (shared.driver); the network, the scheduler, the trainer's pipes and the control socket only post
events to it. This process holds the device's key and must never import torch or numpy: the trainer child has those,
and no key.
"""

import contextlib
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, assert_never

from edge_agent import clock as clocks
from edge_agent import control, delivery, download, libraries, renewal, sensors, why
from edge_agent import participation as core
from edge_agent.budget import Budget
from edge_agent.bus import Bus, BusSaid
from edge_agent.child import Settings, Trainer, TrainerExited, TrainerSaid, TrainerWrote, rss
from edge_agent.config import AgentConfig, encrypted, zone
from edge_agent.delivery import Delivery, Waiting
from edge_agent.download import Downloads
from edge_agent.eligibility import DeviceFacts, questions
from edge_agent.jobs import Done, Job, Judge, Source
from edge_agent.outbox import Damaged, Outbox
from edge_agent.participation import Effect, Participation, Task
from edge_agent.pressure import PressureWatch
from edge_agent.renewal import Renewal, RenewalEvent, RenewalFailed, Renewed
from edge_agent.sandbox import Sandbox
from edge_agent.schedule import Schedule, WindowEdge
from edge_agent.sensors import Sensors
from edge_agent.shelf import Model, Shelf
from edge_agent.store import Kept, Store
from shared import chunks, identity, logs, wire
from shared.control import ControlRequest, Reply
from shared.driver import Driver, Mailbox, on_termination, read_clock
from shared.errors import (
    ConfigError,
    LinkError,
    LocalProtocolError,
    Reason,
    RemoteProtocolError,
    StorageError,
    TrainingError,
)
from shared.events import Event
from shared.logs import tell
from shared.machine import Instant, Tick
from shared.messages import (
    AggregatorStatus,
    DeviceStatus,
    Missing,
    Release,
    ReleaseMessage,
    Signed,
    TaskManifest,
    UpdateMessage,
)
from shared.mqtt import Link, LinkBroken, LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published, Will, tls
from shared.selection import shard
from shared.systemd import ServiceManager
from shared.topics import TASK_RELEASES, TASK_ROUNDS, Topics, is_name, parse_task, task_release
from shared.trust import Trust
from shared.version import VERSION

_HEARTBEAT = 60.0
"""Seconds after which the owner loop turns though nothing happens; the watchdog may ask for less."""
_STORAGE_RETRY = 5.0
"""Seconds until a disk that refused is tried again."""
_DAY = 86_400.0
_LACKING = 600.0
"""Seconds for which a trainer that found no torch is believed, where a look at folders cannot tell."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A signal asked the daemon to end."""

    signal: int


ServiceEvent = (
    LinkEvent
    | TrainerSaid
    | TrainerWrote
    | TrainerExited
    | control.ControlRequest
    | WindowEdge
    | BusSaid
    | RenewalEvent
    | core.Event
    | Stop
)


class Service:
    """Machine and shell of the daemon: `handle` decodes and asks the participation, the rest carries out."""

    def __init__(self, config: AgentConfig, now: Instant) -> None:
        self._config = config
        mine = renewal.choose(config, now.utc)
        self._device = _device_name(config, mine.name)
        self._topics = Topics(config.broker.prefix)
        self._store = Store(config.device.state_dir)
        self._clock = clocks.DeviceClock(config.device.state_dir / "clock", mine.begins, now, clocks.synchronised)
        now = self._clock.at(now)
        self._outbox = Outbox(self._store.outbox)
        self._zone = zone(config.policy.timezone)
        self._participation = Participation(
            trust=Trust(identity.load_root(config.trust.root)),
            policy=config.policy,
            device=self._device,
            certificate=mine.der,
            datasets=frozenset(config.data),
            random=os.urandom,
            timeout=config.trainer.timeout,
            idle_exit=config.trainer.idle_exit,
            inline_max=config.broker.inline_max,
            outbox_count=config.device.outbox_updates,
            outbox_bytes=config.device.outbox_bytes,
            quality=config.local,
        )
        self._shelf = Shelf(config.device.shelf, config.local.public)
        self.mailbox: Mailbox[ServiceEvent] = Mailbox()
        self._sandbox = Sandbox.open(
            os.environ, config.device.proc_root, config.device.sys_root, config.trainer.memory_max
        )
        device, policy = config.device, config.policy
        self._bus = Bus(self.mailbox.post)
        self._budget = Budget(device.state_dir, policy.cpu_budget)
        self._sensors = Sensors(
            device.sys_root, device.proc_root, device.state_dir, self._zone, self._bus, self._budget
        )
        limits = {"cpu": policy.cpu_pressure, "memory": policy.memory_pressure, "io": policy.io_pressure}
        self._pressure = PressureWatch(device.proc_root, limits, lambda: self.mailbox.post(core.Wake()), policy.sense)
        self._threads = config.trainer.threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self._trainer = Trainer(
            self.mailbox.post,
            Settings(
                python=str(config.trainer.python or sys.executable),
                threads=self._threads,
                memory_max=config.trainer.memory_max,
                nice=config.trainer.nice,
                idle=config.trainer.scheduling == "idle",
            ),
            self._sandbox,
        )
        self._job_pid: int | None = None
        self._session = os.urandom(8)
        self._renewal = Renewal(config, mine, now, self.mailbox.post, self._utc, random.random)
        self._link = Link(
            LinkSettings(
                host=config.broker.host,
                port=config.broker.port,
                client_id=self._device,
                ca=config.broker.ca,
                cert=mine.cert_file,
                key=mine.key_file,
                keepalive=config.broker.keepalive,
                connect_timeout=config.broker.connect_timeout,
                message_max=config.broker.message_max,
                clock=self._utc,
            ),
            self.mailbox,
            Will(self._topics.device_status(self._device), self._presence(online=False)),
        )
        self._schedule = Schedule(config.policy.windows, self._zone, self.mailbox.post)
        self._control = control.server(config.device.run_dir, self.mailbox.post)
        self._driver: Driver[ServiceEvent, Effect] = Driver(self.mailbox, self, self)
        self._manager = ServiceManager(os.environ)
        self._started = now
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._flying: dict[int, tuple[bytes, int]] = {}
        """Chunks that the broker has not acknowledged, by the id of their message: (head's digest, number)."""
        self._last_update: dict[str, object] | None = None
        self._last_failure: dict[str, object] | None = None
        """Of training; None once one has worked since."""
        self._missed: set[tuple[str, int]] = set()
        """Tasks, with the manifest's version, whose owner was told that their data set is not here."""
        self._said: core.PublishStatus | None = None
        """Last, to the broker."""
        self._probes: dict[int, Reply] = {}
        """Who waits for the broker's word on a message, by its id."""
        self._curious: list[control.ControlRequest] = []
        """Who asked why nothing is trained, and is answered after the next look."""
        self._link_cause = "connecting"
        self._stopping = False
        """A signal asked the daemon to end, and it does once the trainer has left its work."""
        self._ending = threading.Event()
        """Set by `stop`, for an owner thread that waits for the disk."""
        self._daily_at = now.mono
        self._lacking_until = 0.0
        self._restore(now)

    def _restore(self, now: Instant) -> None:
        """Take up what the disk holds."""
        self._store.sweep_spools(now.utc)
        tasks, strangers = [], set()
        for kept in self._store.load():
            task = restored(kept, self._participation.trust, now.utc)
            if task is None:
                strangers.add(kept.name)
                with contextlib.suppress(StorageError):  # it is tried again at the next start
                    self._store.forget(kept.name)
            else:
                tasks.append(task)
        updates = []
        for found in self._outbox.load():
            if isinstance(found, Damaged):
                tell(Event.UPDATE_DROPPED, id=found.id, why="damaged", detail=found.why)
            elif found.task in strangers:
                self._drop_update(delivery.DropUpdate(found, "task_forgotten"))
            else:
                updates.append(found)
        self._shelf.prune({task.name for task in tasks})
        used = {model.task: model.digest for model in self._shelf.models()}
        for effect in self._participation.restore(tasks, updates, now, self._store.jobs(), used, self._store.trained()):
            with contextlib.suppress(StorageError):  # what is to be kept here is kept better late than never
                self._keep(effect)
            for event in self.perform(effect):
                self.mailbox.post(event)

    def run(self) -> None:
        """Work until a signal says stop."""
        wait = min(_HEARTBEAT, self._manager.watchdog or _HEARTBEAT)
        self._control.start()
        self._schedule.start(read_clock())
        self._pressure.start()
        self._link.start()
        self._manager.ready()
        tell(Event.DAEMON_STARTED, device=self._device, version=VERSION)
        if closed := self._shelf.closed:
            tell(Event.STORAGE_FAILED, path=self._config.device.shelf, detail=closed)
        try:
            while not self._driver.stopping:
                self._driver.turn(wait)
                self._renew(self._now())
                self._daily(self._now())
                self._manager.status(self._summary())
                if self._link.alive:
                    self._manager.alive()
        except StorageError:
            if not self._ending.is_set():
                raise
            # It was asked to end while it waited for the disk: what was not stored has not happened.
        finally:
            self._manager.stopping()
            self._trainer.stop(kill=True)
            if self._link.connected:
                topic = self._topics.device_status(self._device)
                self._link.publish(topic, self._presence(online=False), retain=True, qos=0)
            self.mailbox.close()  # first: the network thread may wait there for a credit
            self._link.stop()
            self._schedule.stop()
            self._pressure.stop()
            self._budget.close()
            self._control.stop()
        tell(Event.DAEMON_STOPPED, device=self._device)

    def stop(self, number: int) -> None:
        """Have `run` end, as a signal asks; from any thread."""
        self._ending.set()
        self.mailbox.post(Stop(number))

    def _now(self) -> Instant:
        """This moment, by the device's time."""
        return self._clock.at(read_clock())

    def _utc(self) -> float:
        """The device's time in seconds, for any thread."""
        return self._clock.peek(read_clock()).utc

    def _renew(self, now: Instant) -> None:
        """Between two turns, when every head that carries the old certificate is signed: go over to a new one."""
        if self._renewal.turn(now):
            mine = self._renewal.current
            self._participation.certificate = mine.der
            self._link.change_identity(mine.cert_file, mine.key_file)

    def _daily(self, now: Instant) -> None:
        """What is worth a look now and then."""
        self._clock.keep(now)
        if now.mono < self._daily_at:
            return
        self._daily_at = now.mono + _DAY
        mine = self._renewal.current
        if mine.expiring(now.utc):
            left = max(0.0, mine.ends - now.utc)
            tell(Event.CERTIFICATE_EXPIRING, path=str(mine.cert_file), days=round(left / _DAY, 1))

    # -- the machine's side ------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """The participation's, or when a certificate is to be renewed."""
        both = (self._participation.deadline, self._renewal.deadline(self._clock.peek(read_clock())))
        return min((each for each in both if each is not None), default=None)

    def handle(self, event: ServiceEvent | Tick, now: Instant) -> Sequence[Effect]:
        """Decode what is still bytes or somebody's question, then let the participation decide."""
        if self._schedule.watch(now):  # which lives by the system's clock, right or wrong
            tell(Event.CLOCK_JUMPED)
            self.mailbox.post(core.ClockSet())
        now = self._clock.at(now)
        match event:
            case Message():
                return self._message(event, now)
            case LinkUp():
                return self._link_up(event, now)
            case LinkDown(cause=cause):
                return self._link_down(cause, now)
            case LinkBroken(cause=cause):
                raise LocalProtocolError(f"the network thread failed: {cause}")
            case Published():
                return self._published(event, now)
            case core.Sensed():
                effects = self._participation.handle(event, now)
                self._explain(now)
                return effects
            case TrainerSaid(pid=pid, message=message):
                work = self._participation.work
                if isinstance(message, Done) and (work is None or work.id != message.id):
                    self._drop(message.id)  # it was given up in its last moment
                return self._participation.handle(core.TrainerTold(message), now) if pid == self._job_pid else []
            case TrainerWrote(line=line):
                tell(Event.TRAINER_SAID, line=line)
                if libraries.lacks_one(line):  # the next look finds it; this job fails by its trainer's end
                    self._lacking_until = now.mono + _LACKING
                return []
            case TrainerExited():
                return self._trainer_exited(event, now)
            case ControlRequest():
                return self._asked(event, now) if event.begin() else []
            case WindowEdge():
                self._schedule.plan(now)
                return self._participation.handle(core.Wake(), now)
            case BusSaid():
                return self._participation.handle(core.Wake(), now) if self._bus.told(event, now.mono) else []
            case Renewed() | RenewalFailed():
                self._renewal.take(event, now)
                return []
            case Stop():
                if self._stopping:
                    self._driver.stop()  # asked twice: at once
                    return []
                self._stopping = True
                self._manager.stopping()
                return self._participation.handle(core.Leave(), now)
            case _:
                return self._participation.handle(event, now)

    def _message(self, message: Message, now: Instant) -> Sequence[Effect]:
        limit = self._config.broker.message_max
        if len(message.payload) > limit:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"{len(message.payload)} bytes, the limit is {limit}")
        if message.topic.startswith(f"{self._topics.prefix}/blob/"):
            blob, index = self._topics.parse_chunk(message.topic)
            return self._participation.handle(download.ChunkArrived(blob, index, message.payload), now)
        if message.topic == self._topics.command(self._device, "receipt"):
            return self._participation.handle(core.ReceiptArrived(wire.unpack(message.payload, Signed, 65_536)), now)
        if message.topic == self._topics.command(self._device, "missing"):
            return self._participation.handle(core.MissingArrived(wire.unpack(message.payload, Missing, 65_536)), now)
        if message.topic.startswith(f"{self._topics.prefix}/agg/"):
            shard_number = self._topics.parse_aggregator_status(message.topic)
            status = wire.unpack(message.payload, AggregatorStatus, 65_536)
            return self._participation.handle(core.AggregatorSaid(status.online, shard_number, status.session), now)
        if message.topic.endswith("/release"):
            task = parse_task(message.topic, "release")
            release = wire.unpack(message.payload, ReleaseMessage, limit)
            return self._participation.handle(core.ReleaseArrived(task, release), now)
        task = parse_task(message.topic, "round")
        return self._participation.handle(core.OfferArrived(task, wire.unpack(message.payload, Signed, 65_536)), now)

    def _link_up(self, event: LinkUp, now: Instant) -> Sequence[Effect]:
        self._link_cause = ""
        tell(Event.LINK_UP, packet_max=event.packet_max)
        receipts, aggregators = self._topics.command(self._device, "+"), self._topics.aggregator_status("+")
        self._link.subscribe(TASK_RELEASES, TASK_ROUNDS, receipts, aggregators)
        return self._participation.handle(core.Connected(event.packet_max), now)

    def _published(self, event: Published, now: Instant) -> Sequence[Effect]:
        if event.refusal:
            self._counts["publish_refused"] += 1
            tell(Event.PUBLISH_REFUSED, cause=event.refusal)
        if (probe := self._probes.pop(event.mid, None)) is not None:
            probe({"published": not event.refusal, "cause": event.refusal or None})
        chunk = self._flying.pop(event.mid, None)
        if chunk is None:
            return []
        return self._participation.handle(core.ChunkTaken(*chunk, acknowledged=not event.refusal), now)

    def _link_down(self, cause: str, now: Instant) -> Sequence[Effect]:
        if cause != self._link_cause:
            tell(Event.LINK_DOWN, cause=cause)
        self._link_cause = cause
        for probe in self._probes.values():
            probe({"published": False, "cause": f"the link went down: {cause}"})
        self._probes.clear()
        return self._participation.handle(core.Disconnected(), now)

    def _trainer_exited(self, event: TrainerExited, now: Instant) -> Sequence[Effect]:
        if event.cause in ("stopped", "exited"):
            tell(Event.TRAINER_STOPPED, pid=event.pid)
        else:
            self._counts["trainer_died"] += 1
            tell(Event.TRAINER_DIED, pid=event.pid, cause=event.cause, code=event.code, signal=event.signal)
        if event.pid != self._job_pid:
            return []
        self._job_pid = None
        detail = f"exit status {event.code}" if event.signal is None else f"signal {event.signal}"
        return self._participation.handle(core.TrainerGone(event.cause, detail), now)

    def _asked(self, event: control.ControlRequest, now: Instant) -> Sequence[Effect]:
        match event.request.verb:
            case "status":
                event.reply(self._status(now))
                return []
            case "why":
                self._curious.append(event)  # answered with what this look finds
            case "probe":
                self._probe(event, now)
                return []
            case "pause" | "resume" as verb:
                state, seconds = self._config.device.state_dir, event.request.seconds
                try:
                    if verb == "pause":
                        sensors.pause(state, None if seconds is None else now.utc + seconds)
                    else:
                        sensors.resume(state)
                except OSError as error:
                    event.reply({"error": f"{state}: {error.strerror}; nothing was changed"})
                    return []
                tell(Event.DEVICE_PAUSED if verb == "pause" else Event.DEVICE_RESUMED, seconds=seconds)
                event.reply({"paused": verb == "pause", "seconds": seconds})
        return self._participation.handle(core.Wake(), now)

    def _explain(self, now: Instant) -> None:
        """Answer those who asked why it does not train, out of a look at the device that was taken just now."""
        for event in self._curious:
            event.reply(why.why(self._participation, self._unlinked(), now, event.request.task))
        self._curious.clear()

    def _unlinked(self) -> str:
        return "" if self._link.connected else self._link_cause

    def _probe(self, event: control.ControlRequest, now: Instant) -> None:
        """Say again how this device is, so that the broker acknowledges it or says why not."""
        if not self._link.connected or self._said is None:
            event.reply({"published": False, "cause": self._link_cause or "nothing was said yet; try again"})
            return
        status = wire.pack(core.status(self._said, self._session, now.utc))
        mid = self._publish(self._topics.device_status(self._device), status, retain=True)
        if mid is None:
            event.reply({"published": False, "cause": "too much waits for the broker already"})
        else:
            self._probes[mid] = event.reply

    # -- the shell's side --------------------------------------------------------------------------------------

    def refused(self, event: ServiceEvent | Tick, error: RemoteProtocolError) -> None:
        """Count and tell; nothing has changed."""
        self._refused[error.reason.value] += 1
        topic = event.topic if isinstance(event, Message) else type(event).__name__
        tell(Event.MESSAGE_REFUSED, topic=topic, reason=error.reason.value, detail=error.detail)

    def portions(self, batch: Sequence[ServiceEvent | Tick]) -> Iterable[Sequence[ServiceEvent | Tick]]:
        """All at once."""
        return [batch]

    def settle(self, event: ServiceEvent | Tick) -> None:
        """A clean session acknowledges by itself."""

    def commit(self, effects: Sequence[Effect]) -> None:
        """Positions and release files, fsynced, before anything acts on them."""
        for effect in effects:
            self._durably(effect)

    def _durably(self, effect: Effect) -> None:
        """Keep trying: nothing may be acted on before it is stored. StorageError only when the daemon has to end."""
        failed_at: float | None = None
        while True:
            try:
                self._keep(effect)
            except StorageError as error:
                if failed_at is None:
                    failed_at = read_clock().mono
                    tell(Event.STORAGE_FAILED, path=error.path, detail=error.detail, retry=_STORAGE_RETRY)
                    self._manager.status(f"waiting for the disk: {error}")
                if self._ending.wait(min(_STORAGE_RETRY, self._manager.watchdog or _STORAGE_RETRY)):
                    raise
                if self._link.alive:
                    self._manager.alive()
            else:
                if failed_at is not None:
                    tell(Event.STORAGE_RECOVERED, seconds=round(read_clock().mono - failed_at, 1))
                return

    def _keep(self, effect: Effect) -> None:
        match effect:
            case core.KeepRelease():
                self._store.keep_release(effect.task, effect.message, effect.manifest_position, effect.position)
            case core.KeepOffer():
                self._store.keep_offer(effect.task, effect.position)
            case delivery.KeepUpdate(update=update):
                self._outbox.keep(update, identity.sign_head(self._renewal.current.key, update.head))
            case core.Settled(update=update):
                self._store.keep_worked(update.task, update.position)
            case core.ForgetTask():
                self._store.forget(effect.task)
                self._shelf.prune(self._participation.tasks.keys())
            case core.KeepJob(job=job):
                self._store.keep_job(job)
            case core.KeepTrained():
                self._store.keep_trained(self._now().utc)
            case _:
                pass

    def perform(self, effect: Effect) -> Iterable[core.Event]:
        """Carry one effect out."""
        match effect:
            case core.KeepRelease():
                self._counts["releases_accepted"] += 1
                tell(
                    Event.RELEASE_ACCEPTED,
                    task=effect.task,
                    version=effect.manifest.version,
                    release=effect.release.number,
                    bytes=effect.release.weights.size,
                )
                self._tell_of_data(effect.manifest)
            case core.KeepOffer():
                pass
            case core.Sense():
                yield core.Sensed(self._look(effect))
            case core.KeepJob() | core.KeepTrained():
                pass
            case core.DropJob(id=job_id):
                self._store.drop_job(job_id)
            case core.Train():
                yield from self._train(effect)
            case core.FreezeTraining():
                self._trainer.freeze()
                told = [obstacle.text for obstacle in effect.obstacles]
                tell(Event.TRAINING_FROZEN, task=effect.task, round=effect.round, obstacles=told)
            case core.ThawTraining():
                self._trainer.thaw()
                tell(Event.TRAINING_THAWED, task=effect.task, round=effect.round, seconds=round(effect.seconds, 1))
            case core.LeaveTraining():
                self._trainer.suspend(effect.id)
                tell(
                    Event.TRAINING_LEAVING,
                    task=effect.task,
                    round=effect.round,
                    why=effect.why,
                    obstacles=[obstacle.text for obstacle in effect.obstacles] or None,
                )
            case core.TrainingLeft():
                self._counts["training_left"] += 1
                tell(Event.TRAINING_LEFT, task=effect.task, round=effect.round, checkpoint=effect.kept)
            case core.JudgeRelease():
                yield from self._judge(effect)
            case core.StopJudging(id=job_id):
                self._trainer.cancel(job_id)
                self._trainer.stop()
                self._job_pid = None
            case core.UseRelease():
                yield from self._use(effect)
            case core.RefuseRelease():
                self._counts["models_refused"] += 1
                tell(Event.MODEL_REFUSED, task=effect.task, release=effect.release, why=effect.why)
            case core.Left():
                self._driver.stop()
            case core.StopTraining():
                if effect.kill:
                    self._trainer.stop(kill=True)
                    self._job_pid = None
                else:
                    self._trainer.cancel(effect.id)
                self._drop(effect.id)
                tell(
                    Event.TRAINING_STOPPED,
                    task=effect.task,
                    round=effect.round,
                    why=effect.why,
                    obstacles=[obstacle.text for obstacle in effect.obstacles] or None,
                )
            case core.TrainingFailed():
                self._counts["training_failed"] += 1
                failure = {"task": effect.task, "round": effect.round, "reason": effect.reason}
                self._last_failure = failure | {"detail": effect.detail}
                self._drop(effect.id)
                tell(
                    Event.TRAINING_FAILED,
                    task=effect.task,
                    round=effect.round,
                    reason=effect.reason,
                    detail=effect.detail,
                    retry=effect.retry,
                )
            case core.AskRecords():
                # A subscription that is there already brings what is retained once more.
                self._link.subscribe(TASK_RELEASES, TASK_ROUNDS)
            case core.RestTrainer():
                self._trainer.stop()
            case core.TrainingFinished():
                self._training_finished(effect)
            case delivery.KeepUpdate() | core.ForgetTask():
                pass
            case delivery.SendUpdate():
                yield from self._send_update(effect)
            case delivery.SendChunk():
                yield from self._send_chunk(effect)
            case core.Settled():
                self._settled(effect)
            case delivery.DropUpdate():
                self._drop_update(effect)
            case download.OpenSpool():
                yield self._open_spool(effect)
            case download.Subscribe():
                self._link.subscribe(*self._chunk_topics(effect))
            case download.Unsubscribe():
                self._link.unsubscribe(*self._chunk_topics(effect))
            case download.WriteChunk():
                yield from self._write_chunk(effect)
            case download.FinishSpool():
                yield self._finish_spool(effect)
            case download.DropSpool(task=task):
                self._store.drop_spool(task)
            case download.AskRelease(task=task):
                # A new subscription brings what is retained, and is not needed beside the one for all tasks.
                self._link.subscribe(task_release(task))
                self._link.unsubscribe(task_release(task))
            case download.DownloadStarted():
                tell(
                    Event.DOWNLOAD_STARTED,
                    task=effect.task,
                    release=effect.release,
                    bytes=effect.size,
                    missing=effect.missing,
                )
            case download.DownloadStopped():
                self._counts["downloads_stopped"] += 1
                tell(
                    Event.DOWNLOAD_STOPPED,
                    task=effect.task,
                    release=effect.release,
                    reason=effect.why,
                    detail=effect.detail or None,
                    retry=effect.retry,
                )
            case core.ShowProgress(progress=progress):
                tell(
                    Event.TRAINING_PROGRESSED,
                    task=effect.task,
                    round=effect.round,
                    phase=progress.phase,
                    epoch=f"{progress.epoch}/{progress.epochs}",
                    step=progress.step,
                    loss=progress.loss,
                )
            case core.EligibilityChanged():
                event = Event.DEVICE_ELIGIBLE if effect.eligible else Event.DEVICE_BLOCKED
                tell(event, obstacles=[obstacle.text for obstacle in effect.obstacles] or None)
            case core.PublishStatus():
                self._said = effect
                status = core.status(effect, self._session, self._now().utc)
                self._publish(self._topics.device_status(self._device), wire.pack(status), qos=0, retain=True)
            case _:
                assert_never(effect)

    def _look(self, effect: core.Sense) -> DeviceFacts:
        """What the sensors read; the bus is asked what the owner or a publisher of a task wants to know."""
        manifests = [task.manifest for task in self._participation.tasks.values() if task.manifest is not None]
        asked = questions(self._config.policy, [manifest.conditions for manifest in manifests])
        facts = self._sensors.read(
            self._now(), self._trainer.pid, effect.working, effect.trained, asked, self._pressure.watching
        )
        return replace(facts, trainer=self._has_libraries())

    # -- training --

    def _has_libraries(self) -> bool | None:
        found = libraries.present(self._config.trainer.python)
        return False if found is None and read_clock().mono < self._lacking_until else found

    def _train(self, effect: core.Train) -> Iterable[core.Event]:
        manifest, offer = effect.manifest, effect.offer
        data = self._config.data[manifest.data.dataset]
        train, evaluate, weights = self._store.files(manifest.task, manifest, effect.release)
        job = Job(
            id=effect.id,
            task=manifest.task,
            opset=manifest.opset,
            layout=manifest.layout,
            train_graph=str(train),
            eval_graph=str(evaluate),
            weights=str(weights),
            training=manifest.training,
            data=manifest.data,
            source=Source(kind=data.format, path=str(data.path)),
            metric=manifest.metric,
            seed=effect.seed,
            clip=offer.clip,
            codec=manifest.codec,
            hpke_key=offer.hpke_key,
            context=effect.context,
            output=str(self._outbox.body(effect.id)),
            threads=self._threads,
            checkpoint=str(self._store.checkpoint(effect.id)),
            checkpoint_every=self._config.trainer.checkpoint,
        )
        fresh = self._trainer.pid is None
        try:
            self._job_pid = self._trainer.submit(job)
        except TrainingError as error:
            yield core.TrainerGone(error.reason, error.detail)
            return
        if fresh:
            tell(Event.TRAINER_STARTED, pid=self._job_pid)
        tell(
            Event.TRAINING_STARTED,
            task=manifest.task,
            round=offer.round,
            release=effect.release.number,
            again=effect.again or None,
        )

    def _judge(self, effect: core.JudgeRelease) -> Iterable[core.Event]:
        manifest = effect.manifest
        source = self._config.data[manifest.data.dataset]
        train, evaluate, weights = self._store.files(manifest.task, manifest, effect.release)
        before = self._shelf.weights(manifest)
        job = Judge(
            id=effect.id,
            opset=manifest.opset,
            layout=manifest.layout,
            train_graph=str(train),
            eval_graph=str(evaluate),
            weights=str(weights),
            before=None if before is None else str(before),
            data=manifest.data,
            source=Source(kind=source.format, path=str(source.path)),
            metric=manifest.metric,
            holdout=manifest.training.holdout,
            batch_size=manifest.training.batch_size,
            threads=self._threads,
        )
        try:
            self._job_pid = self._trainer.submit(job)
        except TrainingError as error:
            yield core.TrainerGone(error.reason, error.detail)

    def _use(self, effect: core.UseRelease) -> Iterable[core.Event]:
        """Put the release where programs find it; where the disk refuses, they go on with the one before."""
        manifest, release, judged = effect.manifest, effect.release, effect.judged
        _, evaluate, weights = self._store.files(manifest.task, manifest, release)
        metrics, examples = ({}, 0) if judged is None else (judged.metrics, judged.examples)
        since = int(self._now().utc)
        model = Model(manifest.task, manifest.version, release.number, effect.digest, metrics, examples, since)
        try:
            self._shelf.put(model, manifest, evaluate, weights)
        except StorageError as error:
            detail = self._shelf.closed or error.detail
            tell(Event.STORAGE_FAILED, path=error.path, detail=detail, retry=core.SHELF_RETRY)
            yield core.ShelfFailed(effect)
            return
        shown = {f"metric_{name}": value for name, value in metrics.items()}
        tell(Event.MODEL_USED, task=manifest.task, version=manifest.version, release=release.number, **shown)

    def _training_finished(self, effect: core.TrainingFinished) -> None:
        done = effect.done
        self._last_failure = None
        tell(
            Event.TRAINING_FINISHED,
            task=effect.task,
            round=effect.round,
            examples=done.examples,
            steps=done.steps,
            loss=done.loss,
            seconds=done.seconds,
            **{f"metric_{name}": value for name, value in done.metrics.items()},
        )

    def _tell_of_data(self, manifest: TaskManifest) -> None:
        """Once for each manifest, say that a task passes this device by."""
        missing, key = _missing(manifest, self._participation.datasets), (manifest.task, manifest.version)
        if missing is not None and key not in self._missed:
            self._missed.add(key)
            tell(Event.DATA_MISSED, task=manifest.task, obstacle=missing)

    # -- updates up --------------------------------------------------------------------------------------------

    def _send_update(self, effect: delivery.SendUpdate) -> Iterable[core.Event]:
        update = effect.update
        body = None
        if not update.chunk_size:
            try:
                body = self._outbox.read(update)
            except StorageError as error:
                yield core.UpdateLost(update.digest, error.detail)
                return
        signature = self._outbox.signature(update.id)
        version: Literal[1, 2] = 1 if body is not None else 2
        message = wire.pack(UpdateMessage(v=version, head=update.head, sig=signature, body=body))
        topic = self._topics.head(shard(self._device, update.shards), self._device, update.digest.hex()[:32])
        self._last_update = {"task": update.task, "round": update.round, "outcome": "sent"}
        if self._publish(topic, message) is not None:
            self._counts["updates_sent"] += 1
            tell(Event.UPDATE_SENT, task=update.task, round=update.round, bytes=update.size, attempt=effect.attempt)

    def _send_chunk(self, effect: delivery.SendChunk) -> Iterable[core.Event]:
        update, index = effect.update, effect.index
        try:
            piece = self._outbox.read(update, index)
        except StorageError as error:
            yield core.UpdateLost(update.digest, error.detail)
            return
        name = update.digest.hex()[:32]
        topic = self._topics.upload_chunk(shard(self._device, update.shards), self._device, name, index)
        mid = self._publish(topic, piece)
        if mid is None:
            yield core.ChunkTaken(update.digest, index, acknowledged=False)
        else:
            self._counts["chunks_sent"] += 1
            self._flying[mid] = (update.digest, index)

    def _settled(self, effect: core.Settled) -> None:
        update, outcome = effect.update, effect.outcome.value
        self._drop(update.id)
        self._counts[f"updates_{outcome}"] += 1
        self._last_update = {"task": update.task, "round": update.round, "outcome": outcome}
        tell(Event.UPDATE_ANSWERED, task=update.task, round=update.round, outcome=outcome, reason=effect.reason or None)

    def _drop_update(self, effect: delivery.DropUpdate) -> None:
        self._drop(effect.update.id)
        if effect.why != "answered":
            self._counts["updates_dropped"] += 1
            tell(Event.UPDATE_DROPPED, task=effect.update.task, round=effect.update.round, why=effect.why)

    def _drop(self, job: str) -> None:
        self._outbox.drop(job)

    # -- blobs down --------------------------------------------------------------------------------------------

    def _open_spool(self, effect: download.OpenSpool) -> core.Event:
        task, blob = effect.task, effect.blob
        try:
            missing = self._store.open_spool(task, blob)
        except StorageError as error:
            return download.SpoolFailed(task, blob.sha256, str(error))
        if missing is None:
            return download.Whole(task, blob.sha256)
        return download.SpoolRead(task, blob.sha256, tuple(missing))

    def _chunk_topics(self, effect: download.Subscribe | download.Unsubscribe) -> Iterable[str]:
        return (self._topics.chunk(effect.blob.hex(), index) for index in effect.chunks)

    def _write_chunk(self, effect: download.WriteChunk) -> Iterable[core.Event]:
        try:
            self._store.write_chunk(effect.task, effect.blob, effect.index, effect.payload)
        except StorageError as error:
            yield download.SpoolFailed(effect.task, effect.blob, str(error))
        else:
            self._counts["chunks_fetched"] += 1

    def _finish_spool(self, effect: download.FinishSpool) -> core.Event:
        task, blob = effect.task, effect.blob.sha256
        try:
            self._store.finish_spool(task, blob)
        except StorageError as error:
            return download.SpoolFailed(task, blob, str(error))
        except RemoteProtocolError as error:
            self._refused[error.reason.value] += 1
            return download.SpoolFailed(task, blob, error.detail, spoilt=True)
        return download.Whole(task, blob)

    def _publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int | None:
        """The message's id, or None if it was not sent."""
        try:
            return self._link.publish(topic, payload, qos=qos, retain=retain)
        except LinkError as error:
            self._counts["publish_refused"] += 1
            tell(Event.PUBLISH_REFUSED, topic=topic, cause=str(error))
            return None

    # -- what people see --

    def _presence(self, *, online: bool) -> bytes:
        return wire.pack(
            DeviceStatus(
                v=1,
                session=self._session,
                online=online,
                version=VERSION,
                opsets=[],
                eligible=False,
                obstacles=[],
                datasets=[],
            )
        )

    def _summary(self) -> str:
        """One line for `systemctl status`."""
        part, link = self._participation, "connected" if self._link.connected else "not connected"
        newest = ", ".join(
            f"{task.name} release {task.release.number}" for task in part.tasks.values() if task.release is not None
        )
        coming = part.downloads.progress
        if coming is not None:
            newest += f", fetching {coming[0]} ({100 * coming[1] // coming[2]} %)"
        if part.work is not None:
            doing = f"{part.work.state} {part.work.task} round {part.work.round}"
            if part.work.state != "training" and part.obstacles:
                doing += ": " + "; ".join(obstacle.text for obstacle in part.obstacles)
        elif part.eligible:
            doing = "ready"
        else:
            doing = "waiting: " + ("; ".join(obstacle.text for obstacle in part.obstacles) or "settling")
        return f"{link}; {newest or 'no model yet'}; {doing}"

    def _state(self) -> str:
        part = self._participation
        if part.work is not None:
            return part.work.state
        if part.eligible:
            return "ready"
        return "waiting" if part.obstacles else "settling"

    def _status(self, now: Instant) -> Mapping[str, object]:
        part = self._participation
        received, sent = self._link.bytes_moved()
        return {
            "device": self._device,
            "version": VERSION,
            "pid": os.getpid(),
            "uptime": round(now.mono - self._started.mono, 1),
            "link": {
                "connected": self._link.connected,
                "broker": f"{self._config.broker.host}:{self._config.broker.port}",
                "cause": self._link_cause or None,
                "bytes_received": received,
                "bytes_sent": sent,
            },
            "certificate": {
                "expires": _moment(self._renewal.current.ends),
                "days": round((self._renewal.current.ends - now.utc) / _DAY, 1),
                "expiring": self._renewal.current.expiring(now.utc),
                "source": self._renewal.current.source,
                "renews": None if self._renewal.due is None else _moment(self._renewal.due),
            },
            "state": self._state(),
            "why": why.why(part, self._unlinked(), now)["answer"],
            "eligible": part.eligible,
            "obstacles": [
                {"name": each.name.value, "value": each.value, "threshold": each.threshold, "text": each.text}
                for each in part.obstacles
            ],
            "sensing": "by pressure triggers" if self._pressure.watching else f"by the clock: {self._pressure.refusal}",
            "sandbox": {"delegated": self._sandbox is not None, "missing": _missing_limits(self._sandbox)},
            "clock": {"synchronised": self._clock.right, "now": _moment(now.utc), "zone": str(self._zone)},
            "training": None
            if part.work is None
            else {
                "task": part.work.task,
                "round": part.work.round,
                "state": part.work.state,
                "epoch": part.progress.epoch if part.progress is not None else 0,
                "step": part.progress.step if part.progress is not None else 0,
            },
            "left": {name: job.position[1] for name, job in sorted(part.left.items())},
            "download": _download(part.downloads),
            "coming": {
                name: {"release": number, "retry": None if until is None else round(max(0.0, until - now.mono), 1)}
                for name, number, until in part.downloads.coming
            },
            "outbox": [_waiting(part.delivery, each, now.mono) for each in part.delivery.waiting],
            "last_update": self._last_update,
            "last_failure": self._last_failure,
            "tasks": {task.name: _shown(task, part.datasets) for task in part.tasks.values()},
            "models": {"folder": str(self._config.device.shelf), "closed": self._shelf.closed or None},
            "memory": {"agent": rss(os.getpid()), "trainer": self._trainer.rss()},
            "counts": dict(sorted(self._counts.items())),
            "refused": dict(sorted(self._refused.items())),
        }


def _missing_limits(sandbox: Sandbox | None) -> dict[str, str]:
    return {} if sandbox is None else dict(sandbox.missing)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def run(config: AgentConfig) -> None:
    """`edge-agent run`: until SIGTERM or SIGINT."""
    logs.configure(config.log.level, config.log.format, environ=os.environ, identifier="edge-agent")
    service = Service(config, read_clock())
    on_termination(service.stop)
    service.run()


def restored(kept: Kept, trust: Trust, now: float) -> Task | None:
    """A task as the store knows it; None if the root, which may be a newer one, does not stand behind it."""
    task = Task(
        kept.name,
        manifest_position=kept.manifest_position,
        release_position=kept.release_position,
        offer_position=kept.offer_position,
        worked=kept.worked,
        settled=kept.worked,
    )
    if kept.manifest is None or kept.release is None:
        return task
    try:
        trust.manifest(kept.manifest, now)
    except RemoteProtocolError as error:
        if error.reason is not Reason.EXPIRED:
            return None
    with contextlib.suppress(RemoteProtocolError):
        manifest = wire.unpack(kept.manifest.payload, TaskManifest)
        task.release = wire.unpack(kept.release.payload, Release)
        task.manifest_signed, task.manifest = kept.manifest, manifest
    return task


def _shown(task: Task, datasets: frozenset[str]) -> dict[str, object]:
    missing = None if task.manifest is None else _missing(task.manifest, datasets)
    return {
        "obstacle": missing,
        "version": task.manifest.version if task.manifest is not None else None,
        "release": task.release.number if task.release is not None else None,
        "round": task.offer.round if task.offer is not None else None,
        "round_state": task.offer.state.value if task.offer is not None else None,
        "rounds": task.manifest.plan.rounds if task.manifest is not None else None,
        "last_round_trained": task.worked[1],
    }


def _missing(manifest: TaskManifest, datasets: frozenset[str]) -> str | None:
    """What to do about a task whose data set this device does not have; None if it has it."""
    name = manifest.data.dataset
    if name in datasets:
        return None
    return f"no data set {name} here: say in agent.toml where it lies, path in [data.{name}], and restart edge-agent"


def _download(downloads: Downloads) -> dict[str, object] | None:
    if downloads.progress is None:
        return None
    task, there, size = downloads.progress
    return {"task": task, "bytes": there, "total": size, "percent": round(100 * there / size, 1)}


def _waiting(delivery: Delivery, each: Waiting, mono: float) -> dict[str, object]:
    update = each.update
    return {
        "task": update.task,
        "version": update.position[0],
        "round": update.round,
        "bytes": update.size,
        "chunks": chunks.count(update.size, update.chunk_size) if update.chunk_size else 0,
        "asked": len(each.wanted) + len(each.flying),
        "attempts": each.sent,
        "next_try": None if delivery.held(each) else round(max(0.0, each.due - mono), 1),
    }


def check_identity(config: AgentConfig) -> None:
    """Read what the device proves itself with, and what it trusts; ConfigError names the file that does not fit.

    A key that only the unit can decrypt is taken on trust: the agent itself reads it when it starts.
    """
    _device_name(config, identity.common_name(identity.load_certificate(config.broker.cert)))
    if encrypted(config.broker.key) is None:
        identity.load_key(config.broker.key)
        tls(config.broker.ca, config.broker.cert, config.broker.key)
    else:
        identity.load_certificates(config.broker.ca)
    identity.load_root(config.trust.root)


def _device_name(config: AgentConfig, certified: str) -> str:
    path = str(config.broker.cert)
    if not is_name(certified):
        raise ConfigError(path, "broker.cert", f"names {certified!r}, which cannot be a device")
    if config.device.name not in (None, certified):
        raise ConfigError(path, "device.name", f"is {config.device.name}, but the certificate is of {certified}")
    return certified
