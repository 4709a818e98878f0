"""The figures of a benchmark run: medians with their spread beside the goals, as a table and as JSON. Pure.

A goal is reached by the median or it is not; nothing here rounds in our favour or leaves a figure out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be: at most, or at least, `bound` (in the figure's unit)."""

    relation: Literal["<=", ">="]
    bound: float

    def reached_by(self, value: float) -> bool:
        """Whether `value` is on the good side; a value exactly at the bound is."""
        return value <= self.bound if self.relation == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {_number(self.bound)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity; `values` are the single measurements, at least one."""

    group: str
    name: str
    unit: str
    values: tuple[float, ...]
    goal: Goal | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.name}: no measurement")

    @property
    def median(self) -> float:
        """The middle of the measurements."""
        return median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return None if self.goal is None else self.goal.reached_by(self.median)

    def as_json(self) -> dict[str, object]:
        """All that is known of it."""
        return {
            "group": self.group,
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "goal": None if self.goal is None else {"relation": self.goal.relation, "bound": self.goal.bound},
            "reached": self.reached,
        }


def document(figures: Sequence[Figure], about: Mapping[str, object]) -> dict[str, object]:
    """The report as it is written to report.json; `about` says what ran where (commit, machine, versions ...)."""
    return {"format": 1, **about, "figures": [figure.as_json() for figure in figures]}


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table for each group, in the order of the figures; widths are padded so that it reads as text too."""
    parts = []
    for group, members in groupby(figures, key=lambda figure: figure.group):
        rows = [("", "median", "min .. max", "n", "unit", "goal", "reached"), *map(_row, members)]
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        parts.append(f"### {group}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(figure: Figure) -> tuple[str, ...]:
    spread = "" if len(figure.values) == 1 else f"{_number(min(figure.values))} .. {_number(max(figure.values))}"
    reached = {None: "", True: "yes", False: "**no**"}[figure.reached]
    goal = "" if figure.goal is None else str(figure.goal)
    return figure.name, _number(figure.median), spread, str(len(figure.values)), figure.unit, goal, reached


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.ljust(width) if column in (0, 4) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    if value and abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
