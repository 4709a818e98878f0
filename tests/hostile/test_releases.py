"""What is no release, on `models/release` of a running aggregator."""

import pytest

from shared import wire
from tests.hostile import records
from tests.hostile.bad_releases import BAD, tampered
from tests.hostile.records import JUNK
from tests.hostile.site import Site


@pytest.mark.parametrize("case", BAD)
def test_bad_release(site: Site, case: str) -> None:
    """It is refused with its reason in one line, nothing changes, and the aggregator serves on."""
    make, reason = BAD[case]
    made = make(site.keys)
    refuses(site, made if isinstance(made, bytes) else wire.pack(made), reason)


@pytest.mark.parametrize("junk", JUNK)
def test_junk(site: Site, junk: str) -> None:
    """Bytes that are no message are refused in the same way."""
    refuses(site, *JUNK[junk])


def refuses(site: Site, payload: bytes, reason: str) -> None:
    """Publish something bad and look at everything."""
    before = site.snapshot()
    lines = site.provoke(lambda: site.publish(payload))
    assert [(line["event"], line["topic"], line["reason"]) for line in lines] == [
        ("message.refused", "models/release", reason)
    ]
    assert site.snapshot() == before
    site.accepts()


def test_junk_costs_no_memory(site: Site) -> None:
    """Ten more of each grow the aggregator by less than one message's limit."""
    before = site.daemon.peak()
    for data, _ in JUNK.values():
        for _ in range(10):
            site.publish(data)
    site.fence()
    assert site.daemon.peak() - before < 100 << 20


def test_retained_junk(site: Site) -> None:
    """Junk that stays on the topic is refused each time the aggregator comes, and a good release still gets through."""
    site.publish(b"junk", retain=True)
    start = len(site.daemon.read())
    site.audit()
    site.daemon.stop()
    site.daemon.start()
    site.daemon.wait("message.refused", start, topic="models/release", reason="not_msgpack")
    site.publish(wire.pack(records.release(site.keys, records.manifest(site.keys, "kept"))), retain=True)
    site.daemon.wait("task.adopted", start, task="kept", version=1)


@pytest.mark.parametrize("part", ["train", "eval", "weights"])
def test_a_known_release_tampered(site: Site, part: str) -> None:
    """A changed copy of what everybody has is told from a mere repetition."""
    refuses(site, wire.pack(tampered(site.messages["main"], part)), "wrong_digest")


def test_a_known_release_again(site: Site) -> None:
    """The release that a task began with changes nothing when it comes again."""
    message = wire.pack(site.messages["short"])
    before = site.snapshot()
    assert site.provoke(lambda: site.publish(message), silent=True) == []
    assert site.snapshot() == before
