"""The contract of one round: who is admitted, what closes it, when it is extended. Pure.

    open --goal reached--------------------------------> closing
    open --deadline, at least min_updates---------------> closing
    open --deadline, fewer--> open, extended (starved) --min_updates--> closing

Extensions double from the plan's deadline up to its max_extension, and never beyond the manifest's end, so a round
never hangs silently and never gives up what was contributed. Ending it (released, superseded, finished ...) is the
coordinator's part.
"""

import math
from dataclasses import dataclass, field

from shared.errors import Reason
from shared.messages import Outcome, Plan
from shared.selection import draw, threshold


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a head."""

    outcome: Outcome
    reason: str = ""


DUPLICATE = Verdict(Outcome.DUPLICATE, Reason.DUPLICATE)
"""Another head of its device came first."""


@dataclass
class Round:
    """One open round. `deadline` is on the monotonic clock; `accepted` maps devices to the digest of their head."""

    task: str
    manifest_version: int
    number: int
    plan: Plan
    participation: int
    deadline: float
    opened: float
    """Unix time of the opening: certificates are judged at this moment."""
    extensions: int = 0
    accepted: dict[str, bytes] = field(default_factory=dict)
    sequence: int = 0
    """Of the contributions, in the order in which the fold adds them."""
    rejected: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Devices whose update was opened and does not count: the digest of its head, and why."""

    def selected(self, device: str) -> bool:
        """Whether this device may take part."""
        return draw(self.task, self.manifest_version, self.number, device) < self.participation

    def judge(self, device: str, head: bytes) -> Verdict | None:
        """What to answer to a head at once; None if its body is worth having.

        The first head of a device that was opened is its only one: the same again gets its first answer.
        """
        known, reason = self.accepted.get(device), ""
        outcome = Outcome.ACCEPTED
        if known is None and device in self.rejected:
            outcome, (known, reason) = Outcome.REJECTED, self.rejected[device]
        if known is not None:
            return Verdict(outcome, reason) if known == head else DUPLICATE
        if not self.selected(device):
            return Verdict(Outcome.NOT_SELECTED, Reason.NOT_SELECTED)
        return None

    def accept(self, device: str, head: bytes) -> int:
        """Count a device's update; returns its place in the fold."""
        self.accepted[device] = head
        self.sequence += 1
        return self.sequence

    def reject(self, device: str, head: bytes, reason: Reason) -> None:
        """Spend a device's turn on an update that does not count."""
        self.rejected[device] = (head, reason.value)

    @property
    def want(self) -> int:
        """Devices to select: the goal and some more, because some will not deliver; twice as many at each extension.

        So devices that are there and never deliver cannot hold a round up for ever.
        """
        return math.ceil(self.plan.goal * self.plan.over_select) << min(self.extensions, 32)

    def wider(self, live: set[str]) -> int:
        """The participation that selects `want` devices of those live now or done already; never below today's."""
        candidates = live | self.accepted.keys()
        draws = (draw(self.task, self.manifest_version, self.number, device) for device in candidates)
        return max(self.participation, threshold(draws, self.want))

    @property
    def full(self) -> bool:
        """Whether the goal is reached."""
        return len(self.accepted) >= self.plan.goal

    @property
    def enough(self) -> bool:
        """Whether the deadline may close it."""
        return len(self.accepted) >= self.plan.min_updates

    @property
    def starved(self) -> bool:
        """Whether a deadline has passed without enough updates."""
        return self.extensions > 0

    @property
    def complete(self) -> bool:
        """Whether what is in closes it at once: a round that starved waits for no more than it needs."""
        return self.full or (self.starved and self.enough)

    def extend(self, now: float, left: float = math.inf) -> float:
        """Move the deadline, by at most `left` seconds; returns the seconds added from `now`."""
        seconds = min(self.plan.deadline * 2.0 ** min(self.extensions, 40), float(self.plan.max_extension), left)
        self.extensions += 1
        self.deadline = now + seconds
        return seconds
