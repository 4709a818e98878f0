"""Updates put together from chunks: exact, bounded whatever anybody sends, and nobody waits for ever."""

import tracemalloc
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aggregator.reassembler import Bounds, Reassembler, Step
from shared.chunks import CHUNK_MIN
from shared.errors import Reason, RemoteProtocolError
from shared.messages import MISSING_MAX

KIB = 1 << 10
SMALL = Bounds(updates=3, size=24 * KIB, device_updates=2, device_size=16 * KIB, waiting=4, asked=18)


def begin(found: Reassembler[str], device: str, name: str, parts: int, now: float = 0.0) -> Step[str]:
    """An update of so many chunks, the last one a byte short."""
    return found.begin(device, name, f"{device}/{name}", parts * CHUNK_MIN - 1, CHUNK_MIN, now)


def data(name: str, index: int, parts: int) -> bytes:
    """What belongs into a chunk."""
    return bytes([ord(name[-1]) ^ index & 0xFF]) * (CHUNK_MIN - (index == parts - 1))


def refused(found: Reassembler[str], *arguments: object) -> Reason:
    """Why a chunk is not taken."""
    with pytest.raises(RemoteProtocolError) as caught:
        found.take(*arguments)  # type: ignore[arg-type]
    return caught.value.reason


def test_any_order_makes_the_same_bytes() -> None:
    """Chunks are written where they belong, the last one shorter."""
    found = Reassembler[str](Bounds())
    assert begin(found, "a", "x", 3).asks == [("a/x", [0, 1, 2])]
    assert found.take("a", "x", 2, data("x", 2, 3), 0.0) == Step()
    assert found.take("a", "x", 0, memoryview(data("x", 0, 3)), 0.0) == Step()
    step = found.take("a", "x", 1, data("x", 1, 3), 0.0)
    assert step.whole is not None
    assert step.whole[0] == "a/x"
    assert bytes(step.whole[1]) == b"".join(data("x", each, 3) for each in range(3))
    assert (found.collecting, found.size, found.holds("a"), found.deadline) == (0, 0, False, None)


def test_no_more_than_64_are_asked_for_and_more_at_half() -> None:
    """The window is filled again when half of it has come."""
    found = Reassembler[str](Bounds())
    assert begin(found, "a", "x", 200).asks == [("a/x", list(range(64)))]
    steps = [found.take("a", "x", each, data("x", each, 200), 0.0) for each in range(64)]
    assert [number for number, step in enumerate(steps) if step.asks] == [31, 63]
    assert steps[31].asks == [("a/x", list(range(64, 96)))]


def test_many_updates_share_what_is_asked_for() -> None:
    """What may wait in the broker is bounded for all together; each goes on nevertheless."""
    found = Reassembler[str](Bounds(asked=100))
    for number in range(30):
        step = begin(found, f"d{number}", "x", 100)
    assert [len(numbers) for _, numbers in step.asks] == [4]


def test_unasked_chunks_are_not_taken() -> None:
    """Beyond the window, repeated, of another update, of another device; also once it is whole."""
    found = Reassembler[str](Bounds())
    begin(found, "a", "x", 100)
    found.take("a", "x", 5, data("x", 5, 100), 0.0)
    chunk = bytes(CHUNK_MIN)
    assert refused(found, "a", "x", 64, chunk, 0.0) is Reason.UNASKED
    assert refused(found, "a", "x", 5, chunk, 0.0) is Reason.UNASKED
    assert refused(found, "a", "y", 0, chunk, 0.0) is Reason.UNASKED
    assert refused(found, "b", "x", 0, chunk, 0.0) is Reason.UNASKED
    begin(found, "b", "z", 1)
    found.take("b", "z", 0, data("z", 0, 1), 0.0)
    assert refused(found, "b", "z", 0, data("z", 0, 1), 0.0) is Reason.UNASKED


@pytest.mark.parametrize("index", [100, 2**32, -1])
def test_numbers_that_no_chunk_has(index: int) -> None:
    """A number behind the end writes nowhere."""
    found = Reassembler[str](Bounds())
    begin(found, "a", "x", 100)
    assert refused(found, "a", "x", index, b"", 0.0) is Reason.BAD_CHUNK


@pytest.mark.parametrize("size", [0, 1, CHUNK_MIN - 1, CHUNK_MIN + 1, 10 * CHUNK_MIN])
def test_a_chunk_has_its_length(size: int) -> None:
    """Shorter or longer is refused, and the right one is still taken."""
    found = Reassembler[str](Bounds())
    begin(found, "a", "x", 100)
    assert refused(found, "a", "x", 3, bytes(size), 0.0) is Reason.BAD_CHUNK
    assert found.take("a", "x", 3, data("x", 3, 100), 0.0) == Step()


@pytest.mark.parametrize(
    ("size", "chunk", "reason"),
    [
        (SMALL.device_size + 1, CHUNK_MIN, Reason.TOO_LARGE),
        (2**62, 2**62, Reason.TOO_LARGE),
        (2**20, CHUNK_MIN - 1, Reason.BAD_CHUNK),
        (10, 9, Reason.BAD_CHUNK),
    ],
)
def test_what_could_never_be_collected(size: int, chunk: int, reason: Reason) -> None:
    """Larger than the room, or cut too finely: refused before anything is allocated."""
    found = Reassembler[str](SMALL)
    with pytest.raises(RemoteProtocolError) as caught:
        found.begin("a", "x", "item", size, chunk, 0.0)
    assert caught.value.reason is reason
    assert (found.collecting, found.waiting, found.holds("a")) == (0, 0, False)


def test_a_small_body_is_one_chunk() -> None:
    """Whatever size of a chunk its head names."""
    found = Reassembler[str](SMALL)
    assert found.begin("a", "x", "item", 10, 2**60, 0.0).asks == [("item", [0])]
    step = found.take("a", "x", 0, b"0123456789", 0.0)
    assert step.whole is not None and bytes(step.whole[1]) == b"0123456789"


def test_heads_alone_cost_no_memory() -> None:
    """A hundred updates of 5 MiB are announced: what they would need is not touched."""
    found = Reassembler[str](Bounds(updates=100))
    resident = _resident()
    for number in range(100):
        found.begin(f"d{number}", "x", "item", 5 << 20, CHUNK_MIN, 0.0)
    assert (found.collecting, found.size) == (100, 500 << 20)
    assert _resident() - resident < 50 << 20


def _resident() -> int:
    """Bytes of memory that this process really has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_heads_beyond_the_bounds_cost_no_memory() -> None:
    """However many come: the waiting room is bounded, for one device and for all."""
    found = Reassembler[str](SMALL)
    tracemalloc.start()
    for number in range(10_000):
        begin(found, f"d{number}", "x", 8)
    for number in range(10_000):
        begin(found, "same", f"{number}", 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.collecting, found.waiting, found.size) == (3, 4, 3 * (8 * KIB - 1))
    assert peak < 1 << 20


def test_who_finds_no_place_waits_its_turn() -> None:
    """In the order in which they came, a large one is not overtaken, and the same head again keeps its place."""
    found = Reassembler[str](SMALL)
    for device in "abc":
        begin(found, device, "x", 7)
    assert begin(found, "d", "x", 14) == begin(found, "e", "x", 1) == Step()
    assert begin(found, "d", "x", 14) == Step()
    assert found.again("d", "x", 0.0) == Step()
    assert found.again("z", "x", 0.0) is None

    def finish(device: str) -> Step[str]:
        return [found.take(device, "x", each, data("x", each, 7), 1.0) for each in range(7)][-1]

    assert finish("a").asks == []
    assert [item for item, _ in finish("b").asks] == ["d/x", "e/x"]
    assert found.waiting == 0


def test_a_device_has_its_share() -> None:
    """A third update of it waits for its own others, and keeps nobody else out."""
    found = Reassembler[str](SMALL)
    assert begin(found, "a", "x", 4).asks and begin(found, "a", "y", 4).asks
    assert begin(found, "a", "z", 4) == Step()
    assert begin(found, "b", "x", 4).asks
    for number in range(4):
        step = found.take("a", "x", number, data("x", number, 4), 0.0)
    assert [item for item, _ in step.asks] == ["a/z"]


def test_a_device_fills_no_waiting_room() -> None:
    """Its heads beyond its share are given up at once."""
    found = Reassembler[str](SMALL)
    for name in "abcd":
        assert begin(found, "a", name, 1).evicted == []
    assert begin(found, "a", "e", 1).evicted == ["a/e"]
    assert found.waiting == 2


def test_the_silent_make_way() -> None:
    """The one that was heard of least recently, once it has been silent for the patience, and only if one waits."""
    found = Reassembler[str](SMALL)
    for number, device in enumerate("abc"):
        begin(found, device, "x", 7, float(number))
    found.take("a", "x", 0, data("x", 0, 7), 20.0)
    assert begin(found, "d", "x", 7, 25.0) == Step()
    assert found.deadline == 31.0
    step = found.tick(31.0)
    assert (step.evicted, [item for item, _ in step.asks]) == (["b/x"], ["d/x"])
    assert found.tick(50.0) == Step()
    assert refused(found, "b", "x", 0, data("x", 0, 7), 50.0) is Reason.UNASKED


def test_heads_are_no_sign_of_life() -> None:
    """Sending one again costs nothing, so it must not keep a place."""
    found = Reassembler[str](SMALL)
    for device in "abc":
        begin(found, device, "x", 7)
    for now in (10.0, 20.0, 29.0):
        assert begin(found, "a", "x", 7, now).asks == [("a/x", list(range(7)))]
    found.take("b", "x", 0, data("x", 0, 7), 29.0)
    found.take("c", "x", 0, data("x", 0, 7), 29.0)
    assert begin(found, "d", "x", 7, 30.0).evicted == ["a/x"]


def test_a_trickle_keeps_no_place_for_ever() -> None:
    """After the time-out an update makes way for one that waits, however alive it is; alone it may go on."""
    found = Reassembler[str](replace(SMALL, updates=1))
    begin(found, "a", "x", 16)
    for number in range(12):
        assert found.take("a", "x", number, data("x", number, 16), number * 55.0).evicted == []
    assert begin(found, "b", "x", 1, 606.0).evicted == ["a/x"]


def test_the_silent_are_asked_again_and_given_up() -> None:
    """After a minute what was asked for is asked for again; after ten minutes of silence there is no update."""
    found = Reassembler[str](Bounds())
    begin(found, "a", "x", 3)
    found.take("a", "x", 1, data("x", 1, 3), 10.0)
    assert found.deadline == 70.0
    assert found.tick(69.0) == Step()
    assert found.tick(70.0).asks == [("a/x", [0, 2])]
    assert found.deadline == 130.0
    assert found.tick(610.0).evicted == ["a/x"]
    assert found.deadline is None


def test_a_deadline_is_met_at_its_very_moment() -> None:
    """Whatever is lost in rounding: a tick at the deadline does what it was for, and the daemon does not turn idly."""
    for now in (1462.8645133415284, *(number / 7 for number in range(1000, 2000))):
        found = Reassembler[str](Bounds())
        begin(found, "a", "x", 3, now)
        while found.deadline is not None:
            assert found.tick(found.deadline) != Step()


def test_what_is_not_wanted_any_more_is_dropped() -> None:
    """Collected or waiting; those that waited for its room begin."""
    found = Reassembler[str](SMALL)
    for device in "abcde":
        begin(found, device, "x", 8)
    step = found.drop(lambda item: item[0] in "ad", 1.0)
    assert (step.dropped, [item for item, _ in step.asks]) == (["a/x", "d/x"], ["e/x"])


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyz"), st.integers(1, 16)),
        unique_by=lambda each: each[:2],
    ),
    st.randoms(use_true_random=False),
)
def test_everybody_gets_through(updates: list[tuple[str, str, int]], dice: object) -> None:
    """If devices send what they are asked for, and their head again when they hear nothing, every update gets whole."""
    found = Reassembler[str](SMALL)
    parts = {f"{device}/{name}": (device, name, count) for device, name, count in updates}
    left, now = dict(parts), 0.0
    queue: list[tuple[str, int]] = []
    for _ in range(1000):
        if not left:
            break
        now += 10.0
        steps = [begin(found, *parts[item], now) for item in list(left)]
        while steps or queue:
            for step in steps:
                queue += [(item, number) for item, numbers in step.asks for number in numbers]
            dice.shuffle(queue)  # type: ignore[attr-defined]
            item, number = queue.pop() if queue else ("", 0)
            steps = []
            if item in left:
                device, name, count = parts[item]
                try:
                    steps = [found.take(device, name, number, data(name, number, count), now)]
                except RemoteProtocolError as error:
                    assert error.reason is Reason.UNASKED
            if steps and steps[0].whole is not None:
                del left[item]
    assert left == {}


# -- against a model ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """One update as a naive reassembler would keep it."""

    parts: int
    asked: set[int] = field(default_factory=set)
    held: dict[int, bytes] = field(default_factory=dict)
    heard: float = 0.0
    began: float = 0.0


class Reassembling(RuleBasedStateMachine):
    """Whatever anybody sends, in whatever order: exact bytes, bounds that hold, and no update that just vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Reassembler[str](SMALL)
        self.now = 1000.0
        self.collecting: dict[str, Model] = {}
        self.waiting: dict[str, int] = {}

    def follow(self, step: Step[str], newcomer: str = "", dropped: bool = False) -> None:
        """Hold a step against the model, and the model to it."""
        for item in step.evicted:
            if item in self.collecting:
                model = self.collecting.pop(item)
                silent, took = self.now - model.heard, self.now - model.began
                assert silent >= SMALL.patience or took >= SMALL.timeout
            else:
                assert item == newcomer
                device = item[0]
                assert len(self.waiting) == SMALL.waiting or sum(each[0] == device for each in self.waiting) == 2
        for item in step.dropped:
            assert dropped
            assert (self.collecting.pop(item, None) is not None) != (self.waiting.pop(item, None) is not None)
        if newcomer and newcomer not in step.evicted:
            self.waiting.setdefault(newcomer, int(newcomer.rpartition(" ")[2]))
        for item, numbers in step.asks:
            if item in self.waiting:
                self.collecting[item] = Model(self.waiting.pop(item), heard=self.now, began=self.now)
            model = self.collecting[item]
            assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(model.parts)) - model.held.keys()
            model.asked |= set(numbers)
            assert len(model.asked) <= MISSING_MAX

    @rule(device=st.sampled_from("abc"), name=st.sampled_from("xyz"), parts=st.sampled_from([1, 3, 7, 12, 16]))
    def head(self, device: str, name: str, parts: int) -> None:
        """A head comes, perhaps again."""
        item = f"{device}/{name} {parts}"
        known = item in self.collecting or item in self.waiting
        step = self.found.begin(device, f"{name}{parts}", item, parts * CHUNK_MIN - 1, CHUNK_MIN, self.now)
        if known:
            assert step.evicted == [] and [each for each, _ in step.asks] == [item] * (item in self.collecting)
            if step.asks:
                assert set(step.asks[0][1]) >= self.collecting[item].asked
        self.follow(step, "" if known else item)

    @precondition(lambda self: self.collecting)
    @rule(pick=st.randoms(use_true_random=False), honest=st.integers(0, 5))
    def chunk(self, pick: object, honest: int) -> None:
        """A chunk comes: mostly one that was asked for, else any number and any length."""
        item = pick.choice(sorted(self.collecting))  # type: ignore[attr-defined]
        model = self.collecting[item]
        number = pick.choice(sorted(model.asked)) if honest else pick.randrange(-1, 20)  # type: ignore[attr-defined]
        right = data("x", number, model.parts)
        payload = right if honest else bytes(pick.choice([0, 5, len(right), len(right) + 1]))  # type: ignore[attr-defined]
        device, name, size = item[0], item[2] + item.rpartition(" ")[2], self.found.size
        if number not in model.asked or len(payload) != len(right):
            reason = Reason.BAD_CHUNK if number in model.asked or not 0 <= number < model.parts else Reason.UNASKED
            assert refused(self.found, device, name, number, payload, self.now) is reason
            assert self.found.size == size
            return
        step = self.found.take(device, name, number, payload, self.now)
        model.asked.remove(number)
        model.held[number] = payload
        model.heard = self.now
        assert (step.whole is not None) == (len(model.held) == model.parts)
        if step.whole is not None:
            del self.collecting[item]
            assert step.whole[0] == item
            assert bytes(step.whole[1]) == b"".join(model.held[each] for each in range(model.parts))
        self.follow(step)

    @rule(seconds=st.sampled_from([1.0, 10.0, 29.0, 61.0, 300.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, with a tick at each deadline on the way, as the driver does it."""
        end = self.now + seconds
        while (due := self.found.deadline) is not None and due <= end:
            assert due >= self.now
            self.now = due
            self.follow(self.found.tick(self.now))
            assert self.found.deadline is None or self.found.deadline > self.now
        self.now = end

    @rule(device=st.sampled_from("abc"))
    def drop(self, device: str) -> None:
        """A device is not wanted any more."""
        self.follow(self.found.drop(lambda item: item[0] == device, self.now), dropped=True)
        assert not any(item[0] == device for item in [*self.collecting, *self.waiting])
        assert not self.found.holds(device)

    @invariant()
    def agrees(self) -> None:
        """The model has the same updates, and nobody has more than the bounds."""
        sizes = [model.parts * CHUNK_MIN - 1 for model in self.collecting.values()]
        assert (self.found.collecting, self.found.waiting) == (len(self.collecting), len(self.waiting))
        assert self.found.size == sum(sizes) <= SMALL.size
        assert len(sizes) <= SMALL.updates and len(self.waiting) <= SMALL.waiting
        for device in "abc":
            own = [model.parts * CHUNK_MIN - 1 for item, model in self.collecting.items() if item[0] == device]
            assert len(own) <= SMALL.device_updates and sum(own) <= SMALL.device_size
            assert self.found.holds(device) == any(item[0] == device for item in [*self.collecting, *self.waiting])

    @invariant()
    def somebody_is_always_asked(self) -> None:
        """An update that is collected misses something that it was asked for: it cannot get stuck."""
        assert all(model.asked for model in self.collecting.values())


Reassembling.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestReassembling = Reassembling.TestCase
