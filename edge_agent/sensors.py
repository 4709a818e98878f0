"""Reads what this device is doing right now from /sys and /proc (or other roots) into DeviceFacts.

A source that is missing, unreadable or garbage gives None, never an exception; edge_agent.eligibility says what None
means. Every look costs a few small files, well under a millisecond, and nothing is kept open. It decides nothing, and
writes nothing but the operator's pause and the day's CPU time, which survive a restart in files.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from pathlib import Path

from edge_agent.budget import Budget
from edge_agent.bus import Bus
from edge_agent.eligibility import DeviceFacts, Question
from shared.files import write_durably
from shared.machine import Instant

PAUSE_FILE = "paused.json"
ECHO = 30.0
"""Seconds for which averages over 10 s still show work of ours that has ended: they fall to 5 % of it."""
SMOOTH = 3.0
"""Seconds, at least, over which the CPU use of others is taken: in less than one, two processes are a storm."""
TRIPS_FRESH = 60.0
"""Seconds for which trip points are believed: they are many files, and only a driver that is reloaded moves them."""

_SMALL = 65_536
_TICKS = os.sysconf("SC_CLK_TCK")
"""Clock ticks in a second."""
_CHARGING = frozenset({"Charging", "Full", "Not charging"})
_TRIPS = frozenset({"passive", "hot", "critical"})
_LATEST = 32_503_680_000
"""UTC seconds; a pause until after the year 2999 is one without an end."""
_CREDIBLE = range(-60_000, 200_000)
"""Millidegrees Celsius; some drivers report -274,000 or 0 for a trip point they do not have."""


_Ticks = tuple[int, int]
"""CPU time in clock ticks: of a process itself, and of the children that it has waited for."""


@dataclass(frozen=True, slots=True)
class _Use:
    """CPU time since boot in clock ticks at one moment: of all CPUs, not idle, and ours."""

    at: float
    """Monotonic seconds."""
    total: int
    busy: int
    ours: int


def memory_free(proc_root: Path) -> int | None:
    """Bytes of MemAvailable; None where that cannot be read."""
    for line in _lines(f"{proc_root}/meminfo"):
        words = line.split()
        if words[:1] == ["MemAvailable:"] and len(words) == 3 and words[2] == "kB":
            value = _whole(words[1])
            return None if value is None else value * 1024
    return None


class Sensors:
    """The device's senses. Call `read` from one thread; it remembers the reading before, to tell CPU use."""

    def __init__(
        self,
        sys_root: Path,
        proc_root: Path,
        state_dir: Path,
        zone: tzinfo,
        bus: Bus | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._proc, self._state, self._zone = proc_root, state_dir, zone
        self._supplies, self._zones = sys_root / "class" / "power_supply", sys_root / "class" / "thermal"
        self._bus, self._budget = bus, budget
        self._trips: dict[str, tuple[float, list[int]]] = {}
        """Of each thermal zone: when they were read, and what they were."""
        self._uses: list[_Use] = []
        """The last readings: the first is what the newest is compared with."""
        self._others: float | None = None
        self._worked: float | None = None

    def read(
        self,
        now: Instant,
        trainer: int | None = None,
        working: bool = False,
        trained: float | None = None,
        asked: frozenset[Question] = frozenset(),
        watched: bool = False,
    ) -> DeviceFacts:
        """Look at the device at `now`.

        `trainer` is the process id of our trainer if one runs, `working` whether it has a job, and `trained` the
        monotonic seconds at which the last round's training ended. What is `asked` of the bus comes with a later look.
        `watched`: the kernel tells of load; what the bus has to be asked, nobody tells.
        """
        if working:
            self._worked = now.mono
        mains, has_battery, battery, silent = self._power()
        wanted = asked if silent else asked - {Question.POWER}
        said = self._bus.look(wanted, now.mono, working) if self._bus is not None else {}
        if Question.POWER in said:
            mains = not said[Question.POWER]
        temperature, margin = self._heat(now.mono)
        paused, until = self._pause(now.utc)
        local = datetime.fromtimestamp(now.utc, UTC).astimezone(self._zone)
        agent = _ticks(f"{self._proc}/{os.getpid()}/stat")
        running = None if trainer is None else _ticks(f"{self._proc}/{trainer}/stat")
        return DeviceFacts(
            local=local,
            mains=mains,
            has_battery=has_battery,
            battery=battery,
            cpu_pressure=self._pressure("cpu"),
            memory_pressure=self._pressure("memory"),
            io_pressure=self._pressure("io"),
            load=self._load(),
            cpu_others=self._cpu_others(now.mono, agent, running),
            memory_free=memory_free(self._proc),
            disk_free=self._disk(),
            temperature=temperature,
            heat_margin=margin,
            training=self._worked is not None and now.mono - self._worked < ECHO,
            paused=paused,
            paused_until=until,
            since_round=None if trained is None else max(0.0, now.mono - trained),
            user_idle=said.get(Question.USER),
            metered=said.get(Question.METERED),
            budget_used=self._cpu_today(local.date(), agent, running),
            watched=watched and not said and not wanted - {Question.POWER},
        )

    # -- power ---------------------------------------------------------------------------------------------------

    def _power(self) -> tuple[bool | None, bool, float | None, bool]:
        """On mains or charging; whether there is a battery, and the charge of the emptiest one in percent.

        Last, whether /sys knows of no supply of this device, so that another source has the word.
        """
        supplies = _entries(self._supplies)
        if supplies is None:
            return None, False, None, True
        online, batteries, charges, unsure = False, 0, [], False
        has_mains = False
        for supply in supplies:
            if _text(f"{supply}/scope") == "Device":  # the battery of a mouse
                continue
            kind = _text(f"{supply}/type")
            if kind in ("Battery", "UPS"):
                if _number(f"{supply}/present") == 0:
                    continue
                batteries += 1
                status, charge = _text(f"{supply}/status"), _number(f"{supply}/capacity")
                online = online or status in _CHARGING
                unsure = unsure or status is None
                charges.append(charge if charge is not None and 0 <= charge <= 100 else None)
            elif kind is not None and (kind == "Mains" or kind.startswith(("USB", "Wireless"))):
                fed = _number(f"{supply}/online")
                has_mains = has_mains or kind == "Mains"
                online = online or (fed is not None and fed > 0)
                unsure = unsure or fed is None
            else:
                unsure = unsure or kind is None
        known = [charge for charge in charges if charge is not None]
        battery = float(min(known)) if known and len(known) == len(charges) else None
        silent = not online and not batteries and not has_mains
        if silent and not unsure:
            online = True  # whatever has no battery and runs is on mains
        return (None if unsure and not online else online), batteries > 0, battery, silent

    # -- heat ----------------------------------------------------------------------------------------------------

    def _heat(self, mono: float) -> tuple[float | None, float | None]:
        """The hottest zone, and the smallest distance of a zone to its lowest trip point, in degrees Celsius."""
        hottest: list[int] = []
        margins: list[int] = []
        for zone in _entries(self._zones) or ():
            value = _number(f"{zone}/temp") if "/thermal_zone" in zone else None
            if value is None or value not in _CREDIBLE:
                continue
            hottest.append(value)
            read, trips = self._trips.get(zone, (None, []))
            if read is None or mono - read >= TRIPS_FRESH:
                trips = [trip for trip in _trips(zone) if trip in _CREDIBLE and trip > 20_000]
                self._trips[zone] = mono, trips
            margins += [min(trips) - value] if trips else []
        return (max(hottest) / 1000 if hottest else None), (min(margins) / 1000 if margins else None)

    # -- load ----------------------------------------------------------------------------------------------------

    def _pressure(self, resource: str) -> float | None:
        """PSI `some avg10` in percent."""
        for line in _lines(f"{self._proc}/pressure/{resource}"):
            words = line.split()
            if words[:1] == ["some"] and len(words) > 1 and words[1].startswith("avg10="):
                value = _float(words[1].removeprefix("avg10="))
                return value if value is not None and 0 <= value <= 100 else None
        return None

    def _load(self) -> float | None:
        words = (_text(f"{self._proc}/loadavg") or "").split()
        value = _float(words[0]) if words else None
        return None if value is None or value < 0 else value / (os.cpu_count() or 1)

    def _cpu_others(self, mono: float, agent: _Ticks | None, trainer: _Ticks | None) -> float | None:
        """Percent of all CPUs that others used lately: over SMOOTH seconds, or since the look before if that is longer.

        The last answer stands if that was just now.
        """
        use = self._cpu_use(mono, agent, trainer)
        if use is None:
            self._uses, self._others = [], None
            return None
        # The newest reading that is old enough to compare with, and what came after it.
        while len(self._uses) > 1 and self._uses[1].at <= mono - SMOOTH:
            del self._uses[0]
        if not self._uses:
            self._others = None
        elif use.total - self._uses[-1].total < 20:
            return self._others
        else:
            before = self._uses[0]
            # A trainer that ended leaves its time with its parent; one that was lost never makes ours negative.
            others = (use.busy - before.busy) - max(0, use.ours - before.ours)
            self._others = min(100.0, max(0.0, 100.0 * others / (use.total - before.total)))
        self._uses.append(use)
        return self._others

    def _cpu_use(self, mono: float, agent: _Ticks | None, trainer: _Ticks | None) -> _Use | None:
        if agent is None:  # without it, nothing can be told apart
            return None
        for line in _lines(f"{self._proc}/stat")[:1]:
            words = [_whole(word) for word in line.split()[1:9]]
            times = [word for word in words if word is not None]
            if line.startswith("cpu ") and len(times) == len(words) >= 5:
                ours = sum(agent) + (sum(trainer) if trainer is not None else 0)
                return _Use(mono, sum(times), sum(times) - times[3] - times[4], ours)
        return None

    def _cpu_today(self, today: date, agent: _Ticks | None, trainer: _Ticks | None) -> float | None:
        """CPU-seconds that all trainers used today: those that have ended, and the one that runs."""
        if self._budget is None:
            return None
        spent = None if agent is None else agent[1] + (sum(trainer) if trainer is not None else 0)
        return self._budget.charge(None if spent is None else spent / _TICKS, today)

    # -- room ----------------------------------------------------------------------------------------------------

    def _disk(self) -> int | None:
        try:
            found = os.statvfs(self._state)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize

    # -- the operator --------------------------------------------------------------------------------------------

    def _pause(self, utc: float) -> tuple[bool, float | None]:
        """Whether the operator paused the device, and until when; a pause file that cannot be read is a pause."""
        file = self._state / PAUSE_FILE
        try:
            if not file.exists():
                return False, None
        except OSError:
            return True, None
        try:
            until = json.loads(_text(file) or "")["until"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return True, None
        if isinstance(until, bool) or not isinstance(until, int | float) or not 0 <= until <= _LATEST:
            return True, None
        return utc < until, (float(until) if utc < until else None)


def pause(state_dir: Path, until: float | None) -> None:
    """Pause training until the UTC second `until`, or until `resume`; OSError if that cannot be written."""
    write_durably(state_dir / PAUSE_FILE, json.dumps({"until": until}).encode() + b"\n")


def resume(state_dir: Path) -> None:
    """End the operator's pause, if there is one."""
    (state_dir / PAUSE_FILE).unlink(missing_ok=True)


# -- small files that may be anything ------------------------------------------------------------------------------


def _text(file: str | Path) -> str | None:
    # Without Python's file objects, which cost three times what these files do.
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        return os.read(handle, _SMALL).decode("ascii", "replace").strip()
    except OSError:
        return None
    finally:
        os.close(handle)


def _lines(file: str | Path) -> list[str]:
    return (_text(file) or "").splitlines()


def _number(file: str | Path) -> int | None:
    return _whole(_text(file) or "")


def _whole(text: str) -> int | None:
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) < 1e9 else None


def _entries(folder: Path) -> list[str] | None:
    """The paths of what lies in `folder`, sorted; nothing where it does not exist; None where it cannot be listed."""
    try:
        return sorted(f"{folder}/{name}" for name in os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError:
        return None


def _trips(zone: str) -> Iterator[int]:
    for number in range(16):
        kind = _text(f"{zone}/trip_point_{number}_type")
        if kind is None:
            return
        value = _number(f"{zone}/trip_point_{number}_temp") if kind in _TRIPS else None
        if value is not None:
            yield value


def _ticks(file: str) -> _Ticks | None:
    """CPU time of a process by its stat file."""
    # The name, in brackets, may itself hold spaces and brackets.
    fields = (_text(file) or "").rpartition(")")[2].split()
    times = [_whole(word) for word in fields[11:15]]
    known = [time for time in times if time is not None]
    return (known[0] + known[1], known[2] + known[3]) if len(known) == 4 else None
