"""edge_agent.sensors: a fake /sys and /proc give the facts they hold, and whatever is broken there gives None."""

import os
from datetime import UTC
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.budget import Budget
from edge_agent.bus import Bus
from edge_agent.eligibility import DeviceFacts, Policy, Question, obstacles
from edge_agent.sensors import ECHO, PAUSE_FILE, Sensors, pause, resume
from shared.machine import Instant

NOW = Instant(mono=1000.0, utc=1_772_452_800.0)
"""2 March 2026, 12:00 UTC."""

MAINS = {"type": "Mains", "online": "1"}
UNPLUGGED = {"type": "Mains", "online": "0"}
USB = {"type": "USB", "online": "0"}


def battery(status: str = "Discharging", capacity: str = "55") -> dict[str, str]:
    """A battery as the kernel shows it."""
    return {"type": "Battery", "scope": "System", "present": "1", "status": status, "capacity": capacity}


class Tree:
    """A /sys, a /proc and a state directory of our own."""

    def __init__(self, root: Path) -> None:
        self.root, self.sys, self.proc, self.state = root, root / "sys", root / "proc", root / "state"
        self.state.mkdir()
        self.senses = Sensors(self.sys, self.proc, self.state, UTC)

    def put(self, name: str, text: str | bytes) -> None:
        """Write one file."""
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)

    def supplies(self, **found: dict[str, str]) -> None:
        """Write /sys/class/power_supply."""
        for supply, entries in found.items():
            for name, text in entries.items():
                self.put(f"sys/class/power_supply/{supply}/{name}", text + "\n")

    def stat(self, busy: int, idle: int, ours: int, trainer: int = 0, child: int = 77) -> None:
        """CPU time in ticks: of all CPUs, of this process, of its trainer."""
        self.put("proc/stat", f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3\n")
        self.put(f"proc/{os.getpid()}/stat", f"1 (a b) c) S {'0 ' * 10}{ours} 0 0 0 20 0\n")
        self.put(f"proc/{child}/stat", f"77 (python) R {'0 ' * 10}{trainer} 0 0 0 20 0\n")

    def read(self, mono: float = NOW.mono, **how: object) -> DeviceFacts:
        """Look."""
        return self.senses.read(Instant(mono, NOW.utc + mono - NOW.mono), **how)  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An empty device."""
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("supplies", "mains", "charge"),
    [
        ({}, True, None),
        ({"AC": MAINS}, True, None),
        ({"AC": UNPLUGGED}, False, None),
        ({"AC": UNPLUGGED, "usb": USB | {"online": "1"}}, True, None),
        ({"usb": USB}, True, None),
        ({"AC": MAINS, "BAT0": battery()}, True, 55.0),
        ({"AC": UNPLUGGED, "BAT0": battery()}, False, 55.0),
        ({"BAT0": battery()}, False, 55.0),
        ({"BAT0": battery("Charging")}, True, 55.0),
        ({"BAT0": battery("Full", "100")}, True, 100.0),
        ({"BAT0": battery("Not charging")}, True, 55.0),
        ({"BAT0": battery("Unknown")}, False, 55.0),
        ({"BAT0": battery(capacity="80"), "BAT1": battery(capacity="30")}, False, 30.0),
        ({"BAT0": battery(capacity="lots")}, False, None),
        ({"BAT0": battery(capacity="300")}, False, None),
        ({"BAT0": battery() | {"present": "0"}}, True, None),
        ({"mouse": battery() | {"scope": "Device"}}, True, None),
        ({"BAT0": {"type": "Battery", "capacity": "55"}}, None, 55.0),
        ({"AC": {"type": "Mains"}}, None, None),
        ({"AC": {"type": "Mains", "online": "yes"}}, None, None),
        ({"odd": {"online": "1"}}, None, None),
    ],
)
def test_power_as_the_table_says(
    tree: Tree, supplies: dict[str, dict[str, str]], mains: bool | None, charge: float | None
) -> None:
    """Mains, charging, what a battery holds; without a battery and a mains entry it is mains."""
    tree.supplies(**supplies)
    facts = tree.read()
    assert (facts.mains, facts.battery) == (mains, charge)
    assert facts.has_battery is ("BAT0" in supplies and supplies["BAT0"].get("present") != "0")


def test_pressure_load_and_memory_are_read(tree: Tree) -> None:
    """The figures of /proc arrive in the units of DeviceFacts."""
    for resource, avg in {"cpu": "12.50", "memory": "0.10", "io": "99.00"}.items():
        text = f"some avg10={avg} avg60=1.00 avg300=1.00 total=5\nfull avg10=77.00 avg60=0.00 avg300=0.00 total=0\n"
        tree.put(f"proc/pressure/{resource}", text)
    tree.put("proc/loadavg", f"{2 * (os.cpu_count() or 1)}.00 0.1 0.1 1/96 5401\n")
    tree.put("proc/meminfo", "MemTotal:  8000 kB\nMemFree:  1 kB\nMemAvailable:  4000 kB\nHugePages_Total:  0\n")
    facts = tree.read()
    assert (facts.cpu_pressure, facts.memory_pressure, facts.io_pressure) == (12.5, 0.1, 99.0)
    assert facts.load == 2.0
    assert facts.memory_free == 4000 * 1024
    assert facts.disk_free is not None
    assert facts.disk_free > 0


def test_heat_is_of_the_hottest_zone_and_the_nearest_trip(tree: Tree) -> None:
    """Trip points that mean nothing are left out, and so are zones that report nonsense."""
    tree.put("sys/class/thermal/thermal_zone0/temp", "45000\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_0_type", "active\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_0_temp", "30000\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_1_type", "passive\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_1_temp", "85000\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_2_type", "critical\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_2_temp", "-274000\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_3_type", "hot\n")
    tree.put("sys/class/thermal/thermal_zone0/trip_point_3_temp", "0\n")
    tree.put("sys/class/thermal/thermal_zone1/temp", "60000\n")
    tree.put("sys/class/thermal/thermal_zone1/trip_point_0_type", "critical\n")
    tree.put("sys/class/thermal/thermal_zone1/trip_point_0_temp", "110000\n")
    tree.put("sys/class/thermal/thermal_zone2/temp", "-274000\n")
    tree.put("sys/class/thermal/cooling_device0/temp", "99000\n")
    facts = tree.read()
    assert (facts.temperature, facts.heat_margin) == (60.0, 40.0)


def test_cpu_of_others_leaves_ours_out(tree: Tree) -> None:
    """Of 1000 ticks 700 were busy, 500 of them ours: others used 20 %."""
    tree.stat(busy=1000, idle=1000, ours=10, trainer=90)
    assert tree.read(trainer=77).cpu_others is None
    tree.stat(busy=1700, idle=1300, ours=20, trainer=580)
    assert tree.read(trainer=77).cpu_others == pytest.approx(20.0)


def test_cpu_of_a_trainer_that_ended_stays_ours(tree: Tree) -> None:
    """Its time moves into that of the parent that waited for it, so it is counted once and as ours."""
    tree.stat(busy=1000, idle=1000, ours=10, trainer=90)
    tree.read(trainer=77)
    tree.put(f"proc/{os.getpid()}/stat", f"1 (agent) S {'0 ' * 10}10 0 390 200 20 0\n")
    tree.put("proc/stat", "cpu  1600 0 0 1400 0 0 0 0 0 0\n")
    assert tree.read().cpu_others == pytest.approx(10.0)


def test_two_looks_at_once_give_the_same_answer(tree: Tree) -> None:
    """A few ticks are no measurement: the last real one stands."""
    tree.stat(busy=1000, idle=1000, ours=0)
    tree.read(mono=1000.0)
    tree.stat(busy=1500, idle=1500, ours=0)
    assert tree.read(mono=1005.0).cpu_others == pytest.approx(50.0)
    tree.stat(busy=1510, idle=1500, ours=0)
    assert tree.read(mono=1005.05).cpu_others == pytest.approx(50.0)
    tree.stat(busy=1700, idle=1500, ours=0)
    assert tree.read(mono=1010.0).cpu_others == pytest.approx(100.0)


def test_cpu_of_others_is_taken_over_seconds(tree: Tree) -> None:
    """Looks come every 0.8 s; one of them in which somebody started a program is no storm, several are."""
    busy, idle, seen = 0, 0, []
    for look in range(12):
        storm = look in (3, 7, 8, 9, 10, 11)
        busy, idle = busy + (160 if storm else 0), idle + (0 if storm else 160)
        tree.stat(busy=busy, idle=idle, ours=0)
        seen.append(tree.read(mono=1000.0 + 0.8 * look).cpu_others)
    assert seen[0] is None
    assert seen[1:3] == [0.0, 0.0]
    assert all(share is not None and share <= 100 / 3 + 1e-9 for share in seen[3:7])
    assert seen[9] == pytest.approx(75.0)
    assert seen[11] == pytest.approx(100.0)


def test_cpu_of_the_trainers_is_charged_to_the_day(tree: Tree) -> None:
    """The running one's and, once it is gone, what it left with us; each second once."""
    senses = Sensors(tree.sys, tree.proc, tree.state, UTC, budget=Budget(tree.state, 600.0))
    tick = os.sysconf("SC_CLK_TCK")
    used = []
    for left, running in ((0, 0), (0, 100 * tick), (0, 150 * tick), (150 * tick, None), (150 * tick, 10 * tick)):
        tree.put(f"proc/{os.getpid()}/stat", f"1 (agent) S {'0 ' * 10}77 3 {left} 0 20 0\n")
        tree.put("proc/77/stat", f"77 (python) R {'0 ' * 10}{running or 0} 0 0 0 20 0\n")
        used.append(senses.read(NOW, trainer=None if running is None else 77).budget_used)
    assert used == [0.0, 100.0, 150.0, 150.0, 160.0]


class Said(Bus):
    """A bus that has answered already."""

    def __init__(self, **answers: bool) -> None:
        super().__init__(lambda said: None)
        self.answers = {Question(name): answer for name, answer in answers.items()}
        self.wanted: frozenset[Question] = frozenset()

    def look(self, wanted: frozenset[Question], mono: float, training: bool = False) -> dict[Question, bool]:
        """What is wanted of it."""
        self.wanted = wanted
        return {each: answer for each, answer in self.answers.items() if each in wanted}


ALL = frozenset(Question)


def test_the_bus_tells_of_user_and_network(tree: Tree) -> None:
    """Its answers are facts like any other; a device whose bus is asked must be looked at, as nothing calls."""
    bus = Said(user=True, metered=False)
    senses = Sensors(tree.sys, tree.proc, tree.state, UTC, bus)
    facts = senses.read(NOW, asked=ALL, watched=True)
    assert (facts.user_idle, facts.metered, facts.watched) == (True, False, False)
    assert senses.read(NOW, asked=frozenset({Question.POWER}), watched=True).watched
    assert senses.read(NOW).user_idle is None


def test_another_source_of_power_counts_only_where_the_kernel_knows_none(tree: Tree) -> None:
    """UPower knows of a UPS on USB; it is not asked, nor heard, where /sys has a supply of its own."""
    bus = Said(power=True)
    senses = Sensors(tree.sys, tree.proc, tree.state, UTC, bus)
    facts = senses.read(NOW, asked=ALL, watched=True)
    assert (facts.mains, facts.watched) == (False, False)
    bus.answers = {}
    assert senses.read(NOW, asked=ALL).mains is True
    bus.answers = {Question.POWER: True}
    tree.supplies(AC=MAINS)
    assert senses.read(NOW, asked=ALL).mains is True
    assert Question.POWER not in bus.wanted


def test_trip_points_are_read_now_and_then(tree: Tree) -> None:
    """The temperature is of now, while its limits, which are many files, may be a minute old."""
    zone = "sys/class/thermal/thermal_zone0"
    tree.put(f"{zone}/trip_point_0_type", "passive\n")
    tree.put(f"{zone}/trip_point_0_temp", "85000\n")
    tree.put(f"{zone}/temp", "45000\n")
    assert tree.read(mono=1000.0).heat_margin == 40.0
    tree.put(f"{zone}/temp", "80000\n")
    tree.put(f"{zone}/trip_point_0_temp", "70000\n")
    assert tree.read(mono=1059.0).heat_margin == 5.0
    assert tree.read(mono=1060.0).heat_margin == -10.0


def test_work_echoes_in_the_averages(tree: Tree) -> None:
    """Pressure over 10 s still shows our work when it has just ended, so it stays ours for a while."""
    assert not tree.read(mono=1000.0).training
    assert tree.read(mono=1001.0, trainer=77, working=True).training
    assert tree.read(mono=1000.9 + ECHO, trainer=77).training
    assert not tree.read(mono=1001.0 + ECHO, trainer=77).training


def test_pause_lasts_until_its_end_or_resume(tree: Tree) -> None:
    """The operator's word survives a restart, because it is a file."""
    pause(tree.state, NOW.utc + 60)
    assert (tree.read().paused, tree.read().paused_until) == (True, NOW.utc + 60)
    assert Tree.read(tree, mono=NOW.mono + 60.1).paused is False
    pause(tree.state, None)
    assert (tree.read().paused, tree.read().paused_until) == (True, None)
    resume(tree.state)
    resume(tree.state)
    assert not tree.read().paused


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"until": true}', '{"until": "soon"}', '{"until": NaN}', '{"until": -1}', "[" * 5000]
    + ['{"until": 1e300}', '{"until": 1' + "0" * 400 + "}"],
)
def test_pause_that_cannot_be_read_is_a_pause(tree: Tree, text: str) -> None:
    """Somebody wanted the device to stop; how long is not known, so it stops."""
    tree.put(f"state/{PAUSE_FILE}", text)
    assert tree.read().paused


def test_time_is_local(tmp_path: Path) -> None:
    """The calendar is about the clock on site."""
    senses = Sensors(tmp_path, tmp_path, tmp_path, ZoneInfo("Asia/Kathmandu"))
    facts = senses.read(NOW, trained=NOW.mono - 5.0)
    assert f"{facts.local:%H:%M}" == "17:45"
    assert facts.since_round == 5.0


def test_device_without_anything_gives_none(tree: Tree) -> None:
    """No /sys and no /proc at all: nothing is known, and nothing is raised."""
    facts = tree.read(trainer=77)
    known = (facts.cpu_pressure, facts.memory_pressure, facts.io_pressure, facts.load, facts.cpu_others)
    assert known == (None,) * 5
    assert (facts.memory_free, facts.temperature, facts.heat_margin, facts.battery) == (None,) * 4


def test_forbidden_files_give_none(tree: Tree) -> None:
    """No permission is one more way not to know; and what may be a pause is one."""
    tree.supplies(AC=MAINS)
    tree.put("proc/pressure/cpu", "some avg10=1.00\n")
    root = os.geteuid() == 0
    tree.root.chmod(0)
    if root:
        os.seteuid(65_534)  # whom a mode keeps out, as it does not root
    try:
        facts = tree.read(trainer=77)
    finally:
        if root:
            os.seteuid(0)
        tree.root.chmod(0o700)
    assert (facts.mains, facts.cpu_pressure, facts.memory_free, facts.disk_free) == (None, None, None, None)
    assert facts.paused
    assert tree.read().mains


def test_folder_in_place_of_a_file_gives_none(tree: Tree) -> None:
    """Reading fails although the path exists, as it does without permission."""
    for name in ("proc/pressure/cpu", "proc/meminfo", "proc/stat", "sys/class/power_supply/AC/type"):
        (tree.root / name).mkdir(parents=True)
    facts = tree.read()
    assert (facts.mains, facts.cpu_pressure, facts.memory_free) == (None, None, None)
    (tree.root / "sys/class/thermal").write_text("")
    assert tree.read().temperature is None


FILES = (
    "sys/class/power_supply/AC/type",
    "sys/class/power_supply/AC/online",
    "sys/class/power_supply/BAT0/type",
    "sys/class/power_supply/BAT0/status",
    "sys/class/power_supply/BAT0/capacity",
    "sys/class/thermal/thermal_zone0/temp",
    "sys/class/thermal/thermal_zone0/trip_point_0_type",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp",
    "proc/pressure/cpu",
    "proc/pressure/memory",
    "proc/pressure/io",
    "proc/loadavg",
    "proc/meminfo",
    "proc/stat",
    f"proc/{os.getpid()}/stat",
    f"state/{PAUSE_FILE}",
)
words = st.sampled_from(
    ["Mains", "Battery", "some avg10=nan", "some avg10=", "1e999", "-1", "9" * 40, "MemAvailable: x kB", "passive"]
    + ["cpu 1 2 3 4 5", "cpu  1 1 1 1 1 1 1 1", "1 (x) S " + "1 " * 20, "nan 0 0", "5000000"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FILES), words | st.binary(max_size=60), max_size=len(FILES)))
def test_garbage_never_raises(tree: Tree, files: dict[str, str | bytes]) -> None:
    """Whatever a driver writes, looking gives facts, and the policy can judge them."""
    for name in FILES:
        tree.put(name, files.get(name, b""))
    for _ in range(2):
        facts = tree.read(trainer=77, working=True)
        assert facts.battery is None or 0 <= facts.battery <= 100
        assert facts.cpu_others is None or 0 <= facts.cpu_others <= 100
        assert facts.cpu_pressure is None or 0 <= facts.cpu_pressure <= 100
        assert all(obstacle.text for obstacle in obstacles(Policy(max_temperature=70.0), None, facts))


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    """The real /sys and /proc give at least time, memory and disk, and CPU use on the second look."""
    senses = Sensors(Path("/sys"), Path("/proc"), tmp_path, UTC)
    facts = senses.read(NOW)
    assert facts.memory_free is not None
    assert 0 < facts.memory_free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts.load is not None
