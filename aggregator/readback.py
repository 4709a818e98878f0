"""What the broker retains of us, as it says on every connection, and what follows for what we know ourselves. Pure.

    collecting --own status comes back, or PATIENCE s--> settled

A broker that was killed hard brings back older records, an emptied one none; a restored aggregator finds newer ones
than its own. That something seems absent and is not costs a repetition of the same bytes.
"""

from dataclasses import dataclass, field
from enum import Enum

from shared.messages import Release, ReleaseMessage, Signed, TaskManifest
from shared.signing import digest
from shared.trust import Position

PATIENCE = 10.0
"""Seconds for a broker that never sends our own status back."""
SKIP = 1000
"""Numbers that a restored aggregator leaves out: the broker may have forgotten what devices remember."""


class Standing(Enum):
    """Where the broker's record stands, seen from ours."""

    BEHIND = "behind"
    """Absent or older."""
    SAME = "same"
    AHEAD = "ahead"
    FORKED = "forked"
    """Another one in our place: we forgot that we made it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A verified release, on a task's own topic (`kept`) or a publisher's new one; its weights may come in chunks."""

    message: ReleaseMessage
    manifest: TaskManifest
    release: Release
    kept: bool
    offer: Signed | None = None
    """What is retained beside it."""

    @property
    def position(self) -> Position:
        """Among the releases of its task."""
        return Position((self.manifest.version, self.release.number), digest(self.message.release))


@dataclass
class ReadBack:
    """Everything found between a connection and the barrier. `due` is when patience ends (monotonic seconds)."""

    due: float
    releases: dict[str, Found] = field(default_factory=dict)
    offers: dict[str, Signed] = field(default_factory=dict)
    root: bool = False
    """Whether our own root is there."""

    def add(self, found: Found) -> None:
        """Keep it if it is the newest of its task."""
        known = self.releases.get(found.manifest.task)
        if known is None or found.position.rank >= known.position.rank:
            self.releases[found.manifest.task] = found


def standing(ours: Position | None, found: Position | None) -> Standing:
    """Compare a record of ours with the broker's."""
    if found is None:
        return Standing.BEHIND
    if ours is None or found.rank > ours.rank:
        return Standing.AHEAD
    if found.rank < ours.rank:
        return Standing.BEHIND
    return Standing.SAME if found.digest == ours.digest else Standing.FORKED


def skipped(last: int, rounds: int) -> int:
    """The round number to go on after, once numbers may have been forgotten; `last` itself when none is left."""
    left = rounds - last
    return last + min(SKIP, max(1, left // 2)) if left > 0 else last
