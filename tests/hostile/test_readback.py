"""What a broker gone bad brings back where the aggregator's own words belong: it is refused, and put right."""

from collections.abc import Callable, Iterable, Iterator

import pytest
from msgspec import structs

from aggregator.broker import Broker
from shared import signing, wire
from shared.messages import Release, ReleaseMessage, Role, Root, RootMessage, RoundOffer, Signed
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.bad_releases import tampered
from tests.hostile.daemon import Line
from tests.hostile.records import JUNK, edited, flip
from tests.hostile.site import Site


@pytest.fixture(scope="module")
def site(fleet: Fleet, broker: Broker) -> Iterator[Site]:
    """An aggregator that the tests stop and start."""
    made = Site(fleet)
    with made.daemon:
        made.begin()
        yield made
        assert made.daemon.stop() == 0
        made.daemon.read()


def brought_back(site: Site, retained: dict[str, bytes]) -> list[Line]:
    """Let the broker hold this when the aggregator comes; what it then refuses or takes."""
    site.fence()
    assert site.daemon.stop() == 0
    site.daemon.read()
    start = len(site.daemon.lines)
    # A durable session of the aggregator's name, so that its own is not lost; what waits there has been dealt with.
    with Peer(site.fleet, site.fleet.aggregator, clean=False) as impostor:
        for topic, payload in retained.items():
            assert impostor.publish(topic, payload, True) < 128
        impostor.bye()
    site.daemon.start()
    site.daemon.wait("link.up", start)
    site.fence()
    lines = [line for line in site.daemon.lines[start:] if "zz-fence" not in line.get("topic", "")]
    return [line for line in lines if line["event"] in ("message.refused", "update.rejected", "task.adopted")]


def told(lines: Iterable[Line]) -> dict[str, str]:
    """Why what lay on a topic was refused, each in one line."""
    found = [(line["topic"], line["reason"]) for line in lines if line["event"] == "message.refused"]
    assert len(found) == len(dict(found)) == len(list(lines))
    return dict(found)


def test_junk(site: Site) -> None:
    """Junk is refused, each piece in one line, and what we know ourselves does not change."""
    before = site.snapshot()
    there, expected = dict[str, bytes](), dict[str, str]()
    for number, (name, (payload, reason)) in enumerate(JUNK.items(), 2):
        for topic in (f"models/junk-{number}/release", f"models/junk-{number}/round", f"fl/root/{number}"):
            there[topic] = payload
            if payload:  # nothing is what is there where nothing was
                expected[topic] = "version" if name == "no_fields" and "root" in topic else reason
    assert told(brought_back(site, there)) == expected
    after = site.snapshot()
    assert (after.rows, after.files) == (before.rows, before.files)
    assert {topic: after.retained[topic] for topic in before.retained} == before.retained
    assert told(brought_back(site, dict.fromkeys(there, b""))) == {}
    site.accepts()


def in_place(site: Site, task: str) -> ReleaseMessage:
    """The newest release of a task as we retain it."""
    return wire.unpack(site.retained()[f"models/{task}/release"], ReleaseMessage)


def forged(site: Site, task: str, key: str) -> ReleaseMessage:
    """A later release that somebody signed."""
    message = in_place(site, task)
    changed = structs.replace(wire.unpack(message.release.payload, Release), number=99)
    return structs.replace(message, release=signing.sign(changed, Role.AGGREGATOR, getattr(site.keys, key)))


RELEASES: dict[str, tuple[Callable[[Site, str], ReleaseMessage | bytes], str | None]] = {
    "absent": (lambda s, t: b"", None),
    "tampered-train": (lambda s, t: tampered(in_place(s, t), "train"), "wrong_digest"),
    "tampered-weights": (lambda s, t: tampered(in_place(s, t), "weights"), "wrong_digest"),
    "tampered-signature": (lambda s, t: tampered(in_place(s, t), "signature"), "bad_signature"),
    "tampered-manifest": (lambda s, t: tampered(in_place(s, t), "manifest"), "bad_signature"),
    "records-alone": (lambda s, t: structs.replace(in_place(s, t), graphs=None, weights=None), "missing_part"),
    "without-weights": (lambda s, t: structs.replace(in_place(s, t), v=2, weights=None), "missing_part"),
    "newer-by-a-stranger": (lambda s, t: forged(s, t, "stranger"), "unknown_key"),
    "newer-by-a-clerk": (lambda s, t: forged(s, t, "clerk"), "unknown_key"),
    "newer-without-weights": (
        lambda s, t: structs.replace(forged(s, t, "aggregator"), v=2, weights=None),
        "missing_part",
    ),
    "of-another-task": (lambda s, t: in_place(s, "short"), "wrong_task"),
    "older-manifest": (lambda s, t: records.release(s.keys, records.manifest(s.keys, t, 4)), None),
    "an-offer": (lambda s, t: s.retained()[f"models/{t}/round"], "wrong_type"),
    "unknown-field": (lambda s, t: edited(wire.pack(in_place(s, t)), extra=1), "wrong_type"),
}
"""What lies in the place of a task's newest release; the task is named like the case."""


def test_bad_releases(site: Site) -> None:
    """What is not our newest release, as we signed it and whole, is replaced by it."""
    for case in RELEASES:
        site.task(case)
    made = {case: make(site, case) for case, (make, _) in RELEASES.items()}
    there = {
        f"models/{case}/release": each if isinstance(each, bytes) else wire.pack(each) for case, each in made.items()
    }
    before = site.snapshot()
    expected = {f"models/{case}/release": reason for case, (_, reason) in RELEASES.items() if reason is not None}
    assert told(brought_back(site, there)) == expected
    assert site.snapshot() == before
    site.accepts()


def offer(site: Site, task: str, key: str = "aggregator", **changes: object) -> Signed:
    """A task's newest offer with something changed."""
    newest = wire.unpack(wire.unpack(site.retained()[f"models/{task}/round"], Signed).payload, RoundOffer)
    return signing.sign(structs.replace(newest, **changes), Role.AGGREGATOR, getattr(site.keys, key))


OFFERS: dict[str, tuple[Callable[[Site, str], Signed | bytes], str | None]] = {
    "no-offer": (lambda s, t: b"", None),
    "offer-by-a-stranger": (lambda s, t: offer(s, t, "stranger", round=7), "unknown_key"),
    "offer-beyond-the-plan": (lambda s, t: offer(s, t, round=2**40), "offer_bounds"),
    "offer-with-a-flipped-bit": (
        lambda s, t: structs.replace(made := offer(s, t, round=7), payload=flip(made.payload, -3)),
        "bad_signature",
    ),
    "ours-with-a-flipped-signature": (lambda s, t: structs.replace(made := offer(s, t), sig=flip(made.sig, 5)), None),
    "offer-of-another-task": (lambda s, t: s.retained()["models/short/round"], "wrong_task"),
    "a-receipt": (
        lambda s, t: signing.sign(records.receipt(t, "x"), Role.AGGREGATOR, s.keys.aggregator),
        "bad_signature",
    ),
}
"""What lies in the place of a task's newest offer."""


def test_bad_offers(site: Site) -> None:
    """What is not our newest offer as we signed it is replaced by it."""
    for case in OFFERS:
        site.task(case)
    made = {case: make(site, case) for case, (make, _) in OFFERS.items()}
    there = {
        f"models/{case}/round": each if isinstance(each, bytes) else wire.pack(each) for case, each in made.items()
    }
    before = site.snapshot()
    lines = brought_back(site, there)
    expected = {f"models/{case}/round": reason for case, (_, reason) in OFFERS.items() if reason is not None}
    assert told(lines) == expected
    assert site.snapshot() == before
    site.accepts()


def test_bad_roots(site: Site) -> None:
    """A next root that the one before did not sign is not followed."""
    pinned = wire.unpack((site.fleet.folder / "root" / "root.msgpack").read_bytes(), Signed)
    following = structs.replace(wire.unpack(pinned.payload, Root), version=2, publishers=[])
    stranger, publisher, own = (
        signing.sign(following, Role.ROOT, key) for key in (site.keys.stranger, site.keys.publisher, site.keys.root)
    )
    foreign = signing.sign(structs.replace(following, fleet="other"), Role.ROOT, site.keys.root)
    bad = {
        "by a stranger": (RootMessage(2, stranger, stranger), "unknown_key"),
        "by the publisher": (RootMessage(2, publisher, own), "unknown_key"),
        "not by itself": (RootMessage(2, own, stranger), "unknown_key"),
        "two roots": (RootMessage(2, own, pinned), "wrong_digest"),
        "of another fleet": (RootMessage(2, foreign, foreign), "wrong_task"),
        "the one we have": (RootMessage(2, pinned, pinned), "rollback"),
    }
    before = site.snapshot()
    with Peer(site.fleet, site.fleet.operator) as operator:
        for name, (message, reason) in bad.items():

            def send(payload: bytes = wire.pack(message)) -> None:
                assert operator.publish("fl/root/2", payload) < 128

            assert told(site.provoke(send)) == {"fl/root/2": reason}, name
        operator.bye()
    assert site.snapshot() == before
    site.accepts()
