"""Who may sign what, and in which order it may come."""

from collections.abc import Callable
from functools import partial
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shared import signing, trust, wire
from shared.errors import LocalProtocolError, Reason, RemoteProtocolError
from shared.messages import (
    Graphs,
    OfferState,
    Outcome,
    PublisherKey,
    Receipt,
    Release,
    Role,
    RoundOffer,
    Use,
    VerificationKey,
)
from shared.trust import Position, Trust, advance
from tests.records import NOW, Records, key, linear, weights

RECORDS = Records()
MESSAGE = RECORDS.message()
MANIFEST = RECORDS.manifest()


def refused(call: Callable[[], object]) -> Reason:
    """Why a rule says no."""
    with pytest.raises(RemoteProtocolError) as caught:
        call()
    return caught.value.reason


def test_what_was_signed_verifies() -> None:
    """A manifest, its first release and an offer go through, as what was signed."""
    manifest = RECORDS.trust.manifest(MESSAGE.manifest, NOW.utc)
    assert manifest == MANIFEST
    assert RECORDS.trust.release(MESSAGE.release, MESSAGE.manifest, manifest).number == 0
    offer = RECORDS.offer(MESSAGE)
    assert trust.offer(RECORDS.sign_offer(offer), MESSAGE.manifest, manifest) == offer


def test_a_flipped_bit_breaks_the_signature() -> None:
    """Payload and signature are verified as they came, before anything is parsed."""
    for field in ("payload", "sig"):
        spoilt = bytearray(getattr(MESSAGE.manifest, field))
        spoilt[len(spoilt) // 2] ^= 1
        signed = structs.replace(MESSAGE.manifest, **{field: bytes(spoilt)})
        assert refused(partial(RECORDS.trust.manifest, signed, NOW.utc)) is Reason.BAD_SIGNATURE


def test_unsigned_bytes_are_never_parsed() -> None:
    """A payload that would not even decode is refused for its signature."""
    signed = structs.replace(MESSAGE.manifest, payload=b"\xc1")
    assert refused(lambda: RECORDS.trust.manifest(signed, NOW.utc)) is Reason.BAD_SIGNATURE


def test_a_signature_is_for_one_kind_of_record() -> None:
    """Domain separation: the aggregator's signature on an offer is none on a release, whatever the bytes."""
    signed = RECORDS.sign_offer(RECORDS.offer(MESSAGE))
    keys = [signing.public_bytes(RECORDS.aggregator)]
    assert refused(lambda: signing.verify(signed, Release, Role.AGGREGATOR, keys)) is Reason.BAD_SIGNATURE
    assert signing.verify(signed, RoundOffer, Role.AGGREGATOR, keys).round == 1


def test_a_frozen_signature() -> None:
    """Protocol version 1 signs exactly these bytes, domain included: Ed25519 has one signature for each message."""
    receipt = Receipt(1, bytes(32), "points", 1, "a", Outcome.ACCEPTED, "")
    assert signing.sign(receipt, Role.AGGREGATOR, key(3)).sig.hex() == (
        "344cddccee006d099cadf8b74c858823cb5c014632d6fae8375d0c5c21662ec4"
        "bebbd8e0b047f74ca0cdcb78a4151100b4fa0156368b8395accd819a7626d609"
    )


def test_roles_are_kept_apart() -> None:
    """The aggregator signs no manifest and no release 0, the publisher no later release."""
    by_aggregator = signing.sign(MANIFEST, Role.AGGREGATOR, RECORDS.aggregator)
    assert refused(lambda: RECORDS.trust.manifest(by_aggregator, NOW.utc)) is Reason.WRONG_ROLE
    posing = signing.sign(MANIFEST, Role.PUBLISHER, RECORDS.aggregator)
    assert refused(lambda: RECORDS.trust.manifest(posing, NOW.utc)) is Reason.UNKNOWN_KEY
    release = wire.unpack(MESSAGE.release.payload, Release)
    first = signing.sign(release, Role.AGGREGATOR, RECORDS.aggregator)
    assert refused(lambda: RECORDS.trust.release(first, MESSAGE.manifest, MANIFEST)) is Reason.WRONG_ROLE
    later = signing.sign(structs.replace(release, number=1), Role.PUBLISHER, RECORDS.publisher)
    assert refused(lambda: RECORDS.trust.release(later, MESSAGE.manifest, MANIFEST)) is Reason.WRONG_ROLE


def test_the_root_key_signs_no_manifest() -> None:
    """The root names publishers; it is none itself, whatever role it claims."""
    root = Records(root_key=key(3))
    by_root = signing.sign(MANIFEST, Role.PUBLISHER, key(3))
    assert refused(lambda: root.trust.manifest(by_root, NOW.utc)) is Reason.UNKNOWN_KEY


def test_a_key_signs_only_what_its_uses_say() -> None:
    """A key for receipts opens no round and makes no release."""
    uses = [VerificationKey(signing.public_bytes(RECORDS.aggregator), [Use.RECEIPT])]
    message = RECORDS.message(RECORDS.manifest(aggregator_keys=uses))
    manifest = RECORDS.manifest(aggregator_keys=uses)
    offer = RECORDS.sign_offer(RECORDS.offer(message))
    assert refused(lambda: trust.offer(offer, message.manifest, manifest)) is Reason.UNKNOWN_KEY
    release = RECORDS.release(message.manifest, number=1)
    assert refused(lambda: RECORDS.trust.release(release, message.manifest, manifest)) is Reason.UNKNOWN_KEY
    receipt = signing.sign(
        Receipt(1, bytes(32), "points", 1, "a", Outcome.ACCEPTED, ""), Role.AGGREGATOR, RECORDS.aggregator
    )
    assert trust.receipt(receipt, manifest).outcome is Outcome.ACCEPTED


def test_expiry() -> None:
    """An expired manifest starts nothing, nor does a manifest under an expired publisher's key."""
    end = float(MANIFEST.expires)
    assert RECORDS.trust.manifest(MESSAGE.manifest, end - 1) == MANIFEST
    assert refused(lambda: RECORDS.trust.manifest(MESSAGE.manifest, end)) is Reason.EXPIRED
    root = structs.replace(
        RECORDS.root, publishers=[PublisherKey(signing.public_bytes(RECORDS.publisher), int(NOW.utc) - 1)]
    )
    assert refused(lambda: Trust(root).manifest(MESSAGE.manifest, NOW.utc)) is Reason.EXPIRED


def test_records_belong_to_their_manifest() -> None:
    """A release or offer of another manifest, or of another task, is refused."""
    other = RECORDS.message(RECORDS.manifest(version=2))
    assert refused(lambda: RECORDS.trust.release(MESSAGE.release, other.manifest, MANIFEST)) is Reason.WRONG_MANIFEST
    offer = RECORDS.sign_offer(RECORDS.offer(other))
    assert refused(lambda: trust.offer(offer, MESSAGE.manifest, MANIFEST)) is Reason.WRONG_MANIFEST
    stray = RECORDS.sign_offer(RECORDS.offer(MESSAGE, task="other"))
    assert refused(lambda: trust.offer(stray, MESSAGE.manifest, MANIFEST)) is Reason.WRONG_TASK
    receipt = signing.sign(
        Receipt(1, bytes(32), "other", 1, "a", Outcome.ACCEPTED, ""), Role.AGGREGATOR, RECORDS.aggregator
    )
    assert refused(lambda: trust.receipt(receipt, MANIFEST)) is Reason.WRONG_TASK


def test_the_manifest_bounds_its_offers() -> None:
    """An offer's clip and round stay within what the publisher signed."""
    wide = RECORDS.sign_offer(RECORDS.offer(MESSAGE, clip=10.5))
    assert refused(lambda: trust.offer(wide, MESSAGE.manifest, MANIFEST)) is Reason.OFFER_BOUNDS
    late = RECORDS.sign_offer(RECORDS.offer(MESSAGE, number=MANIFEST.plan.rounds + 1))
    assert refused(lambda: trust.offer(late, MESSAGE.manifest, MANIFEST)) is Reason.OFFER_BOUNDS


@pytest.mark.parametrize(
    "change",
    [
        {"participation": 2**32 - 1},
        {"deadline": int(NOW.utc) + 59},
        {"clip": 9.0},
        {"release": bytes(32)},
        {"hpke_key": bytes(32)},
        {"shards": 2},
    ],
)
def test_a_re_issue_may_not(change: dict[str, object]) -> None:
    """Lower participation, shorten the deadline, or change clip, release, key or shards."""
    first = RECORDS.offer(MESSAGE)
    again = structs.replace(first, sequence=1, **change)
    assert refused(lambda: trust.continues(again, first)) is Reason.OFFER_BOUNDS


def test_a_re_issue_may() -> None:
    """Raise participation, extend the deadline, close; and a closed round stays closed."""
    first = RECORDS.offer(MESSAGE, participation=5)
    trust.continues(structs.replace(first, sequence=1, participation=6, deadline=first.deadline + 1), first)
    closed = structs.replace(first, sequence=1, state=OfferState.CLOSED)
    trust.continues(closed, first)
    again = structs.replace(first, sequence=2)
    assert refused(lambda: trust.continues(again, closed)) is Reason.OFFER_BOUNDS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graphs": None}, Reason.MISSING_PART),
        ({"v": 2, "weights": None}, Reason.MISSING_PART),
        ({"weights": weights(1.0)}, Reason.WRONG_DIGEST),
        ({"weights": weights()[:-1]}, Reason.WRONG_DIGEST),
        ({"graphs": Graphs(linear("eval"), linear("eval"))}, Reason.WRONG_DIGEST),
        ({"graphs": Graphs(linear("train"), linear("train"))}, Reason.WRONG_DIGEST),
    ],
)
def test_the_parts_are_those_that_were_signed(change: dict[str, object], reason: Reason) -> None:
    """Graphs and weights are hashed against manifest and release."""
    release = wire.unpack(MESSAGE.release.payload, Release)
    assert trust.model(MESSAGE, MANIFEST, release) == (MESSAGE.graphs, MESSAGE.weights)
    spoilt = structs.replace(MESSAGE, **change)
    assert refused(lambda: trust.model(spoilt, MANIFEST, release)) is reason


def test_a_signed_graph_is_checked_all_the_same() -> None:
    """A publisher's signature does not make an operator allowed, nor an op-set known."""
    bad = linear("train").replace(b"aten.linear.default", b"aten.system.default")
    manifest = RECORDS.manifest(train_graph=sha256(bad).digest())
    message = structs.replace(MESSAGE, graphs=Graphs(bad, linear("eval")))
    release = wire.unpack(MESSAGE.release.payload, Release)
    assert refused(lambda: trust.model(message, manifest, release)) is Reason.GRAPH_OP
    assert refused(lambda: trust.model(message, RECORDS.manifest(opset=2), release)) is Reason.UNSUPPORTED


def test_the_root_record_is_signed_by_its_own_key() -> None:
    """What a bundle pins is whole."""
    signed = signing.sign(RECORDS.root, Role.ROOT, RECORDS.root_key)
    assert trust.open_root(signed) == RECORDS.root
    forged = signing.sign(RECORDS.root, Role.ROOT, key(9))
    assert refused(lambda: trust.open_root(forged)) is Reason.UNKNOWN_KEY


def test_only_records_are_signed() -> None:
    """Signing anything else is our own bug."""
    with pytest.raises(LocalProtocolError):
        signing.sign(MANIFEST.training, Role.PUBLISHER, RECORDS.publisher)  # type: ignore[arg-type]


def test_order() -> None:
    """Positions only rise; the same one with another digest is two stories from one key."""
    known = Position((1, 4), b"a" * 32)
    assert advance(None, known)
    assert advance(known, Position((1, 5), b"b" * 32))
    assert advance(known, Position((2, 0), b"b" * 32))
    assert not advance(known, Position((1, 4), b"a" * 32))
    assert refused(lambda: advance(known, Position((1, 3), b"b" * 32))) is Reason.ROLLBACK
    assert refused(lambda: advance(known, Position((1, 4), b"b" * 32))) is Reason.EQUIVOCATION


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.binary(min_size=1, max_size=1))))
def test_what_is_accepted_rises(found: list[tuple[int, int, bytes]]) -> None:
    """Whatever comes in whatever order, the accepted positions strictly rise."""
    known: Position | None = None
    accepted = []
    for version, number, digest in found:
        position = Position((version, number), digest)
        try:
            if advance(known, position):
                known = position
                accepted.append(position.rank)
        except RemoteProtocolError:
            pass
    assert accepted == sorted(set(accepted))


def test_a_digest_names_the_record_not_its_signature() -> None:
    """Two signatures over one record name one record."""
    by_another = signing.sign(MANIFEST, Role.PUBLISHER, key(7))
    assert signing.digest(by_another) == signing.digest(MESSAGE.manifest)
