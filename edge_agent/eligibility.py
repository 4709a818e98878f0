"""Whether this device may train now, and what stands in the way. Pure.

`DeviceFacts` are what was measured, `Policy` is the owner's word, `Conditions` the publisher's, which can only add to
it. `obstacles` judges one moment; `Gatekeeper` judges over time: a device is eligible after nothing stood in the way
for `settle` seconds, it stops at once for power, heat, the calendar and the operator, and for load only if that lasts
`patience` seconds.

A fact of None could not be measured. It blocks where a constraint was asked for that nothing else can judge (mains,
battery, free memory and disk, a temperature ceiling, CPU); it does not where the kernel may simply lack the source
(pressure of memory and I/O, trip points).

Our own trainer must not count as load. While it works, the CPU is judged by what *other* processes use of it
(/proc/stat less our own share), not by pressure, which would show our own threads waiting; I/O pressure, which our
own start-up causes, is not judged at all. Memory pressure always is: the device suffers whoever causes it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from edge_agent.calendar import Window, inside
from shared.config import Section
from shared.messages import Conditions

Percent = Annotated[float, Meta(ge=0.0, le=100.0)]
Seconds = Annotated[float, Meta(ge=0.0, le=31_536_000.0)]
Bytes = Annotated[int, Meta(ge=0, le=2**62)]


class Policy(Section, frozen=True):
    """The owner's word on when this device may train: section [policy]. A release may ask for more, never for less."""

    mains: bool = True
    """Train only on mains or while charging: nobody's battery is spent on training unasked."""
    min_battery: Percent = 20.0
    """Charge in percent, where there is a battery: a reserve for what the device is there for."""
    cpu_pressure: Percent = 20.0
    """Percent of the last 10 s in which some task waited for a CPU. 100 switches it off."""
    cpu_others: Percent = 50.0
    """Percent of all CPUs that others use; takes the place of cpu_pressure while our trainer works. 100 is off."""
    load: Annotated[float, Meta(ge=0.0, le=1000.0)] = 0.7
    """Runnable tasks per CPU, over a minute; used instead of cpu_pressure where the kernel has no PSI."""
    memory_pressure: Percent = 10.0
    """Percent of the last 10 s in which some task waited for memory: above this a device feels slow. 100 is off."""
    io_pressure: Percent = 30.0
    """Percent of the last 10 s in which some task waited for storage; not judged while we train. 100 is off."""
    memory_free: Bytes = 768 << 20
    """Bytes available before the trainer starts; training with torch peaks at about 420 MB. 0 is off."""
    disk_free: Bytes = 256 << 20
    """Bytes free for spool and updates in the state directory. 0 is off."""
    max_temperature: Annotated[float, Meta(ge=0.0, le=150.0)] = 0.0
    """Degrees Celsius of the hottest zone. 0: no ceiling but the kernel's own trip points."""
    windows: Annotated[tuple[Window, ...], Meta(max_length=64)] = ()
    """When training is allowed, such as "22:00-06:00" or "sat,sun 00:00-24:00"; empty: always."""
    timezone: str = ""
    """IANA name of the zone the windows are in; empty: the device's own."""
    spacing: Seconds = 0.0
    """Seconds from the end of one round's training to the next."""
    settle: Seconds = 60.0
    """Seconds without any obstacle before the device offers itself: a door that opens and shuts helps nobody."""
    patience: Seconds = 10.0
    """Seconds that load may stand in the way before work stops: short bursts are normal."""
    grace: Seconds = 300.0
    """Seconds that a frozen trainer waits for what stands in the way to be over, and keeps its memory; then it leaves
    its work with a checkpoint. 0: at once."""
    sense: Annotated[float, Meta(ge=1.0, le=3600.0)] = 30.0
    """Seconds between two looks at the device while it does not train; each look costs about a millisecond."""
    sense_training: Annotated[float, Meta(ge=0.5, le=600.0)] = 5.0
    """Seconds between two looks while it trains, because then others wait for us to notice them."""


class Constraint(StrEnum):
    """What can stand in the way; the wire's obstacle names, never renamed."""

    PAUSED = "paused"
    CALENDAR = "calendar"
    MAINS = "mains"
    BATTERY = "battery"
    HEAT = "heat"
    CPU = "cpu"
    MEMORY = "memory"
    MEMORY_PRESSURE = "memory_pressure"
    IO = "io"
    DISK = "disk"
    SPACING = "spacing"


TOLERATED = frozenset({Constraint.CPU, Constraint.MEMORY, Constraint.MEMORY_PRESSURE, Constraint.IO, Constraint.DISK})
"""These end the device's eligibility only after `patience`; all others do at once."""

PASSING = frozenset({Constraint.MAINS, Constraint.BATTERY, Constraint.HEAT, Constraint.CPU, Constraint.IO})
"""These may soon be over, so that it is worth waiting with a trainer that stands still and keeps its memory."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What was measured at one moment; None where it could not be."""

    local: datetime
    """Now, aware, in the zone that the calendar windows are in."""
    mains: bool | None = True
    has_battery: bool = False
    battery: float | None = None
    """Percent, of the emptiest battery."""
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None
    """PSI `some avg10`, percent."""
    load: float | None = None
    """One-minute load average divided by the number of CPUs."""
    cpu_others: float | None = None
    """Percent of all CPUs that processes other than ours used since the reading before."""
    memory_free: int | None = None
    disk_free: int | None = None
    """Bytes."""
    temperature: float | None = None
    """Degrees Celsius, of the hottest zone."""
    heat_margin: float | None = None
    """Degrees between a zone and its lowest trip point; the smallest of all zones."""
    training: bool = False
    """Our trainer works, or did so recently enough to show in averages over 10 s."""
    paused: bool = False
    paused_until: float | None = None
    """UTC seconds; None while paused: until the operator resumes."""
    since_round: float | None = None
    """Seconds since the last round's training ended; None: never."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One constraint that is not met."""

    name: Constraint
    value: float | str | None
    """What was measured; None: it could not be."""
    threshold: float | str
    text: str
    """The same in words, with the setting that decides."""


def merged(policy: Policy, conditions: Conditions | None) -> Policy:
    """The owner's policy made as strict as the publisher asks, and nowhere less strict than it was."""
    if conditions is None:
        return policy
    idle = Policy() if conditions.idle else policy
    return replace(
        policy,
        mains=policy.mains or conditions.mains,
        min_battery=max(policy.min_battery, float(conditions.min_battery)),
        cpu_pressure=min(policy.cpu_pressure, idle.cpu_pressure),
        cpu_others=min(policy.cpu_others, idle.cpu_others),
        load=min(policy.load, idle.load),
    )


def obstacles(policy: Policy, conditions: Conditions | None, facts: DeviceFacts) -> tuple[Obstacle, ...]:
    """What stands in the way of training at the moment of `facts`, in the order of Constraint; empty means go."""
    policy = merged(policy, conditions)
    found = (
        _paused(facts),
        _calendar(policy, facts),
        _mains(policy, facts),
        _battery(policy, facts),
        _heat(policy, facts),
        _cpu(policy, facts),
        _memory(policy, facts),
        _memory_pressure(policy, facts),
        _io(policy, facts),
        _below(Constraint.DISK, facts.disk_free, policy.disk_free, "free in the state directory", "disk_free"),
        _spacing(policy, facts),
    )
    return tuple(obstacle for obstacle in found if obstacle is not None)


class Gatekeeper:
    """Eligibility over time: call `observe` with what stands in the way, again at the latest at `deadline`."""

    def __init__(self, policy: Policy) -> None:
        self._settle, self._patience = policy.settle, policy.patience
        self._sense, self._sense_training = policy.sense, policy.sense_training
        self._clear_since: float | None = None
        self._blocked_since: float | None = None
        self._due: float | None = None
        self._eligible = False

    @property
    def eligible(self) -> bool:
        """Whether the device may train."""
        return self._eligible

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which the device must be looked at again; None before the first look."""
        return self._due

    def observe(self, found: tuple[Obstacle, ...], mono: float, training: bool = False) -> bool:
        """Take note of what stands in the way at `mono`; returns whether `eligible` changed."""
        before = self._eligible
        if found:
            self._clear_since = None
            self._blocked_since = mono if self._blocked_since is None else self._blocked_since
            urgent = any(obstacle.name not in TOLERATED for obstacle in found)
            if urgent or mono - self._blocked_since >= self._patience:
                self._eligible = False
        else:
            self._blocked_since = None
            self._clear_since = mono if self._clear_since is None else self._clear_since
            self._eligible = self._eligible or mono - self._clear_since >= self._settle
        self._due = self._next(mono, training)
        return self._eligible != before

    def _next(self, mono: float, training: bool) -> float:
        due = mono + (self._sense_training if training else self._sense)
        if self._eligible and self._blocked_since is not None:
            due = min(due, self._blocked_since + self._patience)
        elif not self._eligible and self._clear_since is not None:
            due = min(due, self._clear_since + self._settle)
        return due


# -- one rule each -------------------------------------------------------------------------------------------------


def _paused(facts: DeviceFacts) -> Obstacle | None:
    if not facts.paused:
        return None
    until = facts.paused_until
    end = "edge-agent resume" if until is None else f"{datetime.fromtimestamp(until, facts.local.tzinfo):%F %H:%M}"
    return Obstacle(Constraint.PAUSED, until, "not paused", f"the operator paused it until {end}")


def _calendar(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    if inside(policy.windows, facts.local, facts.local.tzinfo or UTC):
        return None
    asked, now = "; ".join(map(str, policy.windows)), f"{facts.local:%a %H:%M}"
    return Obstacle(Constraint.CALENDAR, now, asked, f"{now} is outside policy.windows ({asked})")


def _mains(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    if not policy.mains or facts.mains:
        return None
    if facts.mains is None:
        return Obstacle(Constraint.MAINS, None, "mains", "the power supply cannot be read and mains power is required")
    return Obstacle(Constraint.MAINS, "battery", "mains", "on battery, and mains power is required")


def _battery(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    if not facts.has_battery or policy.min_battery == 0:
        return None
    if facts.battery is None:
        text = f"the battery's charge cannot be read and {policy.min_battery:g} % is required"
    elif facts.battery < policy.min_battery:
        text = f"the battery is at {facts.battery:g} %, {policy.min_battery:g} % is required"
    else:
        return None
    return Obstacle(Constraint.BATTERY, facts.battery, policy.min_battery, text)


def _heat(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    ceiling, value = policy.max_temperature, facts.temperature
    if ceiling > 0 and value is None:
        return Obstacle(Constraint.HEAT, None, ceiling, "no temperature can be read and policy.max_temperature is set")
    if ceiling > 0 and value is not None and value > ceiling:
        return Obstacle(Constraint.HEAT, value, ceiling, f"{value:g} °C, policy.max_temperature is {ceiling:g} °C")
    if facts.heat_margin is not None and facts.heat_margin <= 0:
        return Obstacle(Constraint.HEAT, value, "trip point", "the kernel throttles a zone that is too hot")
    return None


def _cpu(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    if facts.training:
        # Our own threads wait for a CPU too, so pressure says nothing about others now.
        text = "others use the CPUs for"
        return _above(Constraint.CPU, facts.cpu_others, policy.cpu_others, text, "cpu_others")
    if policy.cpu_pressure >= 100:
        return None
    if facts.cpu_pressure is not None:
        return _above(Constraint.CPU, facts.cpu_pressure, policy.cpu_pressure, "tasks wait for a CPU", "cpu_pressure")
    if facts.load is None:
        text = "neither CPU pressure nor load can be read; policy.cpu_pressure = 100 goes without"
        return Obstacle(Constraint.CPU, None, policy.cpu_pressure, text)
    if facts.load > policy.load:
        text = f"{facts.load:.2f} runnable tasks per CPU, policy.load is {policy.load:g} (this kernel has no PSI)"
        return Obstacle(Constraint.CPU, facts.load, policy.load, text)
    return None


def _memory(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    # A running trainer has already taken its memory; its own limit and memory pressure judge it from here on.
    if facts.training:
        return None
    return _below(Constraint.MEMORY, facts.memory_free, policy.memory_free, "of memory available", "memory_free")


def _memory_pressure(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    value, limit = facts.memory_pressure, policy.memory_pressure
    return _above(Constraint.MEMORY_PRESSURE, value, limit, "tasks wait for memory", "memory_pressure")


def _io(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    if facts.training:
        return None
    return _above(Constraint.IO, facts.io_pressure, policy.io_pressure, "tasks wait for storage", "io_pressure")


def _spacing(policy: Policy, facts: DeviceFacts) -> Obstacle | None:
    since = facts.since_round
    if since is None or since >= policy.spacing:
        return None
    text = f"{since:.0f} s since the last round, policy.spacing is {policy.spacing:g} s"
    return Obstacle(Constraint.SPACING, since, policy.spacing, text)


def _above(name: Constraint, value: float | None, limit: float, what: str, setting: str) -> Obstacle | None:
    if value is None or value <= limit:
        return None
    return Obstacle(name, value, limit, f"{what} {value:.1f} % of the time, policy.{setting} is {limit:g} %")


def _below(name: Constraint, value: int | None, limit: int, what: str, setting: str) -> Obstacle | None:
    if limit == 0 or (value is not None and value >= limit):
        return None
    if value is None:
        return Obstacle(
            name, None, limit, f"how much is {what} cannot be read, policy.{setting} asks for {limit} bytes"
        )
    return Obstacle(name, value, limit, f"{value >> 20} MiB {what}, policy.{setting} is {limit >> 20} MiB")
