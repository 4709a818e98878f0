"""Whether this device may train now, and what stands in the way. Pure.

`DeviceFacts` are what was measured, `Policy` is the owner's word, `Conditions` the publisher's, which can only add to
it. `constraints` judges one moment, constraint by constraint, and `obstacles` are those that are not met; `Gatekeeper`
judges over time: a device is eligible after nothing stood in the way for `settle` seconds, it stops at once for power,
heat, the calendar, its owner and its user, and for load only if that lasts `patience` seconds.

A fact of None could not be measured. It blocks where a constraint was asked for that nothing else can judge (mains,
battery, free memory and disk, a temperature ceiling, CPU, an idle user, an unmetered network, the budget); it does not
where the kernel may simply lack the source (pressure of memory and I/O, trip points).

Our own trainer must not count as load. While it works, the CPU is judged by what *other* processes use of it
(/proc/stat less our own share), not by pressure, which would show our own threads waiting; I/O pressure, which our
own start-up causes, is not judged at all. Memory pressure always is: the device suffers whoever causes it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
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
    idle_user: bool = False
    """Train only while nobody uses the device: the desktop's idle hint, by systemd-logind."""
    unmetered: bool = False
    """Take part only on a network that does not count bytes, by NetworkManager."""
    cpu_budget: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    """CPU-seconds that the trainer may use in a day, from midnight to midnight; energy costs. 0 is no limit."""
    spacing: Seconds = 0.0
    """Seconds from the end of one round's training to the next."""
    settle: Seconds = 60.0
    """Seconds without any obstacle before the device offers itself: a door that opens and shuts helps nobody."""
    patience: Seconds = 5.0
    """Seconds that load may stand in the way before work stops: short bursts are normal."""
    grace: Seconds = 300.0
    """Seconds that a frozen trainer waits for what stands in the way to be over, and keeps its memory; then it leaves
    its work with a checkpoint. 0: at once."""
    sense: Annotated[float, Meta(ge=1.0, le=3600.0)] = 30.0
    """Seconds between two looks at a device that may not train yet, or whose kernel does not wake us for load."""
    sense_idle: Annotated[float, Meta(ge=1.0, le=3600.0)] = 300.0
    """Seconds between two looks at a device that may train and has nothing to; load wakes us, and a look comes before
    every start."""
    sense_training: Annotated[float, Meta(ge=0.2, le=600.0)] = 0.8
    """Seconds between two looks while it trains: a device that is unplugged has its trainer frozen within one."""


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
    USER = "user"
    METERED = "metered"
    BUDGET = "budget"
    DATA = "data"
    NO_TRAINER = "no_trainer"


TOLERATED = frozenset({Constraint.CPU, Constraint.MEMORY, Constraint.MEMORY_PRESSURE, Constraint.IO, Constraint.DISK})
"""These end the device's eligibility only after `patience`; all others do at once."""

PASSING = frozenset(
    {
        Constraint.MAINS,
        Constraint.BATTERY,
        Constraint.HEAT,
        Constraint.CPU,
        Constraint.IO,
        Constraint.USER,
        Constraint.METERED,
    }
)
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
    user_idle: bool | None = None
    """Whether nobody uses the device, as far as its desktop knows."""
    metered: bool | None = None
    """Whether the network counts bytes, or probably does."""
    budget_used: float | None = None
    """CPU-seconds of the trainer since midnight."""
    trainer: bool | None = None
    """Whether the libraries that the trainer needs are installed; None: only a start can tell."""
    watched: bool = False
    """The kernel wakes us when the pressure rises, so nobody need look for that."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What is known of the examples that one task would train on."""

    dataset: str
    wanted: int
    """Fewest examples that the task's contract asks for."""
    examples: int | None = None
    """As the trainer counted them last; None: not counted yet."""
    refused: str = ""
    """Why the trainer refused them, with file and row; "" if it did not."""


class Verdict(StrEnum):
    """What became of one constraint; only UNMET stands in the way."""

    MET = "met"
    UNMET = "unmet"
    UNKNOWN = "unknown"
    """It could not be measured here, and does not stand in the way for that."""
    NOT_ASKED = "not_asked"


class Question(StrEnum):
    """What only the message bus of the device can tell, and is asked only where somebody wants to know."""

    USER = "user"
    METERED = "metered"
    POWER = "power"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One constraint and what was measured of it, for people and programs alike."""

    name: Constraint
    verdict: Verdict
    value: float | str | None
    """What was measured; None: it could not be."""
    threshold: float | str | None
    """What is asked for; None: nothing."""
    text: str
    """The same in words, with the setting that decides."""
    setting: str = ""
    """The setting that decides, such as policy.min_battery; conditions.min_battery is the publisher's."""
    source: str = ""
    """Where the value comes from."""
    advice: str = ""
    """What its owner can do about an unmet one."""


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
        idle_user=policy.idle_user or conditions.idle_user is True,
        unmetered=policy.unmetered or conditions.unmetered is True,
    )


def questions(policy: Policy, asked: Iterable[Conditions]) -> frozenset[Question]:
    """What the bus has to be asked for the owner's policy and all that publishers ask of this device."""
    found = set()
    for each in (policy, *(merged(policy, conditions) for conditions in asked)):
        found |= {Question.USER} if each.idle_user else set()
        found |= {Question.METERED} if each.unmetered else set()
        found |= {Question.POWER} if each.mains else set()
    return frozenset(found)


def constraints(
    policy: Policy, conditions: Conditions | None, facts: DeviceFacts, data: DataFacts | None = None
) -> tuple[Judgement, ...]:
    """Every constraint, met or not, at the moment of `facts`, in the order of Constraint.

    `policy` is the owner's; without `conditions` it is judged alone, without `data` no examples are asked for.
    """
    strict = merged(policy, conditions)
    found = (
        _paused(facts),
        _calendar(strict, facts),
        _mains(strict, facts),
        _battery(strict, facts),
        _heat(strict, facts),
        _cpu(strict, facts),
        _memory(strict, facts),
        _memory_pressure(strict, facts),
        _io(strict, facts),
        _below(_Rule.DISK, facts.disk_free, strict.disk_free, "free in the state directory"),
        _spacing(strict, facts),
        _user(strict, facts),
        _metered(strict, facts),
        _budget(strict, facts),
        _data(data),
        _no_trainer(facts),
    )
    return tuple(_attributed(each, policy, strict) for each in found)


def obstacles(
    policy: Policy, conditions: Conditions | None, facts: DeviceFacts, data: DataFacts | None = None
) -> tuple[Obstacle, ...]:
    """What stands in the way of training at the moment of `facts`: the constraints that are unmet; empty means go."""
    return tuple(
        Obstacle(each.name, each.value, each.threshold if each.threshold is not None else "", each.text)
        for each in constraints(policy, conditions, facts, data)
        if each.verdict is Verdict.UNMET
    )


class Gatekeeper:
    """Eligibility over time: call `observe` with what stands in the way, again at the latest at `deadline`."""

    def __init__(self, policy: Policy) -> None:
        self._settle, self._patience = policy.settle, policy.patience
        self._sense, self._sense_training = policy.sense, policy.sense_training
        self._sense_idle = max(policy.sense, policy.sense_idle)
        self._clear_since: float | None = None
        self._blocked_since: float | None = None
        self._due: float | None = None
        self._eligible = False

    @property
    def eligible(self) -> bool:
        """Whether the device may train."""
        return self._eligible

    @property
    def settles_at(self) -> float | None:
        """Monotonic seconds at which it becomes eligible if nothing gets in the way; None: it is, or something does."""
        return None if self._eligible or self._clear_since is None else self._clear_since + self._settle

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which the device must be looked at again; None before the first look."""
        return self._due

    def observe(self, found: tuple[Obstacle, ...], mono: float, training: bool = False, watched: bool = False) -> bool:
        """Take note of what stands in the way at `mono`; returns whether `eligible` changed.

        `watched`: somebody else notices load and calls sooner, so that an idle device may be left alone.
        """
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
        self._due = self._next(mono, training, watched)
        return self._eligible != before

    def _next(self, mono: float, training: bool, watched: bool) -> float:
        if training:
            due = mono + self._sense_training
        elif watched and self._eligible and self._blocked_since is None:
            due = mono + self._sense_idle
        else:
            due = mono + self._sense
        if self._eligible and self._blocked_since is not None:
            due = min(due, self._blocked_since + self._patience)
        elif not self._eligible and self._clear_since is not None:
            due = min(due, self._clear_since + self._settle)
        return due


# -- one rule each -------------------------------------------------------------------------------------------------


class _Rule(Enum):
    """A constraint, the setting that decides, where its value comes from, and what an owner can do about it."""

    PAUSED = (Constraint.PAUSED, "", "paused.json in the state directory", "edge-agent resume ends it")
    CALENDAR = (Constraint.CALENDAR, "windows", "the clock", "wait for the next window, or widen {setting}")
    MAINS = (Constraint.MAINS, "mains", "/sys/class/power_supply", "plug it in, or set {setting} = false")
    BATTERY = (Constraint.BATTERY, "min_battery", "/sys/class/power_supply", "charge it, or lower {setting}")
    HEAT = (Constraint.HEAT, "max_temperature", "/sys/class/thermal", "let it cool; {setting} is the ceiling")
    CPU = (Constraint.CPU, "cpu_pressure", "/proc/pressure/cpu", "wait until it is idle, or raise {setting}")
    OTHERS = (Constraint.CPU, "cpu_others", "/proc/stat", "wait until others need less, or raise {setting}")
    LOAD = (Constraint.CPU, "load", "/proc/loadavg", "wait until it is idle, or raise {setting}")
    MEMORY = (Constraint.MEMORY, "memory_free", "/proc/meminfo", "end what needs the memory, or lower {setting}")
    MEMORY_PRESSURE = (
        *(Constraint.MEMORY_PRESSURE, "memory_pressure"),
        *("/proc/pressure/memory", "end what needs the memory, or raise {setting}"),
    )
    IO = (Constraint.IO, "io_pressure", "/proc/pressure/io", "wait until the storage is idle, or raise {setting}")
    DISK = (Constraint.DISK, "disk_free", "the file system of the state directory", "free space, or lower {setting}")
    SPACING = (Constraint.SPACING, "spacing", "the clock", "wait, or lower {setting}")
    USER = (Constraint.USER, "idle_user", "IdleHint of systemd-logind", "leave it alone, or set {setting} = false")
    METERED = (Constraint.METERED, "unmetered", "Metered of NetworkManager", "change network, or {setting} = false")
    BUDGET = (Constraint.BUDGET, "cpu_budget", "/proc, and budget.json", "wait for midnight, or raise {setting}")
    DATA = (Constraint.DATA, "", "the trainer", "add examples, or mend the file that was named")
    NO_TRAINER = (
        *(Constraint.NO_TRAINER, "", "the trainer's Python"),
        "sudo edge-agent trainer install puts it in, and the agent needs no restart",
    )

    def __init__(self, constraint: Constraint, setting: str, source: str, advice: str) -> None:
        self.constraint, self.setting, self.source, self.advice = constraint, setting, source, advice


def _judged(
    rule: _Rule, verdict: Verdict | bool, value: float | str | None, threshold: float | str | None, text: str
) -> Judgement:
    """`verdict` may just say whether it is met. `text` has {setting} where the setting's name belongs."""
    if isinstance(verdict, bool):
        verdict = Verdict.MET if verdict else Verdict.UNMET
    return Judgement(rule.constraint, verdict, value, threshold, text, rule.setting, rule.source, rule.advice)


def _attributed(found: Judgement, policy: Policy, strict: Policy) -> Judgement:
    """With the setting's full name, which is the publisher's where that is what made it stricter."""
    name, advice = found.setting, found.advice
    if name and getattr(policy, name) != getattr(strict, name):
        # The publisher's keys have the same names, but for the three that `idle` stands for.
        name = f"conditions.{'idle' if name in ('cpu_pressure', 'cpu_others', 'load') else name} of the task"
        advice = "the task's publisher asks for it, and nothing on this device can loosen that"
    elif name:
        name = f"policy.{name}"
    text, advice = found.text.replace("{setting}", name), advice.replace("{setting}", name)
    unmet = found.verdict is Verdict.UNMET
    return dataclasses.replace(found, text=text, setting=name, advice=advice if unmet else "")


def _paused(facts: DeviceFacts) -> Judgement:
    if not facts.paused:
        return _judged(_Rule.PAUSED, True, "not paused", "not paused", "the operator has not paused it")
    until = facts.paused_until
    end = "edge-agent resume" if until is None else f"{datetime.fromtimestamp(until, facts.local.tzinfo):%F %H:%M}"
    return _judged(_Rule.PAUSED, False, until, "not paused", f"the operator paused it until {end}")


def _calendar(policy: Policy, facts: DeviceFacts) -> Judgement:
    now = f"{facts.local:%a %H:%M}"
    if not policy.windows:
        return _judged(_Rule.CALENDAR, Verdict.NOT_ASKED, now, None, "at any time ({setting} is empty)")
    asked = "; ".join(map(str, policy.windows))
    within = inside(policy.windows, facts.local, facts.local.tzinfo or UTC)
    text = f"{now} is {'inside' if within else 'outside'} {{setting}} ({asked})"
    return _judged(_Rule.CALENDAR, within, now, asked, text)


def _mains(policy: Policy, facts: DeviceFacts) -> Judgement:
    value = None if facts.mains is None else "mains" if facts.mains else "battery"
    if not policy.mains:
        return _judged(_Rule.MAINS, Verdict.NOT_ASKED, value, None, "mains power is not required ({setting} is false)")
    if value is None:
        text = "the power supply cannot be read and mains power is required ({setting})"
    else:
        text = f"on {value}, {'as' if facts.mains else 'and'} mains power is required ({{setting}})"
    return _judged(_Rule.MAINS, facts.mains is True, value, "mains", text)


def _battery(policy: Policy, facts: DeviceFacts) -> Judgement:
    floor, value = policy.min_battery, facts.battery
    if not facts.has_battery:
        return _judged(_Rule.BATTERY, Verdict.NOT_ASKED, None, None, "no battery, so {setting} does not apply")
    if floor == 0:
        return _judged(_Rule.BATTERY, Verdict.NOT_ASKED, value, None, "no charge is required ({setting} is 0)")
    if value is None:
        text = f"the battery's charge cannot be read and {floor:g} % is required ({{setting}})"
        return _judged(_Rule.BATTERY, False, None, floor, text)
    text = f"the battery is at {value:g} %, {floor:g} % is required ({{setting}})"
    return _judged(_Rule.BATTERY, value >= floor, value, floor, text)


def _heat(policy: Policy, facts: DeviceFacts) -> Judgement:
    ceiling, value = policy.max_temperature, facts.temperature
    if ceiling > 0 and value is None:
        return _judged(_Rule.HEAT, False, None, ceiling, "no temperature can be read and {setting} is set")
    if ceiling > 0 and value is not None and value > ceiling:
        return _judged(_Rule.HEAT, False, value, ceiling, f"{value:g} °C, {{setting}} is {ceiling:g} °C")
    if facts.heat_margin is not None and facts.heat_margin <= 0:
        return _judged(_Rule.HEAT, False, value, "trip point", "the kernel throttles a zone that is too hot")
    if ceiling > 0:
        return _judged(_Rule.HEAT, True, value, ceiling, f"{value:g} °C, {{setting}} is {ceiling:g} °C")
    if facts.heat_margin is None:
        text = "no zone has a trip point, and {setting} sets no ceiling"
        return _judged(_Rule.HEAT, Verdict.UNKNOWN, value, "trip point", text)
    text = f"{facts.heat_margin:g} °C below the kernel's trip points ({{setting}} sets no ceiling)"
    return _judged(_Rule.HEAT, True, value, "trip point", text)


def _cpu(policy: Policy, facts: DeviceFacts) -> Judgement:
    if facts.training:
        # Our own threads wait for a CPU too, so pressure says nothing about others now.
        return _above(_Rule.OTHERS, facts.cpu_others, policy.cpu_others, "others use the CPUs for")
    if policy.cpu_pressure >= 100 or facts.cpu_pressure is not None:
        return _above(_Rule.CPU, facts.cpu_pressure, policy.cpu_pressure, "tasks wait for a CPU")
    if facts.load is None:
        text = "neither CPU pressure nor load can be read; {setting} = 100 goes without"
        return _judged(_Rule.CPU, False, None, policy.cpu_pressure, text)
    text = f"{facts.load:.2f} runnable tasks per CPU, {{setting}} is {policy.load:g} (this kernel has no PSI)"
    return _judged(_Rule.LOAD, facts.load <= policy.load, facts.load, policy.load, text)


def _memory(policy: Policy, facts: DeviceFacts) -> Judgement:
    # A running trainer has already taken its memory; its own limit and memory pressure judge it from here on.
    if facts.training:
        text = "our trainer has its memory already; {setting} is for its start"
        return _judged(_Rule.MEMORY, Verdict.NOT_ASKED, facts.memory_free, None, text)
    return _below(_Rule.MEMORY, facts.memory_free, policy.memory_free, "of memory available")


def _memory_pressure(policy: Policy, facts: DeviceFacts) -> Judgement:
    return _above(_Rule.MEMORY_PRESSURE, facts.memory_pressure, policy.memory_pressure, "tasks wait for memory")


def _io(policy: Policy, facts: DeviceFacts) -> Judgement:
    if facts.training:
        text = "not judged while we train, because we read and write too ({setting})"
        return _judged(_Rule.IO, Verdict.NOT_ASKED, facts.io_pressure, None, text)
    return _above(_Rule.IO, facts.io_pressure, policy.io_pressure, "tasks wait for storage")


def _spacing(policy: Policy, facts: DeviceFacts) -> Judgement:
    since, spacing = facts.since_round, policy.spacing
    if spacing == 0:
        return _judged(_Rule.SPACING, Verdict.NOT_ASKED, since, None, "no pause between rounds ({setting} is 0)")
    if since is None:
        return _judged(_Rule.SPACING, True, None, spacing, f"no round yet, {{setting}} is {spacing:g} s")
    text = f"{since:.0f} s since the last round, {{setting}} is {spacing:g} s"
    return _judged(_Rule.SPACING, since >= spacing, since, spacing, text)


def _user(policy: Policy, facts: DeviceFacts) -> Judgement:
    value = None if facts.user_idle is None else "idle" if facts.user_idle else "active"
    if not policy.idle_user:
        return _judged(_Rule.USER, Verdict.NOT_ASKED, value, None, "users do not matter ({setting} is false)")
    if value is None:
        text = "systemd-logind does not say whether somebody uses the device, and {setting} asks"
        return _judged(_Rule.USER, False, None, "idle", text)
    text = f"{'nobody' if facts.user_idle else 'somebody'} uses the device ({{setting}})"
    return _judged(_Rule.USER, facts.user_idle is True, value, "idle", text)


def _metered(policy: Policy, facts: DeviceFacts) -> Judgement:
    value = None if facts.metered is None else "metered" if facts.metered else "unmetered"
    if not policy.unmetered:
        return _judged(_Rule.METERED, Verdict.NOT_ASKED, value, None, "any network will do ({setting} is false)")
    if value is None:
        text = "NetworkManager does not say whether the network counts bytes, and {setting} asks"
        return _judged(_Rule.METERED, False, None, "unmetered", text)
    return _judged(_Rule.METERED, facts.metered is False, value, "unmetered", f"the network is {value} ({{setting}})")


def _budget(policy: Policy, facts: DeviceFacts) -> Judgement:
    used, limit = facts.budget_used, policy.cpu_budget
    if limit == 0:
        return _judged(_Rule.BUDGET, Verdict.NOT_ASKED, used, None, "no limit of CPU time ({setting} is 0)")
    if used is None:
        text = "the CPU time of the trainer cannot be read, and {setting} is set"
        return _judged(_Rule.BUDGET, False, None, limit, text)
    text = f"the trainer used {used:.0f} CPU-seconds today, {{setting}} is {limit:g}"
    return _judged(_Rule.BUDGET, used < limit, used, limit, text)


def _data(data: DataFacts | None) -> Judgement:
    if data is None:
        return _judged(_Rule.DATA, Verdict.NOT_ASKED, None, None, "no task asks for data now")
    name, count, wanted = data.dataset, data.examples, data.wanted
    if data.refused:
        return _judged(_Rule.DATA, False, count, wanted, f"the data set {name} was refused: {data.refused}")
    if count is None:
        text = f"the data set {name} was not read yet, {wanted} examples are required"
        return _judged(_Rule.DATA, Verdict.UNKNOWN, None, wanted, text)
    return _judged(_Rule.DATA, count >= wanted, count, wanted, f"{count} examples in {name}, {wanted} are required")


def _no_trainer(facts: DeviceFacts) -> Judgement:
    if facts.trainer is None:
        return _judged(
            _Rule.NO_TRAINER, Verdict.UNKNOWN, None, "installed", "only a start tells whether PyTorch is there"
        )
    if facts.trainer:
        return _judged(_Rule.NO_TRAINER, True, "installed", "installed", "PyTorch is installed")
    text = "PyTorch is not installed: sudo edge-agent trainer install puts it in"
    return _judged(_Rule.NO_TRAINER, False, "absent", "installed", text)


def _above(rule: _Rule, value: float | None, limit: float, what: str) -> Judgement:
    if limit >= 100:
        return _judged(rule, Verdict.NOT_ASKED, value, None, "not judged ({setting} is 100)")
    if value is None:
        return _judged(rule, Verdict.UNKNOWN, None, limit, f"{rule.source} does not tell; {{setting}} is {limit:g} %")
    text = f"{what} {value:.1f} % of the time, {{setting}} is {limit:g} %"
    return _judged(rule, value <= limit, value, limit, text)


def _below(rule: _Rule, value: int | None, limit: int, what: str) -> Judgement:
    if limit == 0:
        return _judged(rule, Verdict.NOT_ASKED, value, None, "not judged ({setting} is 0)")
    if value is None:
        return _judged(
            rule, False, None, limit, f"how much is {what} cannot be read, {{setting}} asks for {limit} bytes"
        )
    text = f"{value >> 20} MiB {what}, {{setting}} is {limit >> 20} MiB"
    return _judged(rule, value >= limit, value, limit, text)
