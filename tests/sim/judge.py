"""What must never come of any schedule: watched while it happens, and judged when all is quiet.

Device i contributes the unit vector e_i. So in the step from a release to the next one every cell is 0 or exactly the
share of device i: twice that is a double count, 0 for a device that holds an `accepted` receipt is a loss.

Failure conditions, each a bug, whatever the faults were:

- a cell of a step is neither 0 nor its device's share: an update counted twice, in part, or under another's name
- an `accepted` receipt leaves before its contribution is durable, or its device is not in the sum that was released
- one head is answered `accepted` and, at another time, otherwise
- a device counts twice in a round; a round ends twice, or not at all
- a clock that is wrong for less than a day ends a round as `finished`, or has a device told that its certificate is bad
- two different signed records at one position; a record of the aggregator's that does not continue the one before
- a position that a device accepted goes back; a device follows a release that was never made, or trains a round again
  whose update lies in its outbox
- the task does not come to its end within DAYS after the last fault, or devices do not agree with the aggregator then
- a daemon raises anything, turns without rest, or holds more than it needs when all is quiet: updates, chunks, keys,
  bodies, spool files, messages in the broker

Non-failure conditions, which the protocol does not promise:

- an update that was not accepted yet is lost with its device's round: the round closes without it, or is superseded
- a round is collected in vain when a newer manifest, the operator, the gate or a lost key ends it
- a message comes any number of times, late, in any order between topics, or never while its sender is down
- a broker restarted empty or older shows nothing or old state until the aggregator has read it back; what was on its
  way through it comes again when whoever sent it sends it again
- devices train a round once more when they crash before their update lies in the outbox
- a message in hand at two crashes in a row is taken for their cause and put in quarantine
- a wall clock that is wrong costs rounds; back-offs and extensions take as long as they are configured to; one that
  is behind by more than 400 days lets what it dates be forgotten early, so that an old head is answered `late`

Once the aggregator's disk was lost, or went back to a backup, all of that holds but for this:

- what it had counted and not released is lost, and what it said of a head: the same may be answered otherwise now
- a number that it gave, and that no device ever followed, may be given again; so a round may open, count and end anew.
  What devices follow is as strict as ever: no position goes back, and none of them follows another record at a position
  than another device does
- a round that was open ends without a word
- a task whose rounds may all be used up says `needs_manifest`, perhaps with an offer that is behind what devices have,
  and has to come to its end with a newer manifest

If the broker's memory was lost as well in the same schedule, be it at another time, or if it shows what it retains in
another order than it was asked for, nobody but devices may know how far a task had come. Then two devices may follow
two records at one position, and a task that does not come to its end by itself need not say so; with a newer manifest
it has to.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator import coordinator as core
from edge_agent import delivery, participation
from shared import signing, tensors, wire
from shared.errors import Reason
from shared.messages import Receipt, Release, ReleaseMessage, RoundOffer, Signed, TaskManifest
from tests.sim.nodes import Aggregator, Device, Program
from tests.sim.world import World

DAYS = 8
"""Virtual days after the last fault within which everything must have come to its end."""
Place = tuple[str, int, int]
"""(task, manifest version, number of a round)."""


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Step:
    """A round that was released, with the heads that were counted for it."""

    place: Place
    release: Release
    counted: dict[str, bytes]


class Ledger:
    """Watches everything that is decided. `manifests` are all that were ever published, by digest."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.manifests: dict[bytes, TaskManifest] = {}
        self.forgot = False
        """The aggregator's disk was lost or restored from a backup, so it may not know what it did."""
        self.broker_forgot = False
        """So may the broker, at whatever time; or what it shows first says nothing of what comes later."""
        self.releases: dict[bytes, Release] = {}
        self.steps: list[Step] = []
        self.counted: dict[Place, dict[str, bytes]] = {}
        """Heads whose contribution is durable, by device."""
        self.ended: dict[Place, str] = {}
        self.opened: set[Place] = set()
        self._heads: set[bytes] = set()
        self._outcomes: dict[bytes, str] = {}
        self._positions: dict[tuple[str, ...], bytes] = {}
        self._accepted: dict[tuple[str, str, str], tuple[tuple[int, ...], bytes]] = {}
        self._followed: dict[tuple[str, ...], bytes] = {}
        """By position, the record that any device accepted there."""
        self._answerable: set[tuple[str, Place]] = set()
        """(device, place) of all that ever was counted."""
        self._sealed: set[tuple[str, str, int, int]] = set()
        """(device, task, manifest version, round) of every update that was in an outbox."""
        self.receipts: Counter[str] = Counter()
        self.answers: dict[str, set[Place]] = {}
        """Rounds for which a device holds an `accepted` receipt."""

    def forget(self) -> None:
        """The aggregator's disk goes back or is lost."""
        self.forgot = True
        # What it signed and nobody followed it may sign anew; of what was open it knows nothing, or that it has ended.
        self._positions.clear()
        self.opened = set(self.ended)

    # -- what is told --

    def sent(self, program: Program, topic: str, payload: bytes) -> None:
        """A program hands a message to its link."""
        if not isinstance(program, Aggregator) or not payload:
            return
        if topic.endswith("/receipt"):
            self._receipt(wire.unpack(wire.unpack(payload, Signed).payload, Receipt))
        elif topic.endswith("/round"):
            signed = wire.unpack(payload, Signed)
            offer = wire.unpack(signed.payload, RoundOffer)
            version = self.manifests[offer.manifest].version
            self._unique("offer", offer.task, (version, offer.round, offer.sequence), signing.digest(signed))
        elif topic.startswith("models/") and topic.endswith("/release"):
            signed = wire.unpack(payload, ReleaseMessage).release
            release = wire.unpack(signed.payload, Release)
            if signing.digest(signed) not in self.releases:
                raise Broken(f"release {release.number} of {release.task} is published and not stored")

    def stored(self, program: Program, effects: Sequence[Any]) -> None:
        """What these effects ask for is durable now."""
        for effect in effects:
            if isinstance(program, Device):
                self._kept(program, effect)
            else:
                self._committed(effect)

    def answered(self, device: Device, effect: participation.Settled) -> None:
        """A device has taken a receipt."""
        self.receipts[effect.outcome.value] += 1
        if effect.outcome.value == "accepted":
            place = (effect.update.task, *effect.update.position)
            self.answers.setdefault(device.name, set()).add(place)

    # -- what must hold at once --

    def _receipt(self, receipt: Receipt) -> None:
        outcome = receipt.outcome.value
        if receipt.reason == Reason.BAD_CERTIFICATE.value:
            raise Broken(f"{receipt.device} is told that its certificate is bad, which a clock is to blame for")
        if outcome == "accepted" and receipt.head not in self._heads:
            raise Broken(f"{receipt.device} is told `accepted` for round {receipt.round} before that is durable")
        before = self._outcomes.setdefault(receipt.head, outcome)
        if "accepted" in (before, outcome) and before != outcome and not self.forgot:
            raise Broken(f"{receipt.device}, round {receipt.round}: one head is answered {before} and {outcome}")

    def _committed(self, effect: Any) -> None:
        match effect:
            case core.Contribute(received=received):
                context = received.context
                place = (context.task, effect.manifest_version, context.round)
                counted = self.counted.setdefault(place, {})
                if context.device in counted or place in self.ended:
                    raise Broken(f"{context.device} counts twice in {place}, or after its end")
                counted[context.device] = received.digest
                self._answerable.add((context.device, place))
                self._heads.add(received.digest)
            case core.OpenRound(offer=offer):
                place = (offer.task, effect.manifest_version, offer.round)
                if place in self.opened:
                    if not self.forgot:
                        raise Broken(f"{place} opens twice")
                    self.ended.pop(place, None)
                self.opened.add(place)
                self.counted.pop(place, None)
            case core.StoreRelease(release=release):
                place = (release.task, effect.manifest_version, effect.round_number)
                self._end(place, "released")
                self._release(release, effect.signed)
                self.steps.append(Step(place, release, dict(self.counted.get(place, {}))))
            case core.RestoreRelease(release=release):
                self._release(release, effect.signed)
                source = self.releases.get(release.restores or b"")
                if source is None or source.weights != release.weights:
                    raise Broken(f"release {release.number} has not the weights that it restores")
            case core.AdoptRelease(message=message, release=release):
                self.releases[signing.digest(message.release)] = release
            case core.AbandonRound():
                self._end((effect.task, effect.manifest_version, effect.number), effect.how)
            case _:
                pass

    def _end(self, place: Place, how: str) -> None:
        if place in self.ended or place not in self.opened:
            raise Broken(f"{place} ends as {how}, and was {self.ended.get(place, 'never open')}")
        if how == "finished":
            raise Broken(f"{place} ends with its manifest, long before its time")
        self.ended[place] = how

    def _release(self, release: Release, signed: Signed) -> None:
        version = self.manifests[release.manifest].version
        parent = self.releases.get(release.parent or b"")
        if parent is None or parent.number >= release.number or parent.manifest != release.manifest:
            raise Broken(f"release {release.number} of {release.task} continues nothing")
        self._unique("release", release.task, (version, release.number), signing.digest(signed))
        self.releases[signing.digest(signed)] = release

    def _unique(self, kind: str, task: str, rank: tuple[int, ...], digest: bytes) -> None:
        key = (kind, task, *map(str, rank))
        if self._positions.setdefault(key, digest) != digest:
            raise Broken(f"two different records: {kind} {rank} of {task}")

    def _kept(self, device: Device, effect: Any) -> None:
        match effect:
            case participation.KeepRelease(task=task, position=position):
                kind = "release"
                if position.digest not in self.releases and effect.release.number:
                    raise Broken(f"{device.name} follows release {effect.release.number}, which was never made")
            case participation.KeepOffer(task=task, position=position):
                kind = "offer"
            case delivery.KeepUpdate(update=update):
                self._sealed.add((device.name, update.task, *update.position))
                return
            case participation.Train(manifest=manifest, offer=offer):
                if (device.name, manifest.task, manifest.version, offer.round) in self._sealed:
                    raise Broken(f"{device.name} trains round {offer.round} again, though its update is in the outbox")
                return
            case _:
                return
        known, found = self._accepted.get((device.name, kind, task)), (position.rank, position.digest)
        if known is not None and (found[0] < known[0] or (found[0] == known[0] and found != known)):
            raise Broken(f"{device.name}: the {kind} of {task} goes from {known[0]} to {found[0]}")
        self._accepted[device.name, kind, task] = found
        if not (self.forgot and self.broker_forgot):
            first = self._followed.setdefault((kind, task, *map(str, position.rank)), position.digest)
            if first != position.digest:
                raise Broken(f"devices follow two different records: {kind} {position.rank} of {task}")


# -- when all is quiet --------------------------------------------------------------------------------------------


def finished(aggregator: Aggregator, versions: dict[str, int]) -> bool:
    """Whether every task has come to the end of its plan."""
    if aggregator.service is None:
        return False
    tasks = aggregator.service._coordinator.tasks
    return all(
        name in tasks
        and tasks[name].manifest.version == version
        and tasks[name].phase in ("finished", "needs_manifest")
        for name, version in versions.items()
    )


def needs_manifest(aggregator: Aggregator, task: str) -> bool:
    """Whether the aggregator says that only a newer version of a task can go on."""
    if aggregator.service is None:
        return False
    known = aggregator.service._coordinator.tasks.get(task)
    return known is not None and known.phase == "needs_manifest"


def restless(aggregator: Aggregator, devices: Sequence[Device], versions: dict[str, int]) -> str:
    """What has not come to rest yet; empty if nothing is left to wait for."""
    if not finished(aggregator, versions):
        return "the aggregator is not at the end of its tasks"
    coordinator = aggregator.service._coordinator
    if not coordinator.ready:
        return "the aggregator has not read the broker back"
    for device in devices:
        if device.service is None:
            return f"{device.name} is off"
        part = device.service._participation
        if list(part.delivery.waiting):
            return f"{device.name} waits for an answer"
        if device.service._flying:
            return f"{device.name} waits for the broker to confirm a chunk"
        for name in versions:
            ours, theirs = coordinator.tasks[name], part.tasks.get(name)
            if theirs is None or theirs.release_position is None:
                return f"{device.name} knows no release of {name}"
            if theirs.release_position.digest != ours.position.digest:
                return f"{device.name} has release {theirs.release_position.rank} of {name}, not {ours.position.rank}"
            if ours.phase == "needs_manifest":
                continue  # it does not know the last offer itself
            offer = None if ours.offer_signed is None else signing.digest(ours.offer_signed)
            if offer is not None and (theirs.offer_position is None or theirs.offer_position.digest != offer):
                return f"{device.name} has not heard of the last offer of {name}"
    return ""


def judge(ledger: Ledger, aggregator: Aggregator, devices: Sequence[Device]) -> Counter[str]:
    """Broken if anything that came of a schedule is not as promised; else what was seen."""
    by_name = {device.name: device for device in devices}
    for step in ledger.steps:
        _judge_step(ledger, aggregator, step, by_name)
    for place in ledger.opened - ledger.ended.keys():
        raise Broken(f"{place} never ended")
    for name, places in ledger.answers.items():
        for place in places:
            if (name, place) not in ledger._answerable:
                raise Broken(f"{name} holds a receipt for {place}, and is not among those counted")
    _judge_rest(ledger, aggregator, devices)
    return Counter(
        {
            "schedules": 1,
            "accepted": sum(map(len, ledger.counted.values())),
            "released": len(ledger.steps),
            "crashes": aggregator.crashes + sum(device.crashes for device in devices),
            "disk refusals": aggregator.refusals + sum(device.refusals for device in devices),
        }
    ) + Counter(f"ended {how}" for how in ledger.ended.values())


def _judge_step(ledger: Ledger, aggregator: Aggregator, step: Step, devices: dict[str, Device]) -> None:
    release = step.release
    manifest = ledger.manifests[release.manifest]
    parent = ledger.releases[release.parent or b""]
    moved = _flat(ledger, aggregator, manifest, release) - _flat(ledger, aggregator, manifest, parent)
    counted = step.counted
    uniform = manifest.algorithm.weights == "uniform"
    weights = {name: 1.0 if uniform else float(devices[name].examples) for name in counted}
    expected = np.zeros(len(moved), np.float32)
    for name, weight in weights.items():
        expected[devices[name].number] = weight / sum(weights.values())
    if len(counted) < manifest.plan.min_updates or not np.allclose(moved, expected, atol=1e-5):
        raise Broken(f"{step.place} moved {moved[:8]} where {sorted(counted)} make {expected[:8]}")


def _flat(ledger: Ledger, aggregator: Aggregator, manifest: TaskManifest, release: Release) -> NDArray[np.float32]:
    name = release.weights.sha256
    archived = ledger.world.archive.get(name)
    data = bytes(aggregator.service._blobs.get(name)) if archived is None else archived
    return tensors.flatten(manifest.layout, tensors.load(data, manifest.layout))


def _judge_rest(ledger: Ledger, aggregator: Aggregator, devices: Sequence[Device]) -> None:
    """Nothing is held that nobody needs any more."""
    service = aggregator.service
    coordinator, intake = service._coordinator, service._intake
    held = {
        "updates in parts": coordinator.reassembler.collecting + coordinator.reassembler.waiting,
        "bytes in parts": coordinator.reassembler.size,
        "folds": len(intake.folds),
        "opened updates": len(intake.opened),
        "early messages": len(service._early),
        "unsent messages": len(service._distribution._unsent),
        "downloads": len(service._downloads._waiting),
        "keys of rounds": len(list(service._keys.iterdir())),
        "bodies": len(service._blobs._journal.names()),
    }
    for device in devices:
        part, store = device.service._participation, device.service._store
        held |= {
            f"{device.name}: files in the outbox": len(list(store.outbox.iterdir())),
            f"{device.name}: downloads": len(part.downloads.tasks),
            f"{device.name}: chunks in flight": len(device.service._flying),
        }
    left = {what: count for what, count in held.items() if count}
    if left:
        raise Broken(f"held when all is quiet: {left}")
