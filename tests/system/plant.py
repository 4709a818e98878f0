"""A whole fleet on one real machine: broker, aggregator and a device, each a service of systemd, from the packages."""

import json
import platform
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import release
from edge_agent.libraries import WANTED
from shared import lock
from tests.hostile.daemon import until
from tests.hostile.field import POLICY
from tests.system.conftest import ROOT
from tests.system.machine import Machine

AGENT = "edge-agent"
SITE = Path(sysconfig.get_path("purelib"))
VENV = "/usr/lib/fieldfare-agent"
LENT = "/srv/lent"
FAKETIME = f"/usr/lib/{platform.machine()}-linux-gnu/faketime/libfaketimeMT.so.1"
OVERRIDE = "/etc/fieldfare/agent.toml.d/zz.toml"
needs_same_python = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="lends torch to Debian 12's Python 3.11")


def lend_trainer(machine: Machine) -> None:
    """What `edge-agent trainer install` would download, as links to this environment's, which the machine can read.

    The machine must have been made with `lend={SITE: LENT}`.
    """
    wanted = lock.names(lock.subset((ROOT / "requirements/lock.txt").read_text(), WANTED)) | {"torch", "torchgen"}
    wanted |= {"functorch", "numpy.libs", "typing_extensions.py"}
    names = [
        entry.name
        for entry in SITE.iterdir()
        if entry.name in wanted or lock.canonical(entry.name.partition("-")[0]) in wanted
    ]
    assert set(WANTED) <= set(names)
    site = f"{VENV}/lib/python3.11/site-packages"
    machine.shell("".join(f"ln -s {LENT}/{name} {site}/{name}\n" for name in names))


def set_up(machine: Machine, data: Path, name: str, more: str = "") -> None:
    """A fleet on a machine with both packages, everything running, but no torch and no task.

    The device has `data`, an .npz, as the data set `name`, trains whatever else goes on, and is told `more`.
    """
    machine.run(
        "aggregator", "fleet", "init", "/root/fleet", "--name", "test", "--host", "localhost", "--no-passphrase",
        "--broker-home", "/etc/mosquitto/fieldfare", "--broker-data", "/var/lib/mosquitto",
        "--broker-user", "mosquitto",
    )  # fmt: skip
    machine.shell(
        """
        cd /root/fleet
        install -d -m 700 -o mosquitto -g mosquitto /etc/mosquitto/fieldfare
        install -m 600 -o mosquitto -g mosquitto -t /etc/mosquitto/fieldfare \
            broker/{mosquitto.conf,acl,ca.crt,server.crt,server.key}
        install -m 644 -t /etc/fieldfare aggregator/{aggregator.toml,agg-0.crt,ca.crt,root.msgpack}
        install -m 600 -t /etc/fieldfare aggregator/{agg-0.key,signing.key}
        aggregator device add pump-1 --fleet /root/fleet -o /root/pump-1
        install -m 644 -t /etc/fieldfare /root/pump-1/{agent.toml,device.crt,ca.crt,root.msgpack}
        install -m 600 -t /etc/fieldfare /root/pump-1/device.key
        """
    )
    machine.write(
        "/etc/fieldfare/aggregator.toml.d/state.toml", '[state]\ndirectory = "/var/lib/fieldfare-aggregator"\n'
    )
    machine.copy_in(data, f"/srv/data/{name}.npz")
    source = f'[data.{name}]\npath = "/srv/data/{name}.npz"\n'
    machine.write("/etc/fieldfare/agent.toml.d/site.toml", f"{POLICY}sense = 1.0\n{source}{more}")
    machine.drop_in(
        "mosquitto.service",
        "fieldfare",
        "[Service]\nExecStart=\nExecStart=/usr/sbin/mosquitto -c /etc/mosquitto/fieldfare/mosquitto.conf\n",
    )
    machine.run("systemctl", "enable", "--now", "--quiet", "mosquitto")
    machine.run("systemctl", "enable", "--now", "--quiet", "aggregator", AGENT)


def publish(machine: Machine, model: str, task: Path) -> None:
    """Sign the model that `model` ("file.py:attribute") makes, with its task file, and publish it as anybody would."""
    keys = release.fleet_keys(machine.disk / "root/fleet", lambda _: None)
    built = machine.disk / f"root/{task.stem}.release"
    built.write_bytes(release.build(model, "cross_entropy", task, keys, now=time.time()))
    operator = "/root/fleet/operator"
    machine.run(
        "mosquitto_pub", "-V", "5", "-h", "localhost", "-p", "8883", "--cafile", f"{operator}/ca.crt", "--cert",
        f"{operator}/operator.crt", "--key", f"{operator}/operator.key", "-r", "-q", "1", "-t", "models/release",
        "-f", f"/root/{built.name}",
    )  # fmt: skip


def points(path: Path, shape: Sequence[int], count: int = 120) -> Path:
    """A data set of three clouds of points."""
    dice = np.random.default_rng(1)
    y = dice.integers(0, 3, count)
    size = int(np.prod(shape))
    x = (dice.normal(size=(count, size)) + 3 * np.eye(3, size)[y]).astype(np.float32)
    np.savez(path, x=x.reshape(count, *shape), y=y.astype(np.int64))
    return path


def status(machine: Machine) -> dict[str, Any]:
    """`edge-agent status --json`."""
    found: dict[str, Any] = json.loads(machine.run(AGENT, "status", "--json").stdout)
    return found


def waited(machine: Machine, name: str) -> None:
    """Wait until the device reports this obstacle, and perhaps others."""

    def found() -> bool | None:
        ran = machine.run(AGENT, "status", "--json", check=False)
        return (
            True if ran.returncode == 0 and name in {o["name"] for o in json.loads(ran.stdout)["obstacles"]} else None
        )

    until(found, f"the obstacle {name}")
