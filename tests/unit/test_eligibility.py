"""edge_agent.eligibility: every constraint blocks exactly when it says, and the owner's word is final."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.calendar import Window
from edge_agent.eligibility import (
    TOLERATED,
    Constraint,
    DeviceFacts,
    Gatekeeper,
    Obstacle,
    Policy,
    merged,
    obstacles,
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


def test_publisher_can_only_ask_for_more() -> None:
    """Conditions tighten a loose policy and never loosen a strict one."""
    loose = Policy(mains=False, min_battery=0.0, cpu_pressure=100.0, cpu_others=100.0, load=1000.0)
    asked = Conditions(mains=True, idle=True, min_battery=50)
    assert names(loose, asked, mains=False, battery=40.0, cpu_pressure=50.0) == ["mains", "battery", "cpu"]
    assert names(loose, asked, cpu_pressure=None, load=0.8) == ["cpu"]
    assert names(loose, asked, training=True, cpu_others=60.0) == ["cpu"]
    strict = Policy(mains=True, min_battery=90.0, cpu_pressure=5.0)
    assert names(strict, Conditions(), mains=False, cpu_pressure=6.0) == ["mains", "battery", "cpu"]
    assert names(strict, asked, mains=False, battery=60.0, cpu_pressure=6.0) == ["mains", "battery", "cpu"]


conditions = st.builds(Conditions, mains=st.booleans(), idle=st.booleans(), min_battery=st.integers(0, 100))
policies = st.builds(
    Policy,
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
)


@given(policies, conditions, facts)
def test_conditions_never_remove_an_obstacle(policy: Policy, asked: Conditions, found: DeviceFacts) -> None:
    """Whatever a release asks, what the owner forbids stays forbidden; and merging twice changes nothing."""
    alone = {obstacle.name for obstacle in obstacles(policy, None, found)}
    both = {obstacle.name for obstacle in obstacles(policy, asked, found)}
    assert alone <= both
    assert merged(merged(policy, asked), asked) == merged(policy, asked)


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


@given(st.lists(st.tuples(st.floats(0.1, 50), st.sampled_from([None, *Constraint])), max_size=40))
def test_gatekeeper_keeps_its_two_promises(looks: list[tuple[float, Constraint | None]]) -> None:
    """Eligible only if nothing stood in the way for `settle`; never eligible while something urgent does."""
    gate = Gatekeeper(Policy(settle=20.0, patience=10.0))
    now, clear_since = 0.0, None
    was = False
    for step, name in looks:
        now += step
        clear_since = None if name else now if clear_since is None else clear_since
        changed = gate.observe(() if name is None else blocked(name), now)
        assert changed is (gate.eligible is not was)
        if gate.eligible and not was:
            assert clear_since is not None
            assert now - clear_since >= 20.0
        if name is not None and name not in TOLERATED:
            assert not gate.eligible
        assert gate.deadline is not None
        assert gate.deadline > now
        was = gate.eligible


def test_facts_are_named_once() -> None:
    """Every fact that can be unknown is unknown by default, so that a new one is never taken for measured."""
    told = {"local", "mains", "has_battery", "training", "paused"}
    blank = DeviceFacts(local=NOON)
    assert {field.name for field in fields(DeviceFacts) if getattr(blank, field.name) is not None} == told
