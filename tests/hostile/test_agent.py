"""What a running agent must not believe: releases, offers and receipts from a broker and an aggregator gone bad."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import structs

from aggregator.broker import Broker
from shared import sealing, signing, wire
from shared.messages import PARTICIPATION_ALL, OfferState, Release, ReleaseMessage, Role, RoundOffer, Signed
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.bad_releases import BAD, HELD, NOT_FOR_AGENTS, tampered
from tests.hostile.field import AGENT, Field
from tests.hostile.records import CLIP, JUNK, PLAN, edited, flip

RELEASES, ROUNDS, RECEIPTS = "models/main/release", "models/main/round", f"fl/dev/{AGENT}/cmd/receipt"


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker) -> Iterator[Field]:
    """An agent without data, so it never trains; it holds version 5 of `main`, release 3 and the offer of round 2."""
    made = Field(fleet)
    with made.daemon:
        made.start()
        made.task("main", HELD)
        for _ in range(3):
            made.next_release("main")
        global OFFER
        OFFER = made.offer("main", 2, sequence=1, participation=PARTICIPATION_ALL // 2)
        made.fence()
        assert made.asked()["tasks"]["main"]["round"] == 2
        yield made
        assert made.daemon.pid
        assert [line["event"] for line in made.daemon.read()].count("daemon.started") == 1
        assert made.daemon.stop() == 0
        made.daemon.read()


OFFER: RoundOffer
"""What the agent holds."""


def refuses(field: Field, topic: str, payload: bytes, reason: str) -> None:
    """Publish something bad, look at everything, and see the agent take the next good release."""
    before, (refused, counts) = field.snapshot(), field.counters()
    shown = field.asked()["tasks"]["main"]
    lines = field.provoke(lambda: field.publish(topic, payload))
    assert [(line["event"], line["topic"], line["reason"]) for line in lines] == [("message.refused", topic, reason)]
    after = field.counters()
    assert (after[0] - refused, after[1]) == ({reason: 1}, counts)
    assert field.snapshot() == before
    assert field.asked()["tasks"]["main"] == shown
    field.next_release("main")


# -- releases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(BAD.keys() - NOT_FOR_AGENTS))
def test_bad_release(field: Field, case: str) -> None:
    """What the aggregator would refuse the agent refuses by itself: it need not trust the aggregator in this."""
    make, reason = BAD[case]
    made = make(field.keys)
    refuses(field, RELEASES, made if isinstance(made, bytes) else wire.pack(made), reason)


def again(field: Field, number: int, **changes: Any) -> ReleaseMessage:
    """A later release of the held manifest, signed by the aggregator."""
    message = field.messages["main"]
    keys = field.keys
    record = records.signed_release(message.manifest, "main", number, keys.aggregator, Role.AGGREGATOR, **changes)
    return structs.replace(message, release=record)


def held(field: Field) -> int:
    """The number of the release that the agent holds."""
    return wire.unpack(field.messages["main"].release.payload, Release).number


LATER: dict[str, tuple[Callable[[Field], ReleaseMessage], str]] = {
    "lower_number": (lambda f: again(f, held(f) - 1), "rollback"),
    "same_number_other_release": (lambda f: again(f, held(f), metrics={"loss": 0.0}), "equivocation"),
    "by_a_key_for_receipts": (
        lambda f: structs.replace(
            f.messages["main"],
            release=records.signed_release(f.messages["main"].manifest, "main", 99, f.keys.clerk, Role.AGGREGATOR),
        ),
        "unknown_key",
    ),
    "by_a_stranger": (
        lambda f: structs.replace(
            f.messages["main"],
            release=records.signed_release(f.messages["main"].manifest, "main", 99, f.keys.stranger, Role.AGGREGATOR),
        ),
        "unknown_key",
    ),
    "other_weights": (
        lambda f: structs.replace(again(f, 99), weights=records.weights(1.0)),
        "wrong_digest",
    ),
    "other_graph": (
        lambda f: structs.replace(
            again(f, 99),
            graphs=structs.replace(f.messages["main"].graphs, train=records.MODEL.eval),  # type: ignore[type-var]
        ),
        "wrong_digest",
    ),
    "no_parts": (lambda f: structs.replace(again(f, 99), graphs=None, weights=None), "missing_part"),
    "of_another_task": (lambda f: records.release(f.keys, records.manifest(f.keys, "other", 9)), "wrong_task"),
}


@pytest.mark.parametrize("case", LATER)
def test_bad_later_release(field: Field, case: str) -> None:
    """An aggregator can only continue what a publisher began, and only forwards."""
    make, reason = LATER[case]
    refuses(field, RELEASES, wire.pack(make(field)), reason)


@pytest.mark.parametrize("part", ["train", "eval", "weights", "release"])
def test_the_held_release_tampered(field: Field, part: str) -> None:
    """A changed copy of what the agent has is told from a mere repetition, and what it has stays."""
    reason = "bad_signature" if part == "release" else "wrong_digest"
    refuses(field, RELEASES, wire.pack(tampered(field.messages["main"], part)), reason)


def test_the_held_release_again(field: Field) -> None:
    """What a broker sends again after every reconnect is worth no line and changes nothing."""
    before = field.snapshot()
    payload = wire.pack(field.messages["main"])
    assert field.provoke(lambda: field.publish(RELEASES, payload), silent=True) == []
    assert field.snapshot() == before


# -- offers ------------------------------------------------------------------------------------------------------


def re_issue(field: Field, **changes: object) -> Signed:
    """The held offer once more, with something changed."""
    changed = structs.replace(OFFER, **{"sequence": OFFER.sequence + 1, **changes})
    return signing.sign(changed, Role.AGGREGATOR, field.keys.aggregator)


def by(key: str, role: Role) -> Callable[[Field], Signed]:
    """A good re-issue that another key signed."""
    return lambda f: signing.sign(structs.replace(OFFER, sequence=2), role, getattr(f.keys, key))


OFFERS: dict[str, tuple[Callable[[Field], Signed | bytes], str]] = {
    "lower_participation": (lambda f: re_issue(f, participation=OFFER.participation - 1), "offer_bounds"),
    "shorter_deadline": (lambda f: re_issue(f, deadline=OFFER.deadline - 1), "offer_bounds"),
    "another_key": (lambda f: re_issue(f, hpke_key=sealing.generate()[1]), "offer_bounds"),
    "another_clip": (lambda f: re_issue(f, clip=CLIP / 2), "offer_bounds"),
    "more_shards": (lambda f: re_issue(f, shards=2), "offer_bounds"),
    "another_release": (lambda f: re_issue(f, release=bytes(32)), "offer_bounds"),
    "clip_above_the_bound": (lambda f: re_issue(f, round=3, clip=CLIP * 1.001), "offer_bounds"),
    "key_of_another_length": (lambda f: re_issue(f, round=3, hpke_key=bytes(33)), "offer_bounds"),
    "round_beyond_the_plan": (lambda f: re_issue(f, round=PLAN.rounds + 1), "offer_bounds"),
    "older_round": (lambda f: re_issue(f, round=1), "rollback"),
    "older_sequence": (lambda f: re_issue(f, sequence=0), "rollback"),
    "same_position_other_offer": (lambda f: re_issue(f, sequence=1, deadline=OFFER.deadline + 9), "equivocation"),
    "of_another_task": (lambda f: re_issue(f, task="other"), "wrong_task"),
    "participation_above_all": (lambda f: re_issue(f, participation=PARTICIPATION_ALL + 1), "wrong_type"),
    "round_0": (lambda f: re_issue(f, round=0), "wrong_type"),
    "clip_nan": (lambda f: re_issue(f, clip=float("nan")), "wrong_type"),
    "clip_negative": (lambda f: re_issue(f, clip=-1.0), "wrong_type"),
    "unknown_suite": (lambda f: re_issue(f, suite="rot13"), "wrong_type"),
    "unknown_state": (lambda f: re_issue(f, state="ajar"), "wrong_type"),
    "by_the_publisher": (by("publisher", Role.PUBLISHER), "wrong_role"),
    "by_the_publisher_as_aggregator": (by("publisher", Role.AGGREGATOR), "unknown_key"),
    "by_a_key_that_no_manifest_names": (by("stranger", Role.AGGREGATOR), "unknown_key"),
    "by_a_key_for_receipts": (by("clerk", Role.AGGREGATOR), "unknown_key"),
    "flipped_payload": (
        lambda f: structs.replace(made := re_issue(f), payload=flip(made.payload, -3)),
        "bad_signature",
    ),
    "flipped_signature": (lambda f: structs.replace(made := re_issue(f), sig=flip(made.sig, 9)), "bad_signature"),
    "a_receipt_as_offer": (
        lambda f: signing.sign(records.receipt("main", AGENT), Role.AGGREGATOR, f.keys.aggregator),
        "bad_signature",
    ),
    "trailing_byte": (lambda f: wire.pack(re_issue(f)) + b"\0", "not_msgpack"),
    "unknown_field": (lambda f: edited(wire.pack(re_issue(f)), extra=1), "wrong_type"),
}


@pytest.mark.parametrize("case", OFFERS)
def test_bad_offer(field: Field, case: str) -> None:
    """An offer is the manifest's aggregator's, within the manifest's bounds, and only ever continues the one before."""
    make, reason = OFFERS[case]
    made = make(field)
    refuses(field, ROUNDS, made if isinstance(made, bytes) else wire.pack(made), reason)


# -- receipts ----------------------------------------------------------------------------------------------------


def answer(field: Field, role: Role = Role.AGGREGATOR, key: str = "aggregator", **changes: object) -> Signed:
    """A receipt for an update that this agent never sent."""
    made = structs.replace(records.receipt("main", AGENT), **changes)
    return signing.sign(made, role, getattr(field.keys, key))


RECEIPT: dict[str, tuple[Callable[[Field], Signed], str]] = {
    "for_another_device": (lambda f: answer(f, device="live-1"), "wrong_device"),
    "for_another_task": (lambda f: answer(f, task="other"), "wrong_task"),
    "by_a_stranger": (lambda f: answer(f, key="stranger"), "unknown_key"),
    "by_the_publisher": (lambda f: answer(f, Role.PUBLISHER, "publisher"), "wrong_role"),
    "flipped_payload": (lambda f: structs.replace(made := answer(f), payload=flip(made.payload, -3)), "bad_signature"),
    "unknown_outcome": (lambda f: answer(f, outcome="perhaps"), "wrong_type"),
    "an_offer_as_receipt": (lambda f: re_issue(f), "bad_signature"),
}


@pytest.mark.parametrize("case", RECEIPT)
def test_bad_receipt(field: Field, case: str) -> None:
    """A receipt counts only from the aggregator, for this device."""
    make, reason = RECEIPT[case]
    refuses(field, RECEIPTS, wire.pack(make(field)), reason)


def test_a_receipt_for_nothing(field: Field) -> None:
    """A receipt for an update that the agent does not wait for changes nothing; those of a second key are read."""
    before = field.snapshot()
    for key in ("aggregator", "clerk"):
        payload = wire.pack(answer(field, key=key))
        assert field.provoke(lambda payload=payload: field.publish(RECEIPTS, payload), silent=True) == []  # type: ignore[misc]
    assert field.snapshot() == before


# -- junk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", [RELEASES, ROUNDS, RECEIPTS])
@pytest.mark.parametrize("junk", JUNK)
def test_junk(field: Field, topic: str, junk: str) -> None:
    """Bytes that are no message are refused on every topic; what is longer than any record is not decoded."""
    payload, reason = JUNK[junk]
    refuses(field, topic, payload, "too_large" if topic != RELEASES and len(payload) > 65_536 else reason)


@pytest.mark.parametrize(
    "topic", ["models/Digits/release", "models/-x/round", "models/ /release", f"fl/dev/{AGENT}/cmd/reboot"]
)
def test_odd_topic(field: Field, topic: str) -> None:
    """A topic that the protocol does not know is refused, whatever is on it."""
    refuses(field, topic, wire.pack(field.messages["main"]), "topic")


def test_junk_costs_no_memory(field: Field) -> None:
    """Ten of each leave the agent as small as it must be."""
    before = field.daemon.peak()
    for data, _ in JUNK.values():
        for _ in range(10):
            field.publish(RELEASES, data)
    field.fence()
    assert field.daemon.peak() - before < 100 << 20


# -- after a restart ---------------------------------------------------------------------------------------------


def test_a_restart_forgets_nothing(field: Field) -> None:
    """What was refused as older or forked before a restart is refused after it, and a closed round stays closed."""
    global OFFER
    OFFER = field.offer(
        "main",
        2,
        sequence=5,
        participation=OFFER.participation,
        hpke_key=OFFER.hpke_key,
        release=OFFER.release,
        deadline=OFFER.deadline,
        state=OfferState.CLOSED,
    )
    field.fence()
    refuses(field, ROUNDS, wire.pack(re_issue(field, state=OfferState.OPEN)), "offer_bounds")
    assert field.daemon.stop() == 0
    field.daemon.read()
    field.daemon.lines.clear()  # the counters begin again with it
    field.start()
    refuses(field, RELEASES, wire.pack(again(field, held(field) - 1)), "rollback")
    refuses(
        field, RELEASES, wire.pack(records.release(field.keys, records.manifest(field.keys, "main", 4))), "rollback"
    )
    refuses(field, ROUNDS, wire.pack(re_issue(field, sequence=1)), "rollback")
    refuses(field, ROUNDS, wire.pack(re_issue(field, sequence=5, deadline=OFFER.deadline + 5)), "equivocation")


def test_retained_junk(field: Field) -> None:
    """What lies on the broker comes with every connection, is refused each time, and harms nobody."""
    topics = [
        "models/junk/release",
        "models/junk/round",
        RECEIPTS,
        f"fl/dev/{AGENT}/cmd/missing",
        f"fl/dev/{AGENT}/cmd/anything",
        "fl/agg/0/status",
    ]
    for topic in topics:
        assert field.aggregator.publish(topic, b"junk", retain=True) < 128
    field.fence()
    assert field.daemon.stop() == 0
    field.daemon.read()
    field.daemon.lines.clear()
    field.start()
    for topic in topics:
        field.daemon.wait("message.refused", topic=topic)
    for topic in topics:
        assert field.aggregator.publish(topic, b"", retain=True) < 128
    field.fence()
    field.next_release("main")
