"""A message that kills the process: handled alone after a death, condemned after two more, and nothing else with it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import quarantine
from aggregator.quarantine import Quarantine, fingerprint
from shared.mqtt import Message


def message(name: str, payload: bytes = b"payload") -> Message:
    """As the link hands it over."""
    return Message(name, payload, retain=False, qos=1, mid=1, generation=0)


def named(event: Message | None) -> str | None:
    """What has no name is an event of another kind."""
    return None if event is None else event.topic


class Dead(Exception):
    """The process was killed."""


def work(found: Quarantine, batch: Sequence[Message | None], deadly: str = "") -> list[list[str]]:
    """One batch, as the driver works it; the deadly message ends the process while it is in hand."""
    portions = []
    for portion in found.portions(batch, named):
        names = ["-" if event is None else event.topic for event in portion]
        portions.append(names)
        if any(name == deadly and not found.holds(name) for name in names):
            raise Dead
    return portions


def messages(text: str) -> list[Message | None]:
    """A message for each letter, another event for each dash."""
    return [None if letter == "-" else message(letter) for letter in text]


def test_a_batch_is_worked_as_it_is(tmp_path: Path) -> None:
    """As long as nobody is suspect nothing is cut, and after it nothing is in hand."""
    found = Quarantine(tmp_path)
    assert work(found, messages("a-bc")) == [["a", "-", "b", "c"]]
    assert work(Quarantine(tmp_path), messages("a-bc")) == [["a", "-", "b", "c"]]


def test_an_event_of_another_kind_costs_no_note(tmp_path: Path) -> None:
    """A tick every second must not write to the disk."""
    found = Quarantine(tmp_path)
    before = (tmp_path / "in-hand").stat().st_mtime_ns
    work(found, messages("--"))
    assert (tmp_path / "in-hand").stat().st_mtime_ns == before


def test_after_a_death_what_was_in_hand_is_alone(tmp_path: Path) -> None:
    """In its place in the order; who lives through it is suspect no more."""
    with pytest.raises(Dead):
        work(Quarantine(tmp_path), messages("abc"), "b")
    found = Quarantine(tmp_path)
    assert work(found, messages("xab-cy")) == [["x"], ["a"], ["b"], ["-"], ["c"], ["y"]]
    assert work(found, messages("abc")) == [["a", "b", "c"]]


def test_two_deaths_alone_condemn(tmp_path: Path) -> None:
    """Not one, and not those beside it: then it is on the disk, and passes among the others to be refused."""
    for _ in range(3):
        found = Quarantine(tmp_path)
        assert len(found) == 0
        with pytest.raises(Dead):
            work(found, messages("abc"), "b")
    found = Quarantine(tmp_path)
    assert work(found, messages("abc"), "b") == [["a", "b"], ["c"]]
    assert found.holds("b") and not found.holds("a") and not found.holds("c")
    again = Quarantine(tmp_path)
    assert (len(again), again.holds("b")) == (1, True)
    assert work(again, messages("abc"), "b") == [["a", "b", "c"]]


def test_what_is_condemned_lies_in_a_file(tmp_path: Path) -> None:
    """A line that says what it was, then its bytes; without the file it is tried again."""
    for _ in range(3):
        with pytest.raises(Dead):
            work(Quarantine(tmp_path), [message("a", b"\0\n\xffbytes")], "a")
    work(Quarantine(tmp_path), [message("a", b"\0\n\xffbytes")])
    (file,) = (tmp_path / "quarantine").iterdir()
    head, _, payload = file.read_bytes().partition(b"\n")
    assert payload == b"\0\n\xffbytes"
    assert json.loads(head)["topic"] == "a"
    file.unlink()
    assert not Quarantine(tmp_path).holds("a")


def test_an_end_in_order_makes_nobody_suspect(tmp_path: Path) -> None:
    """A wrong setting or a stop in the middle of a batch is no message's fault."""
    found = Quarantine(tmp_path)
    with pytest.raises(Dead):
        work(found, messages("ab"), "a")
    found.close()
    assert work(Quarantine(tmp_path), messages("ab")) == [["a", "b"]]


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]\n", b'{"hand": 5}\n', b'{"suspects": [], "hand": []}\n', b"\xff\xfe\n"]
)
def test_a_torn_note(tmp_path: Path, note: bytes) -> None:
    """It says nothing, and that is all."""
    (tmp_path / "in-hand").write_bytes(note)
    assert work(Quarantine(tmp_path), messages("ab")) == [["a", "b"]]


def test_a_long_note_leaves_nothing_behind_a_short_one(tmp_path: Path) -> None:
    """They are written over each other."""
    with pytest.raises(Dead):
        work(Quarantine(tmp_path), messages("abcdefghijklmno"), "o")
    found = Quarantine(tmp_path)
    work(found, messages("abcdefghijklmno"))
    with pytest.raises(Dead):
        work(found, messages("x"), "x")
    assert work(Quarantine(tmp_path), messages("axb")) == [["a"], ["x"], ["b"]]


def test_the_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files and in bytes: the oldest makes way, and may be tried again."""
    monkeypatch.setattr(quarantine, "_FILES_MAX", 3)
    monkeypatch.setattr(quarantine, "_BYTES_MAX", 1000)
    for name, size in (("a", 10), ("b", 10), ("c", 10), ("d", 10), ("e", 900)):
        for _ in range(3):
            with pytest.raises(Dead):
                work(Quarantine(tmp_path), [message(name, bytes(size))], name)
        work(Quarantine(tmp_path), [message(name, bytes(size))])
    found = Quarantine(tmp_path)
    assert [name for name in "abcde" if found.holds(name)] == ["d", "e"]


def test_a_name_is_cheap_and_its_own() -> None:
    """Topic, length, beginning and end tell messages apart; the middle of a large one is not read."""
    large = bytes(1 << 20)
    names = {
        fingerprint(message("a", large)),
        fingerprint(message("b", large)),
        fingerprint(message("a", large + b"\0")),
        fingerprint(message("a", b"\1" + large[1:])),
        fingerprint(message("a", large[1:] + b"\1")),
        fingerprint(message("a", b"")),
    }
    assert len(names) == 6
    assert fingerprint(message("a", large)) == fingerprint(message("a", bytes(1 << 20)))


@settings(max_examples=100)
@given(st.sets(st.sampled_from("abcdefgh")), st.integers(1, 8), st.data())
def test_whatever_kills_the_others_get_through(
    tmp_path_factory: pytest.TempPathFactory, deadly: set[str], size: int, data: st.DataObject
) -> None:
    """Any may be deadly: after a bounded number of deaths all others were handled, each deadly one condemned."""
    state = tmp_path_factory.mktemp("state")
    left, deaths, handled = list("abcdefgh"), 0, set[str]()
    found = Quarantine(state)
    while left:
        # The broker gives out what was not acknowledged, in order, as many as it likes.
        batch = left[: data.draw(st.integers(1, size))]
        try:
            for portion in found.portions(messages("".join(batch)), named):
                for event in portion:
                    assert event is not None
                    if event.topic in deadly and not found.holds(event.topic):
                        raise Dead
                    handled.add(event.topic)
                for event in portion:
                    left.remove(event.topic)  # type: ignore[union-attr]
        except Dead:
            deaths += 1
            found = Quarantine(state)
    assert handled == set("abcdefgh")
    assert {name for name in "abcdefgh" if found.holds(name)} == deadly
    assert deaths <= 3 * len(deadly)
