"""What the reports on a release say of it: whether it is clearly worse than its parent, and whether the task is done.

Each update reports on the release that it started from, so round n's reports judge release n. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from shared.messages import RISING, Gate, Metric, Metrics, Plan


@dataclass(frozen=True, slots=True)
class Record:
    """The pooled metrics of one release and how many updates reported them."""

    metrics: Metrics
    reports: int


def reports(rows: Sequence[Mapping[str, float]], metric: Metric) -> int:
    """How many of the updates with these metrics say anything on what the task is judged by."""
    return sum(metric in row for row in rows)


def clearly_worse(gate: Gate, metric: Metric, parent: Record, found: Record) -> bool:
    """Whether the release that `found` tells of is clearly worse than its parent; never on few reports."""
    if min(parent.reports, found.reports) < gate.reporters:
        return False
    before, now = parent.metrics.get(metric), found.metrics.get(metric)
    if before is None or now is None:
        return False
    if metric in RISING:
        return before - now > gate.drop
    # Of nothing, or of what can be negative, there is no multiple.
    return before > 0 and now > gate.ratio * before


def reached(plan: Plan, metric: Metric, found: Record) -> bool:
    """Whether the release that `found` tells of is as good as the task wants it."""
    value = found.metrics.get(metric)
    if plan.until is UNSET or value is None or found.reports < plan.min_updates:
        return False
    return value >= plan.until if metric in RISING else value <= plan.until
