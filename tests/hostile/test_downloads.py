"""Releases in chunks from a broker and an aggregator gone bad: nothing is accepted before every byte is as signed."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from aggregator.broker import Broker
from shared import chunks, signing, tensors, wire
from shared.messages import BlobRef, Graphs, Missing, Release, ReleaseMessage, Role
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.daemon import Line
from tests.hostile.field import AGENT, Field
from tests.hostile.records import JUNK, edited, flip, layout_of, of_width, wide

WIDTH, CHUNK = 4000, 1024
VALUES = np.random.default_rng(3).normal(size=(3, WIDTH)).astype(np.float32)
MODEL = replace(wide(WIDTH), weights=tensors.save(layout_of(WIDTH), {"weight": VALUES}))
"""Its weights are not all the same, so no chunk is like another."""
BLOB = chunks.describe(MODEL.weights, CHUNK)
PIECES = [bytes(piece) for piece in chunks.pieces(MODEL.weights, CHUNK)]
ASKED = f"fl/dev/{AGENT}/cmd/missing"


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker) -> Iterator[Field]:
    """An agent without data, so it never trains."""
    made = Field(fleet)
    with made.daemon:
        made.start()
        yield made
        assert [line["event"] for line in made.daemon.read()].count("daemon.started") == 1
        assert made.daemon.stop() == 0
        made.daemon.read()


def release(field: Field, task: str, blob: BlobRef = BLOB, **changes: Any) -> ReleaseMessage:
    """Release 0 of a wide task, whose weights come in chunks as `blob` says."""
    manifest = records.manifest(field.keys, task, model=MODEL, **of_width(WIDTH))
    signed = signing.sign(manifest, Role.PUBLISHER, field.keys.publisher)
    record = records.signed_release(signed, task, by=field.keys.publisher, model=MODEL, v=2, weights=blob, **changes)
    return ReleaseMessage(2, signed, record, Graphs(MODEL.train, MODEL.eval), None)


def publish(field: Field, task: str, message: ReleaseMessage | bytes) -> None:
    """As the aggregator does."""
    payload = message if isinstance(message, bytes) else wire.pack(message)
    field.publish(f"models/{task}/release", payload)


def put(field: Field, *numbers: int, blob: bytes = BLOB.sha256) -> None:
    """Publish chunks as they should be, retained."""
    for number in numbers:
        spoilt(field, number, PIECES[number], blob)


def spoilt(field: Field, number: int, payload: bytes, blob: bytes = BLOB.sha256) -> None:
    """Publish something as a chunk, retained."""
    assert field.aggregator.publish(f"fl/blob/{blob.hex()}/{number}", payload, retain=True) < 128


def clear(field: Field) -> None:
    """Take every chunk back."""
    for number in range(len(PIECES)):
        spoilt(field, number, b"")


@pytest.fixture
def task(field: Field, request: pytest.FixtureRequest) -> Iterator[str]:
    """A task of the test's own, with no chunk on the broker at first; at the end it has been accepted, or stays out."""
    clear(field)
    yield f"t-{abs(hash(request.node.name)) % 10**8}"
    clear(field)


def begin(field: Field, task: str, message: ReleaseMessage | None = None) -> None:
    """Let the agent ask for the chunks of a release."""
    start = len(field.daemon.read())
    publish(field, task, message or release(field, task))
    field.daemon.wait("download.started", start, task=task)
    field.fence()


def end(field: Field, task: str, *numbers: int) -> None:
    """Publish what is missing, and see the release accepted whole."""
    start = len(field.daemon.read())
    put(field, *(numbers or range(len(PIECES))))
    field.daemon.wait("release.accepted", start, task=task)
    assert (field.state / "tasks" / task / BLOB.sha256.hex()).read_bytes() == MODEL.weights
    assert list((field.state / "spool").iterdir()) == []


def told(lines: list[Line]) -> list[tuple[str, str | None]]:
    """What each line says was wrong."""
    return [(line["event"], line.get("reason")) for line in lines]


# -- chunks --------------------------------------------------------------------------------------------------------

ODD: dict[str, bytes] = {
    "truncated": PIECES[2][:-1],
    "a_byte_too_long": PIECES[2] + b"\0",
    "flipped_bit": flip(PIECES[2], 500),
    "of_another_place": PIECES[3],
    "a_megabyte": bytes(1 << 20),
    "the_whole": MODEL.weights,
    "text": b"Dear device",
}
"""What lies on the topic of chunk 2."""


def test_odd_chunks(field: Field, task: str) -> None:
    """Each is refused in one line, and nothing on the disk changes; the right chunk is still taken."""
    begin(field, task)
    put(field, 0, 1)
    field.fence()
    before = field.snapshot()
    for name, payload in ODD.items():
        refused = field.counters()[0]
        lines = field.provoke(lambda payload=payload: spoilt(field, 2, payload))  # type: ignore[misc]
        assert told(lines) == [("message.refused", "wrong_digest")], name
        assert field.counters()[0] - refused == {"wrong_digest": 1}
        assert field.snapshot() == before
    assert task not in field.asked()["tasks"]
    end(field, task, *range(2, len(PIECES)))


def test_repeated_chunks(field: Field, task: str) -> None:
    """A chunk that comes again is worth no line and is not written again."""
    begin(field, task)
    put(field, 0)
    field.fence()
    counts = field.counters()[1]["chunks_fetched"]
    assert field.provoke(lambda: put(field, 0, 0, 0), silent=True) == []
    assert field.counters()[1]["chunks_fetched"] == counts
    end(field, task, *range(1, len(PIECES)))


def test_reordered_chunks(field: Field, task: str) -> None:
    """Chunks may come in any order."""
    begin(field, task)
    end(field, task, *reversed(range(len(PIECES))))


def test_chunks_that_nobody_asked_for(field: Field, task: str) -> None:
    """What is not subscribed to is never delivered, so it costs the agent nothing."""
    moved = field.asked()["link"]["bytes_received"]
    for number, (payload, _) in enumerate(JUNK.values()):
        spoilt(field, number, payload, bytes(32))
    assert field.provoke(lambda: put(field, *range(len(PIECES))), silent=True) == []
    assert field.asked()["link"]["bytes_received"] - moved < 100_000
    for number in range(len(JUNK)):
        spoilt(field, number, b"", bytes(32))
    clear(field)


def test_a_chunk_that_is_withdrawn(field: Field, task: str) -> None:
    """An empty payload says that the release is gone: one line, and another release of the task is taken at once."""
    begin(field, task)
    put(field, 0)
    field.fence()
    lines = field.provoke(lambda: spoilt(field, 1, b""))
    assert told(lines) == [("download.stopped", "gone")]
    assert lines[0]["retry"] > 0
    start = len(field.daemon.read())
    whole = structs.replace(release(field, task), v=1, weights=MODEL.weights)
    record = records.signed_release(whole.manifest, task, by=field.keys.publisher, model=MODEL)
    publish(field, task, structs.replace(whole, release=record))
    field.daemon.wait("release.accepted", start, task=task)


def test_a_signer_who_contradicts_himself(field: Field, task: str) -> None:
    """Right chunks of a blob that they do not make: told once, nothing is kept, and it is not fetched again."""
    lie = structs.replace(BLOB, sha256=bytes(31) + b"\1")
    message = release(field, task, lie)
    begin(field, task, message)
    lines = field.provoke(lambda: put(field, *range(len(PIECES)), blob=lie.sha256))
    assert told(lines) == [("download.stopped", "spoilt")]
    assert list((field.state / "spool").iterdir()) == []
    assert not (field.state / "tasks" / task).exists() or not list((field.state / "tasks" / task).iterdir())
    assert field.provoke(lambda: publish(field, task, message), silent=True) == []
    for number in range(len(PIECES)):
        spoilt(field, number, b"", lie.sha256)


# -- references ----------------------------------------------------------------------------------------------------


def huge(chunk: int) -> BlobRef:
    """A blob of 2^62 bytes."""
    return BlobRef(bytes(32), 2**62, chunk, [bytes(32)] * -(-(2**62) // chunk))


LIES: dict[str, tuple[BlobRef, str]] = {
    "an_exabyte": (huge(2**60), "too_large"),
    "an_exabyte_in_one": (huge(2**62), "too_large"),
    "larger_than_the_layout": (
        BlobRef(bytes(32), len(MODEL.weights) + (17 << 20), 2**20, [bytes(32)] * 18),
        "too_large",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_reference_that_lies(field: Field, case: str, task: str) -> None:
    """Weights that cannot be the layout's are refused before a byte of room is made."""
    blob, reason = LIES[case]
    before = field.snapshot()
    lines = field.provoke(lambda: publish(field, task, release(field, task, blob)))
    assert told(lines) == [("message.refused", reason)]
    assert field.snapshot() == before


COUNTS: dict[str, dict[str, Any]] = {
    "a_chunk_too_few": {"chunks": BLOB.chunks[:-1]},
    "a_chunk_too_many": {"chunks": [*BLOB.chunks, bytes(32)]},
    "no_chunks": {"chunks": []},
    "chunks_of_no_size": {"chunk_size": 0},
    "2_32_chunks": {"size": 2**42},
    "negative_size": {"size": -1},
    "short_hash": {"chunks": [b"x", *BLOB.chunks[1:]]},
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_reference_that_contradicts_itself(field: Field, case: str, task: str) -> None:
    """As many hashes as the sizes say, signed or not."""
    message = release(field, task)
    plain = records.builtins(message.release.payload)
    plain["weights"].update(COUNTS[case])
    payload = records.packed(plain)
    bad = records.sign_bytes(payload, Release, Role.PUBLISHER, field.keys.publisher)
    before = field.snapshot()
    lines = field.provoke(lambda: publish(field, task, structs.replace(message, release=bad)))
    assert told(lines) == [("message.refused", "wrong_type")]
    assert field.snapshot() == before


def test_a_chunk_as_large_as_can_be(field: Field, task: str) -> None:
    """A chunk size far above the blob's is one chunk, and takes the room of the blob."""
    whole = BlobRef(BLOB.sha256, BLOB.size, 2**62, [sha256(MODEL.weights).digest()])
    begin(field, task, release(field, task, whole))
    start = len(field.daemon.read())
    spoilt(field, 0, MODEL.weights)
    field.daemon.wait("release.accepted", start, task=task)


# -- requests for chunks --------------------------------------------------------------------------------------------

MISSING = Missing(2, bytes(32), [0, 5])
REQUESTS: dict[str, tuple[bytes, str]] = {
    "for_no_update": (wire.pack(MISSING), "unasked"),
    "for_2_32": (wire.pack(structs.replace(MISSING, chunks=[2**32])), "unasked"),
    "for_none": (edited(wire.pack(MISSING), chunks=[]), "wrong_type"),
    "for_too_many": (edited(wire.pack(MISSING), chunks=list(range(65))), "wrong_type"),
    "for_one_twice": (edited(wire.pack(MISSING), chunks=[1, 1]), "wrong_type"),
    "in_falling_order": (edited(wire.pack(MISSING), chunks=[2, 1]), "wrong_type"),
    "for_a_negative_one": (edited(wire.pack(MISSING), chunks=[-1]), "wrong_type"),
    "in_the_first_protocol": (edited(wire.pack(MISSING), v=1), "version"),
    "of_the_next_protocol": (edited(wire.pack(MISSING), v=3), "version"),
    "with_an_unknown_field": (edited(wire.pack(MISSING), extra=1), "wrong_type"),
    "with_a_trailing_byte": (wire.pack(MISSING) + b"\0", "not_msgpack"),
    **{f"junk_{name}": (data, "too_large" if len(data) > 65_536 else reason) for name, (data, reason) in JUNK.items()},
    "junk_no_fields": (JUNK["no_fields"][0], "version"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_bad_request(field: Field, case: str) -> None:
    """A request that is none, or for what is not there, is refused in one line; nothing is sent."""
    payload, reason = REQUESTS[case]
    before, sent = field.snapshot(), len(field.collect())
    lines = field.provoke(lambda: field.publish(ASKED, payload))
    assert [(line["event"], line["topic"], line["reason"]) for line in lines] == [("message.refused", ASKED, reason)]
    assert field.snapshot() == before
    assert len(field.collect()) == sent


# -- presence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", JUNK)
def test_junk_as_presence(field: Field, junk: str) -> None:
    """Junk where the aggregator says whether it is there is refused, also from its own hand."""
    payload, reason = JUNK[junk]
    topic = "fl/agg/0/status"
    before = field.snapshot()
    lines = field.provoke(lambda: field.publish(topic, payload))
    reason = "too_large" if len(payload) > 65_536 else reason
    assert [(line["event"], line["topic"], line["reason"]) for line in lines] == [("message.refused", topic, reason)]
    assert field.snapshot() == before


def test_downloads_cost_no_memory(field: Field) -> None:
    """After all that the agent is as small as it was meant to be."""
    assert field.daemon.peak() < 100 << 20
