"""What machines and the driver say to each other: the moment, and that a deadline has come. Never reads a clock."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment on both clocks: `mono` counts steadily and means nothing elsewhere, `utc` is Unix time."""

    mono: float
    utc: float


@dataclass(frozen=True, slots=True)
class Tick:
    """The machine's deadline has come."""
