"""Large releases that an operator publishes in chunks, to an aggregator: whatever lies there in their place."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from aggregator.broker import Broker
from shared import chunks, signing, tensors, wire
from shared.messages import BlobRef, Graphs, ReleaseMessage, Role
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import Line
from tests.hostile.records import JUNK, flip, layout_of, of_width, wide
from tests.hostile.site import Site

WIDTH, CHUNK = 4000, 1024


@pytest.fixture(scope="module")
def site(fleet: Fleet, broker: Broker) -> Iterator[Site]:
    """A running aggregator."""
    made = Site(fleet)
    with made.daemon:
        made.begin()
        yield made
        assert [line["event"] for line in made.daemon.read()].count("daemon.started") == 1
        made.audit()
        assert made.daemon.stop() == 0
        made.daemon.read()


class Large:
    """A task whose release comes in chunks; its weights are like no other's."""

    def __init__(self, site: Site, task: str, weights: bytes | None = None) -> None:
        self.site, self.task = site, task
        if weights is None:
            values = np.random.default_rng(sum(task.encode())).normal(size=(3, WIDTH)).astype(np.float32)
            weights = tensors.save(layout_of(WIDTH), {"weight": values})
        self.model = replace(wide(WIDTH), weights=weights)
        self.blob = chunks.describe(weights, CHUNK)
        self.pieces = [bytes(piece) for piece in chunks.pieces(weights, CHUNK)]

    def message(self, blob: BlobRef | None = None, **changes: Any) -> bytes:
        """Release 0, which refers to `blob`."""
        manifest = records.manifest(self.site.keys, self.task, model=self.model, **of_width(WIDTH), **changes)
        signed = signing.sign(manifest, Role.PUBLISHER, self.site.keys.publisher)
        record = records.signed_release(
            signed, self.task, by=self.site.keys.publisher, model=self.model, v=2, weights=blob or self.blob
        )
        return wire.pack(ReleaseMessage(2, signed, record, Graphs(self.model.train, self.model.eval), None))

    def put(self, *pieces: tuple[int, bytes], blob: BlobRef | None = None) -> None:
        """Publish as chunks, retained, as the operator may."""
        with Peer(self.site.fleet, self.site.fleet.operator) as operator:
            for number, payload in pieces:
                topic = f"fl/blob/{(blob or self.blob).sha256.hex()}/{number}"
                assert operator.publish(topic, payload, retain=True) < 128
            operator.bye()

    def publish(self, message: bytes | None = None) -> None:
        """Put the release where an operator puts it."""
        with Peer(self.site.fleet, self.site.fleet.operator) as operator:
            assert operator.publish("models/release", message or self.message()) < 128
            operator.bye()

    def adopted(self) -> None:
        """All that is missing comes, and the task begins."""
        start = len(self.site.daemon.read())
        self.put(*enumerate(self.pieces))
        self.site.daemon.wait("task.adopted", start, task=self.task)


def told(lines: list[Line]) -> list[tuple[str, object]]:
    """What each line says was wrong."""
    return [(line["event"], line.get("reason")) for line in lines]


def test_odd_chunks(site: Site) -> None:
    """Each is refused in one line and changes nothing; the right chunk is still taken."""
    large = Large(site, "odd")
    large.put((0, large.pieces[0]))
    site.fence()
    before = site.snapshot()
    assert site.provoke(large.publish, silent=True) == []
    odd = {
        "truncated": large.pieces[2][:-1],
        "too long": large.pieces[2] + b"\0",
        "flipped": flip(large.pieces[2], 77),
        "another": large.pieces[3],
        "whole": large.model.weights,
        **{name: payload for name, (payload, _) in JUNK.items() if payload},
    }
    for name, payload in odd.items():
        lines = site.provoke(lambda payload=payload: large.put((2, payload)))  # type: ignore[misc]
        assert told(lines) == [("message.refused", "wrong_digest")], name
    assert site.snapshot() == before
    large.adopted()
    site.accepts()


def test_reordered_and_repeated_chunks(site: Site) -> None:
    """Any order will do, and what comes again is worth no line."""
    large = Large(site, "reordered")
    large.publish()
    some = list(enumerate(large.pieces))[1:]
    assert site.provoke(lambda: large.put(*reversed(some[:8]), *some[:8]), silent=True) == []
    large.adopted()


def test_withdrawn_chunks(site: Site) -> None:
    """An empty chunk ends the collecting in one line; published once more, the release is taken."""
    large = Large(site, "withdrawn")
    large.publish()
    site.fence()
    before = site.snapshot()
    lines = site.provoke(lambda: large.put((0, b"")))
    assert told(lines) == [("release.missed", None)]
    assert site.snapshot() == before
    large.put(*enumerate(large.pieces))
    start = len(site.daemon.read())
    large.publish()
    site.daemon.wait("task.adopted", start, task="withdrawn")


@pytest.mark.parametrize("case", ["contradiction", "pickle", "nan"])
def test_chunks_that_are_no_weights(site: Site, case: str) -> None:
    """Right chunks of what is not the signed blob, or of what is no weights, never become a task."""
    bad = {
        "contradiction": None,
        "pickle": b"\x80\x04}\x94." * 900,
        "nan": records.weights(float("nan"), layout_of(WIDTH)),
    }[case]
    large = Large(site, case, bad)
    blob = structs.replace(large.blob, sha256=bytes(31) + b"\7") if case == "contradiction" else large.blob
    before = site.snapshot()
    large.publish(large.message(blob))
    lines = site.provoke(lambda: large.put(*enumerate(large.pieces), blob=blob))
    assert told(lines) == [("release.missed", None)]
    assert lines[0]["task"] == case
    assert site.snapshot() == before
    site.accepts()


LIES: dict[str, BlobRef] = {
    "exabyte": BlobRef(bytes(32), 2**62, 2**60, [bytes(32)] * 4),
    "one-exabyte": BlobRef(bytes(32), 2**62, 2**62, [bytes(32)]),
    "too-large": BlobRef(bytes(32), 64 << 20, 1 << 20, [bytes(32)] * 64),
}


@pytest.mark.parametrize("case", LIES)
def test_a_reference_that_lies(site: Site, case: str) -> None:
    """Weights that cannot be the layout's are refused before a byte of room is made."""
    large = Large(site, case)
    before = site.snapshot()
    lines = site.provoke(lambda: large.publish(large.message(LIES[case])))
    assert told(lines) == [("message.refused", "too_large")]
    assert site.snapshot() == before


def test_publishing_costs_no_memory(site: Site) -> None:
    """After all that the aggregator is as small as it was meant to be."""
    assert site.daemon.peak() < 250 << 20
    assert list((site.fleet.folder / "aggregator" / "state" / "spool").iterdir()) == []
