"""The machine that scenarios run on is one: it keeps its disk, shares a wire, shows its journal, and leaves nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.daemon import until
from tests.system.conftest import ROOT
from tests.system.machine import Machine, Wire

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def test_the_disk_outlives_the_power(machines: Callable[..., Machine]) -> None:
    """What is written stays over a restart, a shutdown and a power cut; the journal too."""
    made = machines("one")
    made.write("/srv/kept", "yes")
    made.run("systemd-cat", "--identifier=before", "echo", "I was here")
    made.reboot()
    made.power_off()
    made.boot()
    made.run("sync")
    made.pull_the_plug()
    made.boot()
    assert made.read("/srv/kept") == "yes"
    assert "I was here" in made.run("journalctl", "--identifier=before", "--output=cat").stdout
    assert made.run("systemctl", "is-system-running").stdout.strip() == "running"


def test_a_unit_sees_power_that_is_not_there(machines: Callable[..., Machine]) -> None:
    """A fake adapter is plugged in and out under a running unit, whose lines come back as the journal has them."""
    made = machines("two")
    script = "while sleep 0.05; do cat /sys/class/power_supply/AC/online; done"
    made.write("/etc/systemd/system/watch.service", f"[Service]\nExecStart=/bin/sh -c '{script}'\n")
    power = made.fake_power("watch.service")
    made.run("systemctl", "start", "watch")
    assert made.wait_journal("watch", MESSAGE=1)["_SYSTEMD_UNIT"] == "watch.service"
    power.set(False)
    assert made.wait_journal("watch", MESSAGE=0)["PRIORITY"] == "6"
    power.set(True)
    until(lambda: made.journal("watch")[-1]["MESSAGE"] == "1" or None, "the adapter")


def test_machines_on_one_wire_hear_each_other(machines: Callable[..., Machine]) -> None:
    """Two machines on a wire share its ports; one that is not on it does not."""
    wire = Wire()
    try:
        first, second = Machine("first", wire), Machine("second", wire)
        with first, second:
            first.start("python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/srv", "8000")
            first.write("/srv/word", "hello")
            ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/word').read().decode())"
            until(lambda: second.run("python3", "-c", ask, check=False).stdout == "hello\n" or None, "an answer")
            assert machines("alone").run("python3", "-c", ask, check=False).returncode == 1
    finally:
        wire.end()


def test_nothing_is_left(machines: Callable[..., Machine]) -> None:
    """A machine that ended left no mount, no process, no control group and no folder here."""
    before = Path("/proc/self/mounts").read_text()
    with Machine("brief") as made:
        holder, groups = made.disk.parents[2], made.groups
        assert Path("/proc/self/mounts").read_text() == before
        assert made.run("hostname").stdout.strip() == "brief"
    assert groups and not any(group.exists() for group in groups)
    assert not holder.exists() and not Path("/run/systemd/nspawn/propagate/brief").exists()


def test_it_dies_with_the_tests(machines: Callable[..., Machine]) -> None:
    """Tests that are killed leave no machine running."""
    first = (
        "from tests.system.machine import Machine as M; m = M('brief'); m.boot(); print(m.first_process, flush=True)"
    )
    tests = subprocess.Popen(
        [sys.executable, "-c", f"{first}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert tests.stdin is not None and tests.stdout is not None
    with tests.stdin, tests.stdout:
        running = Path(f"/proc/{int(tests.stdout.readline())}")
        assert running.exists()
        tests.kill()
        tests.wait()
        until(lambda: not running.exists() or None, "the end of the machine")
