"""When a release is clearly worse than its parent, and when a task is done."""

from typing import Any

import pytest

from aggregator.gate import Record, clearly_worse, reached, reports
from shared.messages import Gate, Metric, Plan


def record(value: float | None, count: int = 5, name: str = "accuracy") -> Record:
    """What a release's record says."""
    return Record({} if value is None else {name: value}, count)


@pytest.mark.parametrize(
    ("metric", "before", "now", "worse"),
    [
        ("accuracy", 0.9, 0.65, False),
        ("accuracy", 0.9, 0.6, True),
        ("binary_accuracy", 0.5, 1.0, False),
        ("loss", 1.0, 2.0, False),
        ("loss", 1.0, 2.1, True),
        ("rmse", 5.0, 1.0, False),
        ("loss", 0.0, 9.0, False),
        ("loss", -1.0, 9.0, False),
        ("loss", None, 9.0, False),
        ("loss", 1.0, None, False),
    ],
)
def test_clearly_worse(metric: Metric, before: float | None, now: float | None, worse: bool) -> None:
    """A share falls by more than `drop`, an error grows to more than `ratio` times; nothing is judged by nothing."""
    gate = Gate(drop=0.25, ratio=2.0, reporters=3)
    assert clearly_worse(gate, metric, record(before, name=metric), record(now, name=metric)) is worse


@pytest.mark.parametrize(("parent", "found"), [(2, 3), (3, 2)])
def test_few_reporters_judge_nothing(parent: int, found: int) -> None:
    """One device's odd day takes no release back."""
    gate = Gate(reporters=3)
    assert clearly_worse(gate, "accuracy", record(0.9, 3), record(0.1, 3))
    assert not clearly_worse(gate, "accuracy", record(0.9, parent), record(0.1, found))


@pytest.mark.parametrize(
    ("metric", "until", "value", "count", "done"),
    [
        ("accuracy", 0.9, 0.9, 2, True),
        ("accuracy", 0.9, 0.89, 2, False),
        ("accuracy", 0.9, 1.0, 1, False),
        ("loss", 0.1, 0.1, 2, True),
        ("loss", 0.1, 0.11, 2, False),
        ("loss", 0.1, None, 2, False),
        ("accuracy", None, 1.0, 9, False),
    ],
)
def test_reached(metric: Metric, until: float | None, value: float | None, count: int, done: bool) -> None:
    """As good as `until`, by at least as many reports as make a release."""
    found: dict[str, Any] = {} if until is None else {"until": until}
    plan = Plan(goal=3, min_updates=2, rounds=5, deadline=60, **found)
    assert reached(plan, metric, record(value, count, metric)) is done


def test_reports_are_those_with_the_metric() -> None:
    """An update without a hold-out says nothing."""
    assert reports([{"accuracy": 1.0}, {}, {"loss": 1.0}], "accuracy") == 1
