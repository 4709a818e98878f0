"""Updates in chunks from devices gone bad: what was not asked for, is not as signed or never ends."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from aggregator.broker import Broker
from shared import wire
from shared.messages import Missing, Outcome, Plan, Receipt, RoundOffer
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import until
from tests.hostile.records import JUNK, Device, Update, flip, update, values, wide
from tests.hostile.site import Site

WIDTH, CHUNK = 1000, 1024
DIMENSION = 3 * WIDTH
TASK, SHORT = "wide", "brief"
SILENCE, TIMEOUT = 3, 12
"""Seconds after which the aggregator asks again, and gives up."""
ZERO = "0" * 32


@pytest.fixture(scope="module")
def site(fleet: Fleet, broker: Broker) -> Iterator[Site]:
    """An aggregator with two wide tasks: one round for all, and a round that one update ends."""
    made = Site(fleet)
    config = fleet.folder / "aggregator" / "aggregator.toml"
    config.write_text(f"{config.read_text()}\n[limits]\nchunk_timeout = {SILENCE}\nupdate_timeout = {TIMEOUT}\n")
    with made.daemon:
        made.begin()
        brief = Plan(goal=1, min_updates=1, rounds=9, deadline=3600, over_select=9.0)
        made.task(TASK, model=wide(WIDTH), **records.of_width(WIDTH))
        made.task(SHORT, model=wide(WIDTH), plan=brief, **records.of_width(WIDTH))
        yield made
        assert [line["event"] for line in made.daemon.read()].count("daemon.started") == 1
        made.audit()
        assert made.daemon.stop() == 0
        made.daemon.read()


def large(device: Device, offered: RoundOffer, **changes: object) -> Update:
    """A good update in twelve chunks, unless told otherwise."""
    plain = {"delta": values(DIMENSION), "chunk": CHUNK, "context": {"dimension": DIMENSION}}
    return update(device, offered, **{**plain, **changes})  # type: ignore[arg-type]


@dataclass
class Upload:
    """A device's side of one update, over a connection of its own; used as a context."""

    site: Site
    device: Device
    made: Update
    asked: list[int] = field(default_factory=list)
    """All that the aggregator asked for so far, in order."""
    receipts: list[Receipt] = field(default_factory=list)

    def __enter__(self) -> "Upload":
        self.peer = Peer(self.site.fleet, self.site.fleet.device(self.device.name))
        assert self.peer.subscribe(f"fl/dev/{self.device.name}/cmd/+") < 128
        return self

    def __exit__(self, *error: object) -> None:
        self.peer.bye()

    def head(self) -> None:
        """Send the head."""
        self.put("head", self.made.payload)

    def put(self, part: int | str, payload: bytes, name: str | None = None) -> None:
        """Send a chunk, or anything below the device's name."""
        where = f"fl/up/0/{self.device.name}/{name or self.made.name}/{part}"
        assert self.peer.publish(where, payload) < 128

    def chunk(self, *numbers: int) -> None:
        """Send chunks as they should be."""
        for number in numbers:
            self.put(number, self.made.pieces[number])

    def hear(self) -> None:
        """Take what the aggregator has said."""
        for topic, payload in self.peer.fence():
            if topic.endswith("/missing"):
                said = wire.unpack(payload, Missing)
                assert said.head.hex().startswith(self.made.name)
                self.asked += said.chunks
            else:
                self.receipts.append(self.site.opened(payload))

    def until_asked(self, count: int) -> None:
        """Wait until so many chunks were asked for in all."""

        def found() -> bool | None:
            self.hear()
            return len(self.asked) >= count or None

        until(found, f"{count} chunks asked for")

    def answer(self) -> Receipt:
        """Wait for the receipt."""

        def found() -> Receipt | None:
            self.hear()
            return self.receipts[-1] if self.receipts else None

        return until(found, "a receipt")


def upload(site: Site, task: str = TASK, **changes: object) -> Upload:
    """A device that never did anything, with an update for a task's open round."""
    device = site.fresh()
    return Upload(site, device, large(device, site.offer(task), **changes))


def reasons(lines: list[dict[str, object]]) -> list[object]:
    """Why each line says something was refused; for other lines the event."""
    return [line.get("reason", line["event"]) for line in lines]


# -- a chunk that is refused costs nothing and changes nothing ----------------------------------------------------

ODD: dict[str, tuple[Callable[[Upload], object], str]] = {
    "truncated": (lambda u: u.put(3, u.made.pieces[3][:-1]), "bad_chunk"),
    "a_byte_too_long": (lambda u: u.put(3, u.made.pieces[3] + b"\0"), "bad_chunk"),
    "empty": (lambda u: u.put(3, b""), "bad_chunk"),
    "a_megabyte": (lambda u: u.put(3, bytes(1 << 20)), "bad_chunk"),
    "the_last_of_full_length": (lambda u: u.put(len(u.made.pieces) - 1, bytes(CHUNK)), "bad_chunk"),
    "repeated": (lambda u: u.chunk(0), "unasked"),
    "repeated_and_different": (lambda u: u.put(0, flip(u.made.pieces[0], 5)), "unasked"),
    "extra": (lambda u: u.put(len(u.made.pieces), bytes(CHUNK)), "bad_chunk"),
    "number_of_nine_digits": (lambda u: u.put(999_999_999, bytes(CHUNK)), "bad_chunk"),
    "number_2_32": (lambda u: u.put(2**32, bytes(CHUNK)), "topic"),
    "number_2_64": (lambda u: u.put(2**64, bytes(CHUNK)), "topic"),
    "number_below_0": (lambda u: u.put(-1, bytes(CHUNK)), "topic"),
    "number_with_a_zero_in_front": (lambda u: u.put("03", u.made.pieces[3]), "topic"),
    "number_in_other_digits": (lambda u: u.put("\u0663", u.made.pieces[3]), "topic"),
    "of_no_update": (lambda u: u.put(3, u.made.pieces[3], ZERO), "unasked"),
}
"""What is odd about a chunk in the midst of a good update, of which chunk 0 is there."""


@pytest.mark.parametrize("case", ODD)
def test_odd_chunk(site: Site, case: str) -> None:
    """It is refused in one line, and the update goes on with what is missing as if nothing had been."""
    send, reason = ODD[case]
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        made.chunk(0)
        before = site.snapshot()
        lines = site.provoke(lambda: send(made))
        assert [(line["event"], line["reason"]) for line in lines] == [("message.refused", reason)]
        assert site.snapshot() == before
        made.hear()
        assert made.asked == list(range(len(made.made.pieces))) and made.receipts == []
        made.chunk(*range(1, len(made.made.pieces)))
        assert made.answer().outcome is Outcome.ACCEPTED


def test_reordered_chunks(site: Site) -> None:
    """Chunks may come in any order."""
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        lines = site.provoke(lambda: made.chunk(*reversed(range(len(made.made.pieces)))))
        assert reasons(lines) == ["update.accepted"]
        assert made.answer().outcome is Outcome.ACCEPTED


def test_chunks_that_nobody_asked_for(site: Site) -> None:
    """A device that sends its chunks first, or all over again after its receipt, is not listened to."""
    with upload(site) as made:
        count = len(made.made.pieces)
        assert reasons(site.provoke(lambda: made.chunk(*range(count)))) == ["unasked"] * count
        made.head()
        made.until_asked(count)
        made.chunk(*range(count))
        assert made.answer().outcome is Outcome.ACCEPTED
        before = site.snapshot()
        assert reasons(site.provoke(lambda: made.chunk(*range(count)))) == ["unasked"] * count
        assert site.snapshot() == before


@pytest.mark.parametrize("junk", JUNK)
def test_junk_as_a_chunk(site: Site, junk: str) -> None:
    """A chunk has no form to be wrong in: junk is what nobody asked for."""
    before = site.snapshot()
    topic = f"fl/up/0/junk/{ZERO}/0"
    lines = site.provoke(lambda: site.whisper("junk", topic, JUNK[junk][0]))
    assert [(line["topic"], line["reason"]) for line in lines] == [(topic, "unasked")]
    assert site.snapshot() == before


# -- a body that is whole and still wrong -------------------------------------------------------------------------

SPOILT: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "flipped_bit": lambda pieces: [flip(pieces[0], 99), *pieces[1:]],
    "flipped_bit_at_the_end": lambda pieces: [*pieces[:-1], flip(pieces[-1], -1)],
    "two_in_each_others_place": lambda pieces: [pieces[1], pieces[0], *pieces[2:]],
    "one_in_the_place_of_another": lambda pieces: [pieces[1], pieces[1], *pieces[2:]],
    "zeros": lambda pieces: [bytes(len(piece)) for piece in pieces],
}
"""What chunks of the right lengths carry."""


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_body(site: Site, case: str) -> None:
    """Chunks that do not make the signed body are one rejection with a receipt, and the device may send it again."""
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        before = site.snapshot()

        def send() -> None:
            for number, piece in enumerate(SPOILT[case](made.made.pieces)):
                made.put(number, piece)

        lines = site.provoke(send)
        assert [(line["event"], line["reason"]) for line in lines] == [("update.rejected", "wrong_digest")]
        answer = made.answer()
        assert (answer.outcome, answer.reason) == (Outcome.REJECTED, "wrong_digest")
        assert site.snapshot() == before
        made.receipts.clear()
        made.head()
        made.until_asked(2 * len(made.made.pieces))
        made.chunk(*range(len(made.made.pieces)))
        assert made.answer().outcome is Outcome.ACCEPTED


def test_a_sealed_body_that_does_not_open(site: Site) -> None:
    """What was spoilt before it was signed counts as the device's say in this round, as one message would."""
    with upload(site, spoil=("body", 2000)) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        made.chunk(*range(len(made.made.pieces)))
        assert (made.answer().outcome, made.receipts[0].reason) == (Outcome.REJECTED, "sealed_badly")
        said = made.receipts.pop()
        made.head()
        assert made.answer() == said


# -- heads ---------------------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[dict[str, object], str]] = {
    "chunks_of_one_byte": ({"chunk_size": 1}, "bad_chunk"),
    "chunks_of_1023_bytes": ({"chunk_size": 1023}, "bad_chunk"),
    "a_body_of_2_62_bytes": ({"size": 2**62}, "too_large"),
    "2_32_chunks": ({"size": 2**42, "chunk_size": 1024}, "too_large"),
    "a_body_larger_than_the_model": ({"size": 40_000}, "too_large"),
}


@pytest.mark.parametrize("case", HEADS)
def test_bad_head(site: Site, case: str) -> None:
    """A head that announces what never could be taken is rejected before a byte of room is made."""
    changes, reason = HEADS[case]
    with upload(site, head=changes) as made:
        before = site.snapshot()
        lines = site.provoke(made.head)
        assert [(line["event"], line["reason"]) for line in lines] == [("update.rejected", reason)]
        answer = made.answer()
        assert (answer.outcome, answer.reason, made.asked) == (Outcome.REJECTED, reason, [])
        assert site.snapshot() == before


def test_a_chunk_as_large_as_can_be(site: Site) -> None:
    """A chunk size above the body's is one chunk, and costs no more than the body."""
    with upload(site, head={"chunk_size": 2**63 - 1}) as made:
        peak = site.daemon.peak()
        made.head()
        made.until_asked(1)
        assert made.asked == [0]
        made.put(0, made.made.body or b"")
        assert made.answer().outcome is Outcome.ACCEPTED
        assert site.daemon.peak() - peak < 16 << 20


@pytest.mark.parametrize("size", [CHUNK, 0])
def test_a_head_that_contradicts_its_message(site: Site, size: int) -> None:
    """A body in chunks does not ride along, and one that rides along is not asked for."""
    device = site.fresh()
    made = large(device, site.offer(TASK), chunk=0, head={"chunk_size": size, "v": 2 if size else 1})
    message = made.payload if size else records.edited(records.without(made.payload, "body"), v=2, body=None)
    topic = f"fl/up/0/{device.name}/{made.name}/head"
    before = site.snapshot()
    lines = site.provoke(lambda: site.whisper(device.name, topic, message))
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("message.refused", "unasked" if size else "missing_part")
    ]
    assert site.snapshot() == before


@pytest.mark.parametrize(("version", "size"), [(1, CHUNK), (2, 0)])
def test_a_head_of_another_version_than_it_needs(site: Site, version: int, size: int) -> None:
    """The same word has one form: a head says 2 if and only if its body comes in chunks."""
    device = site.fresh()
    made = large(device, site.offer(TASK))
    head = records.edited(made.head, v=version, chunk_size=size)
    bad = Update(head, made.signature, None, CHUNK)
    lines = site.provoke(lambda: site.whisper(device.name, f"fl/up/0/{device.name}/{bad.name}/head", bad.payload))
    assert reasons(lines) == ["wrong_type"]


# -- who never ends, and who begins too much -----------------------------------------------------------------------


def test_a_chunk_that_never_comes(site: Site) -> None:
    """Silence is asked about, then given up in one line; the same update may begin anew."""
    with upload(site) as made:
        count = len(made.made.pieces)
        before = site.snapshot()
        made.head()
        made.until_asked(count)
        made.chunk(*range(count - 1))
        start = len(site.daemon.read())
        made.until_asked(count + 1)
        assert made.asked[count:] == [count - 1]
        line = site.daemon.wait("update.evicted", start, device=made.device.name)
        assert line["task"] == TASK and made.receipts == []
        assert site.snapshot() == before
        assert reasons(site.provoke(lambda: made.chunk(count - 1))) == ["unasked"]
        made.asked.clear()
        made.head()
        made.until_asked(count)
        made.chunk(*range(count))
        assert made.answer().outcome is Outcome.ACCEPTED


def test_many_updates_of_one_device(site: Site) -> None:
    """A device has two updates in the making and two that wait; with its hundredth it takes no more from the others."""
    device, offered = site.fresh(), site.offer(TASK)
    many = [large(device, offered, context={"dimension": DIMENSION, "report": os.urandom(16)}) for _ in range(100)]
    peak, before = site.daemon.peak(), site.snapshot()
    with Peer(site.fleet, site.fleet.device(device.name)) as peer:
        assert peer.subscribe(f"fl/dev/{device.name}/cmd/missing") < 128

        def send() -> None:
            for each in many:
                assert peer.publish(f"fl/up/0/{device.name}/{each.name}/head", each.payload) < 128

        lines = site.provoke(send)
        asked = {wire.unpack(payload, Missing).head for _, payload in peer.fence()}
        peer.bye()
    assert len(asked) == 2
    assert [line["event"] for line in lines] == ["update.evicted"] * 96
    assert site.snapshot() == before
    assert site.daemon.peak() - peak < 16 << 20
    with upload(site) as other:
        other.head()
        other.until_asked(len(other.made.pieces))
        other.chunk(*range(len(other.made.pieces)))
        assert other.answer().outcome is Outcome.ACCEPTED


def test_denied_in_the_midst(site: Site) -> None:
    """A device that is put on the deny list while its chunks come does not count."""
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        deny = site.fleet.folder / "aggregator" / "deny.txt"
        deny.write_text(f"{deny.read_text()}{made.device.name}\n")
        before = site.snapshot()
        lines = site.provoke(lambda: made.chunk(*range(len(made.made.pieces))))
        assert reasons(lines) == ["denied"]
        assert (made.answer().outcome, made.receipts[0].reason) == (Outcome.REJECTED, "denied")
        assert site.snapshot() == before


def test_a_round_that_ends_in_the_midst(site: Site) -> None:
    """Whoever is in the midst of an update when the round ends hears at once that it is late."""
    offered = site.offer(SHORT)
    with upload(site, SHORT) as slow, upload(site, SHORT) as quick:
        for each in (slow, quick):
            each.head()
            each.until_asked(len(each.made.pieces))
        slow.chunk(0, 1)
        quick.chunk(*range(len(quick.made.pieces)))
        assert quick.answer().outcome is Outcome.ACCEPTED
        assert (slow.answer().outcome, slow.receipts[0].round) == (Outcome.LATE, offered.round)
        site.daemon.wait("round.opened", task=SHORT, round=offered.round + 1)
        before = site.snapshot()
        assert reasons(site.provoke(lambda: slow.chunk(2))) == ["unasked"]
        assert site.snapshot() == before


def test_a_second_update_in_the_midst(site: Site) -> None:
    """Two different updates of a device at once: the first that is whole counts, the other is a duplicate."""
    with upload(site) as first:
        other = large(first.device, site.offer(TASK), delta=values(DIMENSION, 0.02))
        first.head()
        first.until_asked(len(first.made.pieces))
        first.put("head", other.payload, other.name)
        first.chunk(*range(len(first.made.pieces)))

        def both() -> bool | None:
            for topic, payload in first.peer.fence():
                if topic.endswith("/receipt"):
                    first.receipts.append(site.opened(payload))
            return len(first.receipts) == 2 or None

        until(both, "two receipts")
        assert {each.head.hex()[:32]: each.outcome for each in first.receipts} == {
            first.made.name: Outcome.ACCEPTED,
            other.name: Outcome.DUPLICATE,
        }


def test_another_device_sends_the_chunks(site: Site) -> None:
    """Chunks below one's own name are of one's own update: another's cannot be completed or spoilt."""
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        other = site.fresh()
        topic = f"fl/up/0/{other.name}/{made.made.name}/0"
        assert reasons(site.provoke(lambda: site.whisper(other.name, topic, made.made.pieces[0]))) == ["unasked"]
        with Peer(site.fleet, site.fleet.device(other.name)) as peer:
            assert peer.publish(f"fl/up/0/{made.device.name}/{made.made.name}/0", made.made.pieces[0]) == 135
            peer.bye()
        made.chunk(*range(len(made.made.pieces)))
        assert made.answer().outcome is Outcome.ACCEPTED


def test_retained_junk_below_a_device(site: Site) -> None:
    """What a device leaves on the broker comes with every restart, is refused each time, and harms nobody."""
    device = site.fresh()
    topics = [f"fl/up/0/{device.name}/{ZERO}/{part}" for part in ("head", "0", "7", "x")]
    with Peer(site.fleet, site.fleet.device(device.name)) as peer:
        for topic in topics:
            assert peer.publish(topic, b"junk", True) < 128
        site.fence()
        site.audit()
        assert site.daemon.stop() == 0
        site.daemon.read()
        site.daemon.lines.clear()
        site.daemon.start()
        for topic in topics:
            site.daemon.wait("message.refused", topic=topic)
        for topic in topics:
            assert peer.publish(topic, b"", True) < 128
        peer.bye()
    site.fence()
    with upload(site) as made:
        made.head()
        made.until_asked(len(made.made.pieces))
        made.chunk(*range(len(made.made.pieces)))
        assert made.answer().outcome is Outcome.ACCEPTED


def test_chunks_cost_no_memory(site: Site) -> None:
    """After all that the aggregator is as small as it was meant to be."""
    assert site.daemon.peak() < 250 << 20
