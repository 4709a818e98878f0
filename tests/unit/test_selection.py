"""Selection: the same on both sides, uniform, and exactly as many as wanted."""

from hypothesis import given
from hypothesis import strategies as st

from shared.messages import PARTICIPATION_ALL
from shared.selection import draw, shard, threshold


def test_frozen_draws() -> None:
    """Devices in the field compute these numbers: they never change."""
    assert [draw("digits", 1, number, "dev-0") for number in (1, 2)] == [0x25258C48, 0x63B22EDA]
    assert [shard(name, 8) for name in ("dev-0", "dev-1")] == [0, 1]
    assert shard("dev-1", 1) == 0


@given(st.sets(st.integers(0, 2**32 - 1), max_size=50), st.integers(1, 60))
def test_threshold_admits_exactly_what_is_wanted(draws: set[int], want: int) -> None:
    """`want` of them, or everyone if there are no more."""
    participation = threshold(draws, want)
    admitted = [each for each in draws if each < participation]
    assert len(admitted) == min(want, len(draws))
    if len(draws) <= want:
        assert participation == PARTICIPATION_ALL


def test_every_part_decides() -> None:
    """Task, manifest version, round and device each make another draw."""
    base = draw("a", 1, 1, "d")
    assert len({base, draw("b", 1, 1, "d"), draw("a", 2, 1, "d"), draw("a", 1, 2, "d"), draw("a", 1, 1, "e")}) == 5


def test_draws_are_spread() -> None:
    """About a quarter of many devices is below a quarter of the range."""
    below = sum(draw("a", 1, 1, f"dev-{number}") < 2**30 for number in range(4000))
    assert 900 < below < 1100
