"""docs/tutorial.md, followed word by word on a fresh Debian with systemd.

Every `sh` block after a comment `run: NAME` is run by bash as it stands, in root's home; `file: NAME` is written there;
`wait: EVENT` waits for that event of the agent and holds the shown lines against the events there are. What differs:
sudo runs its arguments, since the machine's only user is root; PyTorch comes from a folder, because the machine has no
network (`offline: trainer`); and what else this machine does keeps the agent from nothing, because that is more than a
device's: all else of the policy is as packaged.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.events import Event
from shared.logs import sentence
from tests.system.conftest import ROOT, Packages
from tests.system.machine import Machine
from tests.system.plant import needs_same_python

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

_BLOCK = re.compile(r"^<!-- (\w+): (\S+) -->\n```(\w*)\n(.*?)^```$", re.M | re.S)
_SHOWN = re.compile(r"^edge-agent\[\d+\]: ([A-Z][^:]*):", re.M)
WHEELS = "/srv/wheels"
_BUSY = """
[policy]
cpu_pressure = 100.0
cpu_others = 100.0
memory_pressure = 100.0
io_pressure = 100.0
[trainer]
scheduling = "normal"
"""
HEADS = {sentence(event, {}) for event in Event}


class Reader:
    """A new user with a terminal."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.said: dict[str, str] = {}

    def follow(self, todo: str, what: str, text: str) -> None:
        """Do what a block says."""
        match todo:
            case "file":
                self.machine.write(f"/root/{what}", text)
            case "run":
                self.said[what] = self.machine.shell(
                    'cd /root; shopt -s expand_aliases; sudo() { "$@"; }; export DEBIAN_FRONTEND=noninteractive\n'
                    + text,
                    timeout=180,
                )
                if what == "install":
                    self.machine.write("/etc/fieldfare/agent.toml.d/zz-busy.toml", _BUSY)
            case "offline":
                command = text.split("#")[0].split()
                assert command == ["sudo", "edge-agent", "trainer", "install"]
                self.machine.run(*command[1:], "--wheels", WHEELS, timeout=300)
            case "wait":
                assert set(_SHOWN.findall(text)) <= HEADS
                self.machine.wait_journal("edge-agent", 180.0, EVENT=what)  # once it was idle for a minute
            case _:
                raise AssertionError(todo)


@needs_same_python
def test_the_tutorial(machines: Callable[..., Machine], packages: Packages, wheels: Path) -> None:
    """At its end a device has enrolled, trained, answered examples with its model, and is gone without a trace."""
    machine = machines("tutorial", lend={wheels: WHEELS})
    for package in (packages.agent, packages.aggregator):
        machine.copy_in(package, f"/root/{package.name}")
    reader = Reader(machine)
    blocks = _BLOCK.findall((ROOT / "docs/tutorial.md").read_text())
    assert len(blocks) > 12
    for todo, what, _, text in blocks:
        if what == "watch":  # which a person reads some time after the lines above it
            machine.wait_journal("edge-agent", EVENT="model.used", RELEASE=1)
        reader.follow(todo, what, text)
        if what == "predict":
            lines = reader.said["predict"].splitlines()
            assert re.fullmatch(r"class,output_0,output_1,output_2", lines[0]) and len(lines) == 6
            (model,) = json.loads(machine.run("edge-agent", "models", "--json").stdout)["models"]
            assert model["task"] == "pump" and model["release"] >= 1
            assert "training.finished" in machine.run("journalctl", "-o", "json", "-u", "edge-agent").stdout
    assert "sensor-1" in reader.said["watch"] and "pump" in reader.said["watch"]
    assert not machine.exists("/var/lib/fieldfare-agent") and not machine.exists("/etc/fieldfare/device.key")
