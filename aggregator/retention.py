"""Which releases' chunks stay on the broker and which are withdrawn. Pure.

The newest ones stay whatever they weigh; each other one at least for an hour after it was replaced, so that a device in
the middle of it can finish, unless the chunks of the task together are more than the broker is meant to hold. Of one
without chunks nothing is left to keep, once the next one has taken its topic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GRACE = 3600.0
"""Seconds for which a replaced release stays at least."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A release that is retained; `size` is of its chunks, `replaced_at` are Unix seconds, None for the newest."""

    manifest_version: int
    number: int
    size: int
    replaced_at: float | None


def withdrawals(kept: Sequence[Kept], now: float, keep: int, budget: int) -> tuple[list[Kept], float | None]:
    """Of a task's retained releases, newest first: those to withdraw now, and when to look again (Unix seconds).

    The newest `keep` always stay; `budget` are bytes.
    """
    gone: list[Kept] = []
    again: float | None = None
    total = sum(each.size for each in kept)
    for each in reversed(kept[keep:]):
        end = (now if each.replaced_at is None else each.replaced_at) + GRACE
        if end <= now or total > budget or not each.size:
            gone.append(each)
            total -= each.size
        else:
            again = end if again is None else min(again, end)
    return gone, again
