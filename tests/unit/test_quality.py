"""edge_agent.quality: when a release is clearly worse on this device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.jobs import Judged
from edge_agent.quality import Quality, refusal
from shared.messages import RISING, Metric

QUALITY = Quality(refuse=True, drop=0.05, ratio=1.25, examples=20)


def judged(metric: str, now: float | None, before: float | None, examples: int = 20) -> Judged:
    """What the trainer found."""
    tables = [{} if value is None else {metric: value} for value in (now, before)]
    return Judged("j", examples, tables[0], tables[1])


@pytest.mark.parametrize(
    ("metric", "now", "before", "worse"),
    [
        ("accuracy", 0.86, 0.9, False),
        ("accuracy", 0.84, 0.9, True),
        ("binary_accuracy", 0.5, 0.9, True),
        ("loss", 1.25, 1.0, False),
        ("loss", 1.26, 1.0, True),
        ("rmse", 20.0, 10.0, True),
        ("rmse", 5.0, 10.0, False),
        ("loss", 1.0, 0.0, False),
        ("loss", -1.0, -2.0, False),
        ("loss", None, 1.0, True),
        ("loss", 1.0, None, False),
        ("loss", None, None, False),
    ],
)
def test_clearly_worse(metric: Metric, now: float | None, before: float | None, worse: bool) -> None:
    """An accuracy by a difference, an error by a ratio; a release whose error is no number is worse than any."""
    why = refusal(QUALITY, metric, judged(metric, now, before))
    assert (why is not None) is worse
    assert why is None or (metric in why and "20 local examples" in why)


def test_few_examples_say_nothing() -> None:
    """Nor does a device with no hold-out at all."""
    assert refusal(QUALITY, "accuracy", judged("accuracy", 0.0, 1.0, 19)) is None
    assert refusal(QUALITY, "accuracy", judged("accuracy", None, 1.0, 0)) is None


@given(st.sampled_from(["accuracy", "loss"]), st.floats(0, 1), st.floats(0, 1))
def test_no_release_is_worse_than_itself(metric: Metric, one: float, other: float) -> None:
    """And of two releases at most one is clearly worse than the other."""
    assert refusal(QUALITY, metric, judged(metric, one, one)) is None
    both = [refusal(QUALITY, metric, judged(metric, *pair)) for pair in ((one, other), (other, one))]
    assert None in both
    better = max if metric in RISING else min
    assert refusal(QUALITY, metric, judged(metric, better(one, other), one)) is None
