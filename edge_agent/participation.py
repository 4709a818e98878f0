"""The agent's machine: which releases and offers this device believes, and when it trains. Pure.

It holds the device's side of every rule about signed records (shared.trust): verify, then parse, then compare with the
highest position it has accepted; older or forked is refused. It trains on an open offer for the release it holds, when
it is selected and nothing stands in the way, one job at a time.

    release: verified -> (weights in chunks: coming, see edge_agent.download) -> accepted
    job: none -> training -> sealed, see edge_agent.delivery -> none
         training <-> frozen; either -> leaving -> left, with a checkpoint -> training, or dropped

What breaks while it trains freezes the job where that may soon be over, for `grace` seconds at most; else the job is
left with a checkpoint and the child ends, so that its memory is free. A job that was left is gone on with when the
device is eligible again, also after a reboot, as long as its round is open.

An accepted release becomes the model in use on this device at once, or, where its owner asks for it, after the trainer
has judged it on the local hold-out and found it not clearly worse than the one in use. A release that the trainer
cannot judge, in JUDGE_TRIES tries, does not take the place of one in use.

It must never touch a socket, a disk, a clock or a private key: the shell signs heads and keeps files.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import assert_never

from edge_agent import download
from edge_agent.delivery import Delivery, DropUpdate, Update
from edge_agent.delivery import Effect as DeliveryEffect
from edge_agent.download import Coming, Downloads
from edge_agent.eligibility import PASSING, DataFacts, DeviceFacts, Gatekeeper, Obstacle, Policy, obstacles
from edge_agent.jobs import Done, Failed, Judged, LeftJob, Progress, Suspended, Word
from edge_agent.quality import Quality, refusal
from shared import chunks, signing, trust, wire
from shared.errors import Reason, RemoteProtocolError
from shared.layout import dimension
from shared.machine import Instant, Tick
from shared.messages import (
    DeviceStatus,
    Missing,
    OfferState,
    Outcome,
    Release,
    ReleaseMessage,
    RoundOffer,
    Signed,
    TaskManifest,
    UpdateContext,
    UpdateHead,
    Version,
)
from shared.opset import OPSET_VERSION
from shared.selection import draw
from shared.trust import Position, Trust, advance
from shared.version import VERSION

TASKS_MAX = 64
"""Tasks that one device follows; beyond it a release is refused."""
STATUS_BURST, STATUS_INTERVAL, STATUS_REFRESH = 3, 300.0, 6 * 3600.0
"""Status messages at once, seconds until one more is allowed, seconds after which it is said again."""
FACTS_FRESH = 2.0
"""Seconds for which facts may decide that training starts."""
CLOCK_SETTLES = 30.0
"""Seconds after which a clock that was set is believed, whatever was before."""
PROGRESS_INTERVAL = 10.0
"""Seconds between two lines about a training that goes on; one that takes less is told by its start and end."""
OUTBOX_COUNT, OUTBOX_BYTES = 16, 256 << 20
"""Updates, and bytes of their bodies, that wait for an answer at most."""
LEAVING = 20.0
"""Seconds in which a trainer must have left its job; then it is killed, and an older checkpoint has to do."""
RETRY_FIRST, RETRY_MAX = 60.0, 3600.0
"""Seconds before a failed job is tried again; doubles."""
JUDGE_TRIES = 3
"""Times that a trainer may fail to judge a release; then the one in use stays."""
SHELF_RETRY = 300.0
"""Seconds until a release that could not be put into use, because the disk refused, is tried again."""

# -- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker is there; it sends what is retained, and takes packets of at most so many bytes (None: any)."""

    packet_max: int | None = None


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker is gone; training goes on."""


@dataclass(frozen=True, slots=True)
class ReleaseArrived:
    """A message on `models/<task>/release` that decodes."""

    task: str
    message: ReleaseMessage


@dataclass(frozen=True, slots=True)
class OfferArrived:
    """A signed record on `models/<task>/round`; not verified yet."""

    task: str
    signed: Signed


@dataclass(frozen=True, slots=True)
class ReceiptArrived:
    """A signed record on this device's receipt topic; not verified yet."""

    signed: Signed


@dataclass(frozen=True, slots=True)
class MissingArrived:
    """A request for chunks on this device's topic."""

    missing: Missing


@dataclass(frozen=True, slots=True)
class ChunkTaken:
    """What became of a chunk of the update with this head: acknowledged by the broker, or not sent."""

    head: bytes
    index: int
    acknowledged: bool


@dataclass(frozen=True, slots=True)
class UpdateLost:
    """The body of the update with this head cannot be read any more."""

    head: bytes
    detail: str


@dataclass(frozen=True, slots=True)
class AggregatorSaid:
    """The aggregator of a shard is there, or has left."""

    online: bool
    shard: int = 0
    session: bytes = b""


@dataclass(frozen=True, slots=True)
class Sensed:
    """What the sensors read."""

    facts: DeviceFacts


@dataclass(frozen=True, slots=True)
class Wake:
    """Look at the device now: a calendar window opened or closed, or the operator spoke."""


@dataclass(frozen=True, slots=True)
class ClockSet:
    """The wall clock jumped: look at the device now, and what was said with a time has to be said again.

    So it is with what was refused because of the time: soon, once the new time is believed, it is asked for again.
    """


@dataclass(frozen=True, slots=True)
class TrainerTold:
    """The trainer child spoke."""

    message: Word


@dataclass(frozen=True, slots=True)
class TrainerGone:
    """The trainer child ended; `cause` as in edge_agent.child.TrainerExited."""

    cause: str
    detail: str


@dataclass(frozen=True, slots=True)
class ShelfFailed:
    """The disk refused to put a release where programs find it; the one before is still there."""

    effect: "UseRelease"


@dataclass(frozen=True, slots=True)
class Leave:
    """The daemon is going to end: leave what is trained, begin nothing; `Left` says that it may."""


Event = (
    Connected
    | Disconnected
    | ReleaseArrived
    | OfferArrived
    | ReceiptArrived
    | MissingArrived
    | ChunkTaken
    | UpdateLost
    | download.Event
    | AggregatorSaid
    | Sensed
    | Wake
    | ClockSet
    | TrainerTold
    | TrainerGone
    | ShelfFailed
    | Leave
    | Tick
)


# -- effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeepRelease:
    """Store an accepted release, durably, before anything is done with it."""

    task: str
    manifest: TaskManifest
    release: Release
    message: ReleaseMessage
    manifest_position: Position
    position: Position


@dataclass(frozen=True, slots=True)
class KeepOffer:
    """Store the position of an accepted offer, durably."""

    task: str
    position: Position


@dataclass(frozen=True, slots=True)
class Sense:
    """Read the sensors now; `Sensed` follows. The arguments are edge_agent.sensors.Sensors.read's."""

    working: bool
    trained: float | None


@dataclass(frozen=True, slots=True)
class KeepJob:
    """Store what a job is, durably, before it begins: with its checkpoint it can be gone on with after a reboot."""

    job: LeftJob


@dataclass(frozen=True, slots=True)
class KeepTrained:
    """Store, durably, that a training ended now: the owner's spacing counts from here, also after a reboot."""


@dataclass(frozen=True, slots=True)
class DropJob:
    """A job is done, or will never be gone on with: forget it and its checkpoint."""

    id: str


@dataclass(frozen=True, slots=True)
class Train:
    """Give the trainer child a job; `again` is one that was left."""

    id: str
    manifest: TaskManifest
    release: Release
    offer: RoundOffer
    context: bytes
    seed: int
    again: bool


@dataclass(frozen=True, slots=True)
class FreezeTraining:
    """Stop the trainer where it stands, its memory kept; something stands in the way that may soon be over."""

    task: str
    round: int
    obstacles: tuple[Obstacle, ...]


@dataclass(frozen=True, slots=True)
class ThawTraining:
    """Let it go on."""

    task: str
    round: int
    seconds: float
    """For which it stood still."""


@dataclass(frozen=True, slots=True)
class LeaveTraining:
    """Have the trainer write a checkpoint and leave the job."""

    id: str
    task: str
    round: int
    why: str
    obstacles: tuple[Obstacle, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingLeft:
    """The job was left; it is gone on with later, if its round is still open then."""

    task: str
    round: int
    kept: bool
    """Whether there is a checkpoint to go on from, as far as is known."""


@dataclass(frozen=True, slots=True)
class JudgeRelease:
    """Have the trainer judge a task's newest release, and the one in use beside it."""

    id: str
    manifest: TaskManifest
    release: Release


@dataclass(frozen=True, slots=True)
class StopJudging:
    """Give that up for now."""

    id: str


@dataclass(frozen=True, slots=True)
class UseRelease:
    """Make a task's newest release the model in use on this device."""

    manifest: TaskManifest
    release: Release
    digest: bytes
    judged: Judged | None
    """None: it was not judged."""


@dataclass(frozen=True, slots=True)
class RefuseRelease:
    """The release in use stays: the newer one is clearly worse here, or could not be judged."""

    task: str
    release: int
    why: str


@dataclass(frozen=True, slots=True)
class Left:
    """Nothing is trained any more, as `Leave` asked."""


@dataclass(frozen=True, slots=True)
class StopTraining:
    """End a job in the middle: cancel it, which keeps the child warm, or `kill` the child, which ends it at once."""

    id: str
    task: str
    round: int
    why: str
    kill: bool
    obstacles: tuple[Obstacle, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """The job came to nothing; it is tried again in `retry` seconds if its round is still open then."""

    id: str
    task: str
    round: int
    reason: str
    detail: str
    retry: float


@dataclass(frozen=True, slots=True)
class RestTrainer:
    """End the warm trainer child: no work for a while."""


@dataclass(frozen=True, slots=True)
class AskRecords:
    """Have the broker send all retained releases and offers once more."""


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """The job is done and its sealed body lies in the outbox."""

    task: str
    round: int
    done: Done


@dataclass(frozen=True, slots=True)
class Settled:
    """The aggregator has answered an update: remember its round as done, its files can go."""

    update: Update
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ForgetTask:
    """A task that has expired makes room for another; its model in use stays where programs find it."""

    task: str


@dataclass(frozen=True, slots=True)
class ShowProgress:
    """Tell how far the training is."""

    task: str
    round: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class EligibilityChanged:
    """The device may train now, or may not any more."""

    eligible: bool
    obstacles: tuple[Obstacle, ...]


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """Say how this device is; the shell adds its session."""

    eligible: bool
    obstacles: tuple[str, ...]
    datasets: tuple[str, ...]
    protocol: Version
    """What it understands, as far as it has met it."""


Effect = (
    KeepRelease
    | KeepOffer
    | Sense
    | KeepJob
    | KeepTrained
    | DropJob
    | Train
    | FreezeTraining
    | ThawTraining
    | LeaveTraining
    | TrainingLeft
    | JudgeRelease
    | StopJudging
    | UseRelease
    | RefuseRelease
    | Left
    | StopTraining
    | TrainingFailed
    | RestTrainer
    | AskRecords
    | TrainingFinished
    | DeliveryEffect
    | Settled
    | download.Effect
    | ForgetTask
    | ShowProgress
    | EligibilityChanged
    | PublishStatus
)

# -- state -------------------------------------------------------------------------------------------------------


class Hold(StrEnum):
    """Why a task is not trained, whatever the device's own state is; the first of them that applies."""

    NO_RELEASE = "no_release"
    NO_DATA = "no_data"
    OPSET = "unknown_operations"
    NO_OFFER = "no_offer"
    CLOSED = "round_closed"
    OTHER_RELEASE = "other_release"
    """The round trains from a release that is not here."""
    WORKED = "worked"
    """This device's update for the round is made."""
    NOT_SELECTED = "not_selected"


@dataclass
class Task:
    """What this device knows of one task."""

    name: str
    manifest_signed: Signed | None = None
    manifest: TaskManifest | None = None
    release: Release | None = None
    manifest_position: Position | None = None
    release_position: Position | None = None
    offer_position: Position | None = None
    offer: RoundOffer | None = None
    waiting_offer: Signed | None = None
    """An offer of a manifest that has not come yet, or is gone."""
    worked: tuple[int, int] = (0, 0)
    """(manifest version, round) of the newest update made."""
    settled: tuple[int, int] = (0, 0)
    """Of the newest one that was answered; this is on disk."""
    start_at: float = 0.0
    """Monotonic seconds before which this round's training does not start."""
    failures: int = 0
    used: bytes | None = None
    """Digest of the release in use on this device, or soon, where the disk refuses."""
    unshelved: tuple[float, UseRelease] | None = None
    """What the disk refused, and the monotonic seconds at which it is tried again."""
    refused: bytes | None = None
    """Of the one that was judged and found clearly worse, or could not be judged."""
    unjudged: int = 0
    """Times that the trainer failed to judge the newest release."""
    judge_at: float = 0.0
    """Monotonic seconds before which that is not tried again."""


@dataclass
class Judging:
    """A release that the trainer judges."""

    id: str
    task: str
    digest: bytes
    deadline: float


@dataclass
class Work:
    """The job in hand."""

    job: LeftJob
    offer: RoundOffer
    deadline: float
    tell_at: float
    """Monotonic seconds at which progress is worth a line again."""
    frozen_at: float | None = None
    leave_by: float | None = None
    """While it is frozen: when it is left, if what stands in the way is still there."""
    left_by: float | None = None
    """It is being left: when the trainer must have answered."""

    @property
    def id(self) -> str:
        """The job's, which is also its report's."""
        return self.job.id

    @property
    def task(self) -> str:
        """The task's name."""
        return self.job.task

    @property
    def round(self) -> int:
        """The round's number."""
        return self.offer.round

    @property
    def state(self) -> str:
        """training, frozen or leaving."""
        if self.left_by is not None:
            return "leaving"
        return "training" if self.frozen_at is None else "frozen"


@dataclass
class Participation:
    """See the module. `random` gives bytes; `datasets` are the names that this device has data for."""

    trust: Trust
    policy: Policy
    device: str
    certificate: bytes
    datasets: frozenset[str]
    random: Callable[[int], bytes]
    timeout: float
    """Seconds after which a job is given up."""
    idle_exit: float
    """Seconds that the trainer child stays without work."""
    inline_max: int = chunks.INLINE_MAX
    """Bytes up to which a body rides along with its head."""
    outbox_count: int = OUTBOX_COUNT
    outbox_bytes: int = OUTBOX_BYTES
    quality: Quality = field(default_factory=Quality)
    tasks: dict[str, Task] = field(default_factory=dict)
    connected: bool = False
    obstacles: tuple[Obstacle, ...] = ()
    facts: DeviceFacts | None = None
    work: Work | None = None
    left: dict[str, LeftJob] = field(default_factory=dict)
    """Of each task, the job that was left and may be gone on with."""
    judging: Judging | None = None
    progress: Progress | None = None
    last_trained: float | None = None
    protocol: Version = 1
    """The newest version of a manifest or release that this device has verified."""
    downloads: Downloads = field(init=False)
    delivery: Delivery = field(init=False)
    _packet_max: int | None = None
    _gate: Gatekeeper = field(init=False)
    _data: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    """Of each data set that was trained on: examples, and why the trainer refused them or ""."""
    _sensed_at: float = -math.inf
    _warm_until: float | None = None
    _leaving: bool = False
    """The daemon ends."""
    _next_start: float | None = None
    """Monotonic seconds at which a job, or a judgement, that is only waiting for its start time can begin."""
    _early: dict[str, Signed] = field(default_factory=dict)
    """The newest offer of tasks that no release has come of; the oldest makes room."""
    _said: PublishStatus | None = None
    _tokens: float = float(STATUS_BURST)
    _token_time: float | None = None
    _speak_at: float | None = None
    """Monotonic seconds at which a word that is held back may be said."""
    _refresh_at: float | None = None
    _ask_at: float | None = None
    """Monotonic seconds at which records are asked for again, because the clock was set."""

    def __post_init__(self) -> None:
        self._gate = Gatekeeper(self.policy)
        self.downloads = Downloads(self.random)
        self.delivery = Delivery(self.device, self.random, self.outbox_count, self.outbox_bytes)

    def restore(
        self,
        tasks: Iterable[Task],
        updates: Iterable[Update],
        now: Instant,
        jobs: Iterable[LeftJob] = (),
        used: Mapping[str, bytes] | None = None,
        trained: float | None = None,
    ) -> list[Effect]:
        """Take up what an earlier process stored; before any event.

        `used` is the release in use of each task, `trained` the moment (UTC seconds) of the last KeepTrained.
        """
        for task in tasks:
            self.tasks[task.name] = task
            for record in (task.manifest, task.release):
                self._meet(1 if record is None else record.v)
        effects: list[Effect] = []
        for update in updates:
            if update.task in self.tasks and update.position == self.tasks[update.task].settled:
                effects.append(DropUpdate(update, "answered"))  # only its files were left
            else:
                effects += self.delivery.resume(update, now.mono)
        for task in self.tasks.values():
            task.worked = max(task.settled, self.delivery.newest(task.name))
        for job in jobs:
            task_there = self.tasks.get(job.task)
            manifest = None if task_there is None else task_there.manifest
            current = manifest is not None and manifest.version == job.position[0] and now.utc < manifest.expires
            if task_there is not None and current and task_there.worked < job.position and job.task not in self.left:
                self.left[job.task] = job
            else:
                effects.append(DropJob(job.id))
        for task in self.tasks.values():
            task.used = (used or {}).get(task.name)
            effects += self._use_at_once(task)
        if trained is not None:
            self.last_trained = now.mono - max(0.0, now.utc - trained)
            # One that is yet to come was told by a clock that was ahead. It counts as now, and not anew at each start.
            effects += [KeepTrained()] if trained > now.utc and self.policy.spacing else []
        return effects

    @property
    def eligible(self) -> bool:
        """Whether the owner's policy lets this device train now."""
        return self._gate.eligible

    @property
    def busy(self) -> bool:
        """Whether the trainer has something to do, so that its own load is not taken for that of others."""
        return self.work is not None or self.judging is not None

    @property
    def settles_at(self) -> float | None:
        """Monotonic seconds at which the device becomes eligible if nothing gets in the way; None if it is, or not."""
        return self._gate.settles_at

    @property
    def awaited(self) -> Collection[str]:
        """Tasks of which a round is open and no release has come."""
        return self._early.keys()

    @property
    def ending(self) -> bool:
        """The daemon is about to end, so nothing begins any more."""
        return self._leaving

    @property
    def deadline(self) -> float | None:
        """When the machine wants to look again."""
        wanted = [self._gate.deadline, self._warm_until, self._refresh_at if self.connected else None]
        if self._gate.deadline is None:
            wanted.append(0.0)
        wanted += [self._next_start] if self.work is None else [self._work_deadline(self.work)]
        wanted.append(None if self.judging is None else self.judging.deadline)
        wanted += [task.unshelved[0] for task in self.tasks.values() if task.unshelved is not None]
        wanted += [self._speak_at, self._ask_at] if self.connected else []
        wanted += [self.downloads.deadline, self.delivery.deadline]
        return min((each for each in wanted if each is not None), default=None)

    def examples(self, manifest: TaskManifest) -> DataFacts | None:
        """What is known of the examples for a task; None if this device has no such data set."""
        name = manifest.data.dataset
        if name not in self.datasets:
            return None
        count, refused = self._data.get(name, (None, ""))
        return DataFacts(name, manifest.data.min_examples, count, refused)

    def _work_deadline(self, work: Work) -> float | None:
        if work.left_by is not None:
            return work.left_by
        return work.deadline if work.frozen_at is None else work.leave_by

    def handle(self, event: Event, now: Instant) -> list[Effect]:
        """What to do about one event; a RemoteProtocolError has changed nothing."""
        effects = self._react(event, now)
        return effects + self._start(now) + self._speak(now)

    def _react(self, event: Event, now: Instant) -> list[Effect]:
        match event:
            case Connected(packet_max=packet_max):
                self.connected, self._said, self._packet_max = True, None, packet_max
                self._ask_at = None if self._ask_at is None else now.mono + CLOCK_SETTLES
                return [*self.downloads.connected(now.mono), *self.delivery.connected(now.mono)]
            case Disconnected():
                self.connected = False
                self.downloads.disconnected()
                self.delivery.disconnected()
                return []
            case ReleaseArrived(task=name, message=message):
                return self._release_arrived(name, message, now)
            case OfferArrived(task=name, signed=signed):
                return self._offer_arrived(name, signed, now)
            case ReceiptArrived(signed=signed):
                return self._receipt_arrived(signed)
            case MissingArrived(missing=missing):
                return [*self.delivery.missing(missing.head, missing.chunks, now.mono)]
            case ChunkTaken():
                return [*self.delivery.taken(event.head, event.index, event.acknowledged, now.mono)]
            case UpdateLost(head=head):
                return self._lost(head, now)
            case download.Whole():
                return self._whole(event, now)
            case download.SpoolRead() | download.ChunkArrived() | download.SpoolFailed():
                return [*self.downloads.handle(event, now.mono)]
            case AggregatorSaid(online=online, shard=shard, session=session):
                self.delivery.aggregator(shard, session, online, now.mono)
                return []
            case Sensed(facts=facts):
                return self._sensed(facts, now)
            case Wake():
                return [self._sense()]
            case ClockSet():
                self._said, self._ask_at = None, now.mono + CLOCK_SETTLES
                return [self._sense()]
            case TrainerTold(message=message):
                return self._trainer_told(message, now)
            case TrainerGone(cause=cause, detail=detail):
                self._warm_until = None
                if self.judging is not None:
                    return self._unjudged(self.judging, f"{_gone_for(cause)}: {detail}", now)
                if self.work is None:
                    return []
                if self.work.left_by is not None:
                    return self._has_left(self.work, False)
                return self._failed(_gone_for(cause), detail, now)
            case ShelfFailed(effect=effect):
                task = self.tasks.get(effect.manifest.task)
                position = None if task is None else task.release_position
                if task is not None and position is not None and position.digest == effect.digest:
                    task.unshelved = now.mono + SHELF_RETRY, effect
                return []
            case Leave():
                self._leaving = True
                if self.work is None:
                    return [*self._stop_judging(), Left()]
                return self._leave(self.work, "shutdown", now) if self.work.left_by is None else []
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _tick(self, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        due = self._gate.deadline
        if due is None or due <= now.mono:
            effects.append(self._sense())
        due = None if self.work is None else self._work_deadline(self.work)
        if self.work is not None and due is not None and due <= now.mono:
            effects += self._overdue(self.work, now)
        if self._warm_until is not None and self.work is None and self._warm_until <= now.mono:
            self._warm_until = None
            effects.append(RestTrainer())
        if self.judging is not None and self.judging.deadline <= now.mono:
            effects.append(StopJudging(self.judging.id))
            effects += self._unjudged(self.judging, f"no result within {self.timeout:g} s", now)
        for task in self.tasks.values():
            if task.unshelved is not None and task.unshelved[0] <= now.mono:
                effects.append(task.unshelved[1])
                task.unshelved = None
        if self._ask_at is not None and self._ask_at <= now.mono and self.connected:
            self._ask_at = None
            effects.append(AskRecords())
        effects += self.downloads.tick(now.mono)
        effects += self.delivery.expire(now.utc, now.mono)
        effects += self.delivery.tick(now.mono)
        if self._refresh_at is not None and self._refresh_at <= now.mono:
            self._said = None
            # They may have been mended since, and only a round can tell.
            self._data = {name: found for name, found in self._data.items() if not found[1]}
        return effects

    def _overdue(self, work: Work, now: Instant) -> list[Effect]:
        if work.left_by is not None:
            # A checkpoint that it wrote earlier still counts.
            return [self._stop("leaving", kill=True), *self._has_left(work, False)]
        if work.frozen_at is not None and not self.obstacles:
            work.leave_by = now.mono + self.policy.settle + 1.0  # it is about to go on
            return []
        if work.frozen_at is not None:
            return self._leave(work, "obstacles", now)
        stop = self._stop("timeout", kill=True)
        return [stop, *self._failed("timeout", f"no result within {self.timeout:g} s", now)]

    # -- records --

    def _release_arrived(self, name: str, message: ReleaseMessage, now: Instant) -> list[Effect]:
        task = self.tasks.get(name) or Task(name)
        manifest = self.trust.manifest(message.manifest, now.utc)
        if manifest.task != name:
            raise RemoteProtocolError(Reason.WRONG_TASK, f"a release of {manifest.task} on the topic of {name}")
        manifest_position = Position((manifest.version,), signing.digest(message.manifest))
        advance(task.manifest_position, manifest_position)
        release = self.trust.release(message.release, message.manifest, manifest)
        position = Position((manifest.version, release.number), signing.digest(message.release))
        if not advance(task.release_position, position) and task.release is not None:
            if message.graphs is not None and message.weights is not None:
                trust.parts(message.graphs, message.weights, manifest, release)
            return []
        _, weights = trust.model(message, manifest, release)
        coming = Coming(name, message, manifest, release, manifest_position, position)
        if weights is None:
            return self._comes(coming, now)
        effects = self._make_room(name, now)
        older = self.downloads.get(name)
        if older is not None and older.position.rank <= position.rank:
            effects += self.downloads.discard(name)
        return effects + self._accept(coming, now)

    def _comes(self, coming: Coming, now: Instant) -> list[Effect]:
        """A release that is verified, and accepted once its weights are here."""
        if not self.downloads.wants(coming):
            return []
        effects = self._make_room(coming.task, now)
        self._meet(max(coming.manifest.v, coming.release.v))
        return effects + self.downloads.add(coming)

    def _whole(self, event: download.Whole, now: Instant) -> list[Effect]:
        coming, then = self.downloads.whole(event)
        accepted = [] if coming is None else self._accept(coming, now)
        return [*accepted, *then]

    def _accept(self, coming: Coming, now: Instant) -> list[Effect]:
        """A release becomes the newest of its task: all of it is here and verified."""
        name, manifest = coming.task, coming.manifest
        task = self.tasks.get(name) or Task(name, worked=self.delivery.newest(name))
        effects: list[Effect] = []
        waiting = task.waiting_offer if task.offer is None or task.manifest != manifest else None
        waiting = waiting or self._early.pop(name, None)
        if task.manifest != manifest:
            task.offer, task.failures = None, 0
            effects += self._give_up(name, "superseded", now)
            effects += self.delivery.outdated(name, (manifest.version, 0), 0)
        task.manifest_signed, task.manifest, task.release = coming.message.manifest, manifest, coming.release
        task.manifest_position, task.release_position = coming.manifest_position, coming.position
        task.waiting_offer, task.unshelved = None, None
        task.unjudged, task.judge_at = 0, 0.0
        self.tasks[name] = task
        self._meet(max(manifest.v, coming.release.v))
        message = coming.message
        effects.append(KeepRelease(name, manifest, coming.release, message, coming.manifest_position, coming.position))
        if self.judging is not None and self.judging.task == name:
            effects += self._stop_judging()
        effects += self._use_at_once(task)
        if waiting is not None:
            try:
                effects += self._offer_arrived(name, waiting, now)
            except RemoteProtocolError:
                # It belonged to an older manifest; the aggregator's next one comes by itself.
                task.waiting_offer = None
        return effects

    def _meet(self, version: Version) -> None:
        self.protocol = max(self.protocol, version)

    def _offer_arrived(self, name: str, signed: Signed, now: Instant) -> list[Effect]:
        task = self.tasks.get(name)
        if task is None or task.manifest is None or task.manifest_signed is None:
            self._early.pop(name, None)
            self._early[name] = signed
            if len(self._early) > TASKS_MAX:
                del self._early[next(iter(self._early))]
            return []
        try:
            offer = trust.offer(signed, task.manifest_signed, task.manifest)
        except RemoteProtocolError as error:
            if error.reason is not Reason.WRONG_MANIFEST:
                raise
            # Of a manifest whose release is still on its way, or of one that is gone.
            task.waiting_offer = signed
            return []
        position = Position((task.manifest.version, offer.round, offer.sequence), signing.digest(signed))
        if not advance(task.offer_position, position) and task.offer is not None:
            return []
        before = task.offer
        if before is not None and before.round == offer.round:
            trust.continues(offer, before)
        task.offer, task.offer_position = offer, position
        if before is None or before.round != offer.round:
            spread = task.manifest.plan.start_jitter * int.from_bytes(self.random(4), "big") / 2**32
            # One failure does not cost the next round; a device that fails again and again waits ever longer.
            task.start_at = max(now.mono + spread, task.start_at if task.failures > 1 else 0.0)
        effects: list[Effect] = [KeepOffer(name, position)]
        if offer.state is not OfferState.OPEN or (before is not None and before.round != offer.round):
            # A device that was away hears of the next round, and never that its own was closed.
            effects += self._give_up(name, "round_over", now)
        staleness = task.manifest.plan.max_staleness
        return effects + self.delivery.outdated(name, (task.manifest.version, offer.round), staleness)

    def _give_up(self, name: str, why: str, now: Instant) -> list[Effect]:
        """End what is trained for this task, if anything: it would not count any more. The child stays warm.

        One that is frozen or just leaving ends, since it could not do so without running on.
        """
        job = self.left.pop(name, None)
        effects: list[Effect] = [] if job is None else [DropJob(job.id)]
        if self.work is None or self.work.task != name:
            return effects
        job_id, busy = self.work.id, self.work.state == "training"
        effects.append(self._stop(why, kill=not busy))
        effects += self._rest(now, warm=busy)
        return [*effects, DropJob(job_id), *self._gone()]

    def _make_room(self, name: str, now: Instant) -> list[Effect]:
        """A place for one more task: a free one, or that of a task whose manifest has expired."""
        names = self.tasks.keys() | set(self.downloads.tasks)
        if name in names or len(names) < TASKS_MAX:
            return []
        for other in self.tasks.values():
            busy = self.work is not None and self.work.task == other.name
            if not busy and (other.manifest is None or now.utc >= other.manifest.expires):
                del self.tasks[other.name]
                job = self.left.pop(other.name, None)
                late: list[Effect] = [] if job is None else [DropJob(job.id)]
                late += [*self.downloads.discard(other.name), *self.delivery.forget(other.name)]
                return [*late, ForgetTask(other.name)]
        raise RemoteProtocolError(Reason.TOO_LARGE, f"this device follows {TASKS_MAX} tasks already")

    def _receipt_arrived(self, signed: Signed) -> list[Effect]:
        error = RemoteProtocolError(Reason.WRONG_TASK, "a receipt of no task known here")
        for task in self.tasks.values():
            if task.manifest is None:
                continue
            try:
                found = trust.receipt(signed, task.manifest)
            except RemoteProtocolError as refused:
                error = refused
                continue
            if found.device != self.device:
                raise RemoteProtocolError(Reason.WRONG_DEVICE, f"a receipt for {found.device}")
            update = self.delivery.answered(found.head)
            if update is None:
                return []
            task.settled = max(task.settled, update.position)
            return [Settled(update, found.outcome, found.reason)]
        raise error

    def _lost(self, head: bytes, now: Instant) -> list[Effect]:
        """Its round can be trained once more, after a while."""
        effects: list[Effect] = []
        for dropped in self.delivery.lost(head):
            effects.append(dropped)
            task = self.tasks.get(dropped.update.task)
            if task is not None:
                task.worked = max(task.settled, self.delivery.newest(task.name))
                task.start_at = max(task.start_at, now.mono + RETRY_FIRST)
        return effects

    # -- eligibility --

    def _sensed(self, facts: DeviceFacts, now: Instant) -> list[Effect]:
        first, self.facts = self.facts is None, facts
        # The owner's policy says who is eligible; while a task is trained its publisher's conditions hold too.
        manifest = None if self.work is None else self.tasks[self.work.task].manifest
        self.obstacles = obstacles(self.policy, None if manifest is None else manifest.conditions, facts)
        self._sensed_at = now.mono
        changed = self._gate.observe(self.obstacles, now.mono, self.busy, facts.watched)
        # What stands in the way from the start is no change, but its owner should read of it all the same.
        told = changed or (first and bool(self.obstacles))
        effects: list[Effect] = [EligibilityChanged(self.eligible, self.obstacles)] if told else []
        effects += self._stop_judging() if not self.eligible else []
        if self.work is None or self.work.left_by is not None:
            return effects
        if self.eligible:
            return effects + self._thaw(self.work, now)
        # With nothing in the way any more, it stands still until that has lasted.
        return effects + (self._step_aside(self.work, now) if self.obstacles else [])

    def _step_aside(self, work: Work, now: Instant) -> list[Effect]:
        """The device is needed: freeze where that may soon be over, else leave and free the memory."""
        passing = all(obstacle.name in PASSING for obstacle in self.obstacles)
        if not passing or self.policy.grace == 0:
            return self._leave(work, "obstacles", now)
        if work.frozen_at is not None:
            return []
        work.frozen_at, work.leave_by = now.mono, now.mono + self.policy.grace
        return [FreezeTraining(work.task, work.round, self.obstacles)]

    def _thaw(self, work: Work, now: Instant) -> list[Effect]:
        if work.frozen_at is None:
            return []
        seconds = now.mono - work.frozen_at
        work.frozen_at, work.leave_by = None, None
        work.deadline += seconds
        return [ThawTraining(work.task, work.round, seconds)]

    def _leave(self, work: Work, why: str, now: Instant) -> list[Effect]:
        """Ask for a checkpoint, which a frozen trainer is let run for; one that has not begun to train just ends."""
        if self.progress is None or self.progress.phase in ("loading", "evaluating"):
            return [
                self._stop(why, self.obstacles if why == "obstacles" else (), kill=True),
                *self._has_left(work, False),
            ]
        work.frozen_at, work.leave_by, work.left_by = None, None, now.mono + LEAVING
        found = self.obstacles if why == "obstacles" else ()
        return [LeaveTraining(work.id, work.task, work.round, why, found)]

    def _has_left(self, work: Work, kept: bool) -> list[Effect]:
        """The trainer left its job; it is not needed for now, so its memory is given back."""
        self.left[work.task] = work.job
        self.work, self.progress, self._warm_until = None, None, None
        return [TrainingLeft(work.task, work.round, kept), RestTrainer(), *self._gone()]

    def _gone(self) -> list[Effect]:
        return [Left()] if self._leaving and self.work is None else []

    def _sense(self) -> Sense:
        return Sense(self.busy, self.last_trained)

    # -- training --

    def hold(self, task: Task) -> Hold | None:
        """Why this device should not train this task now, its own state and the start time apart; None if it should."""
        offer, manifest, release = task.offer, task.manifest, task.release
        if manifest is None or release is None or task.release_position is None:
            return Hold.NO_RELEASE
        if manifest.data.dataset not in self.datasets:
            return Hold.NO_DATA
        if manifest.opset != OPSET_VERSION:
            return Hold.OPSET
        if offer is None:
            return Hold.NO_OFFER
        if offer.state is not OfferState.OPEN:
            return Hold.CLOSED
        if offer.release != task.release_position.digest:
            return Hold.OTHER_RELEASE
        if task.worked >= (manifest.version, offer.round):
            return Hold.WORKED
        if draw(task.name, manifest.version, offer.round, self.device) >= offer.participation:
            return Hold.NOT_SELECTED
        return None

    def _start(self, now: Instant) -> list[Effect]:
        self._next_start = None
        if self.work is not None or not self.eligible or self.facts is None or self._leaving:
            return []
        if self.judging is not None:
            return []
        if judge := self._judge(now):
            return judge
        wanted = [task for _, task in sorted(self.tasks.items()) if self.hold(task) is None]
        moments = [*(task.start_at for task in wanted), *(task.judge_at for task in self._unproven())]
        self._next_start = min((each for each in moments if each > now.mono), default=None)
        for task in wanted:
            if task.start_at > now.mono:
                continue
            assert task.manifest is not None and task.release is not None and task.offer is not None
            manifest, offer = task.manifest, task.offer
            if now.mono - self._sensed_at > FACTS_FRESH:
                return [self._sense()]  # an idle device is looked at seldom, and now it matters
            if now.utc >= manifest.expires or obstacles(self.policy, manifest.conditions, self.facts):
                continue
            # What may interrupt is looked for more often from now on.
            return [*self._train(task, manifest, task.release, offer, now), self._sense()]
        return []

    def _train(
        self, task: Task, manifest: TaskManifest, release: Release, offer: RoundOffer, now: Instant
    ) -> list[Effect]:
        """Begin a job, or go on with the one that was left."""
        position = (manifest.version, offer.round)
        effects: list[Effect] = []
        left = self.left.pop(task.name, None)
        again = left is not None and left.position == position and left.release == offer.release
        if left is not None and again:
            job = left
        else:
            if left is not None:
                effects.append(DropJob(left.id))
            job = self._new_job(task, manifest, offer, position)
            effects.append(KeepJob(job))
        self.work = Work(job, offer, now.mono + self.timeout, now.mono + PROGRESS_INTERVAL)
        self.progress, self._warm_until, self._next_start = None, None, None
        return [*effects, Train(job.id, manifest, release, offer, job.context, job.seed, again)]

    def _new_job(self, task: Task, manifest: TaskManifest, offer: RoundOffer, position: tuple[int, int]) -> LeftJob:
        report = self.random(16)
        context = wire.pack(
            UpdateContext(
                v=1,
                task=task.name,
                manifest=offer.manifest,
                release=offer.release,
                round=offer.round,
                device=self.device,
                report=report,
                mode="plain",
                k_min=0,
                codec=manifest.codec,
                dimension=dimension(manifest.layout),
            )
        )
        seed = int.from_bytes(self.random(8), "big") >> 1
        return LeftJob(1, report.hex(), task.name, position, offer.release, context, seed)

    # -- the model in use --

    def _use_at_once(self, task: Task) -> list[Effect]:
        """Unless the owner wants it judged first; any model is better than none."""
        return [] if self.quality.asked and task.used is not None else self._use(task)

    def _use(self, task: Task, judged: Judged | None = None) -> list[Effect]:
        """The newest release becomes the model in use on this device, unless it is that already."""
        if task.manifest is None or task.release is None or task.release_position is None:
            return []
        digest = task.release_position.digest
        if task.used == digest:
            return []
        task.used, task.refused = digest, None
        return [UseRelease(task.manifest, task.release, digest, judged)]

    def _unproven(self) -> list[Task]:
        """Tasks whose newest release is to be judged, where the owner wants that."""

        def waits(task: Task) -> bool:
            manifest, position = task.manifest, task.release_position
            if manifest is None or task.release is None or position is None or manifest.opset != OPSET_VERSION:
                return False
            return position.digest not in (task.used, task.refused) and manifest.data.dataset in self.datasets

        return [task for _, task in sorted(self.tasks.items()) if self.quality.asked and waits(task)]

    def _judge(self, now: Instant) -> list[Effect]:
        """The next release to be judged."""
        for task in self._unproven():
            if task.judge_at > now.mono:
                continue
            if now.mono - self._sensed_at > FACTS_FRESH:
                return [self._sense()]
            assert task.manifest is not None and task.release is not None and task.release_position is not None
            id = self.random(16).hex()
            self.judging = Judging(id, task.name, task.release_position.digest, now.mono + self.timeout)
            self._warm_until = None
            return [JudgeRelease(id, task.manifest, task.release), self._sense()]
        return []

    def _judged(self, judging: Judging, judged: Judged) -> list[Effect]:
        """The trainer has judged."""
        task = self._concluded(judging)
        if task is None or task.manifest is None:
            return []
        why = refusal(self.quality, task.manifest.metric, judged)
        return self._use(task, judged) if why is None else self._refuse(task, judging, why)

    def _unjudged(self, judging: Judging, why: str, now: Instant) -> list[Effect]:
        """The trainer could not: perhaps later; but what nobody has judged never takes the place of what is in use."""
        task = self._concluded(judging)
        if task is None:
            return []
        task.judge_at = now.mono + min(RETRY_FIRST * 2.0**task.unjudged, RETRY_MAX)
        task.unjudged += 1
        if task.unjudged < JUDGE_TRIES:
            return []
        return self._refuse(task, judging, f"it could not be judged in {JUDGE_TRIES} tries: {why}")

    def _concluded(self, judging: Judging) -> Task | None:
        """The task whose newest release this was about, if it still is."""
        self.judging = None
        task = self.tasks.get(judging.task)
        position = None if task is None else task.release_position
        return task if position is not None and position.digest == judging.digest else None

    def _refuse(self, task: Task, judging: Judging, why: str) -> list[Effect]:
        assert task.release is not None  # it was judged
        task.refused = judging.digest
        return [RefuseRelease(task.name, task.release.number, why)]

    def _stop_judging(self) -> list[Effect]:
        if self.judging is None:
            return []
        id, self.judging = self.judging.id, None
        return [StopJudging(id)]

    # -- what the trainer says --

    def _trainer_told(self, message: Word, now: Instant) -> list[Effect]:
        if self.judging is not None and message.id == self.judging.id:
            judging = self.judging
            self._warm_until = now.mono + self.idle_exit
            if isinstance(message, Judged):
                return self._judged(judging, message)
            if isinstance(message, Failed):
                return self._unjudged(judging, f"{message.reason}: {message.detail}", now)
            return []
        work = self.work
        if work is None or message.id != work.id:
            return []  # of a job that was given up meanwhile
        match message:
            case Progress():
                self.progress = message
                if now.mono < work.tell_at:
                    return []
                work.tell_at = now.mono + PROGRESS_INTERVAL
                return [ShowProgress(work.task, work.offer.round, message)]
            case Done():
                return [*self._done(work, message, now), *self._gone()]
            case Suspended(kept=kept):
                return self._has_left(work, kept)
            case Judged():
                return []  # nobody asked for it under this name
            case Failed(reason=reason, detail=detail):
                return self._failed(reason, detail, now)
            case _:
                assert_never(message)

    def _done(self, work: Work, done: Done, now: Instant) -> list[Effect]:
        task = self.tasks[work.task]
        manifest = task.manifest
        assert manifest is not None  # a task without one has no work
        head, chunk_size = self._head(work, done)
        task.worked, task.failures = (manifest.version, work.offer.round), 0
        self._data[manifest.data.dataset] = (done.examples + done.holdout, "")
        rest = self._rest(now)
        update = Update(
            work.id,
            work.task,
            task.worked,
            head,
            sha256(head).digest(),
            work.offer.shards,
            done.size,
            chunk_size,
            manifest.expires,
        )
        effects: list[Effect] = [*rest, TrainingFinished(work.task, work.offer.round, done), DropJob(work.id)]
        effects += self.delivery.outdated(work.task, task.worked, manifest.plan.max_staleness)
        return effects + self.delivery.keep(update, now.mono)

    def _head(self, work: Work, done: Done) -> tuple[bytes, int]:
        """The head of a sealed body and the size of the chunks in which that travels; 0: it rides along."""

        def packed(chunk_size: int) -> bytes:
            return wire.pack(
                UpdateHead(
                    v=2 if chunk_size else 1,
                    context=work.job.context,
                    encapsulation=done.encapsulation,
                    size=done.size,
                    sha256=done.sha256,
                    chunk_size=chunk_size,
                    certificate=self.certificate,
                    shares=[],
                )
            )

        whole = packed(0)
        packet = done.size + len(whole) + 2 * chunks.PACKET_ROOM
        if done.size <= self.inline_max and (self._packet_max is None or packet <= self._packet_max):
            return whole, 0
        chunk_size = chunks.chunk_size(self._packet_max)
        return packed(chunk_size), chunk_size

    def _failed(self, reason: str, detail: str, now: Instant) -> list[Effect]:
        work = self.work
        assert work is not None
        task = self.tasks[work.task]
        retry = min(RETRY_FIRST * 2.0**task.failures, RETRY_MAX)
        task.failures += 1
        task.start_at = now.mono + retry
        if reason == "data" and task.manifest is not None:
            self._data[task.manifest.data.dataset] = (None, detail)
        rest = self._rest(now)
        failed = TrainingFailed(work.id, work.task, work.offer.round, reason, detail, retry)
        # It is begun anew: what went wrong may lie in the checkpoint.
        return [*rest, failed, DropJob(work.id), *self._gone()]

    def _rest(self, now: Instant, warm: bool = True) -> list[Effect]:
        self.work, self.progress = None, None
        self.last_trained = now.mono
        self._warm_until = now.mono + self.idle_exit if warm else None
        return [KeepTrained()] if self.policy.spacing else []

    def _stop(self, why: str, found: tuple[Obstacle, ...] = (), *, kill: bool) -> StopTraining:
        assert self.work is not None
        self._warm_until = None
        return StopTraining(self.work.id, self.work.task, self.work.offer.round, why, kill, found)

    # -- presence --

    def _status(self) -> PublishStatus:
        names = tuple(dict.fromkeys(obstacle.name.value for obstacle in self.obstacles))
        bad = {name for name, (_, refused) in self._data.items() if refused}
        names += ("data",) if bad else ()
        return PublishStatus(self.eligible, names, tuple(sorted(self.datasets - bad)), self.protocol)

    def _speak(self, now: Instant) -> list[Effect]:
        if not self.connected or self.facts is None:
            return []
        status = self._status()
        if self._token_time is not None:
            earned = (now.mono - self._token_time) / STATUS_INTERVAL
            self._tokens = min(float(STATUS_BURST), self._tokens + earned)
        self._token_time, self._speak_at = now.mono, None
        if status == self._said:
            return []
        # A birth is never held back: without it, or after a will, a connected device would count as gone.
        if self._tokens < 1.0 and self._said is not None:
            self._speak_at = now.mono + (1.0 - self._tokens) * STATUS_INTERVAL + 0.01
            return []
        self._tokens = max(0.0, self._tokens - 1.0)
        self._said = status
        jitter = int.from_bytes(self.random(2), "big") / 2**16
        self._refresh_at = now.mono + STATUS_REFRESH * (0.75 + 0.25 * jitter)
        return [status]


def status(said: PublishStatus, session: bytes, now: float) -> DeviceStatus:
    """The message for what was decided to be said."""
    return DeviceStatus(
        v=said.protocol,
        session=session,
        online=True,
        version=VERSION,
        opsets=[OPSET_VERSION],
        eligible=said.eligible,
        obstacles=list(said.obstacles),
        datasets=list(said.datasets),
        sent=int(now),
    )


def _gone_for(cause: str) -> str:
    """Why a training failed whose trainer ended for `cause`: where it ran out of memory, no matter who noticed."""
    return cause if cause == "out_of_memory" else f"trainer_{cause}"
