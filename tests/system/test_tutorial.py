"""docs/tutorial.md, followed word by word on a fresh Debian with systemd.

Every `sh` block after a comment `run: NAME` is run by bash as it stands, in root's home; `file: NAME` is written there;
`wait: EVENT` waits for that event of the agent and holds the shown lines against the events there are. What differs:
sudo runs its arguments, since the machine's only user is root; PyTorch is lent instead of downloaded (`lent: trainer`);
and whatever else this machine does, the agent may train at once.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.events import Event
from shared.logs import sentence
from tests.hostile.field import POLICY
from tests.system.conftest import ROOT, Packages
from tests.system.machine import Machine
from tests.system.plant import LENT, SITE, lend_trainer, needs_same_python

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

_BLOCK = re.compile(r"^<!-- (\w+): (\S+) -->\n```(\w*)\n(.*?)^```$", re.M | re.S)
_SHOWN = re.compile(r"^edge-agent\[\d+\]: ([A-Z][^:]*):", re.M)
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
                    self.machine.write("/etc/fieldfare/agent.toml.d/zz-test.toml", POLICY)
            case "lent":
                lend_trainer(self.machine)
            case "wait":
                assert set(_SHOWN.findall(text)) <= HEADS
                self.machine.wait_journal("edge-agent", EVENT=what)
            case _:
                raise AssertionError(todo)


@needs_same_python
def test_the_tutorial(machines: Callable[..., Machine], packages: Packages) -> None:
    """At its end a device has enrolled, trained, answered examples with its model, and is gone without a trace."""
    machine = machines("tutorial", lend={Path(SITE): LENT})
    for package in (packages.agent, packages.aggregator):
        machine.copy_in(package, f"/root/{package.name}")
    reader = Reader(machine)
    blocks = _BLOCK.findall((ROOT / "docs/tutorial.md").read_text())
    assert len(blocks) > 12
    for todo, what, _, text in blocks:
        reader.follow(todo, what, text)
        if what == "predict":
            lines = reader.said["predict"].splitlines()
            assert re.fullmatch(r"class,output_0,output_1,output_2", lines[0]) and len(lines) == 6
            assert "training.finished" in machine.run("journalctl", "-o", "json", "-u", "edge-agent").stdout
    assert "sensor-1" in reader.said["watch"] and "pump" in reader.said["watch"]
    assert not machine.exists("/var/lib/fieldfare-agent") and not machine.exists("/etc/fieldfare/device.key")
