"""The aggregator's machine: every task with its newest release, its open round and the devices that are there. Pure.

It checks releases against the pinned root, opens and closes rounds, judges heads and answers them. Signing is a
function of its input (Ed25519) and so part of the machine; randomness enters as `keygen`. It must never touch a
socket, a disk or a clock, and it never sees an update's numbers: those pass from the shell's `Open` to its fold.

    link:  down --LinkReady--> reading back (what the broker retains) --ReadBackDone, or PATIENCE--> up
    task:  waiting (for min_updates live devices) -> collecting -> reducing -> waiting ... -> finished
                           ^ resume                   | stop, rollback, a newer manifest
                    paused, stopped <-----------------+
           damaged (parts lost on our disk) until the broker brings them back, or a rollback or newer manifest comes

Every round ends in exactly one of released, rejected_by_gate, superseded, stopped, finished.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET, structs

from aggregator import gate
from aggregator.gate import Record
from aggregator.readback import PATIENCE, SKIP, Found, ReadBack, Standing, skipped, standing
from aggregator.reassembler import Bounds, Reassembler, Step
from aggregator.round import Round, Verdict
from shared import events, signing, tensors, trust, wire
from shared.errors import LocalProtocolError, Reason, RemoteProtocolError
from shared.machine import Instant, Tick
from shared.messages import (
    PARTICIPATION_ALL,
    BlobRef,
    DeviceStatus,
    Metrics,
    Missing,
    OfferState,
    Outcome,
    PlainBody,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    RootMessage,
    RoundOffer,
    Signed,
    TaskManifest,
    UpdateContext,
    UpdateHead,
)
from shared.selection import draw, threshold
from shared.topics import update_name
from shared.trust import Position, Trust, advance, model, next_root, parts

STATUS_AGE_MAX = 13 * 3600
"""Seconds after which a device's word about itself no longer counts."""
EXPIRED_KEPT = 86_400.0
"""Seconds for which the clock must say that a manifest has expired before an open round ends for that: one that jumps
ahead costs no update."""
_OFFERS_TASKS, _OFFERS_EACH = 256, 8
"""Tasks whose offers wait for a release, and the newest offers of each."""
_ROOTS_AHEAD = 64
"""Newer roots that wait for the one before them."""

# -- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkReady:
    """The broker is there; what it retains of us follows, then ReadBackDone."""


@dataclass(frozen=True, slots=True)
class ReleaseFound:
    """A message on a task's own release topic; on a new connection what is retained there."""

    task: str
    message: ReleaseMessage


@dataclass(frozen=True, slots=True)
class OfferFound:
    """A signed record on a task's own round topic; not verified yet."""

    task: str
    signed: Signed


@dataclass(frozen=True, slots=True)
class RootFound:
    """A root record on the topic of its version; not verified yet."""

    version: int
    message: RootMessage


@dataclass(frozen=True, slots=True)
class ReadBackDone:
    """Our own status came back: all that was retained came before it."""


@dataclass(frozen=True, slots=True)
class ReleaseReceived:
    """Something on `models/release` that decodes."""

    message: ReleaseMessage


@dataclass(frozen=True, slots=True)
class WeightsArrived:
    """The chunks of a release are all there: its weights, valid, lie in the blobs."""

    found: Found


@dataclass(frozen=True, slots=True)
class WeightsLost:
    """The chunks of a release cannot be had, or are no weights of its layout."""

    found: Found


@dataclass(frozen=True, slots=True)
class PartsLost:
    """Graphs or weights that a task needs are gone from our disk, or damaged there; `detail` says which."""

    task: str
    manifest_version: int
    detail: str


@dataclass(frozen=True, slots=True)
class StatusReceived:
    """A device's word about itself; None once its retained status was cleared.

    `retained`: the broker kept it for us, so that only `sent` says how old it is. What comes live is new, whatever the
    device's clock says.
    """

    device: str
    status: DeviceStatus | None
    retained: bool = False


Verb = Literal["pause", "resume", "stop", "rollback"]
TaskState = Literal["active", "paused", "stopped"]
"""What the operator wants of a task."""


@dataclass(frozen=True, slots=True)
class TaskCommand:
    """The operator wants something of a task. `target` is the release to go back to, None where it is not kept.

    `reply` is the shell's; it comes back in the Answer.
    """

    task: str
    verb: Verb
    target: Signed | None
    reply: object


@dataclass(frozen=True, slots=True)
class HeadReceived:
    """An update's head as it came: parsed and on the topic of its device, its signature not verified yet."""

    digest: bytes
    head: UpdateHead
    context: UpdateContext
    signed: bytes
    """The head's bytes, which `signature` covers and `digest` names."""
    signature: bytes
    body: bytes | memoryview | None
    """Its ciphertext; None as long as its chunks are to be asked for."""

    @property
    def name(self) -> str:
        """What the topics of its chunks call it."""
        return update_name(self.digest)


@dataclass(frozen=True, slots=True)
class HeadAdmitted:
    """A head is its device's, certified, signed and of the task's size: its body is worth having."""

    received: HeadReceived


@dataclass(frozen=True, slots=True)
class HeadSpoilt:
    """A head did not hold, or its body is not the one that was signed for: nothing is on record.

    `passing`: it may hold under another clock. The device gets no word, for it takes any for the last one, and so it
    sends the head again.
    """

    received: HeadReceived
    error: RemoteProtocolError
    passing: bool = False


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A piece of a body, on the topic of its device; `update` is what the topic calls it."""

    device: str
    update: str
    index: int
    payload: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class UpdateCondemned:
    """Putting this update together kills the process: it is not tried again."""

    device: str
    update: str


@dataclass(frozen=True, slots=True)
class UpdateOpened:
    """The body of a head, authentic, decrypted and valid; the shell holds its numbers under the head's digest."""

    received: HeadReceived
    body: PlainBody


@dataclass(frozen=True, slots=True)
class UpdateSpoilt:
    """The body is the one that was signed for, and does not hold: that is this device's word for the round."""

    received: HeadReceived
    error: RemoteProtocolError


@dataclass(frozen=True, slots=True)
class HeadRecalled:
    """What was said of a head of an earlier round or manifest; None if nothing is on record."""

    received: HeadReceived
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class RoundReduced:
    """A closing round's new weights lie in the blobs; `metrics` are what its updates reported of the parent.

    `reports` are the updates that said anything on the task's metric.
    """

    task: str
    manifest_version: int
    number: int
    weights: BlobRef
    metrics: Metrics
    reports: int = 0


@dataclass(frozen=True, slots=True)
class RoundSpoilt:
    """A closing round makes no weights: what it collected is damaged on disk, or a value overflows."""

    task: str
    manifest_version: int
    number: int


Event = (
    LinkReady
    | ReleaseFound
    | OfferFound
    | RootFound
    | ReadBackDone
    | ReleaseReceived
    | WeightsArrived
    | WeightsLost
    | PartsLost
    | StatusReceived
    | TaskCommand
    | HeadReceived
    | HeadAdmitted
    | HeadSpoilt
    | ChunkReceived
    | UpdateCondemned
    | UpdateOpened
    | UpdateSpoilt
    | HeadRecalled
    | RoundReduced
    | RoundSpoilt
    | Tick
)

# -- effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdoptRelease:
    """A publisher's manifest and release 0, or what the broker knew better: store both with graphs and weights.

    Weights that are not in the message lie in the blobs.
    """

    message: ReleaseMessage
    manifest: TaskManifest
    release: Release


@dataclass(frozen=True, slots=True)
class FetchWeights:
    """Collect a release's chunks; WeightsArrived or WeightsLost follows."""

    found: Found


@dataclass(frozen=True, slots=True)
class SeekParts:
    """Tell that a task's graphs or weights are lost, and that `updates` of a closing round wait for them.

    Then let the broker say again what it retains.
    """

    task: str
    release: int
    updates: int
    detail: str


@dataclass(frozen=True, slots=True)
class MendParts:
    """Store graphs and weights again, as they came back, valid, from the broker."""

    task: str
    message: ReleaseMessage


@dataclass(frozen=True, slots=True)
class RestoreRelease:
    """Record a new release with the weights of an earlier one."""

    manifest_version: int
    release: Release
    signed: Signed
    restores: int


@dataclass(frozen=True, slots=True)
class MarkRound:
    """Store and publish an offer that nobody trains on, so that devices and we go on from its number.

    `known`: the store has this round already.
    """

    manifest_version: int
    offer: RoundOffer
    signed: Signed
    known: bool


@dataclass(frozen=True, slots=True)
class Recovered:
    """A task that was restored, or that the broker knew more of, has caught up."""

    task: str
    release: int
    round: int
    needs_manifest: bool


@dataclass(frozen=True, slots=True)
class AdoptRoot:
    """A newer root of the fleet: keep it for the next start."""

    version: int
    message: RootMessage


@dataclass(frozen=True, slots=True)
class PublishRoot:
    """The broker has not our root: put it back."""

    version: int


@dataclass(frozen=True, slots=True)
class SetTaskState:
    """Remember what the operator wants of a task."""

    task: str
    state: TaskState


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the operator; {"error": text} refuses."""

    reply: object
    facts: dict[str, object]


@dataclass(frozen=True, slots=True)
class PublishRelease:
    """Put the newest release of a task where devices find it; `announce` it to people too."""

    task: str
    number: int
    announce: bool


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Store the round with its key and signed offer in one step, then publish the offer."""

    manifest_version: int
    offer: RoundOffer
    signed: Signed
    private_key: bytes
    eligible: int


@dataclass(frozen=True, slots=True)
class ReviseRound:
    """Store a re-issued offer, then publish it; `state` is the round's in the store (None: as it is)."""

    manifest_version: int
    offer: RoundOffer
    signed: Signed
    state: str | None
    extensions: int
    updates: int
    told: events.Event | None


@dataclass(frozen=True, slots=True)
class PublishOffer:
    """Publish an offer again, as stored."""

    task: str
    signed: Signed


@dataclass(frozen=True, slots=True)
class Admit:
    """Verify a head before its chunks are asked for; `opened` is when its round opened (Unix time)."""

    received: HeadReceived
    opened: float
    manifest: TaskManifest


@dataclass(frozen=True, slots=True)
class Ask:
    """Tell a device which chunks of a body to send."""

    device: str
    missing: Missing


@dataclass(frozen=True, slots=True)
class Evict:
    """The chunks of an update were given up, for want of room or of a sign of life."""

    received: HeadReceived


@dataclass(frozen=True, slots=True)
class Open:
    """Decrypt and validate an update, which has its body.

    `opened` is when its round opened (Unix time) if the head is to be verified first, None if it was admitted.
    """

    received: HeadReceived
    clip: float
    opened: float | None
    manifest: TaskManifest


@dataclass(frozen=True, slots=True)
class Contribute:
    """Record an accepted update, then add it to the fold."""

    received: HeadReceived
    body: PlainBody
    manifest_version: int
    sequence: int
    weight: float
    updates: int
    goal: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Record that a device's update does not count, and why; its round takes no other one of it."""

    received: HeadReceived
    manifest_version: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """An update that does not count, which is not on record: say why."""

    received: HeadReceived
    outcome: Outcome
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Reply:
    """Tell a device what became of its update."""

    device: str
    receipt: Signed


@dataclass(frozen=True, slots=True)
class Recall:
    """Look up a head that is not of the open round: under this version, or (None) under whichever it was counted."""

    received: HeadReceived
    manifest_version: int | None


@dataclass(frozen=True, slots=True)
class Reduce:
    """Make the new weights of a closing round."""

    manifest: TaskManifest
    release: Release
    number: int


@dataclass(frozen=True, slots=True)
class StoreRelease:
    """Record the new release and its round's end together."""

    manifest_version: int
    round_number: int
    release: Release
    signed: Signed
    updates: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EraseRound:
    """Once its release is out: erase the round's key and its bodies, and weights that are kept no longer."""

    task: str
    manifest_version: int
    number: int


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Record that a round ended without a release (`how`), then erase its key and bodies.

    `weights` were made and are not wanted.
    """

    task: str
    manifest_version: int
    number: int
    how: str
    weights: bytes | None = None


@dataclass(frozen=True, slots=True)
class FinishTask:
    """The plan's rounds are done, its goal is reached, or its manifest has expired."""

    task: str
    rounds: int
    why: str


Effect = (
    AdoptRelease
    | FetchWeights
    | SeekParts
    | MendParts
    | RestoreRelease
    | MarkRound
    | Recovered
    | AdoptRoot
    | PublishRoot
    | SetTaskState
    | Answer
    | PublishRelease
    | OpenRound
    | ReviseRound
    | PublishOffer
    | Admit
    | Ask
    | Evict
    | Open
    | Contribute
    | Reject
    | Refuse
    | Reply
    | Recall
    | Reduce
    | StoreRelease
    | EraseRound
    | AbandonRound
    | FinishTask
)

# -- state -------------------------------------------------------------------------------------------------------


@dataclass
class Presence:
    """A device's newest word about itself, and when it counts as said (monotonic seconds)."""

    status: DeviceStatus
    heard: float


@dataclass
class Task:
    """One task: what the store keeps of it, and what follows from that."""

    manifest_signed: Signed
    manifest: TaskManifest
    release_signed: Signed
    release: Release
    last_round: int = 0
    offer: RoundOffer | None = None
    offer_signed: Signed | None = None
    round: Round | None = None
    """The open round; None while waiting, reducing or finished."""
    closing: Round | None = None
    keyless: bool = False
    """The round's private key is gone (a restored backup has none), so nothing sealed to it can be opened."""
    live: set[str] = field(default_factory=set)
    """Devices whose newest word is that they would train this task."""
    state: TaskState = "active"
    restored: bool = False
    """It comes from a backup: devices and broker may know more."""
    parent: tuple[Release, Signed] | None = None
    """The release before the newest, while its weights are kept."""
    reports: int = 0
    """Updates behind the newest release's metrics."""
    done: bool = False
    """As good as its plan wants it, or out of rounds."""
    expired: bool = False
    """As far as the clock said when a round might have opened."""
    expired_since: float | None = None
    """Monotonic seconds since when the clock has said so while a round was open."""
    needs_manifest: bool = False
    """Numbers were left out after a restore, and none is left; or devices follow a manifest that cannot be had here."""
    coming: bool = False
    """The broker knows a newer release, whose weights are on their way."""
    damaged: bool = False
    """Its graphs or newest weights are lost on our disk: no round opens, and a closing one keeps what it has."""
    sought: bool = False
    """The broker was asked for them; no second time, until something has changed."""

    @property
    def phase(self) -> str:
        """One word for people: waiting, collecting, starved, reducing, damaged, catching_up, paused, stopped, finished
        or needs_manifest."""
        if self.damaged:
            return "damaged"
        if self.round is not None:
            return "starved" if self.round.starved else "collecting"
        if self.closing is not None:
            return "reducing"
        if self.coming:
            return "catching_up"
        if self.needs_manifest:
            return "needs_manifest"
        if self.done or self.expired or self.last_round >= self.manifest.plan.rounds:
            return "finished"
        return "waiting" if self.state == "active" else self.state

    @property
    def protocol(self) -> int:
        """The version that a device must speak to follow it."""
        return max(self.manifest.v, self.release.v)

    @property
    def position(self) -> Position:
        """Of the newest release."""
        return Position((self.manifest.version, self.release.number), signing.digest(self.release_signed))


@dataclass
class Coordinator:
    """See the module. `public_key` is the aggregator's own signing key: a manifest must name it."""

    trust: Trust
    sign: Callable[[RoundOffer | Release | Receipt], Signed]
    keygen: Callable[[], tuple[bytes, bytes]]
    public_key: bytes
    tasks: dict[str, Task] = field(default_factory=dict)
    devices: dict[str, Presence] = field(default_factory=dict)
    reassembler: Reassembler[HeadReceived] = field(default_factory=lambda: Reassembler(Bounds()))
    ready: bool = False
    """Whether the broker was read back once: before that nothing is published and no round opens."""
    _back: ReadBack | None = None
    _coming: dict[str, Found] = field(default_factory=dict)
    """What the broker knows of a task and we do not: its weights are on their way."""
    _missed: dict[str, Found] = field(default_factory=dict)
    """As before, but its weights cannot be had, and of its manifest we have none."""
    _offers: dict[str, deque[Signed]] = field(default_factory=dict)
    """Offers that came after the barrier and before the release that they are on; not verified yet."""
    _roots: dict[int, RootMessage] = field(default_factory=dict)

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of an open round, of an update in parts or of reading back."""
        due = [task.round.deadline for task in self.tasks.values() if task.round is not None and self.ready]
        due += [] if self._back is None else [self._back.due]
        chunks = self.reassembler.deadline
        return min(due if chunks is None else [*due, chunks], default=None)

    def handle(self, event: Event, now: Instant) -> list[Effect]:
        """What to do about one event; a RemoteProtocolError has changed nothing."""
        effects = self._handle(event, now)
        return effects + self._interrupted(effects, now)

    def _handle(self, event: Event, now: Instant) -> list[Effect]:
        match event:
            case LinkReady():
                self._back = ReadBack(now.mono + PATIENCE)
                self._offers.clear()
                return []
            case ReleaseFound(task=name, message=message):
                return self._release_found(name, message, now)
            case OfferFound(task=name, signed=signed):
                return self._offer_found(name, signed, now)
            case RootFound(version=version, message=root):
                return self._root_found(version, root)
            case ReadBackDone():
                return self._read_back(now)
            case ReleaseReceived(message=message):
                return self._release_received(message, now)
            case WeightsArrived(found=found):
                return self._enter(found, now)
            case WeightsLost(found=found):
                return self._weights_lost(found, now)
            case PartsLost():
                return self._parts_lost(event)
            case StatusReceived():
                return self._status_received(event, now)
            case TaskCommand():
                return self._command(event, now)
            case HeadReceived():
                return self._head_received(event, now)
            case HeadAdmitted(received=received):
                return self._head_admitted(received, now)
            case HeadSpoilt(received=received, error=error):
                told = self._refuse(received, Outcome.REJECTED, error.reason, error.detail)
                return told[:1] if event.passing else told
            case ChunkReceived():
                return self._chunk_received(event, now)
            case UpdateCondemned(device=device, update=update):
                return self._update_condemned(device, update, now)
            case UpdateOpened(received=received, body=body):
                return self._update_opened(received, body, now)
            case UpdateSpoilt(received=received, error=error):
                return self._update_spoilt(received, error, now)
            case HeadRecalled(received=received, verdict=verdict):
                return self._head_recalled(received, verdict)
            case RoundReduced():
                return self._round_reduced(event, now)
            case RoundSpoilt():
                return self._round_spoilt(event, now)
            case Tick():
                late = self._back is not None and self._back.due <= now.mono
                effects = (self._read_back(now) if late else []) + self._deadlines(now)
                return effects + self._stepped(self.reassembler.tick(now.mono))
            case _:
                assert_never(event)

    def live(self, task: Task, now: Instant) -> set[str]:
        """Devices that say they would train this task now, and said so within the last 13 hours."""
        return {name for name in task.live if now.mono - self.devices[name].heard < STATUS_AGE_MAX}

    # -- releases --

    def _release_received(self, message: ReleaseMessage, now: Instant) -> list[Effect]:
        manifest = self.trust.manifest(message.manifest, now.utc)
        release = self.trust.release(message.release, message.manifest, manifest)
        if not self._newer(message, manifest):
            # Our own announcement, or the retained release that this task began with.
            if message.graphs is not None and message.weights is not None:
                parts(message.graphs, message.weights, manifest, release)
            return []
        if release.number != 0:
            raise RemoteProtocolError(Reason.ROLLBACK, f"release {release.number} of a manifest that is not known here")
        found = self._checked(message, manifest, release, kept=False)
        return [FetchWeights(found)] if message.weights is None else self._enter(found, now)

    def _newer(self, message: ReleaseMessage, manifest: TaskManifest) -> bool:
        """Whether a manifest is newer than what its task has; older or forked raises RemoteProtocolError.

        What the broker knows counts like what we have. A manifest whose newest release cannot be had is new once more.
        """
        task, found = self.tasks.get(manifest.task), Position((manifest.version,), signing.digest(message.manifest))
        known = None
        if task is not None:
            known = Position((task.manifest.version,), signing.digest(task.manifest_signed))
        if not advance(known, found):
            return False
        ahead = self._coming.get(manifest.task) or self._missed.get(manifest.task)
        known = None
        if ahead is not None:
            known = Position((ahead.manifest.version,), signing.digest(ahead.message.manifest))
        return advance(known, found) or manifest.task not in self._coming

    def _checked(self, message: ReleaseMessage, manifest: TaskManifest, release: Release, *, kept: bool) -> Found:
        """A release whose signatures hold, once it is one of ours and all that came with it is as signed."""
        if all(key.key != self.public_key for key in manifest.aggregator_keys):
            raise RemoteProtocolError(Reason.UNKNOWN_KEY, "the manifest names other aggregators than this one")
        _, weights = model(message, manifest, release)
        if weights is not None:
            tensors.verify(weights, manifest.layout)
        return Found(message, manifest, release, kept)

    def _enter(self, found: Found, now: Instant) -> list[Effect]:
        """Take a release whose weights are there."""
        found = self._known(found)
        if found.kept:
            return self._catch_up(found, now)
        if not self._newer(found.message, found.manifest):
            return []
        name, number = found.manifest.task, found.release.number
        task, missed = self.tasks.get(name), self._missed.get(name)
        effects = self._abandon(task, "superseded") if task is not None else []
        effects += [*self._adopt(found, task), PublishRelease(name, number, announce=False)]
        adopted = self.tasks[name]
        if adopted.state == "stopped":
            # Who publishes a new version of a task wants it trained.
            adopted.state = "active"
            effects.append(SetTaskState(name, "active"))
        if missed is not None and missed.manifest.version == found.manifest.version:
            # Devices have come further with it, so it goes on above all that they know.
            return effects + self._recover(adopted, _offer_of(adopted, missed.offer), now, missed.release.number + SKIP)
        theirs = _offer_of(adopted, self._offered(found).offer)
        # An offer of it says that it was on its way once, before all was forgotten here.
        return effects + (self._open(adopted, now) if theirs is None else self._recover(adopted, theirs, now))

    def _known(self, found: Found) -> Found:
        """The same release as the broker has it beside its task, if it lies there as well as on `models/release`."""
        coming = self._coming.get(found.manifest.task)
        return found if coming is None or coming.position != found.position else coming

    def _offered(self, found: Found) -> Found:
        """With the highest of the offers that the broker has of it, or had before ours took their place."""
        newest, rank = found.offer, (-1, -1)
        for signed in (*([] if found.offer is None else [found.offer]), *self._offers.pop(found.manifest.task, ())):
            with contextlib.suppress(RemoteProtocolError):
                offer = trust.offer(signed, found.message.manifest, found.manifest)
                if (offer.round, offer.sequence) > rank:
                    newest, rank = signed, (offer.round, offer.sequence)
        return replace(found, offer=newest)

    def _adopt(self, found: Found, before: Task | None) -> list[Effect]:
        """Begin a task anew with a manifest; what the operator wanted of it stays."""
        adopted = Task(found.message.manifest, found.manifest, found.message.release, found.release)
        if before is not None:
            adopted.state = before.state
        self.tasks[found.manifest.task] = adopted
        self._coming.pop(found.manifest.task, None)
        self._missed.pop(found.manifest.task, None)
        self._count_live(adopted)
        return [AdoptRelease(found.message, found.manifest, found.release)]

    def _replace(self, task: Task, signed: Signed, release: Release, reports: int) -> None:
        """Put a newer release in the place of the newest."""
        before = task.protocol
        task.parent = (task.release, task.release_signed)
        task.release, task.release_signed, task.reports = release, signed, reports
        task.damaged = task.sought = False  # what was damaged may not be needed any more
        if task.protocol != before:
            self._count_live(task)

    def _restoring(self, task: Task, source: Release, signed: Signed, step: int = 1) -> list[Effect]:
        """A new release, `step` numbers on, with the weights of an earlier one."""
        release = structs.replace(
            source,
            number=task.release.number + step,
            parent=signing.digest(task.release_signed),
            metrics={},
            restores=signing.digest(signed),
        )
        new = self.sign(release)
        self._replace(task, new, release, 0)
        return [
            RestoreRelease(task.manifest.version, release, new, source.number),
            PublishRelease(release.task, release.number, announce=True),
        ]

    # -- what the broker retains --

    def _release_found(self, name: str, message: ReleaseMessage, now: Instant) -> list[Effect]:
        task = self.tasks.get(name)
        ours = (message.manifest.payload, message.release.payload)
        if task is not None and ours == (task.manifest_signed.payload, task.release_signed.payload) and message.graphs:
            _intact(task, message)
            if self._back is not None:
                self._back.add(Found(message, task.manifest, task.release, True))
            return self._mend(task, message, task.release, now)
        # Devices hold to what they accepted of it, whether or not its term has ended, so we do.
        manifest = self.trust.published(message.manifest, now.utc)
        if manifest.task != name:
            raise RemoteProtocolError(Reason.WRONG_TASK, f"a release of {manifest.task} on the topic of {name}")
        release = self.trust.release(message.release, message.manifest, manifest)
        found = Found(message, manifest, release, True)
        if standing(None if task is None else task.position, found.position) is Standing.BEHIND:
            return [] if task is None else self._mend(task, message, release, now)
        self._checked(message, manifest, release, kept=True)
        if self._back is not None:
            self._back.add(found)
            return []
        return self._ahead(found, now)

    def _offer_found(self, name: str, signed: Signed, now: Instant) -> list[Effect]:
        task = self.tasks.get(name)
        if self._back is None and (task is None or name in self._coming):
            if name in self._offers or len(self._offers) < _OFFERS_TASKS:
                self._offers.setdefault(name, deque(maxlen=_OFFERS_EACH)).append(signed)
            return []
        if task is None or (task.offer_signed is not None and signed.payload == task.offer_signed.payload):
            if self._back is not None:
                self._back.offers[name] = signed
            return []
        try:
            offer = trust.offer(signed, task.manifest_signed, task.manifest)
        except RemoteProtocolError as error:
            if error.reason is not Reason.WRONG_MANIFEST or self._back is None:
                raise
            # Of the manifest before ours, or of one that we shall find.
            offer = None
        if self._back is not None:
            self._back.offers[name] = signed
            return []
        if offer is not None and _standing(task, offer, signed) in (Standing.AHEAD, Standing.FORKED):
            return self._recover(task, offer, now)
        return []

    def _root_found(self, version: int, message: RootMessage) -> list[Effect]:
        current = self.trust.root
        if version <= current.version or version > current.version + _ROOTS_AHEAD:
            if self._back is not None and message.own.payload == wire.pack(current):
                self._back.root = True
            return []
        if version > current.version + 1:
            self._roots[version] = message
            return []
        effects: list[Effect] = []
        following: RootMessage | None = message
        while following is not None:
            try:
                current = next_root(current, following)
            except RemoteProtocolError:
                if not effects:
                    raise
                break
            effects.append(AdoptRoot(current.version, following))
            following = self._roots.pop(current.version + 1, None)
        self.trust = Trust(current)
        if self._back is not None:
            self._back.root = True
        return effects

    def _read_back(self, now: Instant) -> list[Effect]:
        """Everything retained has come, as far as can be known: put right what is not as we know it."""
        back, self._back = self._back, None
        if back is None:
            return []  # of an earlier connection
        first, self.ready = not self.ready, True
        effects: list[Effect] = [] if back.root else [PublishRoot(self.trust.root.version)]
        self._offers = {
            name: deque([signed], _OFFERS_EACH)
            for name, signed in back.offers.items()
            if name not in self.tasks and name not in back.releases
        }
        for name in sorted(self.tasks.keys() | back.releases.keys()):
            effects += self._compare(name, back, first, now)
        return effects

    def _compare(self, name: str, back: ReadBack, first: bool, now: Instant) -> list[Effect]:
        task, found, signed = self.tasks.get(name), back.releases.get(name), back.offers.get(name)
        place = standing(None if task is None else task.position, None if found is None else found.position)
        if found is not None and place in (Standing.AHEAD, Standing.FORKED):
            return self._ahead(replace(found, offer=signed), now)
        assert task is not None
        offer = _offer_of(task, signed)
        offered = Standing.BEHIND if offer is None or signed is None else _standing(task, offer, signed)
        if task.restored or offered in (Standing.AHEAD, Standing.FORKED):
            return self._recover(task, offer, now)
        effects: list[Effect] = []
        if place is Standing.BEHIND:
            effects.append(PublishRelease(name, task.release.number, announce=False))
        if first and task.keyless:
            return effects + self._abandon(task, "superseded") + self._go_on(task, now)
        if task.round is not None and task.round.complete:
            return effects + self._close(task)
        if offered is Standing.BEHIND and task.offer_signed is not None:
            effects.append(PublishOffer(name, task.offer_signed))
        if first and task.closing is not None:
            # A restart owes the release of every round that was closing.
            effects.append(Reduce(task.manifest, task.release, task.closing.number))
        return effects + self._open(task, now)

    def _ahead(self, found: Found, now: Instant) -> list[Effect]:
        """The broker knows a release that we do not, and that we or our publisher signed."""
        task = self.tasks.get(found.manifest.task)
        if task is not None and standing(task.position, found.position) is Standing.FORKED:
            # Two of one number: devices hold theirs, so ours goes on with a number that nobody has.
            return self._recover(task, _offer_of(task, found.offer), now)
        if found.message.weights is not None:
            return self._catch_up(found, now)
        effects: list[Effect] = []
        if task is not None:
            effects, task.coming = self._abandon(task, "superseded"), True
        self._coming[found.manifest.task] = found
        return [*effects, FetchWeights(found)]

    def _catch_up(self, found: Found, now: Instant) -> list[Effect]:
        """Go on from what the broker knows; its weights are there."""
        self._coming.pop(found.manifest.task, None)
        found = self._offered(found)
        task = self.tasks.get(found.manifest.task)
        if task is not None and standing(task.position, found.position) is not Standing.AHEAD:
            task.coming = False
            return self._mended(task, found.release, now) if task.damaged else self._open(task, now)
        effects = self._abandon(task, "superseded") if task is not None else []
        if task is None or task.manifest_signed.payload != found.message.manifest.payload:
            effects += self._adopt(found, task)
            task = self.tasks[found.manifest.task]
        else:
            self._replace(task, found.message.release, found.release, 0)
            task.parent = None
            effects.append(AdoptRelease(found.message, found.manifest, found.release))
        return effects + self._recover(task, _offer_of(task, found.offer), now)

    def _weights_lost(self, found: Found, now: Instant) -> list[Effect]:
        name, found = found.manifest.task, self._known(found)
        task, coming = self.tasks.get(name), self._coming.get(name)
        if not found.kept or (coming is not None and coming.position != found.position):
            return []
        self._coming.pop(name, None)
        found = self._offered(found)
        if task is not None and standing(task.position, found.position) is not Standing.AHEAD:
            task.coming = False
            return self._open(task, now)
        if task is None or task.manifest_signed.payload != found.message.manifest.payload:
            # Nothing to go on from, until its publisher sends it again or the next connection brings it.
            self._missed[name] = found
            if task is not None:
                task.coming, task.needs_manifest = False, True
            return []
        # Our older weights go on under a number above theirs.
        step = found.release.number - task.release.number + SKIP
        return self._recover(task, _offer_of(task, found.offer), now, step)

    def _recover(self, task: Task, theirs: RoundOffer | None, now: Instant, step: int = SKIP) -> list[Effect]:
        """Leave out the numbers that devices may remember and we forgot: a release and an offer say where we go on."""
        task.coming = False
        effects = self._abandon(task, "superseded")
        newest = task.offer
        if theirs is not None and (newest is None or (theirs.round, theirs.sequence) > (newest.round, newest.sequence)):
            newest = theirs
        last = max(task.last_round, 0 if newest is None else newest.round)
        finished = newest is not None and newest.state is OfferState.FINISHED
        number = last if finished else skipped(last, task.manifest.plan.rounds)
        if newest is not None and number == last and (newest is theirs or newest.state is OfferState.OPEN):
            state = OfferState.FINISHED if finished else OfferState.CLOSED
            marked = structs.replace(newest, sequence=newest.sequence + 1, state=state)
        elif number > last:
            # Nobody ever trains on it, so nobody needs the other half of its key.
            marked = self._offer(task, number, self.keygen()[1], now)
            marked = structs.replace(marked, state=OfferState.CLOSED)
        else:
            marked = None
        if marked is not None:
            signed = self.sign(marked)
            effects.append(MarkRound(task.manifest.version, marked, signed, task.last_round >= marked.round))
            task.offer, task.offer_signed, task.last_round = marked, signed, marked.round
        elif task.offer_signed is not None:
            effects.append(PublishOffer(task.manifest.task, task.offer_signed))
        task.done, task.restored = finished, False
        spent = not finished and task.last_round >= task.manifest.plan.rounds
        task.needs_manifest = spent or task.manifest.task in self._missed
        effects += self._restoring(task, task.release, task.release_signed, step)
        effects.append(Recovered(task.manifest.task, task.release.number, task.last_round, task.needs_manifest))
        return effects + self._open(task, now)

    # -- what is lost on our own disk --

    def _parts_lost(self, event: PartsLost) -> list[Effect]:
        """Ask the broker, which retains the newest release: once, since its answer may be as damaged."""
        task = self.tasks[event.task]
        if task.manifest.version != event.manifest_version:
            return []
        asked, task.damaged, task.sought = task.sought, True, True
        waiting = 0 if task.closing is None else len(task.closing.accepted)
        return [] if asked else [SeekParts(event.task, task.release.number, waiting, event.detail)]

    def _mend(self, task: Task, message: ReleaseMessage, release: Release, now: Instant) -> list[Effect]:
        """Take what a retained release of ours, the newest or an earlier one, has of what is lost."""
        if not task.damaged or message.manifest != task.manifest_signed or message.graphs is None:
            return []
        parts(message.graphs, message.weights, task.manifest, release)
        effects: list[Effect] = [MendParts(task.manifest.task, message)]
        if message.weights is None and release.weights.sha256 == task.release.weights.sha256:
            return [*effects, FetchWeights(Found(message, task.manifest, release, True))]
        return effects + self._mended(task, release, now)

    def _mended(self, task: Task, release: Release, now: Instant) -> list[Effect]:
        """Do again what failed; `release` is there already."""
        task.damaged = False
        effects: list[Effect] = []
        if release != task.release:
            effects.append(PublishRelease(task.manifest.task, task.release.number, announce=False))
        if task.closing is not None:
            effects.append(Reduce(task.manifest, task.release, task.closing.number))
        return effects + self._open(task, now)

    # -- the operator --

    def _command(self, command: TaskCommand, now: Instant) -> list[Effect]:
        task = self.tasks.get(command.task)
        if task is None:
            known = ", ".join(sorted(self.tasks)) or "none yet"
            return [Answer(command.reply, {"error": f"there is no task {command.task} here; there are: {known}"})]
        refusal = self._refusal(task, command)
        if refusal:
            return [Answer(command.reply, {"error": f"{command.task} {refusal}"})]
        effects: list[Effect] = []
        match command.verb:
            case "pause":
                effects = self._set_state(task, "paused")
            case "resume":
                # What was as good as wanted goes on if that is what the operator wants.
                task.done = False
                effects = [*self._set_state(task, "active"), *self._open(task, now)]
            case "stop":
                effects = [*self._set_state(task, "stopped"), *self._abandon(task, "stopped", OfferState.FINISHED)]
            case "rollback":
                assert command.target is not None
                target = wire.unpack(command.target.payload, Release)
                ended = self._abandon(task, "superseded")
                effects = [*ended, *self._restoring(task, target, command.target)]
                effects += self._go_on(task, now) if ended else self._open(task, now)
            case _:
                assert_never(command.verb)
        facts: dict[str, object] = {
            "task": command.task,
            "state": task.state,
            "phase": task.phase,
            "release": task.release.number,
            "round": task.last_round,
        }
        return [*effects, Answer(command.reply, facts)]

    def _refusal(self, task: Task, command: TaskCommand) -> str:
        """Why a command cannot be carried out; empty if it can."""
        verb, target = command.verb, command.target
        if verb in ("stop", "rollback") and not self.ready:
            return "waits for the broker, which may hold a newer release of it: try again once it is connected"
        if verb == "pause" and task.phase in ("finished", "needs_manifest"):
            return "is finished: there is nothing to pause"
        if verb == "pause" and task.state == "stopped":
            return "is stopped; `aggregator task resume` starts it again"
        if verb == "resume" and task.last_round >= task.manifest.plan.rounds:
            return f"has no round left of its {task.manifest.plan.rounds}; publish a higher version of it"
        if verb == "rollback" and target is None:
            return "has no such release any more"
        if verb == "rollback" and target is not None and target.payload == task.release_signed.payload:
            return f"is at release {task.release.number} already"
        return ""

    def _set_state(self, task: Task, state: TaskState) -> list[Effect]:
        task.state = state
        return [SetTaskState(task.manifest.task, state)]

    # -- devices --

    def _count_live(self, task: Task) -> None:
        task.live = {name for name, each in self.devices.items() if _would_train(each.status, task)}

    def _status_received(self, event: StatusReceived, now: Instant) -> list[Effect]:
        device, status = event.device, event.status
        known = self.devices.get(device)
        same = known is not None and status is not None and status.session == known.status.session
        if known is not None and status is not None:
            if not status.online and not same:
                return []  # a late will of an earlier session
            if event.retained and same and status.online and status.sent < known.status.sent:
                return []
        if status is None:
            self.devices.pop(device, None)
        else:
            # What comes live is new, whatever either clock says.
            heard = now.mono - (max(0.0, now.utc - status.sent) if event.retained else 0.0)
            if known is not None and same and status.sent == known.status.sent:
                heard = max(heard, known.heard)
            self.devices[device] = Presence(status, heard)
        effects: list[Effect] = []
        for task in self.tasks.values():
            # Per device, not per fleet: a hundred thousand births must not each look at a hundred thousand devices.
            if status is not None and _would_train(status, task):
                task.live.add(device)
                if task.round is None:
                    effects += self._open(task, now)
            elif device in task.live:
                task.live.remove(device)
                effects += self._widen(task, device, now)
        return effects

    def _widen(self, task: Task, gone: str, now: Instant) -> list[Effect]:
        """Select others at once when a selected device goes away."""
        current = task.round
        if current is None or current.participation >= PARTICIPATION_ALL:
            return []
        if gone in current.accepted or not current.selected(gone):
            return []
        wider = current.wider(self.live(task, now))
        if wider <= current.participation:
            return []
        current.participation = wider
        return self._revise(task, participation=wider, told=events.Event.ROUND_WIDENED)

    # -- rounds --

    def _open(self, task: Task, now: Instant) -> list[Effect]:
        manifest, plan = task.manifest, task.manifest.plan
        if not self.ready or len(task.live) < plan.min_updates:
            return []
        task.expired = now.utc >= manifest.expires
        if task.phase != "waiting":
            return []
        live = self.live(task, now)
        if len(live) < plan.min_updates:
            return []
        number = task.last_round + 1
        seconds = min(float(plan.deadline), manifest.expires - now.utc)
        opened = Round(manifest.task, manifest.version, number, plan, 0, now.mono + seconds, now.utc)
        opened.participation = threshold(
            (draw(manifest.task, manifest.version, number, each) for each in live), opened.want
        )
        private, public = self.keygen()
        offer = self._offer(task, number, public, now)
        offer = structs.replace(offer, participation=opened.participation, deadline=int(now.utc + seconds))
        signed = self.sign(offer)
        task.round, task.offer, task.offer_signed, task.last_round = opened, offer, signed, number
        return [OpenRound(manifest.version, offer, signed, private, len(live))]

    def _offer(self, task: Task, number: int, public: bytes, now: Instant) -> RoundOffer:
        """An open offer to nobody, due now."""
        return RoundOffer(
            v=1,
            task=task.manifest.task,
            manifest=signing.digest(task.manifest_signed),
            release=signing.digest(task.release_signed),
            round=number,
            sequence=0,
            state=OfferState.OPEN,
            participation=0,
            clip=task.manifest.privacy.clip_max,
            shards=1,
            suite="x25519",
            hpke_key=public,
            deadline=int(now.utc),
        )

    def _revise(
        self,
        task: Task,
        *,
        participation: int | None = None,
        deadline: int | None = None,
        state: OfferState = OfferState.OPEN,
        stored: str | None = "open",
        told: events.Event | None = None,
    ) -> list[Effect]:
        before = task.offer
        if before is None:
            raise LocalProtocolError(f"{task.manifest.task} has no offer to revise")
        current = task.round or task.closing
        offer = structs.replace(
            before,
            sequence=before.sequence + 1,
            state=state,
            participation=before.participation if participation is None else participation,
            # The wall clock may have been set back; what devices were promised holds.
            deadline=before.deadline if deadline is None else max(deadline, before.deadline),
        )
        task.offer, task.offer_signed = offer, self.sign(offer)
        updates = len(current.accepted) if current is not None else 0
        extensions = current.extensions if current is not None else 0
        return [ReviseRound(task.manifest.version, offer, task.offer_signed, stored, extensions, updates, told)]

    def _deadlines(self, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        for task in self.tasks.values():
            current, left, deadline = task.round, task.manifest.expires - now.utc, None
            if left > 0.0 or current is None:
                task.expired_since = None
            elif task.expired_since is None:
                task.expired_since = now.mono
            if current is None or current.deadline > now.mono or not self.ready:
                continue
            if current.enough:
                effects += self._close(task)
                continue
            if task.expired_since is not None:
                left = task.expired_since + EXPIRED_KEPT - now.mono
                if left <= 0.0:
                    task.expired = True
                    effects += self._abandon(task, "finished", OfferState.FINISHED)
                    effects.append(FinishTask(task.manifest.task, task.last_round, "expired"))
                    continue
            seconds = current.extend(now.mono, left)
            if task.expired_since is None:
                deadline = int(now.utc + seconds)
            current.participation = current.wider(self.live(task, now))
            effects += self._revise(
                task,
                participation=current.participation,
                deadline=deadline,
                told=events.Event.ROUND_EXTENDED,
            )
        return effects

    def _close(self, task: Task) -> list[Effect]:
        task.closing, task.round = task.round, None
        effects = self._revise(task, state=OfferState.CLOSED, stored="closing")
        assert task.closing is not None
        return [*effects, Reduce(task.manifest, task.release, task.closing.number)]

    def _round_reduced(self, event: RoundReduced, now: Instant) -> list[Effect]:
        task = self.tasks[event.task]
        closed = self._closing(event)
        if closed is None:
            return []
        plan, metric = task.manifest.plan, task.manifest.metric
        before, found = Record(task.release.metrics, task.reports), Record(event.metrics, event.reports)
        worse = plan.gate is not UNSET and gate.clearly_worse(plan.gate, metric, before, found)
        if worse and task.parent is not None:
            rejected = self._abandon(task, "rejected_by_gate", weights=event.weights.sha256)
            return [*rejected, *self._restoring(task, *task.parent), *self._go_on(task, now)]
        release = Release(
            v=2 if event.weights.chunk_size else 1,
            task=event.task,
            manifest=signing.digest(task.manifest_signed),
            number=task.release.number + 1,
            parent=signing.digest(task.release_signed),
            weights=event.weights,
            control_variate=None,
            delta=None,
            metrics=event.metrics,
            privacy_spent=None,
            restores=None,
        )
        signed = self.sign(release)
        self._replace(task, signed, release, event.reports)
        task.closing = None
        updates, seconds = len(closed.accepted), now.utc - closed.opened
        effects: list[Effect] = [
            StoreRelease(task.manifest.version, closed.number, release, signed, updates, seconds),
            PublishRelease(event.task, release.number, announce=True),
            *(self._finish(task, "goal") if gate.reached(plan, metric, found) else self._go_on(task, now)),
        ]
        return [*effects, EraseRound(event.task, task.manifest.version, closed.number)]

    def _round_spoilt(self, event: RoundSpoilt, now: Instant) -> list[Effect]:
        task = self.tasks[event.task]
        return self._abandon(task, "rejected_by_gate") + self._go_on(task, now) if self._closing(event) else []

    def _closing(self, event: RoundReduced | RoundSpoilt) -> Round | None:
        """The round that was reduced; None if the operator or a newer manifest ended it in the same batch."""
        task = self.tasks[event.task]
        if task.manifest.version != event.manifest_version:
            return None
        if task.closing is None or task.closing.number != event.number:
            return None
        return task.closing

    def _go_on(self, task: Task, now: Instant) -> list[Effect]:
        """After a round: the next one, or the end of the plan."""
        if task.last_round >= task.manifest.plan.rounds:
            return self._finish(task, "rounds")
        return self._open(task, now)

    def _finish(self, task: Task, why: str) -> list[Effect]:
        task.done = True
        finished = self._revise(task, state=OfferState.FINISHED, stored=None)
        return [*finished, FinishTask(task.manifest.task, task.last_round, why)]

    def _abandon(
        self, task: Task, how: str, state: OfferState = OfferState.CLOSED, weights: bytes | None = None
    ) -> list[Effect]:
        """End the task's round, if it has one, without a release of it."""
        current = task.round or task.closing
        if current is None:
            return []
        effects: list[Effect] = list(self._revise(task, state=state, stored=how))
        task.round = task.closing = None
        task.keyless = False
        return [*effects, AbandonRound(task.manifest.task, task.manifest.version, current.number, how, weights)]

    # -- updates --

    def _head_received(self, received: HeadReceived, now: Instant) -> list[Effect]:
        answer = self._answer(received)
        if answer is not None:
            return answer
        task, current = self._collecting(received)
        if received.body is not None:
            return self._open_update(received, current.opened)
        known = self.reassembler.again(received.context.device, received.name, now.mono)
        return [Admit(received, current.opened, task.manifest)] if known is None else self._stepped(known)

    def _head_admitted(self, received: HeadReceived, now: Instant) -> list[Effect]:
        answer = self._answer(received)
        if answer is not None:
            return answer
        head, device = received.head, received.context.device
        try:
            step = self.reassembler.begin(device, received.name, received, head.size, head.chunk_size, now.mono)
        except RemoteProtocolError as error:
            return self._refuse(received, Outcome.REJECTED, error.reason, error.detail)
        return self._stepped(step)

    def _chunk_received(self, chunk: ChunkReceived, now: Instant) -> list[Effect]:
        step = self.reassembler.take(chunk.device, chunk.update, chunk.index, chunk.payload, now.mono)
        effects = self._stepped(step)
        if step.whole is not None:
            received, body = step.whole
            received = replace(received, body=body)
            # Hours may lie between head and last chunk.
            answer = self._answer(received)
            effects += self._open_update(received, None) if answer is None else answer
        return effects

    def _update_condemned(self, device: str, update: str, now: Instant) -> list[Effect]:
        step = self.reassembler.drop(lambda each: (each.context.device, each.name) == (device, update), now.mono)
        effects = self._stepped(step)
        for received in step.dropped:
            effects += self._update_spoilt(received, RemoteProtocolError(Reason.QUARANTINED), now)
        return effects

    def _open_update(self, received: HeadReceived, opened: float | None) -> list[Effect]:
        task, _ = self._collecting(received)
        assert task.offer is not None
        return [Open(received, task.offer.clip, opened, task.manifest)]

    def _update_opened(self, received: HeadReceived, body: PlainBody, now: Instant) -> list[Effect]:
        # Closed meanwhile, perhaps by this very head: the broker may have sent it twice. Or two heads of one device
        # were opened in one batch: the first is in.
        answer = self._answer(received)
        if answer is not None:
            return answer
        task, current = self._collecting(received)
        sequence = current.accept(received.context.device, received.digest)
        algorithm = task.manifest.algorithm
        weight = float(min(body.examples, algorithm.cap)) if algorithm.weights == "examples" else 1.0
        count, goal = len(current.accepted), current.plan.goal
        effects: list[Effect] = [
            Contribute(received, body, task.manifest.version, sequence, weight, count, goal),
            self._reply(received, Outcome.ACCEPTED),
            *self._settled(received, now),
        ]
        # Before the broker was read back, a newer release may be there that was made of this very round.
        return effects + self._close(task) if current.complete and self.ready else effects

    def _update_spoilt(self, received: HeadReceived, error: RemoteProtocolError, now: Instant) -> list[Effect]:
        answer = self._answer(received)
        if answer is not None:
            return answer
        task, current = self._collecting(received)
        current.reject(received.context.device, received.digest, error.reason)
        return [
            Reject(received, task.manifest.version, error.reason, error.detail),
            self._reply(received, Outcome.REJECTED, error.reason.value),
            *self._settled(received, now),
        ]

    def _head_recalled(self, received: HeadReceived, verdict: Verdict | None) -> list[Effect]:
        if verdict is not None:
            return self._say(received, verdict)
        context = received.context
        if context.manifest != signing.digest(self.tasks[context.task].manifest_signed):
            return self._refuse(received, Outcome.SUPERSEDED, Reason.WRONG_MANIFEST, "of another manifest")
        return self._refuse(received, Outcome.LATE, Reason.LATE, f"round {context.round} is over")

    def _answer(self, received: HeadReceived) -> list[Effect] | None:
        """What to say to a head that cannot count, or did already; None as long as it can."""
        context = received.context
        task = self.tasks.get(context.task)
        if task is None:
            return self._refuse(received, Outcome.UNKNOWN, Reason.WRONG_TASK, f"no task {context.task} here")
        if context.manifest != signing.digest(task.manifest_signed):
            return [Recall(received, None)]
        if context.round > task.last_round:
            return self._refuse(
                received, Outcome.UNKNOWN, Reason.NO_SUCH_ROUND, f"round {context.round} is not open yet"
            )
        current, offer = task.round, task.offer
        if current is None or offer is None or context.round != current.number:
            return [Recall(received, task.manifest.version)]
        verdict = current.judge(context.device, received.digest)
        if verdict is not None:
            return self._say(received, verdict)
        if task.keyless:
            return self._refuse(received, Outcome.SUPERSEDED, Reason.NO_SUCH_ROUND, "its key is gone, so it ends")
        if context.release != offer.release:
            return self._refuse(received, Outcome.REJECTED, Reason.WRONG_DIGEST, "of another release than the round's")
        return None

    def _collecting(self, received: HeadReceived) -> tuple[Task, Round]:
        """The task and open round of a head that can count."""
        task = self.tasks[received.context.task]
        if task.round is None:
            raise LocalProtocolError(f"no round of {received.context.task} is open")
        return task, task.round

    def _say(self, received: HeadReceived, verdict: Verdict) -> list[Effect]:
        """Repeat what was said of this very head, or refuse another one."""
        if verdict.outcome in (Outcome.ACCEPTED, Outcome.REJECTED):
            return [self._reply(received, verdict.outcome, verdict.reason)]
        return self._refuse(received, verdict.outcome, Reason(verdict.reason), "")

    def _settled(self, received: HeadReceived, now: Instant) -> list[Effect]:
        """A device has had its say in a round: what else it has under way for it cannot count."""
        context = received.context
        if not self.reassembler.holds(context.device):
            return []
        return self._dropped(
            lambda each: (
                (each.context.task, each.context.manifest, each.context.round, each.context.device)
                == (context.task, context.manifest, context.round, context.device)
            ),
            now,
        )

    def _interrupted(self, effects: Sequence[Effect], now: Instant) -> list[Effect]:
        """Whoever is in the midst of an update when its round stops taking any is told so at once."""
        ended = {
            each.offer.task
            for each in effects
            if isinstance(each, ReviseRound) and each.offer.state is not OfferState.OPEN
        }
        return self._dropped(lambda each: each.context.task in ended, now) if ended else []

    def _dropped(self, unwanted: Callable[[HeadReceived], bool], now: Instant) -> list[Effect]:
        step = self.reassembler.drop(unwanted, now.mono)
        answers = [effect for received in step.dropped for effect in self._answer(received) or []]
        return answers + self._stepped(step)

    def _stepped(self, step: Step[HeadReceived]) -> list[Effect]:
        """What the reassembler wants done, but for what is whole."""
        asks = [Ask(each.context.device, Missing(v=2, head=each.digest, chunks=numbers)) for each, numbers in step.asks]
        return [*map(Evict, step.evicted), *asks]

    def _refuse(self, received: HeadReceived, outcome: Outcome, reason: Reason, detail: str) -> list[Effect]:
        return [Refuse(received, outcome, reason, detail), self._reply(received, outcome, reason.value)]

    def _reply(self, received: HeadReceived, outcome: Outcome, reason: str = "") -> Reply:
        context = received.context
        receipt = Receipt(
            v=1,
            head=received.digest,
            task=context.task,
            round=context.round,
            device=context.device,
            outcome=outcome,
            reason=reason,
        )
        return Reply(context.device, self.sign(receipt))


def _would_train(status: DeviceStatus, task: Task) -> bool:
    return (
        status.online
        and status.eligible
        and status.v >= task.protocol
        and task.manifest.opset in status.opsets
        and task.manifest.data.dataset in status.datasets
    )


def _intact(task: Task, message: ReleaseMessage) -> None:
    """Refuse a copy of our newest release that no device could use, so that ours is put in its place."""
    if (message.manifest, message.release) != (task.manifest_signed, task.release_signed):
        raise RemoteProtocolError(Reason.BAD_SIGNATURE, f"release {task.release.number} with another signature")
    if message.weights is None and not task.release.weights.chunks:
        raise RemoteProtocolError(Reason.MISSING_PART, f"release {task.release.number} without its weights")
    if message.graphs is not None:
        parts(message.graphs, message.weights, task.manifest, task.release)


def _offer_of(task: Task, signed: Signed | None) -> RoundOffer | None:
    """The offer inside, if it is of this task's manifest."""
    if signed is None:
        return None
    try:
        return trust.offer(signed, task.manifest_signed, task.manifest)
    except RemoteProtocolError:
        return None


def _standing(task: Task, offer: RoundOffer, signed: Signed) -> Standing:
    """Where the broker's offer stands, seen from ours of the same manifest."""
    ours = None
    if task.offer is not None and task.offer_signed is not None:
        ours = Position((task.offer.round, task.offer.sequence), signing.digest(task.offer_signed))
    return standing(ours, Position((offer.round, offer.sequence), signing.digest(signed)))


def signer(private: Ed25519PrivateKey) -> Callable[[RoundOffer | Release | Receipt], Signed]:
    """The aggregator's signature, for `Coordinator.sign`."""
    return lambda record: signing.sign(record, Role.AGGREGATOR, private)
