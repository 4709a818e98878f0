"""The demo's folder: what lies where, and how it is made, the fleet and its release by the public command line.

Nothing outside the folder is written, and only a folder that an earlier demo made is emptied.
"""

import fcntl
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aggregator import ca
from aggregator.broker import free_port
from examples.digits.processes import DemoError, command
from shared.mqtt import LinkSettings
from shared.topics import SERVICE_OPERATOR

HERE = Path(__file__).parent
HOST = "127.0.0.1"
SETTLE = 1.0
"""Seconds that a device of the demo waits before it offers itself; 60 by default, which a demo has no time for."""

_SOCKET_MAX = 107
_ANOTHER = "name another folder: make demo ARGS='--folder build/demo2'"
_PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything lies."""

    root: Path

    @property
    def fleet(self) -> Path:
        """What `aggregator fleet init` made."""
        return self.root / "fleet"

    @property
    def logs(self) -> Path:
        """One log for each process."""
        return self.root / "logs"

    @property
    def machine(self) -> Path:
        """The /sys and /proc that the agents read."""
        return self.root / "machine"

    @property
    def task(self) -> Path:
        """The task file, with this demo's devices and rounds."""
        return self.root / "task.toml"

    @property
    def release(self) -> Path:
        """The signed release file that was published."""
        return self.root / "release.msgpack"

    @property
    def model(self) -> Path:
        """The last release's weights for plain PyTorch."""
        return self.root / "digits.safetensors"

    @property
    def report(self) -> Path:
        """The summary's figures."""
        return self.root / "report.json"

    def data(self, name: str) -> Path:
        """One device's examples."""
        return self.device(name) / "digits.npz"

    def device(self, name: str) -> Path:
        """One device's bundle, data and state."""
        return self.root / "devices" / name

    def run_dir(self, name: str) -> Path:
        """Where a device's agent opens its socket."""
        return self.root / "run" / name


def claim(root: Path) -> IO[bytes]:
    """Empty the demo's folder, or make it; it is ours while the returned file is open."""
    mark = root / "demo.lock"
    if len(str(root / "run" / "device-99" / "control.sock")) > _SOCKET_MAX:
        raise DemoError(f"{root} is too long a path for a Unix socket in it; move the checkout to a shorter one")
    if root.is_dir() and not mark.exists() and any(root.iterdir()):
        raise DemoError(f"{root} holds what no demo made, and would be emptied; {_ANOTHER}")
    root.mkdir(parents=True, exist_ok=True)
    lock = mark.open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise DemoError(f"another demo runs in {root}; wait for it, or {_ANOTHER}") from None
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != mark:
            entry.unlink()
    for folder in ("logs", "devices", "run"):
        (root / folder).mkdir()
    return lock


def make_fleet(place: Place) -> int:
    """CA, root, publisher, operator, aggregator and broker, keys without passphrase; returns the broker's port."""
    port = free_port()
    command(
        "aggregator", "fleet", "init", place.fleet, "--name", "demo",
        "--host", HOST, "--bind", HOST, "--port", str(port), "--no-passphrase",
    )  # fmt: skip
    return port


def make_device(place: Place, name: str) -> None:
    """A device's bundle, and a drop-in with what its owner would set."""
    bundle = place.device(name)
    command("aggregator", "device", "add", name, "--fleet", place.fleet, "-o", bundle)
    drop_in = bundle / "agent.toml.d" / "demo.toml"
    drop_in.parent.mkdir()
    drop_in.write_text(
        f"""\
[device]
state_dir = "state"
run_dir = {json.dumps(str(place.run_dir(name)))}
sys_root = {json.dumps(str(place.machine / "sys"))}
proc_root = {json.dumps(str(place.machine / "proc"))}

[policy]
settle = {SETTLE}

[trainer]
threads = 1
scheduling = "normal"

[data.digits]
path = "digits.npz"
"""
    )


def make_machine(place: Place) -> None:
    """A /sys and a /proc of a machine on mains with nothing else to do."""
    files = {
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/AC/online": "1\n",
        "proc/pressure/cpu": _PRESSURE,
        "proc/pressure/memory": _PRESSURE,
        "proc/pressure/io": _PRESSURE,
        "proc/loadavg": "0.00 0.00 0.00 1/100 100\n",
        "proc/meminfo": "MemTotal:        4194304 kB\nMemAvailable:    3145728 kB\n",
    }
    for name, text in files.items():
        path = place.machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def make_task(place: Place, devices: int, rounds: int) -> None:
    """The example's task file, with a goal and a number of rounds that suit this demo."""
    text = (HERE / "task.toml").read_text()
    for key, value in {"goal": devices, "min_updates": max(1, devices * 3 // 4), "rounds": rounds}.items():
        text, changed = re.subn(rf"(?m)^{key} = \d+", f"{key} = {value}", text)
        assert changed == 1, key
    place.task.write_text(text)


def build_release(place: Place) -> None:
    """The model as a signed release file."""
    command(
        "aggregator", "release", "build", f"{HERE / 'model.py'}:Digits", "--loss", "cross_entropy",
        "--task", place.task, "--fleet", place.fleet, "-o", place.release,
    )  # fmt: skip


def publish_release(place: Place) -> None:
    """Into the fleet; returns when the aggregator has taken it."""
    command("aggregator", "release", "publish", place.release, "--fleet", place.fleet)


def export_model(place: Place) -> None:
    """The newest release's weights, as safetensors."""
    command("aggregator", "model", "export", "digits", "--fleet", place.fleet, "-o", place.model)


def operator(place: Place) -> LinkSettings:
    """How the fleet's operator reaches the broker."""
    fleet = ca.read_fleet(place.fleet)
    identity = place.fleet / "operator"
    return LinkSettings(
        host=fleet.hosts[0],
        port=fleet.port,
        client_id=SERVICE_OPERATOR,
        ca=identity / "ca.crt",
        cert=identity / "operator.crt",
        key=identity / "operator.key",
        message_max=fleet.message_max,
    )
