"""The demo's folder: whose it is, and what the agents are shown there."""

import fcntl
import tomllib
from datetime import UTC
from pathlib import Path

import pytest

from edge_agent.eligibility import Policy, obstacles
from edge_agent.sensors import Sensors
from examples.digits import place
from examples.digits.place import Place
from examples.digits.processes import DemoError
from shared.machine import Instant


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    """What somebody else put there is never deleted."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoError, match="holds what no demo made"):
        place.claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    """A second run starts from nothing."""
    place.claim(tmp_path).close()
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "key").touch()
    place.claim(tmp_path).close()
    assert {entry.name for entry in tmp_path.iterdir()} == {"demo.lock", "logs", "devices", "run"}


def test_a_folder_in_use_is_refused_untouched(tmp_path: Path) -> None:
    """Two demos never share a folder, and the second one says so."""
    with place.claim(tmp_path):
        (tmp_path / "report.json").write_text("{}")
        with pytest.raises(DemoError, match="another demo runs"):
            place.claim(tmp_path)
        assert (tmp_path / "report.json").exists()
    with (tmp_path / "demo.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    """It is said at once, and not by an agent that dies later."""
    with pytest.raises(DemoError, match="too long"):
        place.claim(tmp_path / ("x" * 100))


def test_nothing_stands_in_the_way_on_the_made_machine(tmp_path: Path) -> None:
    """The owner's default policy finds no obstacle in the demo's own /sys and /proc, without a constraint loosened."""
    here = Place(tmp_path)
    place.make_machine(here)
    sensors = Sensors(here.machine / "sys", here.machine / "proc", tmp_path, UTC)
    facts = sensors.read(Instant(0.0, 0.0))
    assert (facts.mains, facts.cpu_pressure, facts.memory_pressure, facts.io_pressure) == (True, 0.0, 0.0, 0.0)
    assert facts.memory_free is not None
    assert obstacles(Policy(disk_free=0), None, facts) == ()


@pytest.mark.parametrize(("devices", "fewest"), [(1, 1), (2, 1), (4, 3), (8, 6)])
def test_the_task_file_fits_the_demo(tmp_path: Path, devices: int, fewest: int) -> None:
    """The goal is every device, and nothing but the plan differs from the example's own task file."""
    here = Place(tmp_path)
    place.make_task(here, devices, 7)
    made = tomllib.loads(here.task.read_text())
    example = tomllib.loads((place.HERE / "task.toml").read_text())
    assert made.pop("plan") == example.pop("plan") | {"goal": devices, "min_updates": fewest, "rounds": 7}
    assert made == example
