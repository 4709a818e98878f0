"""edge_agent.eligibility: every constraint blocks exactly when it says, and the owner's word is final."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import UNSET

from edge_agent.calendar import Window
from edge_agent.eligibility import (
    TOLERATED,
    Constraint,
    DataFacts,
    DeviceFacts,
    Gatekeeper,
    Obstacle,
    Policy,
    Question,
    Verdict,
    constraints,
    merged,
    obstacles,
    questions,
)
from shared.messages import Conditions

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
GOOD = DeviceFacts(
    local=NOON,
    mains=True,
    has_battery=True,
    battery=80.0,
    cpu_pressure=1.0,
    memory_pressure=0.0,
    io_pressure=0.0,
    load=0.1,
    cpu_others=1.0,
    memory_free=4 << 30,
    disk_free=4 << 30,
    temperature=40.0,
    heat_margin=40.0,
)
POLICY = Policy()


def names(policy: Policy = POLICY, conditions: Conditions | None = None, **facts: Any) -> list[str]:
    """What stands in the way of a good device with other `facts`."""
    return [obstacle.name.value for obstacle in obstacles(policy, conditions, replace(GOOD, **facts))]


def test_good_device_may_go() -> None:
    """Nothing stands in the way where all is well."""
    assert names() == []


@pytest.mark.parametrize(
    ("facts", "settings", "expected"),
    [
        ({"paused": True}, {}, "paused"),
        ({}, {"windows": (Window.parse("22:00-06:00"),)}, "calendar"),
        ({"mains": False}, {}, "mains"),
        ({"mains": None}, {}, "mains"),
        ({"battery": 19.0}, {}, "battery"),
        ({"battery": None}, {}, "battery"),
        ({"temperature": 70.1}, {"max_temperature": 70.0}, "heat"),
        ({"temperature": None}, {"max_temperature": 70.0}, "heat"),
        ({"heat_margin": 0.0}, {}, "heat"),
        ({"cpu_pressure": 20.1}, {}, "cpu"),
        ({"cpu_pressure": None, "load": 0.71}, {}, "cpu"),
        ({"cpu_pressure": None, "load": None}, {}, "cpu"),
        ({"training": True, "cpu_others": 50.1}, {}, "cpu"),
        ({"memory_free": (768 << 20) - 1}, {}, "memory"),
        ({"memory_free": None}, {}, "memory"),
        ({"memory_pressure": 10.1}, {}, "memory_pressure"),
        ({"memory_pressure": 10.1, "training": True}, {}, "memory_pressure"),
        ({"io_pressure": 30.1}, {}, "io"),
        ({"disk_free": (256 << 20) - 1}, {}, "disk"),
        ({"disk_free": None}, {}, "disk"),
        ({"since_round": 59.9}, {"spacing": 60.0}, "spacing"),
        ({"user_idle": False}, {"idle_user": True}, "user"),
        ({"user_idle": None}, {"idle_user": True}, "user"),
        ({"metered": True}, {"unmetered": True}, "metered"),
        ({"metered": None}, {"unmetered": True}, "metered"),
        ({"budget_used": 600.0}, {"cpu_budget": 600.0}, "budget"),
        ({"budget_used": None}, {"cpu_budget": 600.0}, "budget"),
    ],
)
def test_each_constraint_blocks(facts: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    """One fact beyond its threshold, or unknown where it must be known, is one obstacle of that name."""
    policy = msgspec.structs.replace(POLICY, **settings)
    assert names(policy, **facts) == [expected]


@pytest.mark.parametrize(
    ("facts", "settings"),
    [
        ({}, {"windows": (Window.parse("11:00-13:00"),)}),
        ({"mains": False}, {"mains": False}),
        ({"has_battery": False, "battery": None}, {}),
        ({"battery": 20.0}, {}),
        ({"battery": None}, {"min_battery": 0.0}),
        ({"temperature": 70.0}, {"max_temperature": 70.0}),
        ({"temperature": None, "heat_margin": None}, {}),
        ({"cpu_pressure": 20.0}, {}),
        ({"cpu_pressure": 100.0}, {"cpu_pressure": 100.0}),
        ({"cpu_pressure": None, "load": None}, {"cpu_pressure": 100.0}),
        ({"cpu_pressure": None, "load": 0.7}, {}),
        ({"memory_pressure": None, "io_pressure": None}, {}),
        ({"memory_free": None}, {"memory_free": 0}),
        ({"disk_free": None}, {"disk_free": 0}),
        ({"since_round": 60.0}, {"spacing": 60.0}),
        ({"since_round": None}, {"spacing": 60.0}),
        ({"user_idle": False, "metered": True, "budget_used": 1e6}, {}),
        ({"user_idle": True}, {"idle_user": True}),
        ({"metered": False}, {"unmetered": True}),
        ({"budget_used": 599.9}, {"cpu_budget": 600.0}),
    ],
)
def test_at_the_threshold_or_switched_off_nothing_blocks(facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """A threshold may be reached, a constraint may be off, and a source the kernel lacks is no obstacle."""
    policy = msgspec.structs.replace(POLICY, **settings)
    assert names(policy, **facts) == []


def test_our_own_trainer_is_not_load() -> None:
    """While we train, pressure of CPU and I/O and the memory we took are ours; what others use still counts."""
    ours: dict[str, Any] = {"training": True, "cpu_pressure": 99.0, "io_pressure": 99.0, "load": 9.0, "memory_free": 0}
    assert names(**ours) == []
    assert names(**ours, cpu_others=None) == []
    assert names(**ours, cpu_others=60.0) == ["cpu"]


def test_obstacle_says_value_threshold_and_setting() -> None:
    """`edge-agent why` needs no other source."""
    (found,) = obstacles(POLICY, None, replace(GOOD, cpu_pressure=37.2))
    assert found == Obstacle(
        Constraint.CPU, 37.2, 20.0, "tasks wait for a CPU 37.2 % of the time, policy.cpu_pressure is 20 %"
    )
    (paused,) = obstacles(POLICY, None, replace(GOOD, paused=True, paused_until=NOON.timestamp() + 3600))
    assert "until 2026-03-02 13:00" in paused.text


def test_every_constraint_is_judged_in_order() -> None:
    """`edge-agent why` shows each one, also those that are met, each with words, a source and what decides."""
    found = constraints(POLICY, None, GOOD)
    assert [each.name for each in found] == list(Constraint)
    assert all(each.text and each.source and "{" not in each.text + each.advice for each in found)
    assert {each.name.value for each in found if each.verdict is Verdict.NOT_ASKED} == {
        *("calendar", "spacing", "user", "metered", "budget", "data")
    }
    assert not any(each.advice or each.verdict is Verdict.UNMET for each in found)
    cpu = next(each for each in found if each.name is Constraint.CPU)
    assert (cpu.value, cpu.threshold, cpu.setting, cpu.source) == (
        1.0,
        20.0,
        "policy.cpu_pressure",
        "/proc/pressure/cpu",
    )


def test_an_unmet_constraint_says_what_its_owner_can_do() -> None:
    """The owner's own setting where that decides; where the publisher asks for more, that nothing here loosens it."""

    def mains(policy: Policy, asked: Conditions | None) -> tuple[str, str]:
        (found,) = (each for each in constraints(policy, asked, replace(GOOD, mains=False)) if each.advice)
        return found.setting, found.advice

    assert mains(POLICY, Conditions(mains=True)) == ("policy.mains", "plug it in, or set policy.mains = false")
    setting, advice = mains(Policy(mains=False), Conditions(mains=True))
    assert setting == "conditions.mains of the task"
    assert "publisher" in advice
    loose = Policy(cpu_pressure=100.0)
    busy = constraints(loose, Conditions(idle=True), replace(GOOD, cpu_pressure=50.0))
    assert [each.setting for each in busy if each.advice] == ["conditions.idle of the task"]


def test_what_the_kernel_lacks_is_unknown_and_not_met() -> None:
    """People can tell what was measured from what was not."""
    found = constraints(POLICY, None, replace(GOOD, memory_pressure=None, heat_margin=None, temperature=None))
    assert [each.name.value for each in found if each.verdict is Verdict.UNKNOWN] == [
        "heat",
        "memory_pressure",
        "no_trainer",
    ]


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (None, Verdict.NOT_ASKED),
        (DataFacts("points", 40), Verdict.UNKNOWN),
        (DataFacts("points", 40, 40), Verdict.MET),
        (DataFacts("points", 40, 39), Verdict.UNMET),
        (DataFacts("points", 40, 400, "b.npz: row 7 is not finite"), Verdict.UNMET),
    ],
)
def test_enough_data(data: DataFacts | None, verdict: Verdict) -> None:
    """Fewer examples than the contract asks for, or some that were refused, are an obstacle by name."""
    (judged,) = [each for each in constraints(POLICY, None, GOOD, data) if each.name is Constraint.DATA]
    assert judged.verdict is verdict
    names = [each.name.value for each in obstacles(POLICY, None, GOOD, data)]
    assert names == (["data"] if verdict is Verdict.UNMET else [])


def test_the_bus_is_asked_only_what_somebody_wants_to_know() -> None:
    """The owner's settings or a publisher's; a device whose owner wants none of it spawns nothing."""
    nothing = Policy(mains=False)
    assert questions(nothing, ()) == set()
    assert questions(nothing, [Conditions(), Conditions(unmetered=True)]) == {Question.METERED}
    assert questions(nothing, [Conditions(mains=True)]) == {Question.POWER}
    assert questions(Policy(idle_user=True), ()) == {Question.USER, Question.POWER}


def test_publisher_can_only_ask_for_more() -> None:
    """Conditions tighten a loose policy and never loosen a strict one."""
    loose = Policy(mains=False, min_battery=0.0, cpu_pressure=100.0, cpu_others=100.0, load=1000.0)
    asked = Conditions(mains=True, idle=True, min_battery=50)
    assert names(loose, Conditions(idle_user=True, unmetered=True)) == ["user", "metered"]
    private = Policy(idle_user=True, unmetered=True)
    assert names(private, Conditions(), user_idle=False, metered=True) == ["user", "metered"]
    assert names(loose, asked, mains=False, battery=40.0, cpu_pressure=50.0) == ["mains", "battery", "cpu"]
    assert names(loose, asked, cpu_pressure=None, load=0.8) == ["cpu"]
    assert names(loose, asked, training=True, cpu_others=60.0) == ["cpu"]
    strict = Policy(mains=True, min_battery=90.0, cpu_pressure=5.0)
    assert names(strict, Conditions(), mains=False, cpu_pressure=6.0) == ["mains", "battery", "cpu"]
    assert names(strict, asked, mains=False, battery=60.0, cpu_pressure=6.0) == ["mains", "battery", "cpu"]


demands = st.sampled_from([True, UNSET])
conditions = st.builds(
    Conditions,
    mains=st.booleans(),
    idle=st.booleans(),
    min_battery=st.integers(0, 100),
    idle_user=demands,
    unmetered=demands,
)
policies = st.builds(
    Policy,
    idle_user=st.booleans(),
    unmetered=st.booleans(),
    cpu_budget=st.sampled_from([0.0, 100.0]),
    max_temperature=st.sampled_from([0.0, 70.0]),
    spacing=st.sampled_from([0.0, 50.0]),
    windows=st.sampled_from([(), (Window.parse("22:00-06:00"),)]),
    mains=st.booleans(),
    min_battery=st.floats(0, 100),
    cpu_pressure=st.floats(0, 100),
    cpu_others=st.floats(0, 100),
    load=st.floats(0, 4),
)
percent = st.none() | st.floats(0, 100)
facts = st.builds(
    DeviceFacts,
    local=st.just(NOON),
    mains=st.sampled_from([True, False, None]),
    has_battery=st.booleans(),
    battery=percent,
    cpu_pressure=percent,
    cpu_others=percent,
    load=st.none() | st.floats(0, 4),
    memory_pressure=percent,
    io_pressure=percent,
    memory_free=st.none() | st.integers(0, 1 << 31),
    disk_free=st.none() | st.integers(0, 1 << 31),
    temperature=st.none() | st.floats(-40, 120),
    heat_margin=st.none() | st.floats(-40, 120),
    training=st.booleans(),
    paused=st.booleans(),
    since_round=st.none() | st.floats(0, 100),
    user_idle=st.sampled_from([True, False, None]),
    metered=st.sampled_from([True, False, None]),
    budget_used=st.none() | st.floats(0, 200),
)


@given(policies, conditions, facts)
def test_conditions_never_remove_an_obstacle(policy: Policy, asked: Conditions, found: DeviceFacts) -> None:
    """Whatever a release asks, what the owner forbids stays forbidden; and merging twice changes nothing."""
    alone = {obstacle.name for obstacle in obstacles(policy, None, found)}
    both = {obstacle.name for obstacle in obstacles(policy, asked, found)}
    assert alone <= both
    assert merged(merged(policy, asked), asked) == merged(policy, asked)


@given(policies, conditions, conditions, facts)
def test_every_condition_only_tightens(policy: Policy, one: Conditions, other: Conditions, found: DeviceFacts) -> None:
    """What asks for at least as much lets through at most as much, for each single condition and for all together."""
    more = Conditions(
        mains=one.mains or other.mains,
        idle=one.idle or other.idle,
        min_battery=max(one.min_battery, other.min_battery),
        idle_user=one.idle_user or other.idle_user,
        unmetered=one.unmetered or other.unmetered,
    )
    less = {obstacle.name for obstacle in obstacles(policy, one, found)}
    assert less <= {obstacle.name for obstacle in obstacles(policy, more, found)}


@given(policies, st.none() | conditions, facts)
def test_obstacles_are_the_unmet_constraints(policy: Policy, asked: Conditions | None, found: DeviceFacts) -> None:
    """One judgement, two views: what blocks and what is shown cannot disagree."""
    judged = constraints(policy, asked, found)
    assert [each.name for each in judged] == list(Constraint)
    unmet = [(each.name, each.value, each.text) for each in judged if each.verdict is Verdict.UNMET]
    assert [(each.name, each.value, each.text) for each in obstacles(policy, asked, found)] == unmet
    assert all((each.threshold is None) == (each.verdict is Verdict.NOT_ASKED) for each in judged)


@given(facts)
def test_no_facts_at_all_never_mean_go(found: DeviceFacts) -> None:
    """A device that can measure nothing does not train under the default policy."""
    blind = DeviceFacts(local=NOON, mains=None)
    assert [obstacle.name for obstacle in obstacles(POLICY, None, blind)] == ["mains", "cpu", "memory", "disk"]
    assert all(obstacle.text for obstacle in obstacles(POLICY, None, found))


def blocked(name: Constraint) -> tuple[Obstacle, ...]:
    """One obstacle."""
    return (Obstacle(name, 1.0, 0.0, "text"),)


def test_eligible_only_after_it_settled() -> None:
    """Sixty seconds without an obstacle, and an obstacle in between starts them anew."""
    gate = Gatekeeper(Policy(settle=60.0, sense=30.0))
    assert gate.deadline is None
    assert not gate.observe((), 0.0)
    assert gate.deadline == 30.0
    assert not gate.observe((), 40.0)
    assert gate.deadline == 60.0
    assert not gate.observe(blocked(Constraint.IO), 50.0)
    assert not gate.observe((), 55.0)
    assert not gate.observe((), 114.9)
    assert not gate.eligible
    assert gate.observe((), 115.0)
    assert gate.eligible


def test_without_settling_time_the_first_look_counts() -> None:
    """settle = 0 means at once."""
    gate = Gatekeeper(Policy(settle=0.0))
    assert gate.observe((), 5.0)
    assert gate.eligible


@pytest.mark.parametrize("name", [name for name in Constraint if name not in TOLERATED])
def test_power_heat_calendar_and_operator_stop_at_once(name: Constraint) -> None:
    """These end it with the first look that shows them."""
    gate = Gatekeeper(Policy(settle=0.0))
    gate.observe((), 0.0)
    assert gate.observe(blocked(name), 1.0)
    assert not gate.eligible


@pytest.mark.parametrize("name", sorted(TOLERATED))
def test_load_must_last_before_it_stops(name: Constraint) -> None:
    """A burst passes, load that lasts `patience` does not, and the deadline is where that is decided."""
    gate = Gatekeeper(Policy(settle=0.0, patience=10.0, sense_training=5.0))
    gate.observe((), 0.0)
    assert not gate.observe(blocked(name), 1.0, training=True)
    assert gate.deadline == 6.0
    assert not gate.observe((), 6.0, training=True)
    assert not gate.observe(blocked(name), 11.0, training=True)
    assert not gate.observe(blocked(name), 18.0, training=True)
    assert gate.deadline == 21.0
    assert gate.observe(blocked(name), 21.0, training=True)
    assert not gate.eligible


def test_an_idle_device_is_left_alone_where_the_kernel_watches() -> None:
    """Long only while it may train, nothing stands in the way and load would wake us; else as often as before."""
    gate = Gatekeeper(Policy(settle=0.0, sense=30.0, sense_idle=300.0, sense_training=0.8))
    assert gate.observe((), 0.0, watched=True)
    assert gate.deadline == 300.0
    gate.observe((), 1.0)
    assert gate.deadline == 31.0
    gate.observe((), 2.0, training=True, watched=True)
    assert gate.deadline == 2.8
    gate.observe(blocked(Constraint.CPU), 3.0, watched=True)
    assert gate.deadline == 8.0
    gate.observe(blocked(Constraint.CPU), 8.0, watched=True)
    assert gate.deadline == 38.0
    settling = Gatekeeper(Policy(settle=60.0, sense=30.0))
    settling.observe((), 0.0, watched=True)
    assert settling.deadline == 30.0


class GatekeeperRules(RuleBasedStateMachine):
    """Any sequence of looks, judged by the whole history of looks. Times are whole tenths of a second, and exact."""

    SETTLE, PATIENCE = 200.0, 50.0

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gatekeeper(Policy(settle=self.SETTLE, patience=self.PATIENCE, sense=300.0, sense_training=8.0))
        self.looks: list[tuple[float, frozenset[Constraint]]] = []
        self.now = 0.0

    @rule(
        step=st.sampled_from([0, 1, 8, 49, 50, 51, 199, 200]) | st.integers(0, 600),
        names=st.frozensets(st.sampled_from(Constraint), max_size=2) | st.just(frozenset()),
        training=st.booleans(),
        watched=st.booleans(),
    )
    def look(self, step: int, names: frozenset[Constraint], training: bool, watched: bool) -> None:
        """One look at the device."""
        was, self.now = self.gate.eligible, self.now + step
        found = tuple(obstacle for name in sorted(names) for obstacle in blocked(name))
        changed = self.gate.observe(found, self.now, training, watched)
        self.looks.append((self.now, names))
        assert changed is (self.gate.eligible is not was)
        urgent = not names <= TOLERATED
        if self.gate.eligible and not was:
            # It has held for `settle`: no look within that time saw anything, and one before it was clear too.
            assert not any(seen for at, seen in self.looks if at > self.now - self.SETTLE)
            assert any(at <= self.now - self.SETTLE for at, _ in self.looks)
        if urgent:
            assert not self.gate.eligible
        if was and not self.gate.eligible and not urgent:
            assert self._blocked_for() >= self.PATIENCE
        if was and self._blocked_for() >= self.PATIENCE:
            assert not self.gate.eligible

    def _blocked_for(self) -> float:
        """How long every look has seen something."""
        began = self.now
        for at, seen in reversed(self.looks):
            if not seen:
                break
            began = at
        return self.now - began if self.looks[-1][1] else 0.0

    @precondition(lambda self: self.looks)
    @invariant()
    def it_looks_again_in_time(self) -> None:
        """The next look is ahead, and not later than the moment at which something would be decided."""
        due = self.gate.deadline
        assert due is not None
        assert due > self.now
        if self.gate.eligible and self.looks[-1][1]:
            assert due <= self.now - self._blocked_for() + self.PATIENCE


TestGatekeeper = GatekeeperRules.TestCase


def test_the_policys_page_names_every_constraint_and_setting() -> None:
    """docs/howto/policy.md has the obstacles in their order, and says of each which setting decides."""
    text = (Path(__file__).parents[2] / "docs" / "howto" / "policy.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"]
    assert [row[0] for row in rows] == list(Constraint)
    settings = {name.strip(" `") for row in rows for name in row[2].split(",") if name.strip(" `")}
    timing = {"settle", "patience", "grace", "sense", "sense_idle", "sense_training"}
    assert settings | timing == set(Policy.__struct_fields__)
    judged = constraints(POLICY, None, GOOD)
    assert all(each.setting.removeprefix("policy.") in {*settings, ""} for each in judged)


def test_facts_are_named_once() -> None:
    """Every fact that can be unknown is unknown by default, so that a new one is never taken for measured."""
    told = {"local", "mains", "has_battery", "training", "paused", "watched"}
    blank = DeviceFacts(local=NOON)
    assert {field.name for field in fields(DeviceFacts) if getattr(blank, field.name) is not None} == told


@pytest.mark.parametrize(("there", "blocked"), [(True, False), (None, False), (False, True)])
def test_no_trainer(there: bool | None, blocked: bool) -> None:
    """A device that surely lacks PyTorch says so and how to get it; where that cannot be told, a start will tell."""
    found = [each for each in obstacles(Policy(), None, replace(GOOD, trainer=there)) if each.name == "no_trainer"]
    assert bool(found) is blocked
    (judged,) = [each for each in constraints(POLICY, None, replace(GOOD, trainer=there)) if each.name == "no_trainer"]
    assert ("edge-agent trainer install" in judged.advice) is blocked
