"""How releases go out: chunks, then the message; a few at a time; and are taken away again."""

import collections
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from aggregator import coordinator as core
from aggregator.blobs import Blobs, file_of
from aggregator.config import Limits
from aggregator.coordinator import Task
from aggregator.distribution import WINDOW, Distribution
from aggregator.store import Store
from shared import chunks, wire
from shared.errors import LinkError
from shared.machine import Instant
from shared.messages import Release, ReleaseMessage
from shared.topics import RELEASE, Topics, task_release
from tests.records import NOW, Records, later

RECORDS = Records()
TOPICS = Topics("fl")
SIZE = 2048


class Outlet:
    """A distribution over a real store, and a broker that confirms when it is told to."""

    def __init__(self, folder: Path, budget: int = 1 << 30, keep: int = 10) -> None:
        self.folder = folder
        self.store, self.blobs = Store(folder / "db"), Blobs(folder / "blobs")
        self.sent: list[tuple[str, bytes, bool]] = []
        self.room = 10**9
        self.confirmed = 0
        self.now = NOW
        self.lost: list[core.PartsLost] = []
        self.limits = Limits(retained_bytes=budget, keep_releases=keep)
        self.out = Distribution(self.store, self.blobs, TOPICS, self.publish, self.limits, self.lost.append)
        self.task: Task | None = None

    def publish(self, topic: str, payload: bytes, retain: bool) -> int:
        """As the link does; ids are places in `sent`."""
        if len(self.sent) - self.confirmed >= self.room:
            raise LinkError("too much waits")
        self.sent.append((topic, payload, retain))
        return len(self.sent) - 1

    def confirm(self, count: int = 10**9, refusal: str = "") -> None:
        """The broker answers the oldest messages, and those that follow from that, until nothing is open."""
        while self.confirmed < len(self.sent) and count > 0:
            self.confirmed, count = self.confirmed + 1, count - 1
            self.out.published(self.confirmed - 1, refusal, self.now)

    def release(self, number: int, data: bytes, size: int = SIZE) -> None:
        """A task's next release, stored and given out."""
        blob = chunks.describe(data, size)
        if self.task is None:
            manifest = RECORDS.manifest()
            signed = RECORDS.sign_manifest(manifest)
            first = RECORDS.release(signed, number, data, v=2 if size else 1, weights=blob)
            message = structs.replace(RECORDS.message(), manifest=signed, release=first, weights=data)
            record = wire.unpack(first.payload, Release)
            self.task = Task(signed, manifest, first, record)
            with self.store.transaction():
                self.out.adopt(core.AdoptRelease(message, manifest, record), self.now.utc)
        else:
            signed = RECORDS.release(self.task.manifest_signed, number, data, v=2 if size else 1, weights=blob)
            self.blobs.put(data)
            with self.store.transaction():
                self.store.add_release("points", 1, number, signed, blob.sha256, self.now.utc)
            self.task.release, self.task.release_signed = wire.unpack(signed.payload, Release), signed
        self.out.publish(self.task, self.now, announce=number > 0)

    def after(self, seconds: float) -> None:
        """Time passes."""
        self.now = later(seconds, self.now)
        self.out.tick(self.now)

    def retained(self) -> dict[str, bytes]:
        """What the broker keeps."""
        kept: dict[str, bytes] = {}
        for topic, payload, retain in self.sent:
            if retain:
                kept[topic] = payload
        return {topic: payload for topic, payload in kept.items() if payload}


@pytest.fixture
def outlet(tmp_path: Path) -> Iterator[Outlet]:
    """A fresh one."""
    made = Outlet(tmp_path)
    yield made
    made.store.close()
    made.blobs.close()


def data(number: int, count: int = 5) -> bytes:
    """Weights of so many chunks."""
    return bytes([number]) * (count * SIZE - 7)


def topic(blob: bytes, index: int) -> str:
    """Of a chunk."""
    return TOPICS.chunk(chunks.describe(blob, SIZE).sha256.hex(), index)


def test_small_weights_ride_in_the_message(outlet: Outlet) -> None:
    """At once, as protocol 1 has it; later releases are announced to people too."""
    outlet.release(0, b"x" * 100, 0)
    ((where, payload, retain),) = outlet.sent
    message = wire.unpack(payload, ReleaseMessage)
    assert (where, retain, message.v, message.weights) == (task_release("points"), True, 1, b"x" * 100)
    outlet.release(1, b"y" * 100, 0)
    assert [(where, retain) for where, _, retain in outlet.sent[1:]] == [
        (task_release("points"), True),
        (RELEASE, False),
    ]


def test_the_message_follows_its_chunks(outlet: Outlet) -> None:
    """A few chunks are in flight; the message goes once all are confirmed, and names them."""
    weights = data(1, WINDOW + 4)
    outlet.release(0, weights)
    assert [each[0] for each in outlet.sent] == [topic(weights, index) for index in range(WINDOW)]
    outlet.confirm(3)
    assert len(outlet.sent) == WINDOW + 3
    outlet.confirm(WINDOW)
    assert len(outlet.sent) == WINDOW + 4
    outlet.confirm(1)
    where, payload, retain = outlet.sent[-1]
    assert (where, retain) == (task_release("points"), True)
    message = wire.unpack(payload, ReleaseMessage)
    assert (message.v, message.weights) == (2, None)
    assert b"".join(each[1] for each in outlet.sent[:-1]) == weights
    assert outlet.out.retained_bytes() == len(weights)


def test_a_full_queue_only_delays(outlet: Outlet) -> None:
    """Nothing is lost and nothing overtakes: it goes on when the broker confirms."""
    outlet.room = 3
    weights = data(1)
    outlet.release(0, weights)
    outlet.out.retain("models/points/round", b"old")
    outlet.out.retain("models/points/round", b"new")
    assert len(outlet.sent) == 3
    outlet.confirm()
    assert [each[0] for each in outlet.sent].count("models/points/round") == 1
    assert outlet.retained()["models/points/round"] == b"new"
    assert outlet.retained()[task_release("points")]
    assert [topic(weights, index) in outlet.retained() for index in range(5)] == [True] * 5


def test_refused_chunks_are_not_named(outlet: Outlet) -> None:
    """A message that names what is not there would only cost devices their time."""
    outlet.release(0, data(1))
    outlet.confirm(1, "not authorized")
    outlet.confirm()
    assert task_release("points") not in outlet.retained()


def test_chunks_above_the_brokers_limit_are_not_sent(outlet: Outlet) -> None:
    """paho would try for ever; the log says what to do, and other releases go on."""
    outlet.out.connected(SIZE)
    outlet.release(0, data(1))
    assert outlet.sent == []
    outlet.out.connected(None)
    assert outlet.task is not None
    outlet.out.publish(outlet.task, outlet.now, announce=False)
    assert len(outlet.sent) == 5


def test_a_newer_release_takes_the_older_ones_place(outlet: Outlet) -> None:
    """What nobody will ask for is not sent to its end."""
    outlet.release(0, data(1, 40))
    outlet.confirm(5)
    outlet.release(1, data(2))
    outlet.confirm()
    sent = [each[0] for each in outlet.sent]
    assert topic(data(1, 40), 39) not in sent
    message = wire.unpack(outlet.retained()[task_release("points")], ReleaseMessage)
    assert wire.unpack(message.release.payload, Release).number == 1


def test_a_newer_release_without_chunks_does_so_too(outlet: Outlet) -> None:
    """The older one's message does not come after it when its last chunk is confirmed."""
    outlet.release(0, data(0, 20))
    outlet.release(1, b"small", 0)
    outlet.confirm()
    message = wire.unpack(outlet.retained()[task_release("points")], ReleaseMessage)
    assert (wire.unpack(message.release.payload, Release).number, message.weights) == (1, b"small")


def test_a_cut_link_does_not_begin_again(outlet: Outlet) -> None:
    """The broker still has the newest chunk that it confirmed: the rest follows."""
    weights = data(1, 40)
    outlet.release(0, weights)
    outlet.confirm(20)
    assert outlet.task is not None
    asked = outlet.out.connected(None)
    assert asked == topic(weights, 19)
    assert outlet.out.seen(asked, b"there")
    assert not outlet.out.seen(topic(weights, 3), b"another's")
    outlet.out.publish(outlet.task, outlet.now, announce=False)
    outlet.confirm()
    assert [each[0] for each in outlet.sent].count(topic(weights, 0)) == 1
    assert task_release("points") in outlet.retained()


def test_a_broker_that_forgot_gets_everything_again(outlet: Outlet) -> None:
    """It was emptied in the middle: the first chunks go out once more before the message."""
    weights = data(1, 40)
    outlet.release(0, weights)
    outlet.confirm(20)
    assert outlet.task is not None
    assert outlet.out.connected(None) == topic(weights, 19)
    outlet.out.publish(outlet.task, outlet.now, announce=False)
    outlet.confirm()
    assert [each[0] for each in outlet.sent].count(topic(weights, 0)) == 2
    assert outlet.sent[-1][0] == task_release("points")


# -- withdrawing -----------------------------------------------------------------------------------------------------


def count(outlet: Outlet, weights: bytes) -> int:
    """Chunks of these weights that the broker keeps."""
    return sum(topic(weights, index) in outlet.retained() for index in range(60))


def test_old_releases_are_withdrawn(outlet: Outlet) -> None:
    """An hour after they were replaced, and the newest two never."""
    for number in range(4):
        outlet.release(number, data(number))
        outlet.confirm()
    outlet.after(3599)
    outlet.confirm()
    assert [count(outlet, data(number)) for number in range(4)] == [5, 5, 5, 5]
    outlet.after(2)
    outlet.confirm()
    assert [count(outlet, data(number)) for number in range(4)] == [0, 0, 5, 5]
    assert [each.number for each in outlet.store.retained("points")] == [3, 2]
    assert outlet.out.retained_bytes() == len(data(2)) + len(data(3))


def test_the_budget_withdraws_before_the_hour(tmp_path: Path) -> None:
    """Retained bytes of a task stay below it, so that the broker's savings do not stall it."""
    outlet = Outlet(tmp_path, budget=3 * 5 * SIZE)
    for number in range(5):
        outlet.release(number, data(number))
        outlet.confirm()
    assert [count(outlet, data(number)) for number in range(5)] == [0, 0, 5, 5, 5]


def test_a_withdrawal_survives_a_restart(outlet: Outlet) -> None:
    """It is on record only once the broker has confirmed it; until then it is done again."""
    for number in range(3):
        outlet.release(number, data(number))
        outlet.confirm()
    outlet.after(3601)
    outlet.confirm(2)
    assert [each.number for each in outlet.store.retained("points")] == [2, 1, 0]
    again = Distribution(outlet.store, outlet.blobs, TOPICS, outlet.publish, outlet.limits, outlet.lost.append)
    assert outlet.task is not None
    again.resume([outlet.task], outlet.now)
    outlet.out = again
    outlet.after(0)
    outlet.confirm()
    assert count(outlet, data(0)) == 0
    assert [each.number for each in outlet.store.retained("points")] == [2, 1]


def test_chunks_that_another_release_names_stay(outlet: Outlet) -> None:
    """A rollback brings weights back: taking the old release away must not take them from the new one."""
    outlet.release(0, data(0))
    outlet.release(1, data(1))
    outlet.confirm()
    outlet.release(2, data(0))
    outlet.release(3, data(3))
    outlet.confirm()
    outlet.after(3601)
    outlet.confirm()
    assert [each.number for each in outlet.store.retained("points")] == [3, 2]
    assert [count(outlet, data(number)) for number in (0, 1, 3)] == [5, 0, 5]


def test_releases_without_chunks_are_let_go_silently(outlet: Outlet) -> None:
    """There is nothing to take away, so nothing waits for its hour."""
    for number in range(3):
        outlet.release(number, bytes([number]) * 10, 0)
    assert {payload for _, payload, _ in outlet.sent if not payload} == set()
    assert [each.number for each in outlet.store.retained("points")] == [2, 1]


@pytest.mark.parametrize("size", [0, SIZE])
def test_rows_of_old_releases_go(tmp_path: Path, size: int) -> None:
    """A task that runs for years is no dearer than a young one; what is kept or retained has its row."""
    outlet = Outlet(tmp_path, budget=6 * 5 * SIZE, keep=2)
    for number in range(40):
        outlet.release(number, data(number), size)
        outlet.confirm()
        assert outlet.out.retained_bytes() == (min(number + 1, 6) * len(data(0)) if size else 0)
    rows = [each.number for each in outlet.store.releases("points", 1, 100)]
    assert rows == ([39, 38, 37, 36, 35, 34] if size else [39, 38, 37, 36])


def test_a_wall_clock_that_was_set_does_not_stop_it(outlet: Outlet) -> None:
    """Set back by years, it looks again within the hour; it keeps releases longer, and never takes the newest."""
    for number in range(3):
        outlet.release(number, data(number))
        outlet.confirm()
    outlet.now = Instant(outlet.now.mono, outlet.now.utc - 10**8)
    outlet.after(3601)
    assert outlet.out.deadline is not None and outlet.out.deadline <= outlet.now.mono + 3601
    outlet.now = Instant(outlet.now.mono, outlet.now.utc + 10**8)
    outlet.after(3601)
    outlet.confirm()
    assert [each.number for each in outlet.store.retained("points")] == [2, 1]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_weights_do_not_go_out(outlet: Outlet, how: str) -> None:
    """Each piece is hashed before it is sent: what the disk spoilt is told, and no message names it."""
    outlet.room = 3
    weights = data(1, 8)
    outlet.release(0, weights)
    path = file_of(outlet.folder / "blobs", chunks.describe(weights, SIZE).sha256)
    spoil(path, how, 5 * SIZE)
    outlet.room = 10**9
    outlet.confirm()
    out = outlet.retained()
    whole = {topic(weights, index): weights[index * SIZE : (index + 1) * SIZE] for index in range(8)}
    assert out.items() <= whole.items()
    assert topic(weights, 5) not in out and task_release("points") not in out
    assert [each.task for each in outlet.lost] == ["points"]
    assert outlet.out._jobs == collections.deque()


@pytest.mark.parametrize("part", ["train", "eval", "weights"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_parts_do_not_go_out(outlet: Outlet, part: str, how: str) -> None:
    """Neither graphs nor small weights; and the daemon lives on."""
    outlet.release(0, b"x" * 100, 0)
    outlet.sent.clear()
    names = dict(zip(("train", "eval", "weights"), outlet.store.model("points", 1), strict=True))
    spoil(file_of(outlet.folder / "blobs", names[part]), how, 5)
    assert outlet.task is not None
    outlet.out.publish(outlet.task, outlet.now, announce=True)
    assert outlet.sent == []
    assert [each.task for each in outlet.lost] == ["points"]


def spoil(path: Path, how: str, at: int) -> None:
    """What a disk may do to a file."""
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[:at])
    else:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
