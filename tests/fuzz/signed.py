"""Signed records through the rules of trust: whoever signs, whatever they sign, whatever happens to it on its way."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any

import msgspec
from msgspec import structs

from shared import signing, trust, wire
from shared.errors import RemoteProtocolError
from shared.messages import (
    BlobRef,
    Gate,
    Graphs,
    OfferState,
    Outcome,
    PublisherKey,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    Root,
    RootMessage,
    RoundOffer,
    Signed,
    TaskManifest,
    Use,
    VerificationKey,
)
from shared.trust import Position, Trust
from tests.fuzz.mutate import Tree, graft, read_msgpack, spoil, write_msgpack
from tests.fuzz.target import Target
from tests.records import NOW, Records, key, linear, weights

_RECORDS = Records()
_KEYS = {
    "root": _RECORDS.root_key,
    "publisher": _RECORDS.publisher,
    "retired": key(5),
    "aggregator": _RECORDS.aggregator,
    "clerk": key(4),
    "stranger": key(6),
}
"""The fleet's keys; the retired publisher's has expired, the clerk's may sign receipts alone."""
_PUBLIC = {name: signing.public_bytes(private) for name, private in _KEYS.items()}
ROOT = structs.replace(
    _RECORDS.root, publishers=[*_RECORDS.root.publishers, PublisherKey(_PUBLIC["retired"], int(NOW.utc) - 1)]
)
TRUST = Trust(ROOT)
MANIFEST = _RECORDS.manifest(
    until=0.9,
    gate=Gate(),
    aggregator_keys=[
        VerificationKey(_PUBLIC["aggregator"], [Use.OFFER, Use.RELEASE, Use.RECEIPT]),
        VerificationKey(_PUBLIC["clerk"], [Use.RECEIPT]),
    ],
)
SIGNED = _RECORDS.sign_manifest(MANIFEST)
_DIGEST = signing.digest(SIGNED)

_DOMAINS: dict[type[Any], bytes] = {
    Root: b"root",
    TaskManifest: b"manifest",
    Release: b"release",
    RoundOffer: b"offer",
    Receipt: b"receipt",
}
_MAY: dict[type[Any], dict[str, Role]] = {
    Root: dict.fromkeys(_KEYS, Role.ROOT),  # signed by the keys inside itself: the pin is what counts
    TaskManifest: {"publisher": Role.PUBLISHER},
    Release: {"publisher": Role.PUBLISHER, "retired": Role.PUBLISHER, "aggregator": Role.AGGREGATOR},
    RoundOffer: {"aggregator": Role.AGGREGATOR},
    Receipt: {"aggregator": Role.AGGREGATOR, "clerk": Role.AGGREGATOR},
}
"""Whose word counts for what, and as what they must sign."""


def _records() -> list[Any]:
    message = _RECORDS.message(MANIFEST, number=3)
    release = structs.replace(wire.unpack(message.release.payload, Release), manifest=_DIGEST)
    chunked = BlobRef(bytes(32), 300_000, 122_880, [b"0" * 32, b"1" * 32, b"2" * 32])
    offer = structs.replace(_RECORDS.offer(message), manifest=_DIGEST)
    return [
        ROOT,
        MANIFEST,
        structs.replace(release, number=0),
        release,
        structs.replace(release, v=2, weights=chunked, number=4, parent=bytes(32), metrics={"loss": 0.5}),
        offer,
        structs.replace(offer, state=OfferState.CLOSED, round=5, sequence=9),
        Receipt(1, bytes(32), "points", 1, "sensor-1", Outcome.REJECTED, "norm"),
    ]


_GOOD: Sequence[Any] = _records()
_TREES: list[Tree] = [read_msgpack(wire.pack(record)) for record in _GOOD]


@dataclass(frozen=True)
class Case:
    """A record where one of `kind` belongs, and who really signed which bytes as what (None: nobody did)."""

    kind: type[Any]
    signed: Signed
    maker: str | None
    domain: type[Any]


def sign(payload: bytes, kind: type[Any], maker: str, role: Role) -> Signed:
    """A signature as its maker really makes it, over any bytes."""
    sig = _KEYS[maker].sign(b"fieldfare/v1/" + _DOMAINS[kind] + b"\0" + payload)
    return Signed(1, role, signing.key_id(_PUBLIC[maker]), sig, payload)


def _maker(record: Any) -> str:
    match record:
        case Root():
            return "root"
        case TaskManifest() | Release(number=0):
            return "publisher"
        case _:
            return "aggregator"


def _make(rng: Random) -> Case:
    at = rng.randrange(len(_GOOD))
    record, payload = _GOOD[at], wire.pack(_GOOD[at])
    kind = domain = type(record)
    maker = _maker(record)
    role = _MAY[kind][maker]
    tampered = False
    if rng.randrange(4):
        payload = write_msgpack(graft(_TREES[at], rng, _TREES), rng if rng.randrange(8) == 0 else None)
    elif rng.randrange(4) == 0:
        payload = spoil(payload, rng)
    if rng.randrange(4) == 0:
        maker = list(_KEYS)[rng.randrange(len(_KEYS))]
        role = _MAY[kind].get(maker, role) if rng.randrange(2) else rng.choice(list(Role))
    if rng.randrange(8) == 0:
        domain = list(_DOMAINS)[rng.randrange(len(_DOMAINS))]
    signed = sign(payload, domain, maker, role)
    if rng.randrange(6) == 0:
        before = signed
        match rng.randrange(4):
            case 0:
                signed = structs.replace(signed, sig=spoil(signed.sig, rng))
            case 1:
                signed = structs.replace(signed, payload=spoil(signed.payload, rng))
            case 2:
                signed = structs.replace(signed, key=signing.key_id(list(_PUBLIC.values())[rng.randrange(len(_KEYS))]))
            case _:
                signed = structs.replace(signed, role=rng.choice(list(Role)))
        tampered = (signed.sig, signed.payload) != (before.sig, before.payload)
    if rng.randrange(8) == 0:
        kind = list(_DOMAINS)[rng.randrange(len(_DOMAINS))]
    return Case(kind, signed, None if tampered else maker, domain)


def _opened(case: Case) -> Any:
    if case.kind is Root:
        return trust.open_root(case.signed)
    if case.kind is TaskManifest:
        return TRUST.manifest(case.signed, NOW.utc)
    if case.kind is Release:
        return TRUST.release(case.signed, SIGNED, MANIFEST)
    return (
        (trust.offer(case.signed, SIGNED, MANIFEST))
        if case.kind is RoundOffer
        else trust.receipt(case.signed, MANIFEST)
    )


def _judge(case: Case) -> bool:
    """A record is taken only if who may sign it signed exactly these bytes as it, and it keeps within its manifest."""
    try:
        found = _opened(case)
    except RemoteProtocolError:
        return False
    assert type(found) is case.kind and wire.pack(found) == case.signed.payload
    assert case.maker is not None, "a record that was tampered with"
    assert case.domain is case.kind, "a signature for another kind of record"
    assert _MAY[case.kind].get(case.maker) is case.signed.role, f"a {case.kind.__name__} by the {case.maker}"
    assert case.signed.key == signing.key_id(_PUBLIC[case.maker])
    match found:
        case Root():
            assert _PUBLIC[case.maker] in found.root_keys
        case TaskManifest():
            assert found.expires > NOW.utc
            assert found.v == (1 if found.plan.until is msgspec.UNSET and found.plan.gate is msgspec.UNSET else 2)
        case Release():
            assert (found.task, found.manifest) == (MANIFEST.task, _DIGEST)
            assert (found.number == 0) == (case.maker in ("publisher", "retired"))
        case RoundOffer():
            assert (found.task, found.manifest, len(found.hpke_key)) == (MANIFEST.task, _DIGEST, 32)
            assert 0 < found.clip <= MANIFEST.privacy.clip_max and 1 <= found.round <= MANIFEST.plan.rounds
            assert 0 <= found.participation <= 2**32
        case Receipt():
            assert found.task == MANIFEST.task
    return True


def _cases() -> list[Case]:
    return [
        Case(type(record), sign(wire.pack(record), type(record), maker, _MAY[type(record)][maker]), maker, type(record))
        for record, maker in ((record, _maker(record)) for record in _GOOD)
    ]


RECORDS = Target("records", _make, _judge, _cases, examples=800)


# -- the walk from one root to the next ----------------------------------------------------------------------------

_NEXT = structs.replace(ROOT, version=ROOT.version + 1, root_keys=[_PUBLIC["stranger"], _PUBLIC["clerk"]])


@dataclass(frozen=True)
class Walk:
    """A message where the next root belongs, and who really signed its halves as a root (None: nobody did)."""

    message: RootMessage
    before: str | None
    own: str | None


def _walk(payload: bytes, before: str, own: str) -> Walk:
    halves = (sign(payload, Root, name, Role.ROOT) for name in (before, own))
    return Walk(RootMessage(2, *halves), before, own)


def _roots_make(rng: Random) -> Walk:
    payload = wire.pack(_NEXT)
    if rng.randrange(2):
        payload = write_msgpack(graft(read_msgpack(payload), rng, _TREES))
    names = list(_KEYS)
    before = names[rng.randrange(len(names))] if rng.randrange(4) == 0 else "root"
    own = names[rng.randrange(len(names))] if rng.randrange(4) == 0 else ("stranger", "clerk")[rng.randrange(2)]
    made = _walk(payload, before, own)
    match rng.randrange(8):
        case 0:
            old = sign(wire.pack(_GOOD[rng.randrange(len(_GOOD))]), Root, own, Role.ROOT)
            return Walk(structs.replace(made.message, own=old), before, own)
        case 1:
            return Walk(structs.replace(made.message, before=made.message.own), own, own)
        case 2:
            half = structs.replace(made.message.before, sig=spoil(made.message.before.sig, rng)[:64].ljust(64, b"x"))
            whole = half.sig == made.message.before.sig
            return Walk(structs.replace(made.message, before=half), before if whole else None, own)
        case 3:
            half = structs.replace(made.message.own, role=Role.PUBLISHER)
            return Walk(structs.replace(made.message, own=half), before, None)
        case _:
            return made


def _roots_judge(walk: Walk) -> bool:
    """A root is followed only to the next version of the same fleet, signed by the root before it and by itself."""
    try:
        found = trust.next_root(ROOT, walk.message)
    except RemoteProtocolError:
        return False
    assert walk.before is not None and _PUBLIC[walk.before] in ROOT.root_keys
    assert walk.own is not None and _PUBLIC[walk.own] in found.root_keys
    assert wire.pack(found) == walk.message.before.payload == walk.message.own.payload
    assert (found.fleet, found.version) == (ROOT.fleet, ROOT.version + 1)
    return True


ROOTS = Target("roots", _roots_make, _roots_judge, lambda: [_walk(wire.pack(_NEXT), "root", "stranger")], examples=300)


# -- a whole release ---------------------------------------------------------------------------------------------

_PARTS = (linear("train"), linear("eval"), weights())
_MESSAGE = ReleaseMessage(
    2,
    SIGNED,
    sign(wire.pack(wire.unpack(_RECORDS.release(SIGNED).payload, Release)), Release, "publisher", Role.PUBLISHER),
    Graphs(_PARTS[0], _PARTS[1]),
)


def _models_make(rng: Random) -> tuple[TaskManifest, Release, ReleaseMessage]:
    """Graphs that the publisher signed, whatever they are; and parts that are not the signed ones."""
    train, evaluate, data = _PARTS
    match rng.randrange(6):
        case 0:
            train = write_msgpack(graft(read_msgpack(train), rng, [read_msgpack(evaluate)]))
        case 1:
            evaluate = write_msgpack(graft(read_msgpack(evaluate), rng, [read_msgpack(train)]))
        case 2:
            train = spoil(train, rng, _PARTS)
        case _:
            pass
    manifest = structs.replace(
        MANIFEST,
        train_graph=sha256(train).digest(),
        eval_graph=sha256(evaluate).digest(),
        opset=rng.choice((1, 1, 1, 2)),
    )
    chunk = rng.choice((0, 0, 7))
    pieces = [sha256(data[at : at + chunk]).digest() for at in range(0, len(data), chunk)] if chunk else []
    release = structs.replace(
        wire.unpack(_MESSAGE.release.payload, Release),
        v=2 if chunk else 1,
        weights=BlobRef(sha256(data).digest(), len(data), chunk, pieces),
    )
    sent: dict[str, bytes] = {"train": train, "eval": evaluate, "weights": data}
    if rng.randrange(3) == 0:
        name = list(sent)[rng.randrange(3)]
        sent[name] = spoil(sent[name], rng, _PARTS)
    graphs = None if rng.randrange(12) == 0 else Graphs(sent["train"], sent["eval"])
    inline = None if rng.randrange(4) == 0 else sent["weights"]
    return (
        manifest,
        release,
        structs.replace(_MESSAGE, v=2 if graphs is not None and inline is None else 1, graphs=graphs, weights=inline),
    )


def _models_judge(case: tuple[TaskManifest, Release, ReleaseMessage]) -> bool:
    """What is taken of a release is, to the byte, what was signed."""
    manifest, release, message = case
    try:
        graphs, data = trust.model(message, manifest, release)
    except RemoteProtocolError:
        return False
    assert (sha256(graphs.train).digest(), sha256(graphs.eval).digest()) == (manifest.train_graph, manifest.eval_graph)
    if data is None:
        assert release.weights.chunks
    else:
        assert (sha256(data).digest(), len(data)) == (release.weights.sha256, release.weights.size)
    return True


def _models_good() -> list[tuple[TaskManifest, Release, ReleaseMessage]]:
    manifest = structs.replace(MANIFEST, train_graph=sha256(_PARTS[0]).digest(), eval_graph=sha256(_PARTS[1]).digest())
    release = wire.unpack(_MESSAGE.release.payload, Release)
    return [(manifest, release, structs.replace(_MESSAGE, v=1, weights=_PARTS[2]))]


MODELS = Target("models", _models_make, _models_judge, _models_good, examples=300)


# -- order -------------------------------------------------------------------------------------------------------


def _orders_make(rng: Random) -> list[tuple[int, RoundOffer]]:
    """A history of offers, as a broker or an aggregator gone bad sends it."""
    offer: RoundOffer = _GOOD[5]
    change: list[Callable[[], dict[str, object]]] = [
        dict,
        lambda: {"sequence": offer.sequence + 1, "participation": max(0, offer.participation - rng.randrange(2))},
        lambda: {"sequence": offer.sequence + 1, "deadline": offer.deadline + rng.randrange(-1, 2)},
        lambda: {"sequence": offer.sequence + 1, "state": rng.choice(list(OfferState))},
        lambda: {"sequence": offer.sequence + 1, "clip": rng.choice((1.0, 10.0))},
        lambda: {
            "round": offer.round + 1,
            "sequence": 0,
            "state": OfferState.OPEN,
            "hpke_key": bytes([rng.randrange(9)] * 32),
        },
        lambda: {"round": max(1, offer.round - 1)},
        lambda: {"deadline": offer.deadline + 1},
    ]
    found: list[tuple[int, RoundOffer]] = []
    version = 1
    for _ in range(rng.randrange(12)):
        offer = structs.replace(offer, **change[rng.randrange(len(change))]())
        version += rng.randrange(12) == 0
        found.append((version, offer))
        if rng.randrange(5) == 0 and found:
            found.append(found[rng.randrange(len(found))])
    return found


def _orders_judge(history: list[tuple[int, RoundOffer]]) -> bool:
    """As a device takes them: positions only rise, one record each, and a round only ever moves on."""
    taken: list[tuple[Position, RoundOffer]] = []
    for version, offer in history:
        position = Position((version, offer.round, offer.sequence), sha256(wire.pack(offer)).digest())
        try:
            known = taken[-1] if taken else None
            if not trust.advance(known[0] if known else None, position):
                assert known is not None and known[1] == offer
                continue
            if known and known[0].rank[:2] == position.rank[:2]:
                trust.continues(offer, known[1])
        except RemoteProtocolError:
            continue
        taken.append((position, offer))
    for (before, earlier), (after, later) in itertools.pairwise(taken):
        assert before.rank < after.rank
        if before.rank[:2] == after.rank[:2]:
            assert (earlier.hpke_key, earlier.clip, earlier.release) == (later.hpke_key, later.clip, later.release)
            assert later.participation >= earlier.participation and later.deadline >= earlier.deadline
            assert later.state is not OfferState.OPEN or earlier.state is OfferState.OPEN
    return len(taken) > 1


ORDERS = Target("orders", _orders_make, _orders_judge, lambda: [[(1, _GOOD[5]), (2, _GOOD[5])]], examples=400)

TARGETS = [RECORDS, ROOTS, MODELS, ORDERS]
