"""The download of a blob: a bounded window, only what is missing, nothing that was not asked for."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import chunks
from shared.errors import Reason, RemoteProtocolError
from shared.fetch import PATIENCE, WINDOW, Fetch, Progress, Step

DATA = bytes(range(256)) * 40
SIZE = 100
BLOB = chunks.describe(DATA, SIZE)
COUNT = len(BLOB.chunks)


def piece(index: int) -> bytes:
    """The bytes of a chunk."""
    start, end = chunks.span(len(DATA), SIZE, index)
    return DATA[start:end]


@settings(max_examples=60)
@given(st.sets(st.integers(0, COUNT - 1), min_size=1), st.randoms(use_true_random=False), st.integers(1, 40))
def test_every_missing_chunk_comes_once(missing: set[int], random: object, cut: int) -> None:
    """In any order and with the link cut anywhere: each missing chunk is written once, the window is never exceeded."""
    fetch = Fetch(BLOB, missing, 0.0)
    subscribed = set(fetch.connected(0.0))
    written: list[int] = []
    progress = Progress.GOING
    turns = 0
    while progress is Progress.GOING:
        turns += 1
        if turns % cut == 0:
            fetch.disconnected()
            subscribed = set(fetch.connected(float(turns)))
        assert len(fetch._asked) <= WINDOW
        left = sorted(subscribed - set(written))
        index = left[turns * 7 % len(left)]
        step = fetch.arrived(index, piece(index), float(turns))
        written += [index] if step.write else []
        subscribed = (subscribed - set(step.unsubscribe)) | set(step.subscribe)
        progress = step.progress
    assert sorted(written) == sorted(missing)
    assert progress is Progress.DONE and fetch.left == 0


def test_the_window_slides_by_halves() -> None:
    """The next chunks are asked for when half of the window has come, so a link never runs dry."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    assert fetch.connected(0.0) == tuple(range(WINDOW))
    for index in range(WINDOW // 2 - 1):
        assert fetch.arrived(index, piece(index), 1.0).subscribe == ()
    step = fetch.arrived(WINDOW // 2 - 1, piece(WINDOW // 2 - 1), 1.0)
    assert step.unsubscribe == tuple(range(WINDOW // 2))
    assert step.subscribe == tuple(range(WINDOW, WINDOW + WINDOW // 2))


@pytest.mark.parametrize(
    ("index", "payload", "reason"),
    [(0, b"other", Reason.WRONG_DIGEST), (0, piece(1), Reason.WRONG_DIGEST), (90, piece(90), Reason.UNASKED)],
)
def test_what_does_not_belong_changes_nothing(index: int, payload: bytes, reason: Reason) -> None:
    """A chunk with other bytes, or one that nobody asked for, is refused and may still come right."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    fetch.connected(0.0)
    with pytest.raises(RemoteProtocolError) as caught:
        fetch.arrived(index, payload, 1.0)
    assert caught.value.reason is reason
    assert fetch.left == COUNT and fetch.deadline == PATIENCE
    assert fetch.arrived(0, piece(0), 1.0).write


def test_a_repeated_chunk_is_not_written_again() -> None:
    """The aggregator publishes chunks anew after a broker lost them; that is no fault."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    fetch.connected(0.0)
    assert fetch.arrived(3, piece(3), 1.0).write
    assert not fetch.arrived(3, piece(3), 2.0).write


def test_a_chunk_may_cross_with_its_unsubscribing() -> None:
    """What the broker had sent before it was told is no fault of anybody, and is not written again."""
    fetch = Fetch(BLOB, range(5, COUNT), 0.0)
    fetch.connected(0.0)
    steps = [fetch.arrived(index, piece(index), 1.0) for index in range(5, 5 + WINDOW // 2)]
    assert steps[-1].unsubscribe == tuple(range(5, 5 + WINDOW // 2))
    left = fetch.left
    for index in (0, 5, 5 + WINDOW // 2 - 1):
        assert fetch.arrived(index, piece(index), 2.0) == Step(False, (), (), Progress.GOING)
    assert fetch.left == left
    for index in (-1, COUNT - 1, COUNT):
        with pytest.raises(RemoteProtocolError):
            fetch.arrived(index, piece(index), 2.0)


def test_an_empty_payload_says_gone() -> None:
    """Then everything is unsubscribed, what came already included."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    fetch.connected(0.0)
    fetch.arrived(0, piece(0), 1.0)
    step = fetch.arrived(1, b"", 1.0)
    assert step.progress is Progress.GONE
    assert step.unsubscribe == tuple(range(WINDOW))


def test_what_came_before_a_cut_is_unsubscribed() -> None:
    """A durable session keeps subscriptions over a cut of the link, so they are taken back after it."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    fetch.connected(0.0)
    fetch.arrived(0, piece(0), 1.0)
    fetch.disconnected()
    fetch.connected(2.0)
    steps = [fetch.arrived(index, piece(index), 3.0) for index in range(1, WINDOW)]
    assert 0 in {index for step in steps for index in step.unsubscribe}


def test_patience_counts_only_while_connected() -> None:
    """A device without a link waits as long as that takes; with one, each chunk renews its patience."""
    fetch = Fetch(BLOB, range(COUNT), 0.0)
    fetch.connected(5.0)
    assert fetch.deadline == 5.0 + PATIENCE
    fetch.arrived(0, piece(0), 30.0)
    assert fetch.deadline == 30.0 + PATIENCE
    fetch.disconnected()
    assert fetch.deadline is None
    resumed: Sequence[int] = fetch.connected(1e6)
    assert 0 not in resumed and len(resumed) == WINDOW
    assert fetch.deadline == 1e6 + PATIENCE
