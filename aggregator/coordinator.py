"""The aggregator's machine: every task with its newest release, its open round and the devices that are there. Pure.

It checks releases against the pinned root, opens and closes rounds, judges heads and answers them. Signing is a
function of its input (Ed25519) and so part of the machine; randomness enters as `keygen`. It must never touch a
socket, a disk or a clock, and it never sees an update's numbers: those pass from the shell's `Open` to its fold.

    task: waiting (for min_updates live devices) -> collecting -> reducing -> waiting ... -> finished
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.reassembler import Bounds, Reassembler, Step
from aggregator.round import Round, Verdict
from shared import events, signing, tensors
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
    RoundOffer,
    Signed,
    TaskManifest,
    UpdateContext,
    UpdateHead,
)
from shared.selection import draw, threshold
from shared.topics import update_name
from shared.trust import Position, Trust, advance, model, parts

STATUS_AGE_MAX = 13 * 3600
"""Seconds after which a device's word about itself no longer counts."""

# -- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkReady:
    """The broker is there; `fresh` if it remembers nothing of us or we have only just started."""

    fresh: bool


@dataclass(frozen=True, slots=True)
class ReleaseReceived:
    """Something on `models/release` that decodes."""

    message: ReleaseMessage


@dataclass(frozen=True, slots=True)
class StatusReceived:
    """A device's word about itself; None once its retained status was cleared."""

    device: str
    status: DeviceStatus | None


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
    """A head did not hold, or its body is not the one that was signed for: nothing is on record."""

    received: HeadReceived
    error: RemoteProtocolError


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A piece of a body, on the topic of its device; `update` is what the topic calls it."""

    device: str
    update: str
    index: int
    payload: bytes | memoryview


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
    """What was said of a head of an earlier round; None if nothing is on record."""

    received: HeadReceived
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class RoundReduced:
    """A closing round's new weights lie in the blobs; `metrics` are what its updates reported of the parent."""

    task: str
    manifest_version: int
    number: int
    weights: BlobRef
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class RoundSpoilt:
    """A closing round makes no weights: what it collected is damaged on disk, or a value overflows."""

    task: str
    manifest_version: int
    number: int


Event = (
    LinkReady
    | ReleaseReceived
    | StatusReceived
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
    """A publisher's manifest and release 0: store both with graphs and weights."""

    message: ReleaseMessage
    manifest: TaskManifest
    release: Release


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
    """Look an earlier round's head up."""

    received: HeadReceived
    manifest_version: int


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
    """Once its release is out: erase the round's key, its bodies and the weights that it replaced."""

    task: str
    manifest_version: int
    number: int
    replaced: bytes


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Record that a round ended without a release (`how`), then erase its key and bodies."""

    task: str
    manifest_version: int
    number: int
    how: str


@dataclass(frozen=True, slots=True)
class FinishTask:
    """Every round of the plan is done."""

    task: str
    rounds: int


Effect = (
    AdoptRelease
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

    @property
    def phase(self) -> str:
        """One word for people: waiting, collecting, starved, reducing or finished."""
        if self.round is not None:
            return "starved" if self.round.starved else "collecting"
        if self.closing is not None:
            return "reducing"
        return "finished" if self.last_round >= self.manifest.plan.rounds else "waiting"


@dataclass
class Coordinator:
    """See the module. `public_key` is the aggregator's own signing key: a manifest must name it."""

    trust: Trust
    sign: Callable[[RoundOffer | Release | Receipt], Signed]
    keygen: Callable[[], tuple[bytes, bytes]]
    public_key: bytes
    tasks: dict[str, Task] = field(default_factory=dict)
    devices: dict[str, DeviceStatus] = field(default_factory=dict)
    reassembler: Reassembler[HeadReceived] = field(default_factory=lambda: Reassembler(Bounds()))
    ready: bool = False

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of an open round or of an update in parts."""
        due = [task.round.deadline for task in self.tasks.values() if task.round is not None]
        chunks = self.reassembler.deadline
        return min(due if chunks is None else [*due, chunks], default=None)

    def handle(self, event: Event, now: Instant) -> list[Effect]:
        """What to do about one event; a RemoteProtocolError has changed nothing."""
        effects = self._handle(event, now)
        return effects + self._interrupted(effects, now)

    def _handle(self, event: Event, now: Instant) -> list[Effect]:
        match event:
            case LinkReady(fresh=fresh):
                return self._link_ready(fresh, now)
            case ReleaseReceived(message=message):
                return self._release_received(message, now)
            case StatusReceived(device=device, status=status):
                return self._status_received(device, status, now)
            case HeadReceived():
                return self._head_received(event, now)
            case HeadAdmitted(received=received):
                return self._head_admitted(received, now)
            case HeadSpoilt(received=received, error=error):
                return self._refuse(received, Outcome.REJECTED, error.reason, error.detail)
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
                return self._deadlines(now) + self._stepped(self.reassembler.tick(now.mono))
            case _:
                assert_never(event)

    def live(self, task: Task, now: Instant) -> set[str]:
        """Devices that say they would train this task now, and said so within the last 13 hours."""
        return {name for name in task.live if now.utc - self.devices[name].sent < STATUS_AGE_MAX}

    # -- releases --

    def _link_ready(self, fresh: bool, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        if not self.ready:
            # A restart owes the release of every round that was closing.
            for task in self.tasks.values():
                if task.keyless:
                    effects += self._abandon(task, "superseded")
                elif task.closing is not None:
                    effects.append(Reduce(task.manifest, task.release, task.closing.number))
        for name, task in self.tasks.items():
            if fresh:
                effects.append(PublishRelease(name, task.release.number, announce=False))
            # Small, and a broker that was killed hard may have brought back an older one with our session.
            if task.offer_signed is not None:
                effects.append(PublishOffer(name, task.offer_signed))
        self.ready = True
        return effects + self._open_rounds(now)

    def _release_received(self, message: ReleaseMessage, now: Instant) -> list[Effect]:
        manifest = self.trust.manifest(message.manifest, now.utc)
        release = self.trust.release(message.release, message.manifest, manifest)
        task = self.tasks.get(manifest.task)
        known = None
        if task is not None:
            known = Position((task.manifest.version,), signing.digest(task.manifest_signed))
        if not advance(known, Position((manifest.version,), signing.digest(message.manifest))):
            # Our own announcement, or the retained release that this task began with.
            if message.graphs is not None and message.weights is not None:
                parts(message.graphs, message.weights, manifest, release)
            return []
        if release.number != 0:
            raise RemoteProtocolError(Reason.ROLLBACK, f"release {release.number} of a manifest that is not known here")
        if all(key.key != self.public_key for key in manifest.aggregator_keys):
            raise RemoteProtocolError(Reason.UNKNOWN_KEY, "the manifest names other aggregators than this one")
        _, weights = model(message, manifest, release)
        if weights is None:
            raise RemoteProtocolError(Reason.MISSING_PART, f"release {release.number} without its weights")
        tensors.load(weights, manifest.layout)
        effects: list[Effect] = []
        if task is not None:
            effects += self._abandon(task, "superseded")
        adopted = Task(message.manifest, manifest, message.release, release)
        adopted.live = {name for name, status in self.devices.items() if _would_train(status, manifest)}
        self.tasks[manifest.task] = adopted
        effects.append(AdoptRelease(message, manifest, release))
        effects.append(PublishRelease(manifest.task, release.number, announce=False))
        return effects + self._open_rounds(now)

    # -- devices --

    def _status_received(self, device: str, status: DeviceStatus | None, now: Instant) -> list[Effect]:
        known = self.devices.get(device)
        if known is not None and status is not None:
            if not status.online and status.session != known.session:
                return []  # a late will of an earlier session
            if status.session == known.session and status.online and status.sent < known.sent:
                return []
        if status is None:
            self.devices.pop(device, None)
        else:
            self.devices[device] = status
        effects: list[Effect] = []
        for task in self.tasks.values():
            # Per device, not per fleet: a hundred thousand births must not each look at a hundred thousand devices.
            if status is not None and _would_train(status, task.manifest):
                task.live.add(device)
                if task.phase == "waiting":
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

    def _open_rounds(self, now: Instant) -> list[Effect]:
        return [effect for task in self.tasks.values() if task.phase == "waiting" for effect in self._open(task, now)]

    def _open(self, task: Task, now: Instant) -> list[Effect]:
        manifest, plan = task.manifest, task.manifest.plan
        if not self.ready or len(task.live) < plan.min_updates or now.utc >= manifest.expires:
            return []
        live = self.live(task, now)
        if len(live) < plan.min_updates:
            return []
        number = task.last_round + 1
        opened = Round(manifest.task, manifest.version, number, plan, 0, now.mono + plan.deadline, now.utc)
        opened.participation = threshold(
            (draw(manifest.task, manifest.version, number, each) for each in live), opened.want
        )
        private, public = self.keygen()
        offer = RoundOffer(
            v=1,
            task=manifest.task,
            manifest=signing.digest(task.manifest_signed),
            release=signing.digest(task.release_signed),
            round=number,
            sequence=0,
            state=OfferState.OPEN,
            participation=opened.participation,
            clip=manifest.privacy.clip_max,
            shards=1,
            suite="x25519",
            hpke_key=public,
            deadline=int(now.utc) + plan.deadline,
        )
        signed = self.sign(offer)
        task.round, task.offer, task.offer_signed, task.last_round = opened, offer, signed, number
        return [OpenRound(manifest.version, offer, signed, private, len(live))]

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
        offer = RoundOffer(
            v=1,
            task=before.task,
            manifest=before.manifest,
            release=before.release,
            round=before.round,
            sequence=before.sequence + 1,
            state=state,
            participation=before.participation if participation is None else participation,
            clip=before.clip,
            shards=before.shards,
            suite=before.suite,
            hpke_key=before.hpke_key,
            deadline=before.deadline if deadline is None else max(deadline, before.deadline),
        )
        task.offer, task.offer_signed = offer, self.sign(offer)
        updates = len(current.accepted) if current is not None else 0
        extensions = current.extensions if current is not None else 0
        return [ReviseRound(task.manifest.version, offer, task.offer_signed, stored, extensions, updates, told)]

    def _deadlines(self, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        for task in self.tasks.values():
            current = task.round
            if current is None or current.deadline > now.mono:
                continue
            if current.enough:
                effects += self._close(task)
            else:
                seconds = current.extend(now.mono)
                current.participation = current.wider(self.live(task, now))
                effects += self._revise(
                    task,
                    participation=current.participation,
                    deadline=int(now.utc + seconds),
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
        release = Release(
            v=1,
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
        replaced = task.release.weights.sha256
        task.release, task.release_signed, task.closing = release, signed, None
        updates, seconds = len(closed.accepted), now.utc - closed.opened
        effects: list[Effect] = [
            StoreRelease(task.manifest.version, closed.number, release, signed, updates, seconds),
            PublishRelease(event.task, release.number, announce=True),
            *self._go_on(task, now),
        ]
        return [*effects, EraseRound(event.task, task.manifest.version, closed.number, replaced)]

    def _round_spoilt(self, event: RoundSpoilt, now: Instant) -> list[Effect]:
        task = self.tasks[event.task]
        return self._abandon(task, "rejected_by_gate") + self._go_on(task, now) if self._closing(event) else []

    def _closing(self, event: RoundReduced | RoundSpoilt) -> Round | None:
        """The round that was reduced; None if a newer manifest came in the same batch and ended it."""
        task = self.tasks[event.task]
        if task.manifest.version != event.manifest_version:
            return None
        if task.closing is None or task.closing.number != event.number:
            raise LocalProtocolError(f"round {event.number} of {event.task} was reduced but is not closing")
        return task.closing

    def _go_on(self, task: Task, now: Instant) -> list[Effect]:
        """After a round: the next one, or the end of the plan."""
        if task.phase != "finished":
            return self._open(task, now)
        finished = self._revise(task, state=OfferState.FINISHED, stored=None)
        return [*finished, FinishTask(task.manifest.task, task.last_round)]

    def _abandon(self, task: Task, how: str) -> list[Effect]:
        current = task.round or task.closing
        if current is None:
            return []
        effects: list[Effect] = list(self._revise(task, state=OfferState.CLOSED, stored=how))
        task.round = task.closing = None
        task.keyless = False
        return [*effects, AbandonRound(task.manifest.task, task.manifest.version, current.number, how)]

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
        return effects + self._close(task) if current.full else effects

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
        if verdict is None:
            return self._refuse(received, Outcome.LATE, Reason.LATE, f"round {received.context.round} is over")
        return self._say(received, verdict)

    def _answer(self, received: HeadReceived) -> list[Effect] | None:
        """What to say to a head that cannot count, or did already; None as long as it can."""
        context = received.context
        task = self.tasks.get(context.task)
        if task is None:
            return self._refuse(received, Outcome.UNKNOWN, Reason.WRONG_TASK, f"no task {context.task} here")
        if context.manifest != signing.digest(task.manifest_signed):
            return self._refuse(received, Outcome.SUPERSEDED, Reason.WRONG_MANIFEST, "of another manifest")
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


def _would_train(status: DeviceStatus, manifest: TaskManifest) -> bool:
    return (
        status.online
        and status.eligible
        and manifest.opset in status.opsets
        and manifest.data.dataset in status.datasets
    )


def signer(private: Ed25519PrivateKey) -> Callable[[RoundOffer | Release | Receipt], Signed]:
    """The aggregator's signature, for `Coordinator.sign`."""
    return lambda record: signing.sign(record, Role.AGGREGATOR, private)
