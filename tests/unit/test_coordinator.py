"""The aggregator's machine: releases in, rounds opened and closed, heads judged, each device counted once."""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import structs

from aggregator import coordinator as core
from aggregator.coordinator import Coordinator, Effect, HeadReceived
from aggregator.round import DUPLICATE, Verdict
from shared import signing, trust, wire
from shared.chunks import CHUNK_MIN
from shared.errors import Reason, RemoteProtocolError
from shared.machine import Instant, Tick
from shared.messages import (
    BlobRef,
    DeviceStatus,
    FedAvg,
    Gate,
    OfferState,
    Outcome,
    PlainBody,
    Receipt,
    Release,
    ReleaseMessage,
    RoundOffer,
    Signed,
    UpdateContext,
    UpdateHead,
)
from shared.opset import OPSET_VERSION
from tests.records import DIMENSION, NOW, Records, key, later, weights

RECORDS = Records()
UP = (core.LinkReady(), core.RootFound(1, RECORDS.root_message), core.ReadBackDone())
"""A connection to a broker that keeps our root and nothing else of ours."""
BODY = PlainBody(examples=40, steps=10, metrics={}, holdout=0)


def status(**changes: object) -> DeviceStatus:
    """A device that would train now."""
    base = DeviceStatus(1, b"12345678", True, "0.1.0", [OPSET_VERSION], True, [], ["points"], int(NOW.utc))
    return structs.replace(base, **changes)


@dataclass
class Bench:
    """A coordinator under test, and what it has told the shell to do."""

    machine: Coordinator = field(
        default_factory=lambda: Coordinator(
            RECORDS.trust,
            core.signer(RECORDS.aggregator),
            lambda: (b"private" * 4, b"p" * 32),
            signing.public_bytes(RECORDS.aggregator),
        )
    )
    now: Instant = NOW
    effects: list[Effect] = field(default_factory=list)

    def tell(self, *events: core.Event) -> list[Effect]:
        """Handle events; returns what they led to."""
        start = len(self.effects)
        for event in events:
            self.effects += self.machine.handle(event, self.now)
        return self.effects[start:]

    def outcomes(self, event: core.Event) -> list[Outcome]:
        """What devices are told because of an event, whatever manifest they follow."""
        replies = only(self.tell(event), core.Reply)
        return [wire.unpack(each.receipt.payload, Receipt).outcome for each in replies]  # type: ignore[union-attr]

    def after(self, seconds: float) -> list[Effect]:
        """Let time pass and the deadline come."""
        self.now = later(seconds, self.now)
        return self.tell(Tick())

    def begin(self, message: ReleaseMessage | None = None, devices: str = "abc") -> list[Effect]:
        """Link, release and live devices: a round is open."""
        self.tell(*UP, core.ReleaseReceived(message or RECORDS.message()))
        return self.tell(*(core.StatusReceived(device, status()) for device in devices))

    @property
    def offer(self) -> RoundOffer:
        """The newest offer."""
        offer = self.machine.tasks["points"].offer
        assert offer is not None
        return offer

    def head(self, device: str, salt: bytes = b"1", parts: int = 0, **changes: Any) -> HeadReceived:
        """A device's head for the newest offer; with `parts` its body comes in so many chunks."""
        offer = self.offer
        context = UpdateContext(
            v=1,
            task="points",
            manifest=offer.manifest,
            release=offer.release,
            round=offer.round,
            device=device,
            report=sha256(salt).digest()[:16],
            mode="plain",
            k_min=0,
            codec="fp32",
            dimension=DIMENSION,
        )
        context = structs.replace(context, **changes)
        size = parts * CHUNK_MIN if parts else 100
        head = UpdateHead(
            2 if parts else 1,
            wire.pack(context),
            bytes(80),
            size,
            bytes(32),
            CHUNK_MIN if parts else 0,
            b"certificate",
            [],
        )
        signed = wire.pack(head)
        return HeadReceived(sha256(signed).digest(), head, context, signed, b"signature", None if parts else b"body")

    def chunks(self, received: HeadReceived, *numbers: int) -> list[Effect]:
        """A device sends chunks; each is filled with its number."""
        device = received.context.device
        return self.tell(
            *(core.ChunkReceived(device, received.name, each, bytes([each]) * CHUNK_MIN) for each in numbers)
        )

    def update(self, device: str, salt: bytes = b"1", **changes: Any) -> list[Effect]:
        """A device's whole update, if its body is asked for."""
        received = self.head(device, salt, **changes)
        effects = self.tell(received)
        if only(effects, core.Open):
            effects += self.tell(core.UpdateOpened(received, BODY))
        return effects

    def reduce(self) -> list[Effect]:
        """The shell has made the new weights."""
        closing = self.machine.tasks["points"].closing
        assert closing is not None
        blob = weights(float(closing.number))
        ref = BlobRef(sha256(blob).digest(), len(blob))
        return self.tell(core.RoundReduced("points", closing.manifest_version, closing.number, ref, {"loss": 1.0}))


def only(effects: list[Effect], kind: type[Effect]) -> list[Effect]:
    """The effects of one kind."""
    return [each for each in effects if isinstance(each, kind)]


def receipts(effects: list[Effect]) -> list[Receipt]:
    """What devices were told, verified as a device does."""
    manifest = RECORDS.manifest()
    return [trust.receipt(each.receipt, manifest) for each in effects if isinstance(each, core.Reply)]


def refused(bench: Bench, message: ReleaseMessage) -> Reason:
    """Why a release does not enter; the machine is as before."""
    before = dict(bench.machine.tasks)
    with pytest.raises(RemoteProtocolError) as caught:
        bench.tell(core.ReleaseReceived(message))
    assert bench.machine.tasks == before
    return caught.value.reason


# -- releases ----------------------------------------------------------------------------------------------------


def test_a_release_enters() -> None:
    """It is stored before it is published."""
    bench = Bench()
    effects = bench.tell(*UP, core.ReleaseReceived(RECORDS.message()))
    assert [type(each) for each in effects] == [core.AdoptRelease, core.PublishRelease]


def test_the_same_release_again_changes_nothing() -> None:
    """It is retained, so it comes on every connect; so do our own announcements."""
    bench = Bench()
    bench.begin()
    assert bench.tell(core.ReleaseReceived(RECORDS.message())) == []
    bare = structs.replace(RECORDS.message(number=1), graphs=None, weights=None)
    assert bench.tell(core.ReleaseReceived(bare)) == []


def test_releases_that_do_not_enter() -> None:
    """Older, forked, in parts, expired, of another aggregator, of a wrong layout, or not a first release."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(version=2)))
    assert refused(bench, RECORDS.message(RECORDS.manifest(version=1))) is Reason.ROLLBACK
    assert refused(bench, RECORDS.message(RECORDS.manifest(version=2, goal=4))) is Reason.EQUIVOCATION
    newer = RECORDS.message(RECORDS.manifest(version=3))
    assert refused(bench, structs.replace(newer, v=2, weights=None)) is Reason.MISSING_PART
    assert refused(bench, RECORDS.message(RECORDS.manifest(version=3, expires=int(NOW.utc)))) is Reason.EXPIRED
    assert refused(bench, RECORDS.message(RECORDS.manifest(version=3), number=1)) is Reason.ROLLBACK
    other = Records(aggregator=key(8))
    assert refused(bench, other.message(other.manifest(version=3))) is Reason.UNKNOWN_KEY
    blob = b"not safetensors"
    signed = RECORDS.release(newer.manifest, 0, blob)
    assert refused(bench, structs.replace(newer, release=signed, weights=blob)) is Reason.WEIGHTS_INVALID


def test_a_newer_manifest_supersedes_the_open_round() -> None:
    """The old offer is closed and its key given up, before the new release goes out."""
    bench = Bench()
    bench.begin()
    effects = bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    kinds = [type(each) for each in effects]
    assert kinds == [core.ReviseRound, core.AbandonRound, core.AdoptRelease, core.PublishRelease, core.OpenRound]
    assert effects[0].offer.state is OfferState.CLOSED  # type: ignore[union-attr]
    assert (bench.offer.round, bench.offer.sequence) == (1, 0)


# -- rounds ------------------------------------------------------------------------------------------------------


def test_a_round_opens_when_enough_are_there() -> None:
    """With min_updates eligible devices, on a link that is up, and not before."""
    bench = Bench()
    bench.tell(core.ReleaseReceived(RECORDS.message()))
    assert bench.tell(*(core.StatusReceived(device, status()) for device in "ab")) == []
    opened = bench.tell(*UP)
    assert len(only(opened, core.OpenRound)) == 1
    offer = trust.offer(opened[-1].signed, RECORDS.message().manifest, RECORDS.manifest())  # type: ignore[union-attr]
    assert (offer.state, offer.round, offer.clip) == (OfferState.OPEN, 1, 10.0)


def test_no_round_opens_after_the_manifest_expired() -> None:
    """Its term ends training; what is open still closes, and nothing opens on the new release."""
    bench = Bench()
    bench.begin()
    bench.now = later(RECORDS.manifest().expires - NOW.utc)
    bench.tell(*(core.StatusReceived(device, status(sent=int(bench.now.utc))) for device in "abc"))
    for device in "abc":
        bench.update(device)
    assert only(bench.reduce(), core.OpenRound) == []
    assert bench.machine.tasks["points"].phase == "finished"
    # The wall clock was wrong: once it is right again, so is the task.
    bench.now = Instant(bench.now.mono, NOW.utc)
    assert only(bench.tell(core.StatusReceived("a", status())), core.OpenRound)


@pytest.mark.parametrize(
    "change",
    [
        {"online": False},
        {"eligible": False},
        {"datasets": ["other"]},
        {"opsets": [99]},
        {"sent": int(NOW.utc) - 13 * 3600},
    ],
)
def test_who_is_not_eligible(change: dict[str, object]) -> None:
    """Offline, blocked, without the data, with other operators, or unheard of for 13 hours."""
    bench = Bench()
    assert bench.begin(devices="a") == []
    assert only(bench.tell(core.StatusReceived("b", status(**change), retained=True)), core.OpenRound) == []
    assert len(only(bench.tell(core.StatusReceived("b", status(session=b"another1"))), core.OpenRound)) == 1


def test_a_late_will_does_not_erase_a_newer_birth() -> None:
    """The will of an earlier session says nothing about this one."""
    bench = Bench()
    bench.begin(devices="ab")
    bench.tell(core.StatusReceived("a", status(online=False, session=b"earlier1")))
    assert bench.machine.devices["a"].status.online
    bench.tell(core.StatusReceived("a", status(online=False)))
    assert not bench.machine.devices["a"].status.online


def test_the_goal_closes_the_round() -> None:
    """Closed is published when closing starts, then the new release, then the next round on it."""
    bench = Bench()
    bench.begin()
    for device in "ab":
        assert only(bench.update(device), core.Reduce) == []
    last = bench.update("c")
    assert [type(each) for each in last] == [
        core.Open,
        core.Contribute,
        core.Reply,
        core.ReviseRound,
        core.Reduce,
    ]
    assert bench.offer.state is OfferState.CLOSED
    kinds = [type(each) for each in bench.reduce()]
    assert kinds == [core.StoreRelease, core.PublishRelease, core.OpenRound, core.EraseRound]
    task = bench.machine.tasks["points"]
    release = RECORDS.trust.release(task.release_signed, task.manifest_signed, task.manifest)
    assert (release.number, release.metrics) == (1, {"loss": 1.0})
    assert release.parent == signing.digest(RECORDS.message().release)
    assert (bench.offer.round, bench.offer.release) == (2, signing.digest(task.release_signed))


def test_the_deadline_closes_with_the_minimum() -> None:
    """Two of a goal of three are enough when the time is up."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    bench.update("b")
    assert only(bench.after(59), core.Reduce) == []
    assert len(only(bench.after(1), core.Reduce)) == 1


def test_too_few_extend() -> None:
    """One of two is not enough: the deadline moves, what came is kept, and the late one closes it at once."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    first = bench.offer
    assert [type(each) for each in bench.after(60)] == [core.ReviseRound]
    trust.continues(bench.offer, first)
    assert bench.offer.deadline > first.deadline
    assert bench.machine.tasks["points"].phase == "starved"
    assert only(bench.update("b"), core.Reduce)


def test_the_last_round_finishes_the_task() -> None:
    """After the plan's rounds the offer says finished, and nothing opens any more."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(rounds=2)))
    for _ in range(2):
        for device in "abc":
            bench.update(device)
        last = bench.reduce()
    assert [type(each) for each in last[-2:]] == [core.FinishTask, core.EraseRound]
    assert bench.offer.state is OfferState.FINISHED
    assert bench.machine.tasks["points"].phase == "finished"
    assert bench.tell(core.StatusReceived("d", status())) == []


def test_participation_rises_when_the_selected_go_away() -> None:
    """Those who are there now are selected instead, at once, in a re-issue that devices accept."""
    bench = Bench()
    devices = [f"dev-{number}" for number in range(20)]
    bench.tell(*UP, *(core.StatusReceived(device, status()) for device in devices))
    bench.tell(core.ReleaseReceived(RECORDS.message()))
    current = bench.machine.tasks["points"].round
    assert current is not None
    chosen = [device for device in devices if current.selected(device)]
    assert len(chosen) == 3
    before = bench.offer
    revised = bench.tell(core.StatusReceived(chosen[0], status(online=False)))
    assert [type(each) for each in revised] == [core.ReviseRound]
    trust.continues(bench.offer, before)
    assert sum(current.selected(device) for device in devices) == 4
    assert bench.tell(core.StatusReceived(devices[0], status())) == []


def test_a_selected_device_that_never_delivers_does_not_stop_the_round() -> None:
    """It is there and says that it would train: each extension asks more of the others."""
    bench = Bench()
    devices = [f"dev-{number}" for number in range(20)]
    bench.tell(*UP, *(core.StatusReceived(device, status()) for device in devices))
    bench.tell(core.ReleaseReceived(RECORDS.message()))
    current = bench.machine.tasks["points"].round
    assert current is not None
    asked = []
    for wait in (60, 60, 120, 240):
        before = bench.offer
        asked.append(sum(current.selected(device) for device in devices))
        bench.after(wait)
        trust.continues(bench.offer, before)
        assert bench.offer.participation == current.participation
    assert asked == [3, 6, 12, 20]


# -- updates -----------------------------------------------------------------------------------------------------


def test_weights_by_examples_or_uniform() -> None:
    """The claimed examples count up to the cap; uniform weights ignore them."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(algorithm=FedAvg("examples", cap=25))))
    assert [each.weight for each in only(bench.update("a"), core.Contribute)] == [25.0]  # type: ignore[union-attr]
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(algorithm=FedAvg("uniform"))))
    assert [each.weight for each in only(bench.update("a"), core.Contribute)] == [1.0]  # type: ignore[union-attr]


def test_the_same_head_again_gets_the_same_answer_and_counts_once() -> None:
    """A device that lost its receipt sends the identical head."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    again = bench.update("a")
    assert [each.outcome for each in receipts(again)] == [Outcome.ACCEPTED]
    assert only(again, core.Contribute) == []
    another = bench.update("a", salt=b"2")
    assert [(each.outcome, each.reason) for each in receipts(another)] == [(Outcome.DUPLICATE, "duplicate")]
    assert len(only(bench.effects, core.Contribute)) == 1


def test_two_heads_of_one_device_in_one_batch() -> None:
    """Both are opened, the first counts."""
    bench = Bench()
    bench.begin()
    one, two = bench.head("a", b"1"), bench.head("a", b"2")
    bench.tell(one, two)
    effects = bench.tell(core.UpdateOpened(one, BODY), core.UpdateOpened(two, BODY))
    assert [each.outcome for each in receipts(effects)] == [Outcome.ACCEPTED, Outcome.DUPLICATE]
    assert len(only(effects, core.Contribute)) == 1


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        ({"task": "other"}, Outcome.UNKNOWN, "wrong_task"),
        ({"release": bytes(32)}, Outcome.REJECTED, "wrong_digest"),
        ({"round": 2}, Outcome.UNKNOWN, "no_such_round"),
    ],
)
def test_heads_that_do_not_fit(change: dict[str, Any], outcome: Outcome, reason: str) -> None:
    """Of no task, another release or a future round: answered at once, not even verified."""
    bench = Bench()
    bench.begin()
    effects = bench.update("a", **change)
    assert [type(each) for each in effects] == [core.Refuse, core.Reply]
    (reply,) = [each for each in effects if isinstance(each, core.Reply)]
    found = wire.unpack(reply.receipt.payload, Receipt)
    assert (found.outcome, found.reason) == (outcome, reason)


def test_who_was_not_selected_is_not_opened() -> None:
    """The aggregator computes the selection itself, so a hostile device cannot volunteer."""
    bench = Bench()
    devices = [f"dev-{number}" for number in range(20)]
    bench.tell(*UP, *(core.StatusReceived(device, status()) for device in devices))
    bench.tell(core.ReleaseReceived(RECORDS.message()))
    current = bench.machine.tasks["points"].round
    assert current is not None
    stranger = next(device for device in devices if not current.selected(device))
    effects = bench.update(stranger)
    assert [type(each) for each in effects] == [core.Refuse, core.Reply]
    assert [each.outcome for each in receipts(effects)] == [Outcome.NOT_SELECTED]


def test_a_head_that_does_not_hold_is_forgotten() -> None:
    """Whoever sent it may be somebody else: the reason is told, and a good one of the device counts after all."""
    bench = Bench()
    bench.begin()
    received = bench.head("a")
    bench.tell(received)
    effects = bench.tell(core.HeadSpoilt(received, RemoteProtocolError(Reason.BAD_SIGNATURE)))
    assert [type(each) for each in effects] == [core.Refuse, core.Reply]
    assert [(each.outcome, each.reason) for each in receipts(effects)] == [(Outcome.REJECTED, "bad_signature")]
    assert only(bench.update("a", salt=b"2"), core.Contribute)


def test_an_update_that_does_not_hold_is_its_devices_word() -> None:
    """It is recorded; the identical head gets its first answer and reason again, another one is a duplicate."""
    bench = Bench()
    bench.begin()
    received = bench.head("a")
    bench.tell(received)
    effects = bench.tell(core.UpdateSpoilt(received, RemoteProtocolError(Reason.NORM, "too long")))
    assert [type(each) for each in effects] == [core.Reject, core.Reply]
    assert [(each.outcome, each.reason) for each in receipts(effects)] == [(Outcome.REJECTED, "norm")]
    again = bench.update("a")
    assert [type(each) for each in again] == [core.Reply]
    assert receipts(again) == receipts(effects)
    other = bench.update("a", salt=b"2")
    assert [each.outcome for each in receipts(other)] == [Outcome.DUPLICATE]
    assert bench.machine.tasks["points"].round.accepted == {}  # type: ignore[union-attr]


def test_one_spoilt_update_twice_in_a_batch() -> None:
    """Both copies are opened before either is recorded: one record, the same receipt twice."""
    bench = Bench()
    bench.begin()
    spoilt = core.UpdateSpoilt(bench.head("a"), RemoteProtocolError(Reason.NORM))
    effects = bench.tell(spoilt, spoilt)
    assert [type(each) for each in effects] == [core.Reject, core.Reply, core.Reply]
    assert {(each.outcome, each.reason) for each in receipts(effects)} == {(Outcome.REJECTED, "norm")}


def test_an_earlier_round_is_looked_up() -> None:
    """An identical head gets its original outcome, another one is late."""
    bench = Bench()
    bench.begin()
    first = bench.head("a")
    for device in "abc":
        bench.update(device)
    bench.reduce()
    (recall,) = bench.tell(first)
    assert isinstance(recall, core.Recall)
    known = bench.tell(core.HeadRecalled(first, Verdict(Outcome.ACCEPTED)))
    assert [each.outcome for each in receipts(known)] == [Outcome.ACCEPTED]
    unknown = bench.tell(core.HeadRecalled(first, None))
    assert [each.outcome for each in receipts(unknown)] == [Outcome.LATE]
    spoilt = bench.tell(core.HeadRecalled(first, Verdict(Outcome.REJECTED, "norm")))
    assert [(each.outcome, each.reason) for each in receipts(spoilt)] == [(Outcome.REJECTED, "norm")]
    assert only(spoilt, core.Refuse) == []
    other = bench.tell(core.HeadRecalled(first, DUPLICATE))
    assert [each.outcome for each in receipts(other)] == [Outcome.DUPLICATE]


def test_a_head_of_another_manifest_is_looked_up() -> None:
    """An identical head gets its original outcome, whatever was published meanwhile; any other is superseded."""
    bench = Bench()
    bench.begin()
    head = bench.head("a")
    bench.update("a")
    bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    assert bench.tell(head) == [core.Recall(head, None)]
    assert bench.outcomes(core.HeadRecalled(head, Verdict(Outcome.ACCEPTED))) == [Outcome.ACCEPTED]
    assert bench.outcomes(core.HeadRecalled(head, None)) == [Outcome.SUPERSEDED]


def test_an_update_that_opens_after_the_closing_is_late() -> None:
    """What the goal did not need is not counted in a later round."""
    bench = Bench()
    bench.begin()
    late = bench.head("d")
    bench.tell(core.StatusReceived("d", status()), late)
    for device in "abc":
        bench.update(device)
    (recall,) = bench.tell(core.UpdateOpened(late, BODY))
    assert isinstance(recall, core.Recall)
    effects = bench.tell(core.HeadRecalled(late, None))
    assert [each.outcome for each in receipts(effects)] == [Outcome.LATE]
    bench.reduce()
    assert bench.offer.round == 2
    (recall,) = bench.tell(core.UpdateOpened(late, BODY))
    assert isinstance(recall, core.Recall)


def test_a_head_that_comes_twice_in_the_batch_that_closes_is_not_late() -> None:
    """The link was cut and the broker sent it again: what it is told is what the store says, not that it is late."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    bench.update("b")
    last, again = bench.head("c"), bench.head("c")
    bench.tell(last, again)
    effects = bench.tell(core.UpdateOpened(last, BODY), core.UpdateOpened(again, BODY))
    assert [each.outcome for each in receipts(effects)] == [Outcome.ACCEPTED]
    assert isinstance(effects[-1], core.Recall)


# -- updates in chunks -------------------------------------------------------------------------------------------


def asked(effects: list[Effect]) -> list[list[int]]:
    """The chunks that devices were asked for."""
    return [each.missing.chunks for each in effects if isinstance(each, core.Ask)]


def test_chunks_are_asked_for_and_the_whole_is_opened() -> None:
    """Nothing is asked before the head is admitted; 64 at once, more at half of them; then the body is there."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", parts=100)
    assert [type(each) for each in bench.tell(head)] == [core.Admit]
    effects = bench.tell(core.HeadAdmitted(head))
    assert asked(effects) == [list(range(64))]
    assert [(each.device, each.missing.head) for each in effects if isinstance(each, core.Ask)] == [("a", head.digest)]
    assert bench.chunks(head, *range(31)) == []
    assert asked(bench.chunks(head, 31)) == [list(range(64, 96))]
    assert asked(bench.chunks(head, *range(32, 99))) == [list(range(96, 100))]
    (opened,) = bench.chunks(head, 99)
    assert isinstance(opened, core.Open)
    body = opened.received.body
    assert body is not None and bytes(body) == b"".join(bytes([each]) * CHUNK_MIN for each in range(100))
    effects = bench.tell(core.UpdateOpened(opened.received, BODY))
    assert [each.outcome for each in receipts(effects)] == [Outcome.ACCEPTED]


def test_a_head_that_comes_again_is_answered_with_what_is_missing() -> None:
    """Its device came back after a cut: it is verified once, and keeps what has arrived."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    bench.chunks(head, 1)
    again = bench.tell(head)
    assert [type(each) for each in again] == [core.Ask]
    assert asked(again) == [[0, 2]]
    # Two copies in one batch are both verified.
    assert asked(bench.tell(core.HeadAdmitted(head))) == [[0, 2]]


@pytest.mark.parametrize(
    ("device", "index", "size", "reason"),
    [
        ("a", 1, CHUNK_MIN, Reason.UNASKED),
        ("a", 0, CHUNK_MIN - 1, Reason.BAD_CHUNK),
        ("a", 0, CHUNK_MIN + 1, Reason.BAD_CHUNK),
        ("a", 0, 0, Reason.BAD_CHUNK),
        ("a", 3, CHUNK_MIN, Reason.BAD_CHUNK),
        ("a", 2**32, CHUNK_MIN, Reason.BAD_CHUNK),
        ("b", 0, CHUNK_MIN, Reason.UNASKED),
    ],
)
def test_chunks_that_are_not_taken(device: str, index: int, size: int, reason: Reason) -> None:
    """Repeated, of another length, behind the end, or of somebody else: refused, and nothing has changed."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    bench.chunks(head, 1)
    with pytest.raises(RemoteProtocolError) as caught:
        bench.tell(core.ChunkReceived(device, head.name, index, bytes(size)))
    assert caught.value.reason is reason
    assert asked(bench.tell(head)) == [[0, 2]]


def test_a_body_that_can_never_be_collected() -> None:
    """Larger than the room, or in chunks that are too small: rejected with the reason, and no memory is spent."""
    bench = Bench()
    bench.begin()
    for changed, reason in (({"size": 2**40}, "too_large"), ({"chunk_size": 1}, "bad_chunk")):
        head = bench.head("a", parts=3)
        head = replace(head, head=structs.replace(head.head, **changed))
        effects = bench.tell(head, core.HeadAdmitted(head))
        assert [(each.outcome, each.reason) for each in receipts(effects)] == [(Outcome.REJECTED, reason)]
        assert bench.machine.reassembler.size == 0


def test_the_end_of_a_round_ends_its_updates_in_chunks() -> None:
    """Whoever is in the midst of one is told at once, its memory is free, and its chunks are not asked for."""
    bench = Bench()
    bench.begin()
    head = bench.head("d", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    for device in "abc":
        effects = bench.update(device)
    assert isinstance(effects[-1], core.Recall) and effects[-1].received == head
    assert bench.machine.reassembler.size == 0
    assert [each.outcome for each in receipts(bench.tell(core.HeadRecalled(head, None)))] == [Outcome.LATE]
    with pytest.raises(RemoteProtocolError):
        bench.chunks(head, 0)


def test_a_newer_manifest_ends_updates_in_chunks() -> None:
    """They are superseded, and told so; those of other tasks go on."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    effects = bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    assert effects[-1] == core.Recall(head, None)
    assert bench.outcomes(core.HeadRecalled(head, None)) == [Outcome.SUPERSEDED]
    assert bench.machine.reassembler.size == 0


def test_a_device_that_had_its_say_is_asked_no_more() -> None:
    """It trained twice, and sends both: as soon as one is in, the other is a duplicate."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", b"1", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    effects = bench.update("a", b"2")
    assert [(each.head, each.outcome) for each in receipts(effects)][1:] == [(head.digest, Outcome.DUPLICATE)]
    assert bench.machine.reassembler.size == 0


def test_a_silent_device_is_asked_again_and_then_given_up() -> None:
    """After a minute it is asked again, after ten it is evicted; it may begin anew."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(deadline=10_000)))
    head = bench.head("a", parts=3)
    bench.tell(head, core.HeadAdmitted(head))
    bench.chunks(head, 1)
    assert bench.machine.deadline == bench.now.mono + 60
    assert asked(bench.after(60)) == [[0, 2]]
    effects: list[Effect] = []
    while not only(effects, core.Evict):
        due = bench.machine.deadline
        assert due is not None and due > bench.now.mono
        effects = bench.after(due - bench.now.mono)
    assert bench.now.mono == NOW.mono + 600
    assert bench.machine.reassembler.size == 0
    assert asked(bench.tell(head, core.HeadAdmitted(head))) == [[0, 1, 2]]


# -- restarts ----------------------------------------------------------------------------------------------------


def test_a_restart_finishes_what_was_closing_and_says_everything_again() -> None:
    """The reduction is done over, newest release and offer are published once the link is there."""
    bench = Bench()
    bench.begin()
    for device in "abc":
        bench.update(device)
    again = Bench()
    again.machine.tasks = bench.machine.tasks
    effects = again.tell(*UP)
    assert [type(each) for each in effects] == [core.PublishRelease, core.PublishOffer, core.Reduce]


def test_a_round_whose_key_is_gone_is_given_up() -> None:
    """After a restore nothing sealed to it can be opened: it ends, and the next one opens."""
    bench = Bench()
    bench.begin()
    again = Bench()
    again.machine.tasks = bench.machine.tasks
    again.machine.devices = bench.machine.devices
    again.machine.tasks["points"].keyless = True
    effects = again.tell(*UP)
    kinds = [type(each) for each in effects]
    assert kinds == [core.PublishRelease, core.ReviseRound, core.AbandonRound, core.OpenRound]
    assert again.offer.round == 2


def test_a_mean_that_makes_no_weights_ends_its_round() -> None:
    """The release stays, the next round opens on it; the last one finishes the task."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(rounds=2)))
    for number in (1, 2):
        for device in "abc":
            bench.update(device)
        effects = bench.tell(core.RoundSpoilt("points", 1, number))
        assert [each.how for each in effects if isinstance(each, core.AbandonRound)] == ["rejected_by_gate"]
    assert isinstance(effects[-1], core.FinishTask)
    assert bench.offer.state is OfferState.FINISHED
    assert bench.machine.tasks["points"].release.number == 0


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_manifest_that_comes_while_a_round_is_reduced(spoilt: bool) -> None:
    """After a restart both may be in one batch: what was reduced belongs to nothing any more, and nothing breaks."""
    bench = Bench()
    bench.begin()
    for device in "abc":
        bench.update(device)
    bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    before = bench.offer
    reduced = core.RoundReduced("points", 1, 1, BlobRef(bytes(32), 1), {})
    found = core.RoundSpoilt("points", 1, 1) if spoilt else reduced
    assert bench.tell(found) == []
    assert (bench.offer, bench.machine.tasks["points"].release.number) == (before, 0)


@pytest.mark.parametrize("verb", ["stop", "rollback"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_an_operator_who_ends_a_round_while_it_is_reduced(verb: core.Verb, spoilt: bool) -> None:
    """Both may be in one batch: no release is made of a round that has ended, and nothing breaks."""
    bench = Bench()
    bench.begin()
    old = bench.machine.tasks["points"].release_signed
    run_round(bench, {})
    number = bench.offer.round
    for device in "abc":
        bench.update(device)
    assert only(bench.effects, core.Reduce)
    command(bench, verb, old)
    before = len(bench.effects), bench.machine.tasks["points"].release.number
    reduced = core.RoundReduced("points", 1, number, BlobRef(bytes(32), 1), {})
    assert bench.tell(core.RoundSpoilt("points", 1, number) if spoilt else reduced) == []
    assert (len(bench.effects), bench.machine.tasks["points"].release.number) == before


# -- how rounds end ----------------------------------------------------------------------------------------------


def ends(effects: list[Effect]) -> list[tuple[int, str]]:
    """The rounds that ended, and how."""
    found = []
    for each in effects:
        if isinstance(each, core.StoreRelease):
            found.append((each.round_number, "released"))
        if isinstance(each, core.AbandonRound):
            found.append((each.number, each.how))
    return found


def judged(**changes: object) -> ReleaseMessage:
    """A task with a gate for accuracy, of two reporters."""
    gate = Gate(drop=0.2, reporters=2)
    return RECORDS.message(RECORDS.manifest(**{"metric": "accuracy", "gate": gate, **changes}))


def v2(**changes: object) -> DeviceStatus:
    """A device that has met protocol 2."""
    return status(v=2, **changes)


def run_round(bench: Bench, metrics: dict[str, float], reports: int = 3) -> list[Effect]:
    """Everybody contributes, and the new weights are made; returns what followed."""
    for device in "abc":
        bench.update(device)
    task = bench.machine.tasks["points"]
    assert task.closing is not None
    blob = weights(float(task.closing.number))
    ref = BlobRef(sha256(blob).digest(), len(blob))
    return bench.tell(core.RoundReduced("points", task.manifest.version, task.closing.number, ref, metrics, reports))


def judged_bench(**changes: object) -> Bench:
    """A judged task with an open round."""
    bench = Bench()
    bench.tell(*UP, core.ReleaseReceived(judged(**changes)))
    bench.tell(*(core.StatusReceived(device, v2()) for device in "abc"))
    return bench


def test_a_release_that_is_clearly_worse_is_taken_back() -> None:
    """Its round is spent, its parent's weights come back under the next number, and the next round opens on them."""
    bench = judged_bench()
    first = bench.machine.tasks["points"].release
    run_round(bench, {"accuracy": 0.9})
    effects = run_round(bench, {"accuracy": 0.5})
    assert ends(effects) == [(2, "rejected_by_gate")]
    (restored,) = only(effects, core.RestoreRelease)
    assert isinstance(restored, core.RestoreRelease)
    task = bench.machine.tasks["points"]
    release = RECORDS.trust.release(task.release_signed, task.manifest_signed, task.manifest)
    assert (release.number, release.weights, release.metrics) == (2, first.weights, {})
    assert (restored.restores, release.restores) == (0, signing.digest(judged().release))
    assert (bench.offer.round, bench.offer.release) == (3, signing.digest(task.release_signed))
    # What was restored has no record to be judged by, and the one after it has again.
    assert ends(run_round(bench, {"accuracy": 0.1})) == [(3, "released")]
    assert ends(run_round(bench, {"accuracy": 0.05})) == [(4, "released")]


@pytest.mark.parametrize(("metrics", "reports"), [({"accuracy": 0.71}, 3), ({"accuracy": 0.1}, 1), ({}, 3)])
def test_the_gate_lets_pass(metrics: dict[str, float], reports: int) -> None:
    """What is not clearly worse, what too few told of, and what nobody told of."""
    bench = judged_bench()
    run_round(bench, {"accuracy": 0.9})
    assert ends(run_round(bench, metrics, reports)) == [(2, "released")]


def test_a_task_without_a_gate_is_not_judged() -> None:
    """The publisher may turn it off."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(metric="accuracy")))
    run_round(bench, {"accuracy": 0.9})
    assert ends(run_round(bench, {"accuracy": 0.0})) == [(2, "released")]


def test_until_ends_the_task_with_a_release() -> None:
    """The release is good enough: what was made of its updates goes out, and nothing opens any more."""
    bench = judged_bench(until=0.9)
    assert ends(run_round(bench, {"accuracy": 0.89})) == [(1, "released")]
    effects = run_round(bench, {"accuracy": 0.9})
    assert ends(effects) == [(2, "released")]
    assert [each.why for each in effects if isinstance(each, core.FinishTask)] == ["goal"]
    assert (bench.offer.state, bench.machine.tasks["points"].phase) == (OfferState.FINISHED, "finished")
    assert bench.tell(core.StatusReceived("d", v2())) == []


def test_an_older_device_is_not_waited_for_in_a_newer_task() -> None:
    """Who does not understand protocol 2 could only starve its rounds."""
    bench = Bench()
    bench.tell(*UP, core.ReleaseReceived(judged()))
    assert bench.tell(*(core.StatusReceived(device, status()) for device in "abc")) == []
    opened = bench.tell(*(core.StatusReceived(device, v2()) for device in "ab"))
    assert [each.eligible for each in opened if isinstance(each, core.OpenRound)] == [2]


def test_a_release_in_chunks_asks_more_of_devices() -> None:
    """From the first release on that needs protocol 2, those who have met it are counted, and only those."""
    bench = Bench()
    bench.begin()
    for device in "abc":
        bench.update(device)
    ref = BlobRef(bytes(32), 2000, 1024, [bytes(32), bytes(32)])
    effects = bench.tell(core.RoundReduced("points", 1, 1, ref, {}))
    assert only(effects, core.OpenRound) == []
    assert bench.machine.tasks["points"].release.v == 2
    assert only(bench.tell(*(core.StatusReceived(device, v2()) for device in "ab")), core.OpenRound)


def test_a_starved_round_ends_with_its_manifest() -> None:
    """Extensions end with the manifest's term, and so does the task: it is never open for ever."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(expires=int(NOW.utc) + 100)))
    assert bench.offer.deadline == int(NOW.utc) + 60
    bench.after(60)
    assert bench.offer.deadline == int(NOW.utc) + 100
    bench.after(40)
    assert bench.machine.tasks["points"].phase == "starved"
    effects = bench.after(core.EXPIRED_KEPT)
    assert ends(effects) == [(1, "finished")]
    assert [each.why for each in effects if isinstance(each, core.FinishTask)] == ["expired"]
    assert bench.offer.state is OfferState.FINISHED
    assert bench.machine.deadline is None


def test_a_clock_that_is_ahead_spends_no_contribution() -> None:
    """What is in counts once the clock is right; only a day of it ends the round, and none opens meanwhile."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    right, ahead = bench.now.utc, RECORDS.manifest().expires + 40 * 365 * 86_400
    bench.now = Instant(bench.now.mono, ahead)
    before = bench.offer
    for _ in range(20):
        bench.now = Instant(bench.now.mono + 3600, ahead)
        assert ends(bench.tell(Tick())) == []
    trust.continues(bench.offer, before)
    assert bench.offer.deadline == before.deadline, "no deadline of a clock that may be wrong is promised"
    assert bench.machine.deadline is not None and bench.machine.deadline > bench.now.mono
    bench.now = Instant(bench.now.mono + 3600, right + 21 * 3600)
    bench.tell(Tick())
    # Ahead once more: the day begins anew.
    bench.now = Instant(bench.now.mono + 3600, ahead)
    bench.tell(Tick())
    bench.now = Instant(bench.now.mono + 20 * 3600, ahead)
    assert ends(bench.tell(Tick())) == []
    assert only(bench.update("b"), core.Reduce)
    assert bench.reduce() and bench.machine.tasks["points"].phase == "finished"


def test_a_certificate_of_another_time_gets_no_last_word() -> None:
    """The device would delete its update for a clock of ours that is wrong; it is counted all the same."""
    bench = Bench()
    bench.begin()
    received = bench.head("a")
    error = RemoteProtocolError(Reason.BAD_CERTIFICATE)
    assert [type(each) for each in bench.tell(core.HeadSpoilt(received, error, passing=True))] == [core.Refuse]
    assert bench.outcomes(core.HeadSpoilt(received, error)) == [Outcome.REJECTED]


def test_a_round_never_outlives_its_manifest() -> None:
    """What opens shortly before the end closes with it, with what is in."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(expires=int(NOW.utc) + 10)))
    assert bench.offer.deadline == int(NOW.utc) + 10
    bench.update("a")
    bench.update("b")
    assert only(bench.after(10), core.Reduce)
    bench.reduce()
    assert bench.machine.tasks["points"].phase == "finished"


def test_the_wall_clock_moves_no_deadline() -> None:
    """Set back or forward, a round's time runs on; what devices were promised never gets shorter."""
    for jump in (-(10**7), 10**4):
        bench = Bench()
        bench.begin()
        due, before = bench.machine.deadline, bench.offer
        bench.now = Instant(bench.now.mono, bench.now.utc + jump)
        bench.tell(core.StatusReceived("d", status(sent=0)))
        assert bench.machine.deadline == due
        bench.after(60)
        trust.continues(bench.offer, before)
        assert ends(bench.effects) == []


def test_who_speaks_is_there_whatever_the_clocks_say() -> None:
    """A device whose clock is years off counts for 13 hours from its word; a retained word counts by its date."""
    bench = Bench()
    bench.tell(*UP, core.ReleaseReceived(RECORDS.message()))
    wrong = status(sent=1000)
    bench.tell(core.StatusReceived("a", wrong))
    # A retained word that comes again on a new connection makes it no older.
    bench.tell(core.StatusReceived("a", wrong, retained=True))
    task = bench.machine.tasks["points"]
    assert bench.machine.live(task, bench.now) == {"a"}
    assert bench.machine.live(task, later(13 * 3600 - 1)) == {"a"}
    assert bench.machine.live(task, later(13 * 3600)) == set()
    assert bench.machine.live(task, Instant(NOW.mono, NOW.utc + 10**9)) == {"a"}
    bench.tell(core.StatusReceived("b", status(sent=int(NOW.utc) - 40_000), retained=True))
    assert bench.machine.live(task, bench.now) == {"a", "b"}
    assert bench.machine.live(task, later(13 * 3600 - 40_000)) == {"a"}


def test_any_number_of_tasks() -> None:
    """Fifty at once, each with its own round, and each ends alone."""
    bench = Bench()
    names = [f"task-{number}" for number in range(50)]
    bench.tell(*UP, *(core.StatusReceived(device, status()) for device in "abc"))
    for name in names:
        manifest = RECORDS.sign_manifest(RECORDS.manifest(task=name))
        message = structs.replace(RECORDS.message(), manifest=manifest, release=RECORDS.release(manifest, task=name))
        assert only(bench.tell(core.ReleaseReceived(message)), core.OpenRound)
    assert sum(task.round is not None for task in bench.machine.tasks.values()) == 50
    effects = bench.tell(core.TaskCommand("task-7", "stop", None, None))
    assert ends(effects) == [(1, "stopped")]
    assert sum(task.round is not None for task in bench.machine.tasks.values()) == 49


# -- the operator ------------------------------------------------------------------------------------------------


def command(bench: Bench, verb: core.Verb, target: Signed | None = None) -> tuple[list[Effect], dict[str, object]]:
    """What a command leads to, and what the operator is told."""
    effects = bench.tell(core.TaskCommand("points", verb, target, "reply"))
    answer = effects[-1]
    assert isinstance(answer, core.Answer) and answer.reply == "reply"
    return effects[:-1], answer.facts


def test_a_paused_task_finishes_its_round_and_opens_no_other() -> None:
    """Nothing is lost by a pause, and `resume` goes on with the next number."""
    bench = Bench()
    bench.begin()
    effects, facts = command(bench, "pause")
    assert effects == [core.SetTaskState("points", "paused")]
    assert facts == {"task": "points", "state": "paused", "phase": "collecting", "release": 0, "round": 1}
    assert ends(run_round(bench, {})) == [(1, "released")]
    task = bench.machine.tasks["points"]
    assert (task.phase, task.round) == ("paused", None)
    effects, facts = command(bench, "resume")
    assert [type(each) for each in effects] == [core.SetTaskState, core.OpenRound]
    assert (facts["state"], bench.offer.round) == ("active", 2)


def test_a_stopped_task_ends_its_round() -> None:
    """Devices are told that it is over; `resume` opens a new one."""
    bench = Bench()
    bench.begin()
    bench.update("a")
    effects, facts = command(bench, "stop")
    assert ends(effects) == [(1, "stopped")]
    assert (bench.offer.state, facts["phase"]) == (OfferState.FINISHED, "stopped")
    assert "is stopped" in str(command(bench, "pause")[1]["error"])
    assert bench.tell(core.StatusReceived("d", status())) == []
    effects, _ = command(bench, "resume")
    assert [type(each) for each in effects] == [core.SetTaskState, core.OpenRound]
    assert (bench.offer.round, bench.offer.state) == (2, OfferState.OPEN)


def test_a_last_round_that_is_stopped_leaves_nothing_to_do() -> None:
    """There is no round to go on with, and that is nobody's loss: it needs no new version to be whole."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(rounds=1)))
    assert command(bench, "stop")[1]["phase"] == "finished"
    assert "no round left" in str(command(bench, "resume")[1]["error"])


def test_a_rollback_is_a_new_release() -> None:
    """The open round ends, the old weights come back under the next number, and training goes on from them."""
    bench = Bench()
    bench.begin()
    first = bench.machine.tasks["points"].release_signed
    run_round(bench, {})
    effects, facts = command(bench, "rollback", first)
    kinds = [type(each) for each in effects]
    assert kinds == [core.ReviseRound, core.AbandonRound, core.RestoreRelease, core.PublishRelease, core.OpenRound]
    assert ends(effects) == [(2, "superseded")]
    task = bench.machine.tasks["points"]
    release = RECORDS.trust.release(task.release_signed, task.manifest_signed, task.manifest)
    assert (release.number, facts["release"], release.restores) == (2, 2, signing.digest(first))
    assert release.weights == wire.unpack(first.payload, Release).weights
    assert (bench.offer.round, bench.offer.release) == (3, signing.digest(task.release_signed))
    assert "is at release 2 already" in str(command(bench, "rollback", task.release_signed)[1]["error"])
    assert "no such release" in str(command(bench, "rollback", None)[1]["error"])


def test_a_paused_task_can_be_rolled_back() -> None:
    """Its release is restored and no round opens."""
    bench = Bench()
    bench.begin()
    first = bench.machine.tasks["points"].release_signed
    run_round(bench, {})
    command(bench, "stop")
    effects, facts = command(bench, "rollback", first)
    assert [type(each) for each in effects] == [core.RestoreRelease, core.PublishRelease]
    assert facts["phase"] == "stopped"


def test_a_new_version_starts_a_stopped_task() -> None:
    """Who publishes wants it trained; a pause stays until it is ended."""
    for verb, state in (("stop", "active"), ("pause", "paused")):
        bench = Bench()
        bench.begin()
        command(bench, verb)  # type: ignore[arg-type]
        bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
        assert bench.machine.tasks["points"].state == state


def test_commands_for_what_is_not_there() -> None:
    """Unknown tasks, a plan without rounds left and a broker that was not read back yet are told apart."""
    bench = Bench()
    (answer,) = bench.tell(core.TaskCommand("other", "pause", None, None))
    assert isinstance(answer, core.Answer) and "no task other here" in str(answer.facts["error"])
    bench.begin(RECORDS.message(RECORDS.manifest(rounds=1)))
    run_round(bench, {})
    assert "no round left" in str(command(bench, "resume")[1]["error"])
    assert "is finished" in str(command(bench, "pause")[1]["error"])
    bench.machine.ready = False
    assert "connected" in str(command(bench, "stop")[1]["error"])


class Rounds(RuleBasedStateMachine):
    """Whatever devices do in whatever order: one device counts at most once a round, and numbers only rise."""

    DEVICES = "abcdef"

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.bench.tell(*UP, core.ReleaseReceived(RECORDS.message(RECORDS.manifest(rounds=1000))))
        self.counted: dict[int, list[str]] = {}

    @rule(device=st.sampled_from(DEVICES), online=st.booleans(), eligible=st.booleans())
    def presence(self, device: str, online: bool, eligible: bool) -> None:
        """A device comes or goes."""
        self.bench.tell(core.StatusReceived(device, status(online=online, eligible=eligible)))

    @precondition(lambda self: self.bench.machine.tasks["points"].offer is not None)
    @rule(device=st.sampled_from(DEVICES), salt=st.sampled_from([b"1", b"2"]), back=st.integers(0, 2))
    def update(self, device: str, salt: bytes, back: int) -> None:
        """A device sends for this round or an earlier one, perhaps again, perhaps something else."""
        number = max(1, self.bench.offer.round - back)
        for effect in self.bench.update(device, salt, round=number):
            if isinstance(effect, core.Contribute):
                self.counted.setdefault(effect.received.context.round, []).append(device)

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0, 500.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.after(seconds)

    @precondition(lambda self: self.bench.machine.tasks["points"].closing is not None)
    @rule()
    def reduce(self) -> None:
        """The shell is done."""
        self.bench.reduce()

    @invariant()
    def once(self) -> None:
        """No device twice, never more than the goal."""
        for devices in self.counted.values():
            assert len(devices) == len(set(devices)) <= 3

    @invariant()
    def offers_continue(self) -> None:
        """Rounds and sequences rise, releases follow each other."""
        offers = [each.offer for each in self.bench.effects if isinstance(each, core.OpenRound | core.ReviseRound)]
        assert [(each.round, each.sequence) for each in offers] == sorted(
            {(each.round, each.sequence) for each in offers}
        )
        for before, after in pairwise(offers):
            if before.round == after.round:
                trust.continues(after, before)
        releases = [each.release.number for each in self.bench.effects if isinstance(each, core.StoreRelease)]
        assert releases == list(range(1, len(releases) + 1))

    @invariant()
    def a_release_has_enough_behind_it(self) -> None:
        """No release of fewer than min_updates."""
        for effect in self.bench.effects:
            if isinstance(effect, core.StoreRelease):
                assert effect.updates == len(self.counted[effect.round_number]) >= 2


Rounds.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRounds = Rounds.TestCase


class Contract(RuleBasedStateMachine):
    """Whatever happens in whatever order: a round that opened ends once, in one of five ways, or has a deadline."""

    DEVICES = "abcd"

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.version = 1
        first = RECORDS.message().weights
        assert first is not None
        self.weights = {sha256(first).digest(): first}
        self.bench.tell(*UP)
        self.publish()
        self.bench.tell(*(core.StatusReceived(device, v2()) for device in "abc"))

    @property
    def task(self) -> core.Task:
        """The only one."""
        return self.bench.machine.tasks["points"]

    def publish(self) -> None:
        """The next version, judged, with a goal and a term."""
        gate = Gate(drop=0.2, reporters=2)
        expires = int(self.bench.now.utc) + 2000
        manifest = RECORDS.manifest(
            version=self.version, metric="accuracy", gate=gate, until=0.95, rounds=4, max_extension=100, expires=expires
        )
        self.bench.tell(core.ReleaseReceived(RECORDS.message(manifest)))

    @rule(device=st.sampled_from(DEVICES), online=st.booleans())
    def presence(self, device: str, online: bool) -> None:
        """A device comes or goes."""
        self.bench.tell(core.StatusReceived(device, v2(online=online)))

    @precondition(lambda self: self.task.offer is not None)
    @rule(device=st.sampled_from(DEVICES))
    def update(self, device: str) -> None:
        """A device sends for the newest round."""
        self.bench.update(device)

    @rule(seconds=st.sampled_from([1.0, 61.0, 500.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.after(seconds)

    @rule(jump=st.sampled_from([-(10**6), -100, 100, 10**4]))
    def set_clock(self, jump: int) -> None:
        """The wall clock is set; deadlines run on."""
        self.bench.now = Instant(self.bench.now.mono, self.bench.now.utc + jump)

    @precondition(lambda self: self.task.closing is not None)
    @rule(accuracy=st.sampled_from([0.1, 0.5, 0.9, 0.96]), spoilt=st.booleans())
    def reduce(self, accuracy: float, spoilt: bool) -> None:
        """The shell is done."""
        closing = self.task.closing
        assert closing is not None
        name, version, number = "points", closing.manifest_version, closing.number
        weights = b"%d %d" % (version, number)
        blob = BlobRef(sha256(weights).digest(), len(weights))
        self.weights[blob.sha256] = weights
        done = core.RoundReduced(name, version, number, blob, {"accuracy": accuracy}, 3)
        self.bench.tell(core.RoundSpoilt(name, version, number) if spoilt else done)

    @rule(verb=st.sampled_from(["pause", "resume", "stop", "rollback"]))
    def operate(self, verb: core.Verb) -> None:
        """The operator speaks."""
        target = self.task.parent[1] if self.task.parent is not None else None
        self.bench.tell(core.TaskCommand("points", verb, target, None))

    @rule()
    def supersede(self) -> None:
        """A publisher's next version comes."""
        if self.bench.now.utc < RECORDS.root.publishers[0].expires:
            self.version += 1
            self.publish()

    @rule(kept=st.booleans())
    def reconnect(self, kept: bool) -> None:
        """The link was cut; the broker kept everything or nothing."""
        weights = self.weights[self.task.release.weights.sha256]
        message = structs.replace(
            RECORDS.message(), manifest=self.task.manifest_signed, release=self.task.release_signed, weights=weights
        )
        there: list[core.Event] = [core.ReleaseFound("points", message)] if kept else []
        if kept and self.task.offer_signed is not None:
            there.append(core.OfferFound("points", self.task.offer_signed))
        self.bench.tell(UP[0], *there, *UP[1:])

    @invariant()
    def one_ending(self) -> None:
        """Each round that opened has one ending, but the newest of a version, which may be open or closing."""
        versions = [each.manifest_version for each in self.bench.effects if isinstance(each, core.OpenRound)]
        rounds = [each.offer.round for each in self.bench.effects if isinstance(each, core.OpenRound)]
        opened = list(zip(versions, rounds, strict=True))
        ended: list[tuple[int, int, str]] = []
        for each in self.bench.effects:
            if isinstance(each, core.StoreRelease):
                ended.append((each.manifest_version, each.round_number, "released"))
            if isinstance(each, core.AbandonRound):
                ended.append((each.manifest_version, each.number, each.how))
        assert {how for *_, how in ended} <= {"released", "rejected_by_gate", "superseded", "stopped", "finished"}
        assert len({each[:2] for each in ended}) == len(ended)
        task = self.task
        going = task.round or task.closing
        expected = sorted(opened)
        if going is not None:
            expected.remove((going.manifest_version, going.number))
        assert sorted(each[:2] for each in ended) == expected

    @invariant()
    def nothing_hangs(self) -> None:
        """An open round has a deadline that comes; a task without one says why."""
        task = self.task
        if task.round is not None:
            assert self.bench.machine.deadline is not None
            assert self.bench.machine.deadline <= self.bench.now.mono + 2000
        elif task.closing is None:
            assert task.phase in ("waiting", "paused", "stopped", "finished")

    @invariant()
    def offers_continue(self) -> None:
        """What devices see of a version never goes back, and a release never takes another's number."""
        offers = [
            (each.manifest_version, each.offer)
            for each in self.bench.effects
            if isinstance(each, core.OpenRound | core.ReviseRound)
        ]
        for (earlier, before), (version, after) in pairwise(offers):
            assert (earlier, before.round, before.sequence) < (version, after.round, after.sequence)
            if (earlier, before.round) == (version, after.round):
                trust.continues(after, before)
        numbers = [
            (each.manifest_version, each.release.number)
            for each in self.bench.effects
            if isinstance(each, core.StoreRelease | core.RestoreRelease)
        ]
        assert numbers == sorted(set(numbers))


Contract.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestContract = Contract.TestCase


def test_release_payload_is_a_release() -> None:
    """What is stored is what was signed."""
    bench = Bench()
    bench.begin()
    for device in "abc":
        bench.update(device)
    (stored,) = only(bench.reduce(), core.StoreRelease)
    assert isinstance(stored, core.StoreRelease)
    assert wire.unpack(stored.signed.payload, Release) == stored.release
