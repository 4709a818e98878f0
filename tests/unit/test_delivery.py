"""Updates on their way up: nothing unanswered is lost, nothing answered is sent, no chunk goes out unasked."""

from dataclasses import dataclass, field, replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import delivery
from edge_agent.delivery import (
    EXPIRED_KEPT,
    FLYING_MAX,
    RESEND_FIRST,
    RESEND_MAX,
    RESEND_SPREAD,
    SILENCE,
    WANTED_MAX,
    Delivery,
    DropUpdate,
    KeepUpdate,
    SendChunk,
    SendUpdate,
    Update,
)
from shared.errors import Reason, RemoteProtocolError
from tests.records import counted


def update(number: int = 1, task: str = "points", size: int = 1000, chunk_size: int = 10, version: int = 1) -> Update:
    """A sealed update; 100 chunks unless told otherwise."""
    head = f"{task} {version} {number}".encode()
    return Update(head.hex(), task, (version, number), head, sha256(head).digest(), 1, size, chunk_size, 10**6)


@dataclass
class Bench:
    """A delivery, and all that it wants done."""

    machine: Delivery = field(default_factory=lambda: Delivery("sensor-1", counted(), 4, 10_000))
    now: float = 1000.0
    effects: list[delivery.Effect] = field(default_factory=list)

    def tell(self, effects: list[delivery.Effect]) -> list[delivery.Effect]:
        """Note effects."""
        self.effects += effects
        return effects

    def after(self, seconds: float) -> list[delivery.Effect]:
        """Time passes; what was wanted meanwhile."""
        start, end = len(self.effects), self.now + seconds
        for _ in range(10_000):
            due = self.machine.deadline
            if due is None or due > end:
                self.now = end
                return self.effects[start:]
            self.now = max(self.now, due)
            self.tell(self.machine.tick(self.now))
        raise AssertionError("it wakes for ever without a reason")

    def missing(self, found: Update, *numbers: int) -> list[int]:
        """The aggregator asks for chunks; those that are sent at once."""
        return chunks_of(self.tell(self.machine.missing(found.digest, numbers, self.now)))

    def taken(self, found: Update, index: int, acknowledged: bool = True) -> list[int]:
        """The broker acknowledges a chunk; those that are sent then."""
        return chunks_of(self.tell(self.machine.taken(found.digest, index, acknowledged, self.now)))


def chunks_of(effects: list[delivery.Effect]) -> list[int]:
    """Numbers of the chunks sent."""
    return [each.index for each in effects if isinstance(each, SendChunk)]


def heads(effects: list[delivery.Effect]) -> list[Update]:
    """What heads were sent."""
    return [each.update for each in effects if isinstance(each, SendUpdate)]


def connected() -> Bench:
    """A bench whose broker is there."""
    bench = Bench()
    bench.tell(bench.machine.connected(bench.now))
    return bench


def test_it_is_stored_before_it_is_sent() -> None:
    """In this order, and at once."""
    bench = connected()
    assert [type(each) for each in bench.tell(bench.machine.keep(update(), bench.now))] == [KeepUpdate, SendUpdate]


def test_the_same_head_again_ever_more_slowly() -> None:
    """From 10 s to an hour, shortened by up to half, until somebody answers."""
    bench = connected()
    bench.machine.keep(update(), bench.now)
    gaps, last = [], bench.now
    for _ in range(14):
        due = bench.machine.deadline
        assert due is not None
        assert heads(bench.after(due - bench.now)) == [update()]
        gaps.append(bench.now - last)
        last = bench.now
    for turn, gap in enumerate(gaps):
        longest = min(RESEND_FIRST * 2**turn, RESEND_MAX)
        assert longest / 2 <= gap <= longest
    assert bench.machine.answered(update().digest) == update()
    assert bench.after(10 * RESEND_MAX) == []


def test_attempts_are_counted() -> None:
    """For the owner to see."""
    bench = connected()
    bench.tell(bench.machine.keep(update(), bench.now))
    bench.after(RESEND_FIRST)
    assert [each.attempt for each in bench.effects if isinstance(each, SendUpdate)] == [1, 2]


def test_nothing_without_a_broker() -> None:
    """It is stored all the same, and goes out when the broker is there."""
    bench = Bench()
    assert [type(each) for each in bench.machine.keep(update(), bench.now)] == [KeepUpdate]
    assert bench.machine.deadline is None
    bench.tell(bench.machine.connected(bench.now))
    assert heads(bench.after(RESEND_SPREAD)) == [update()]


def test_held_while_its_aggregator_is_away() -> None:
    """And sent within seconds when that is back, however long the back-off had become."""
    bench = connected()
    bench.machine.keep(update(), bench.now)
    bench.after(RESEND_MAX)
    bench.machine.aggregator(0, b"first", False, bench.now)
    assert bench.machine.deadline is None
    bench.machine.aggregator(0, b"second", True, bench.now)
    assert heads(bench.after(RESEND_SPREAD)) == [update()]


def test_an_aggregator_of_another_shard_does_not_matter() -> None:
    """Only the one that owns the update's shard can answer it."""
    bench = connected()
    bench.machine.keep(update(), bench.now)
    bench.machine.aggregator(7, b"other", False, bench.now)
    assert heads(bench.after(RESEND_FIRST)) == [update()]


def test_a_late_will_is_not_believed() -> None:
    """An aggregator that restarted at once is there, whatever its earlier life left."""
    bench = connected()
    bench.machine.aggregator(0, b"second", True, bench.now)
    bench.machine.aggregator(0, b"first", False, bench.now)
    assert heads(bench.machine.keep(update(), bench.now)) == [update()]


def test_a_restarted_aggregator_is_sent_the_head() -> None:
    """Its new session tells that it forgot what it had asked for; the same session again tells nothing."""
    bench, found = connected(), update()
    bench.machine.aggregator(0, b"first", True, bench.now)
    bench.machine.keep(found, bench.now)
    bench.missing(found, *range(64))
    bench.machine.aggregator(0, b"first", True, bench.now)
    assert heads(bench.after(RESEND_SPREAD)) == []
    bench.machine.aggregator(0, b"second", True, bench.now)
    assert bench.taken(found, 0) == []
    assert heads(bench.after(SILENCE)) == [found]


def test_the_memory_of_aggregators_is_bounded() -> None:
    """Topics with numbers cost no memory without end."""
    bench = connected()
    for number in range(2 * delivery.AGGREGATORS_MAX):
        bench.machine.aggregator(number, b"session", True, bench.now)
    assert len(bench.machine._aggregators) == delivery.AGGREGATORS_MAX


def test_exactly_the_chunks_that_were_asked_for() -> None:
    """Each once, in the order asked, at most a window of them unacknowledged."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    asked = list(range(3, 64, 2))
    sent = bench.missing(found, *asked)
    assert sent == asked[:FLYING_MAX]
    for index in list(asked):
        sent += bench.taken(found, index)
    assert sent == asked
    assert bench.missing(found, 5) == [5]


def test_what_is_in_flight_is_not_sent_twice() -> None:
    """The link sends it by itself until the broker has it; asked for again after that, it goes out again."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    assert bench.missing(found, 1, 2) == [1, 2]
    assert bench.missing(found, 1, 2, 3) == [3]
    bench.taken(found, 1)
    assert bench.missing(found, 1) == [1]


def test_an_upload_goes_on_over_a_new_connection() -> None:
    """What was asked for needs no new head: on a link that is cut every few seconds that would be most of the time."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    bench.missing(found, *range(40))
    bench.machine.disconnected()
    assert bench.taken(found, 0) == []
    assert chunks_of(bench.tell(bench.machine.connected(bench.now))) == [FLYING_MAX]
    assert heads(bench.after(RESEND_SPREAD)) == []


def test_chunks_that_could_not_be_sent_are_left_to_the_aggregator() -> None:
    """The queue to the broker was full: the head goes out again later, and nothing spins."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    sent = bench.missing(found, *range(20))
    turns = 0
    while sent:
        turns += 1
        sent += bench.taken(found, sent.pop(0), acknowledged=False)
    assert turns == 20
    assert heads(bench.after(RESEND_FIRST)) == [found]


def test_a_long_silence_frees_the_window() -> None:
    """If acknowledgements never come, the head is sent once more and the aggregator can ask anew."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    bench.missing(found, *range(40))
    assert heads(bench.after(SILENCE - 1)) == []
    assert heads(bench.after(1)) == [found]
    assert bench.missing(found, 0, 1) == [0, 1]


@pytest.mark.parametrize(
    ("digest", "numbers", "reason"),
    [
        (bytes(32), [0], Reason.UNASKED),
        (update().digest, [100], Reason.BAD_CHUNK),
        (update().digest, [0, 2**62], Reason.BAD_CHUNK),
        (update(2, size=10, chunk_size=0).digest, [0], Reason.BAD_CHUNK),
    ],
    ids=["unknown", "end", "beyond", "inline"],
)
def test_requests_for_what_is_not_here(digest: bytes, numbers: list[int], reason: Reason) -> None:
    """Unknown heads, numbers beyond the end and a body that rode along: a typed refusal, and nothing is sent."""
    bench = connected()
    bench.machine.keep(update(), bench.now)
    bench.machine.keep(update(2, size=10, chunk_size=0), bench.now)
    before = repr(list(bench.machine.waiting))
    with pytest.raises(RemoteProtocolError) as caught:
        bench.machine.missing(digest, numbers, bench.now)
    assert caught.value.reason is reason
    assert repr(list(bench.machine.waiting)) == before


def test_what_is_wanted_is_bounded() -> None:
    """However often somebody asks."""
    bench, found = connected(), update(size=100_000)
    bench.machine = Delivery("sensor-1", counted(), 4, 10**6)
    bench.machine.keep(found, bench.now)
    for start in range(0, 640, 64):
        bench.machine.missing(found.digest, range(start, start + 64), bench.now)
    assert [len(each.wanted) for each in bench.machine.waiting] == [WANTED_MAX]


def test_the_oldest_make_room() -> None:
    """By number and by bytes; the newest one always stays."""
    bench = connected()
    for number in range(1, 5):
        bench.tell(bench.machine.keep(update(number), bench.now))
    fifth = bench.machine.keep(update(5), bench.now)
    assert [(each.update.round, each.why) for each in fifth if isinstance(each, DropUpdate)] == [(1, "outbox_full")]
    large = bench.machine.keep(update(6, size=20_000), bench.now)
    assert [each.update.round for each in large if isinstance(each, DropUpdate)] == [2, 3, 4, 5]
    assert [each.update.round for each in bench.machine.waiting] == [6]


def test_what_can_count_no_more_is_dropped() -> None:
    """A newer round beyond the staleness, a newer manifest; other tasks and newer rounds stay."""
    bench = connected()
    first, second, other = update(1), update(2), update(1, task="other")
    for each in (first, second, other):
        bench.machine.keep(each, bench.now)
    assert bench.machine.outdated("points", (1, 2), 1) == []
    assert bench.machine.outdated("points", (1, 2), 0) == [DropUpdate(first, "round_over")]
    assert bench.machine.newest("points") == (1, 2)
    assert bench.machine.outdated("points", (2, 0), 5) == [DropUpdate(second, "round_over")]
    assert [each.update for each in bench.machine.waiting] == [other]


def test_an_expired_manifest() -> None:
    """What it asked for is held back and then dropped; a clock that jumped ahead for an hour costs nothing."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    assert bench.machine.expire(float(found.expires), bench.now) == []
    assert bench.after(3600) == []
    assert bench.machine.expire(float(found.expires) - 1, bench.now) == []
    assert heads(bench.after(RESEND_FIRST)) == [found]
    assert bench.machine.expire(float(found.expires), bench.now) == []
    bench.after(EXPIRED_KEPT)
    assert bench.machine.expire(float(found.expires), bench.now) == [DropUpdate(found, "expired")]


def test_a_body_that_is_lost() -> None:
    """Is told once and never sent again."""
    bench, found = connected(), update()
    bench.machine.keep(found, bench.now)
    assert bench.machine.lost(found.digest) == [DropUpdate(found, "storage")]
    assert bench.machine.lost(found.digest) == []
    assert bench.after(RESEND_MAX) == []


STEP = st.tuples(
    st.sampled_from(
        ["keep", "up", "down", "missing", "taken", "receipt", "wait", "crash", "away", "back", "lost chunk", "offer"]
    ),
    st.integers(0, 99),
)


@settings(max_examples=150)
@given(st.lists(STEP, max_size=60))
def test_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Unanswered updates stay and go out in the end, answered ones never do, only asked chunks do, and few heads."""
    bench = Bench()
    disk: dict[bytes, Update] = {}
    answered: set[bytes] = set()
    dropped: set[bytes] = set()
    allowed: dict[tuple[bytes, int], int] = {}
    number, wakes, started = 0, 0, bench.now

    def look(effects: list[delivery.Effect]) -> None:
        for effect in effects:
            digest = effect.update.digest
            match effect:
                case KeepUpdate():
                    disk[digest] = effect.update
                case SendUpdate():
                    assert digest in disk and digest not in answered
                case SendChunk(index=index):
                    assert digest in disk and digest not in answered
                    allowed[digest, index] -= 1
                    assert allowed[digest, index] >= 0, "nobody asked"
                case DropUpdate():
                    del disk[digest]
                    dropped.add(digest)
        assert sum(len(each.flying) for each in bench.machine.waiting) <= FLYING_MAX

    for what, value in steps:
        start = len(bench.effects)
        held = list(bench.machine.waiting)
        one = held[value % len(held)] if held else None
        match what:
            case "keep":
                number += 1
                bench.tell(bench.machine.keep(update(number), bench.now))
            case "up":
                wakes += 1
                bench.tell(bench.machine.connected(bench.now))
            case "down":
                bench.machine.disconnected()
            case "missing" if one is not None:
                asked = sorted({value, (value * 7) % 100, (value * 13) % 100})
                for index in asked:
                    allowed[one.update.digest, index] = allowed.get((one.update.digest, index), 0) + 1
                bench.missing(one.update, *asked)
            case "taken" if one is not None and one.flying:
                bench.taken(one.update, min(one.flying))
            case "lost chunk" if one is not None and one.flying:
                bench.taken(one.update, min(one.flying), acknowledged=False)
            case "receipt" if one is not None:
                assert bench.machine.answered(one.update.digest) == one.update
                answered.add(one.update.digest)
                del disk[one.update.digest]
            case "offer":
                bench.tell(bench.machine.outdated("points", (1, max(1, number - 2)), 0))
            case "wait":
                bench.after(float(value))
            case "crash":
                bench.machine = Delivery("sensor-1", counted(), 4, 10_000)
                for each in disk.values():
                    bench.tell(bench.machine.resume(each, bench.now))
                wakes += 1
            case "away" | "back":
                wakes += 1
                bench.machine.aggregator(0, b"session", what == "back", bench.now)
        look(bench.effects[start:])
    assert {each.update.digest for each in bench.machine.waiting} == set(disk)
    for digest in disk:
        spent = [each for each in bench.effects if isinstance(each, SendUpdate) and each.update.digest == digest]
        asked_and_taken = sum(what in ("missing", "taken") for what, _ in steps)
        assert len(spent) <= 1 + wakes + asked_and_taken + (bench.now - started) / (RESEND_FIRST / 2)
    bench.machine.aggregator(0, b"another", True, bench.now)
    bench.tell(bench.machine.connected(bench.now))
    assert {each.digest for each in heads(bench.after(2 * SILENCE))} == set(disk)
    assert replace(update(), id="x").round == 1
