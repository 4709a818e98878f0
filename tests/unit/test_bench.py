"""The benchmark's report: goals are compared honestly, and nothing measured is lost on the way to table and JSON."""

import json

import pytest

from bench.report import Figure, Goal, document, table

FIGURES = [
    Figure("Round", "release to release", "s", (0.7, 0.4, 0.6), Goal("<=", 0.5)),
    Figure("Round", "bytes up", "MB", (4.01,)),
    Figure("Fold", "streaming", "GB", (10.0, 12.0), Goal(">=", 10.0)),
]


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        (Goal("<=", 45), 45.0, True),
        (Goal("<=", 45), 45.01, False),
        (Goal(">=", 10), 10.0, True),
        (Goal(">=", 10), 9.99, False),
    ],
)
def test_goal(goal: Goal, value: float, reached: bool) -> None:
    """A goal is reached at its bound and missed just beyond it."""
    assert goal.reached_by(value) is reached


def test_median_decides() -> None:
    """The median is held against the goal, not the best measurement; without a goal nothing is claimed."""
    assert [figure.median for figure in FIGURES] == [0.6, 4.01, 11.0]
    assert [figure.reached for figure in FIGURES] == [False, None, True]


def test_no_measurement() -> None:
    """A figure without a measurement cannot be made."""
    with pytest.raises(ValueError, match="no measurement"):
        Figure("Fold", "streaming", "GB", ())


def test_document() -> None:
    """The JSON holds every single measurement, the spread, the goal, and what ran where."""
    found = json.loads(json.dumps(document(FIGURES, {"commit": "abc"})))
    assert (found["format"], found["commit"], len(found["figures"])) == (1, "abc", 3)
    assert found["figures"][0] == {
        "group": "Round",
        "name": "release to release",
        "unit": "s",
        "median": 0.6,
        "min": 0.4,
        "max": 0.7,
        "values": [0.7, 0.4, 0.6],
        "goal": {"relation": "<=", "bound": 0.5},
        "reached": False,
    }
    assert found["figures"][1]["goal"] is None and found["figures"][1]["reached"] is None


def test_table() -> None:
    """One table a group, all its columns aligned, a missed goal in bold."""
    lines = table(FIGURES).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### Round", "### Fold"]
    first = [line for line in lines[: lines.index("### Fold")] if line.startswith("|")]
    assert len(first) == 4 and len({len(line) for line in first}) == 1
    assert [cell.strip() for cell in first[2].split("|")[1:-1]] == [
        "release to release",
        "0.6",
        "0.4 .. 0.7",
        "3",
        "s",
        "<= 0.5",
        "**no**",
    ]
    assert lines[-1].split("|")[-2].strip() == "yes"
