"""An agent that is killed in the middle of 20 MB, down or up, goes on with what is missing; the test leads the task."""

from collections import Counter
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest

from aggregator.broker import Broker
from shared import chunks, graph, signing, wire
from shared.graph import Graph, Kind, Port, Ref, Row, StateSlot
from shared.messages import (
    DataContract,
    DeviceStatus,
    Graphs,
    Missing,
    ReleaseMessage,
    Role,
    TensorSpec,
    UpdateHead,
    UpdateMessage,
)
from shared.opset import OPSET_VERSION
from shared.spool import Spool
from shared.tensors import save
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.daemon import until
from tests.hostile.field import AGENT, Field
from tests.hostile.records import INPUT, TARGET, Model

BALLAST = 5_000_000
LAYOUT = [
    TensorSpec("weight", "parameter", "float32", [3, 4]),
    TensorSpec("ballast", "parameter", "float32", [BALLAST]),
]
TASK = "large"
MEMORY = 60 << 20
"""Bytes that the agent may take, whatever is on its way: 20 MB of it would show."""


def encoded(kind: Kind) -> bytes:
    """A linear layer, and 20 MB that it does not use."""
    x, y, scores = 2, 3, 4
    return graph.encode(
        Graph(
            kind,
            OPSET_VERSION,
            tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in LAYOUT),
            (Port("x", "float32", [4]), Port("y", "int64", [])),
            (),
            (
                Row("aten.linear.default", (Ref(x), Ref(0))),
                Row("aten.cross_entropy_loss.default", (Ref(scores), Ref(y))),
            ),
            (scores + 1,) if kind == "train" else (scores, scores + 1),
        )
    )


WEIGHTS = save(
    LAYOUT,
    {
        "weight": np.zeros([3, 4], np.float32),
        "ballast": np.random.default_rng(1).normal(size=BALLAST).astype(np.float32),
    },
)
BLOB = chunks.describe(WEIGHTS, chunks.CHUNK_SIZE)
MODEL = Model(encoded("train"), encoded("eval"), WEIGHTS)


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """An agent with good data; the tests kill and start it."""
    data = tmp_path_factory.mktemp("owner") / "d.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.normal(size=(40, 4)).astype("f4"), y=rng.integers(0, 3, 40).astype("i8"))
    made = Field(fleet, f'[data.d]\npath = "{data}"\n\n[trainer]\nthreads = 1\n')
    with made.daemon:
        made.start()
        yield made
        assert made.daemon.stop() == 0
        made.daemon.read()


def describe(field: Field) -> None:
    """The task's release 0: its weights come in chunks."""
    contract = DataContract("d", [INPUT], TARGET, 10)
    manifest = records.manifest(field.keys, TASK, model=MODEL, layout=LAYOUT, data=contract)
    signed = signing.sign(manifest, Role.PUBLISHER, field.keys.publisher)
    release = records.signed_release(signed, TASK, by=field.keys.publisher, model=MODEL, v=2, weights=BLOB)
    field.manifests[TASK] = manifest
    field.messages[TASK] = ReleaseMessage(2, signed, release, Graphs(MODEL.train, MODEL.eval), None)


def put(field: Field, *numbers: int) -> None:
    """Publish chunks of the weights, retained."""
    for index in numbers:
        start, end = chunks.span(BLOB.size, BLOB.chunk_size, index)
        topic = f"fl/blob/{BLOB.sha256.hex()}/{index}"
        assert field.aggregator.publish(topic, WEIGHTS[start:end], retain=True) < 128


def counts(field: Field) -> Counter[str]:
    """What the agent that runs has counted."""
    return Counter(field.asked()["counts"])


def test_a_download_over_a_killed_agent(field: Field) -> None:
    """Only what is missing is fetched again, nothing counts before all is there, and memory stays flat."""
    describe(field)
    count = len(BLOB.chunks)
    half = count // 2
    put(field, *range(half))
    field.publish(f"models/{TASK}/release", b"")
    message = wire.pack(field.messages[TASK])
    assert field.aggregator.publish(f"models/{TASK}/release", message, retain=True) < 128

    def some() -> bool | None:
        return counts(field)["chunks_fetched"] == half or None

    until(some, f"{half} chunks")
    shown = field.asked()["download"]
    assert shown["task"] == TASK and shown["bytes"] == half * BLOB.chunk_size
    assert shown["total"] == len(WEIGHTS) and 45 < shown["percent"] < 55
    assert field.daemon.peak() < MEMORY
    field.daemon.kill()
    assert not (field.state / "tasks" / TASK / "state").exists()
    spool = Spool(field.state / "spool" / f"{TASK}.{BLOB.sha256.hex()}", BLOB)
    missing = spool.missing()
    assert missing == list(range(half, count))
    put(field, *missing)
    start = len(field.daemon.read())
    field.daemon.start()
    line = field.daemon.wait("download.started", start, task=TASK)
    assert line["missing"] == BLOB.size - half * BLOB.chunk_size
    field.daemon.wait("release.accepted", start, task=TASK)
    assert counts(field)["chunks_fetched"] == len(missing)
    assert field.asked()["link"]["bytes_received"] < 1.05 * line["missing"] + len(message) + 65_536
    assert (field.state / "tasks" / TASK / BLOB.sha256.hex()).read_bytes() == WEIGHTS
    assert list((field.state / "spool").iterdir()) == []
    assert field.daemon.peak() < MEMORY
    assert field.status(lambda status: status.v == 2).v == 2


def uploads(field: Field) -> list[tuple[str, bytes]]:
    """All that the agent has sent below its head's topic: (head or number, payload)."""
    return [(topic.rpartition("/")[2], payload) for topic, payload in field.collect() if topic.startswith("fl/up/")]


def wills(field: Field) -> int:
    """How often the broker has said that the agent is gone."""
    statuses = [payload for topic, payload in field.collect() if topic.endswith("/status")]
    return sum(not wire.unpack(payload, DeviceStatus).online for payload in statuses)


def test_an_upload_over_a_killed_agent(field: Field) -> None:
    """The identical head comes again, and after it exactly the chunks that are asked for, until a receipt ends it."""
    start = len(field.daemon.read())
    offered = field.offer(TASK)
    field.daemon.wait("update.sent", start, task=TASK)

    def head() -> UpdateMessage | None:
        heads = [payload for part, payload in uploads(field) if part == "head"]
        return wire.unpack(heads[0], UpdateMessage) if heads else None

    sent = until(head, "a head")
    assert sent.v == 2 and sent.body is None
    described, digest = wire.unpack(sent.head, UpdateHead), sha256(sent.head).digest()
    assert described.chunk_size == chunks.CHUNK_SIZE and described.size > 4 * BALLAST
    count = chunks.count(described.size, described.chunk_size)

    def ask(*numbers: int) -> None:
        field.publish(f"fl/dev/{AGENT}/cmd/missing", wire.pack(Missing(2, digest, list(numbers))))

    def pieces() -> list[tuple[int, bytes]]:
        return [(int(part), payload) for part, payload in uploads(field) if part != "head"]

    field.fence()
    assert pieces() == []
    waiting = field.asked()["outbox"][0]
    assert (waiting["task"], waiting["round"], waiting["chunks"]) == (TASK, offered.round, count)
    ask(*range(64))
    until(lambda: len(pieces()) > 20 or None, "some chunks")
    before_that = wills(field)
    field.daemon.kill()
    # The broker speaks the will when it has dealt with all that came before.
    until(lambda: wills(field) > before_that or None, "the will")
    before = pieces()
    assert {index for index, _ in before} <= set(range(64))
    assert Counter(index for index, _ in before).most_common(1)[0][1] == 1

    field.received.clear()
    start = len(field.daemon.read())
    field.daemon.start()
    again = until(head, "the head once more")
    assert (again.head, again.sig) == (sent.head, sent.sig)
    got = dict(before)
    missing = [index for index in range(count) if index not in got]
    while missing:
        ask(*missing[:64])
        asked, missing = set(missing[:64]), missing[64:]

        def came(asked: set[int] = asked) -> bool | None:
            return asked <= {index for index, _ in pieces()} or None

        until(came, "what was asked for")
    field.fence()
    assert sorted(index for index, _ in pieces()) == [index for index in range(count) if index not in got]
    got |= dict(pieces())
    body = b"".join(got[index] for index in range(count))
    assert len(body) == described.size and sha256(body).digest() == described.sha256
    assert field.daemon.peak() < MEMORY

    stranger = wire.pack(Missing(2, bytes(32), [0]))
    refused = field.provoke(lambda: field.publish(f"fl/dev/{AGENT}/cmd/missing", stranger))
    assert [line["reason"] for line in refused] == ["unasked"]
    assert [path.suffix for path in sorted((field.state / "outbox").iterdir())] == [".body", ".entry"]
    receipt = records.receipt(TASK, AGENT, head=digest)
    field.publish(f"fl/dev/{AGENT}/cmd/receipt", field.signed(receipt))
    line = field.daemon.wait("update.answered", start, task=TASK)
    assert line["outcome"] == "accepted"
    field.fence()
    assert list((field.state / "outbox").iterdir()) == []
    assert field.asked()["outbox"] == []
    assert not any(line["event"] == "training.started" for line in field.daemon.read()[start:])
