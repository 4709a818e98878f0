"""Releases that come in chunks: one at a time, the newest of a task, again after a while, accepted only when whole."""

from dataclasses import dataclass, field, replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from edge_agent import download
from edge_agent.download import (
    RETRY_FIRST,
    RETRY_MAX,
    AskRelease,
    ChunkArrived,
    Coming,
    Downloads,
    DownloadStarted,
    DownloadStopped,
    DropSpool,
    FinishSpool,
    OpenSpool,
    SpoolFailed,
    SpoolRead,
    Subscribe,
    Unsubscribe,
    Whole,
    WriteChunk,
)
from shared import chunks, signing, wire
from shared.errors import Reason, RemoteProtocolError
from shared.fetch import PATIENCE, WINDOW
from shared.messages import BlobRef, Release, ReleaseMessage, TaskManifest
from shared.trust import Position
from tests.records import Records, counted

RECORDS = Records()
SIZE = 100


def data(value: int) -> bytes:
    """A blob of 40 chunks."""
    return sha256(b"%d" % value).digest() * 125


def coming(task: str = "points", number: int = 1, blob: bytes | None = None, version: int = 1) -> Coming:
    """A verified release whose weights come in chunks."""
    manifest = RECORDS.manifest(task=task, version=version)
    signed = RECORDS.sign_manifest(manifest)
    ref = chunks.describe(data(number) if blob is None else blob, SIZE)
    release = RECORDS.release(signed, number, v=2, task=task, weights=ref)
    message = ReleaseMessage(2, signed, release, RECORDS.message().graphs, None)
    return Coming(
        task,
        message,
        wire.unpack(signed.payload, TaskManifest),
        wire.unpack(release.payload, Release),
        Position((version,), signing.digest(signed)),
        Position((version, number), signing.digest(release)),
    )


@dataclass
class Bench:
    """Downloads with a disk and a broker that do what is asked at once; `blobs` are what the broker holds."""

    machine: Downloads = field(default_factory=lambda: Downloads(counted()))
    now: float = 1000.0
    disk: dict[bytes, dict[int, bytes | bytearray]] = field(default_factory=dict)
    whole: set[bytes] = field(default_factory=set)
    asked: set[tuple[bytes, int]] = field(default_factory=set)
    told: list[download.Effect] = field(default_factory=list)
    accepted: list[Coming] = field(default_factory=list)
    full: bool = False
    """Whether the disk refuses."""
    fetched: int = 0

    def run(self, effects: list[download.Effect]) -> list[download.Effect]:
        """Carry effects out, and what follows from them."""
        for effect in effects:
            self.told.append(effect)
            match effect:
                case OpenSpool(task=task, blob=blob):
                    if blob.sha256 in self.whole:
                        self.event(Whole(task, blob.sha256))
                    elif self.full:
                        self.event(SpoolFailed(task, blob.sha256, "full"))
                    else:
                        held = self.disk.setdefault(blob.sha256, {})
                        missing = tuple(index for index in range(len(blob.chunks)) if index not in held)
                        self.event(SpoolRead(task, blob.sha256, missing))
                case Subscribe(blob=name, chunks=numbers):
                    self.asked |= {(name, index) for index in numbers}
                case Unsubscribe(blob=name, chunks=numbers):
                    self.asked -= {(name, index) for index in numbers}
                case WriteChunk(task=task, blob=name, index=index, payload=payload):
                    if self.full:
                        self.event(SpoolFailed(task, name, "full"))
                    else:
                        assert index not in self.disk[name], "fetched twice"
                        self.disk[name][index] = payload
                        self.fetched += 1
                case FinishSpool(task=task, blob=blob):
                    if len(self.disk[blob.sha256]) == len(blob.chunks):
                        self.whole.add(blob.sha256)
                        self.event(Whole(task, blob.sha256))
        return effects

    def event(self, event: download.Event) -> None:
        """Something happened."""
        if isinstance(event, Whole):
            found, then = self.machine.whole(event)
            self.accepted += [] if found is None else [found]
            self.run(then)
        else:
            self.run(self.machine.handle(event, self.now))

    def add(self, release: Coming) -> None:
        """A release is verified."""
        if self.machine.wants(release):
            self.run(self.machine.add(release))

    def deliver(self, source: bytes, count: int = 10_000) -> None:
        """The broker sends chunks of a blob that are subscribed to."""
        name = sha256(source).digest()
        for _ in range(count):
            waiting = sorted(index for blob, index in self.asked if blob == name)
            fresh = [index for index in waiting if index not in self.disk[name]]
            if not fresh or name in self.whole:
                return
            start, end = chunks.span(len(source), SIZE, fresh[0])
            self.event(ChunkArrived(name, fresh[0], source[start:end]))

    def connect(self) -> None:
        """A new connection, which knows of no subscription."""
        self.asked.clear()
        self.run(self.machine.connected(self.now))

    def after(self, seconds: float) -> None:
        """Time passes."""
        end = self.now + seconds
        while (due := self.machine.deadline) is not None and due <= end:
            self.now = max(self.now, due)
            self.run(self.machine.tick(self.now))
        self.now = end

    def settle(self, *sources: bytes) -> None:
        """All is well for hours: the broker sends what it is asked for."""
        for _ in range(300):
            self.after(30)
            for source in sources:
                self.deliver(source)

    def of(self, kind: type[download.Effect]) -> list[download.Effect]:
        """The effects of one kind."""
        return [each for each in self.told if isinstance(each, kind)]


def connected() -> Bench:
    """A bench with a connection."""
    bench = Bench()
    bench.connect()
    return bench


def test_accepted_when_whole() -> None:
    """The last chunk and the check of the whole come before it counts; nothing stays subscribed."""
    bench, release = connected(), coming()
    bench.add(release)
    bench.deliver(data(1), 39)
    assert bench.accepted == []
    assert bench.machine.progress == ("points", 39 * SIZE, len(data(1)))
    bench.deliver(data(1))
    assert bench.accepted == [release]
    assert bench.asked == set() and bench.machine.progress is None and bench.machine.deadline is None
    assert max(len(each.chunks) for each in bench.told if isinstance(each, Subscribe)) == WINDOW


def test_what_lies_whole_on_the_disk_is_not_fetched() -> None:
    """A rollback wants the weights of before, also without any connection."""
    bench, release = Bench(), coming()
    bench.whole.add(sha256(data(1)).digest())
    bench.add(release)
    assert bench.accepted == [release]
    assert bench.of(Subscribe) == []


def test_after_a_restart_only_what_is_missing() -> None:
    """The file of before is the memory: the new process asks for the rest."""
    bench = connected()
    bench.add(coming())
    bench.deliver(data(1), 25)
    again = Bench(disk=bench.disk)
    again.connect()
    again.add(coming())
    (started,) = again.of(DownloadStarted)
    assert isinstance(started, DownloadStarted) and started.missing == len(data(1)) - 25 * SIZE
    again.deliver(data(1))
    assert again.fetched == len(chunks.describe(data(1), SIZE).chunks) - 25
    assert len(again.accepted) == 1


def test_a_new_connection_asks_again() -> None:
    """For what was asked for and did not come."""
    bench = connected()
    bench.add(coming())
    bench.deliver(data(1), 3)
    bench.machine.disconnected()
    assert bench.machine.deadline is None
    bench.connect()
    assert len(bench.asked) == WINDOW
    bench.deliver(data(1))
    assert len(bench.accepted) == 1


def test_what_is_given_up_without_a_connection_is_unsubscribed_after_it() -> None:
    """The broker's session remembers what was subscribed to: nothing of it stays there for ever."""
    bench = connected()
    bench.add(coming())
    bench.deliver(data(1), 3)
    before = set(bench.asked)
    bench.machine.disconnected()
    bench.run(bench.machine.discard("points"))
    effects = bench.machine.connected(bench.now)
    assert {(each.blob, chunk) for each in effects if isinstance(each, Unsubscribe) for chunk in each.chunks} >= before
    assert bench.machine.connected(bench.now) == []


def test_a_withdrawal_that_nobody_asked_for() -> None:
    """An earlier process had asked: it is unsubscribed from, and no fault of anybody."""
    bench = connected()
    assert bench.machine.handle(ChunkArrived(bytes(32), 5, b""), bench.now) == [Unsubscribe(bytes(32), (5,))]


def test_a_newer_release_takes_over() -> None:
    """The older one is let go in the middle; what of it is still on its way is nobody's fault, a stranger's is."""
    bench = connected()
    bench.add(coming(number=1))
    bench.deliver(data(1), 5)
    bench.add(coming(number=2))
    assert {blob for blob, _ in bench.asked} == {sha256(data(2)).digest()}
    bench.event(ChunkArrived(sha256(data(1)).digest(), 7, data(1)[700:800]))
    with pytest.raises(RemoteProtocolError) as caught:
        bench.event(ChunkArrived(bytes(32), 0, b"x"))
    assert caught.value.reason is Reason.UNASKED
    bench.deliver(data(2))
    assert [each.release.number for each in bench.accepted] == [2]


def test_an_older_release_is_refused_while_a_newer_one_comes() -> None:
    """Until that one fails: then the older one is better than none."""
    bench = connected()
    bench.add(coming(number=2))
    with pytest.raises(RemoteProtocolError) as caught:
        bench.machine.wants(coming(number=1))
    assert caught.value.reason is Reason.ROLLBACK
    assert not bench.machine.wants(coming(number=2))
    bench.after(PATIENCE)
    assert bench.machine.wants(coming(number=1))


def test_what_is_not_wanted_leaves_no_file() -> None:
    """A release that is overtaken by a whole one gives its place on the disk back, once, before the next begins."""
    bench = Bench()
    bench.connect()
    bench.add(coming("points"))
    bench.add(coming("other", 2))
    effects = bench.run(bench.machine.discard("points"))
    drop, after = effects.index(DropSpool("points")), [type(each) for each in effects]
    assert drop < after.index(OpenSpool)
    assert bench.run(bench.machine.discard("points")) == []


def test_one_at_a_time() -> None:
    """A second task waits for its turn, so that memory and link are shared by no two downloads."""
    bench = connected()
    bench.add(coming("a", 1))
    bench.add(coming("b", 2))
    assert len(bench.of(OpenSpool)) == 1
    assert {blob for blob, _ in bench.asked} == {sha256(data(1)).digest()}
    bench.deliver(data(1))
    bench.deliver(data(2))
    assert [each.task for each in bench.accepted] == ["a", "b"]


def test_one_that_fails_does_not_hold_up_the_next() -> None:
    """While it rests, others have their turn."""
    bench = connected()
    bench.add(coming("a", 1))
    bench.add(coming("b", 2))
    bench.event(ChunkArrived(sha256(data(1)).digest(), 0, b""))
    assert [(task, number, until is None) for task, number, until in bench.machine.coming] == [
        ("a", 1, False),
        ("b", 2, True),
    ]
    bench.deliver(data(2))
    assert [each.task for each in bench.accepted] == ["b"]


@pytest.mark.parametrize("why", ["gone", "stalled", "storage"])
def test_what_fails_is_tried_again_ever_more_slowly(why: str) -> None:
    """Told with its reason, then the newest release is asked for, after a minute at first and an hour at last."""
    bench = connected()
    bench.full = why == "storage"
    bench.add(coming())
    waits = []
    for _ in range(9):
        if why == "gone":
            bench.event(ChunkArrived(sha256(data(1)).digest(), 2, b""))
        bench.after(PATIENCE if why == "stalled" else 0.0)
        stopped = bench.told[-1]
        assert isinstance(stopped, DownloadStopped) and stopped.why == why and stopped.retry is not None
        assert bench.asked == set()
        waits.append(stopped.retry)
        before = len(bench.of(AskRelease))
        bench.after(stopped.retry - 1)
        assert len(bench.of(AskRelease)) == before
        bench.after(1)
        assert len(bench.of(AskRelease)) == before + 1
    assert all(RETRY_FIRST * 2**turn * 0.5 <= wait or wait >= RETRY_MAX / 2 for turn, wait in enumerate(waits))
    assert max(waits) <= RETRY_MAX
    bench.full = False
    bench.settle(data(1))
    assert len(bench.accepted) == 1


def test_a_disk_that_fills_up_in_the_middle() -> None:
    """Several chunks fail at once and cost one rest; what was written before is kept."""
    bench = connected()
    bench.add(coming())
    bench.deliver(data(1), 10)
    bench.full = True
    name = sha256(data(1)).digest()
    effects = [
        each
        for index in (10, 11)
        for each in bench.machine.handle(ChunkArrived(name, index, data(1)[index * SIZE : (index + 1) * SIZE]), 0.0)
    ]
    bench.run(effects)
    assert len(bench.of(DownloadStopped)) == 1
    bench.full = False
    bench.settle(data(1))
    assert len(bench.accepted) == 1


def test_nothing_is_tried_without_a_connection() -> None:
    """A rest goes on until the broker is back."""
    bench = connected()
    bench.add(coming())
    bench.event(ChunkArrived(sha256(data(1)).digest(), 2, b""))
    bench.machine.disconnected()
    bench.after(10 * RETRY_MAX)
    assert bench.of(AskRelease) == []
    bench.connect()
    bench.after(0)
    assert len(bench.of(AskRelease)) == 1


def test_a_signer_who_contradicts_himself_is_not_asked_twice() -> None:
    """Right chunks of a wrong whole would be fetched in vain for ever."""
    bench = connected()
    good = chunks.describe(data(1), SIZE)
    release = coming()
    blob = BlobRef(b"x" * 32, good.size, good.chunk_size, good.chunks)
    lie = replace(release, release=structs.replace(release.release, weights=blob))
    bench.add(lie)
    bench.event(SpoolFailed("points", b"x" * 32, "not what was signed", spoilt=True))
    (stopped,) = bench.of(DownloadStopped)
    assert isinstance(stopped, DownloadStopped) and (stopped.why, stopped.retry) == ("spoilt", None)
    assert not bench.machine.wants(lie)
    assert bench.machine.wants(coming(number=2))


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["release", "chunks", "down", "up", "wait", "gone", "full", "room", "restart", "stray"]),
            st.integers(1, 4),
        ),
        max_size=40,
    )
)
def test_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Numbers accepted only rise, no chunk is fetched twice, and once all is well the newest release arrives."""
    bench, newest = connected(), 0
    accepted: list[Coming] = []
    for what, number in steps:
        match what:
            case "release" if number > newest:
                newest = number
                bench.add(coming(number=number))
            case "chunks":
                for each in range(1, 5):
                    bench.deliver(data(each), 9 * number)
            case "down":
                bench.machine.disconnected()
                bench.asked.clear()
            case "up":
                bench.connect()
            case "wait":
                bench.after(10.0**number)
            case "gone":
                for blob, index in sorted(bench.asked)[:1]:
                    bench.event(ChunkArrived(blob, index, b""))
            case "full" | "room":
                bench.full = what == "full"
            case "restart":
                accepted += bench.accepted
                bench = Bench(now=bench.now, disk=bench.disk, whole=bench.whole)
                bench.connect()
                if newest > max((each.release.number for each in accepted), default=0):
                    bench.add(coming(number=newest))
            case "stray":
                with pytest.raises(RemoteProtocolError):
                    bench.event(ChunkArrived(bytes(32), number, b"stray"))
    bench.full = False
    bench.connect()
    bench.settle(*(data(each) for each in range(1, 5)))
    numbers = [each.release.number for each in accepted + bench.accepted]
    assert numbers == sorted(set(numbers))
    assert not newest or numbers[-1] == newest
