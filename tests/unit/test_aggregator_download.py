"""How a release in chunks comes in: into a spool file, then into the blobs, over cuts, restarts and bad chunks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from aggregator import coordinator as core
from aggregator.blobs import Blobs
from aggregator.download import Downloads
from aggregator.readback import Found
from shared import chunks, wire
from shared.errors import RemoteProtocolError
from shared.fetch import PATIENCE
from shared.messages import Release, TaskManifest
from shared.topics import Topics
from tests.records import NOW, Records, later, weights

RECORDS = Records()
TOPICS = Topics("fl")
DATA = weights(0.5)
SIZE = 40


class Inlet:
    """Downloads into real folders; what is subscribed to is written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = Blobs(folder / "blobs")
        self.wanted: set[str] = set()
        self.now = NOW
        self.start()

    def start(self) -> None:
        """As a fresh process."""
        self.downloads = Downloads(
            self.folder / "spool",
            TOPICS,
            self.blobs,
            lambda *topics: self.wanted.update(topics),
            lambda *topics: self.wanted.difference_update(topics),
        )

    def chunk(self, index: int, data: bytes = DATA, payload: bytes | None = None) -> list[core.Event]:
        """A chunk comes."""
        piece = data[index * SIZE : (index + 1) * SIZE] if payload is None else payload
        return self.downloads.arrived(chunks.describe(data, SIZE).sha256, index, piece, self.now)

    def rest(self, found: Found, data: bytes = DATA) -> list[core.Event]:
        """All chunks that are subscribed to, until nothing more is wanted."""
        events: list[core.Event] = []
        while self.wanted:
            for topic in sorted(self.wanted):
                events += self.chunk(TOPICS.parse_chunk(topic)[1], data)
        return events


def release(version: int = 1, data: bytes = DATA, kept: bool = False) -> Found:
    """A release whose weights come in chunks."""
    manifest = RECORDS.sign_manifest(RECORDS.manifest(version=version))
    record = RECORDS.release(manifest, 3 if kept else 0, data, v=2, weights=chunks.describe(data, SIZE))
    message = structs.replace(RECORDS.message(), v=2, manifest=manifest, release=record, weights=None)
    return Found(message, wire.unpack(manifest.payload, TaskManifest), wire.unpack(record.payload, Release), kept)


@pytest.fixture
def inlet(tmp_path: Path) -> Iterator[Inlet]:
    """A fresh one."""
    made = Inlet(tmp_path)
    yield made
    made.blobs.close()


def test_chunks_become_weights(inlet: Inlet) -> None:
    """They are asked for once the link is there, and what is whole lies in the blobs when it is told."""
    found = release()
    assert inlet.downloads.begin(found, inlet.now) == []
    assert inlet.wanted == set()
    inlet.downloads.connected(inlet.now)
    assert len(inlet.wanted) == len(found.release.weights.chunks)
    assert inlet.rest(found) == [core.WeightsArrived(found)]
    assert inlet.blobs.get(found.release.weights.sha256) == DATA
    assert inlet.downloads.deadline is None


def test_weights_that_are_there_are_not_asked_for(inlet: Inlet) -> None:
    """A release may bring back what an earlier one had."""
    inlet.blobs.put(DATA)
    found = release()
    assert inlet.downloads.begin(found, inlet.now) == [core.WeightsArrived(found)]


def test_a_restart_asks_for_the_rest(inlet: Inlet) -> None:
    """What lies in the spool is hashed and stays; the release that waits is handed out again."""
    found = release()
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(found, inlet.now)
    inlet.chunk(0)
    inlet.chunk(1)
    inlet.wanted = set()
    inlet.start()
    assert inlet.downloads.pending() == [found.message]
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(found, inlet.now)
    assert {TOPICS.parse_chunk(topic)[1] for topic in inlet.wanted} == set(range(2, len(found.release.weights.chunks)))
    assert inlet.rest(found) == [core.WeightsArrived(found)]
    inlet.downloads.tidy()
    inlet.start()
    assert inlet.downloads.pending() == []


def test_a_bad_chunk_is_refused(inlet: Inlet) -> None:
    """Nothing has changed: the right one still completes it."""
    found = release()
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(found, inlet.now)
    for index, payload in ((0, b"x" * SIZE), (99, b"y")):
        with pytest.raises(RemoteProtocolError):
            inlet.chunk(index, payload=payload)
    assert inlet.rest(found) == [core.WeightsArrived(found)]


def test_gone_and_stalled(inlet: Inlet) -> None:
    """An empty chunk says that the broker has them no more; silence says it after a while, but not while it is cut."""
    found = release()
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(found, inlet.now)
    assert inlet.chunk(2, payload=b"") == [core.WeightsLost(found)]
    assert inlet.wanted == set()
    inlet.downloads.begin(found, inlet.now)
    inlet.downloads.disconnected()
    inlet.now = later(10 * PATIENCE)
    assert inlet.downloads.tick(inlet.now) == []
    inlet.downloads.connected(inlet.now)
    assert inlet.downloads.deadline == inlet.now.mono + PATIENCE
    inlet.now = later(PATIENCE, inlet.now)
    assert inlet.downloads.tick(inlet.now) == [core.WeightsLost(found)]


def test_what_is_no_model_is_lost(inlet: Inlet) -> None:
    """Chunks that are as signed and still no weights of the layout never reach the blobs."""
    data = b"not safetensors" * 10
    found = release(data=data)
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(found, inlet.now)
    assert inlet.rest(found, data) == [core.WeightsLost(found)]
    assert inlet.blobs.names() == []
    assert list((inlet.folder / "spool").iterdir()) == [], "nor are they fetched again after every restart"


def test_a_newer_release_takes_the_place(inlet: Inlet) -> None:
    """Of the same task only the newest is collected; one at a time, of different tasks in turn."""
    first, second = release(1), release(2, weights(0.7))
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(first, inlet.now)
    inlet.downloads.begin(second, inlet.now)
    assert inlet.rest(second, weights(0.7)) == [core.WeightsArrived(second)]
    inlet.downloads.tidy()
    assert inlet.downloads.pending() == []


def test_an_older_release_takes_no_place(inlet: Inlet) -> None:
    """What the publisher began with comes after what the broker has of it now, and is not collected."""
    newest, first = release(1, kept=True), release(1, weights(0.7))
    inlet.downloads.connected(inlet.now)
    assert inlet.downloads.begin(newest, inlet.now) == []
    assert inlet.downloads.begin(first, inlet.now) == [core.WeightsLost(first)]
    assert inlet.downloads.pending() == []
    assert inlet.rest(newest) == [core.WeightsArrived(newest)]
    # A newer manifest overtakes it, and whoever waits for it is told.
    newest, second = release(1, weights(0.3), kept=True), release(2, weights(0.7))
    inlet.downloads.begin(newest, inlet.now)
    assert inlet.downloads.begin(second, inlet.now) == [core.WeightsLost(newest)]


def test_what_made_room_leaves_nothing(inlet: Inlet) -> None:
    """The chunks of a release that a newer one overtook go from the disk, unless the newer one has the same weights."""
    inlet.downloads.connected(inlet.now)
    inlet.downloads.begin(release(1), inlet.now)
    inlet.chunk(0)
    inlet.downloads.begin(release(2), inlet.now)
    assert TOPICS.chunk(chunks.describe(DATA, SIZE).sha256.hex(), 0) not in inlet.wanted, "it is there already"
    inlet.downloads.begin(release(3, weights(0.7)), inlet.now)
    there = [path.name for path in (inlet.folder / "spool").glob("*.chunks")]
    assert there == [f"{chunks.describe(weights(0.7), SIZE).sha256.hex()}.chunks"]


def test_a_full_disk_is_tried_again(inlet: Inlet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given up for it: what came stays, the rest is asked for a minute later."""
    found = release()
    inlet.downloads.connected(inlet.now)
    monkeypatch.setattr("aggregator.download.RESERVE", 1 << 60)
    assert inlet.downloads.begin(found, inlet.now) == []
    assert inlet.wanted == set() and inlet.downloads.deadline is not None
    monkeypatch.undo()
    inlet.now = later(61)
    assert inlet.downloads.tick(inlet.now) == []
    assert inlet.rest(found) == [core.WeightsArrived(found)]


def test_the_brokers_own_release_is_not_written_down(inlet: Inlet) -> None:
    """It is found again on the next connection."""
    inlet.downloads.begin(release(kept=True), inlet.now)
    assert inlet.downloads.pending() == []
