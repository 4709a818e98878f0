"""A fleet for one measurement: folders made by the product, a real mosquitto with TLS, the installed programs.

Every process ends with `stop`, or with this one, whatever ends that. State lies below a folder on a real disk, because
durability is part of what is measured.
"""

import json
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from aggregator import ca
from aggregator.broker import Broker, free_port
from bench.meters import children
from edge_agent import control
from shared.errors import LinkError

TASK = "bench"
CLASSES, EXAMPLES = 1000, 16
HERE = Path(__file__).parent

_POLICY = """\
[policy]
# Ten trainers on two cores would see one another as load.
mains = false
settle = 0.0
cpu_pressure = 100.0
cpu_others = 100.0
memory_pressure = 100.0
io_pressure = 100.0
load = 1000.0
[log]
format = "json"
"""


@dataclass(frozen=True)
class Model:
    """One of bench/model.py."""

    name: str
    features: int

    @property
    def parameters(self) -> int:
        """Float32 values of an update."""
        return (self.features + 1) * CLASSES


MILLION, QUARTER = Model("Million", 999), Model("Quarter", 249)


class BenchError(Exception):
    """The benchmark cannot go on."""


class Log:
    """A daemon's JSON log, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.events: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Every event so far; `at` is its time in Unix seconds."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"{"):
                event = json.loads(line)
                self.events.append({**event, "at": datetime.fromisoformat(event["time"]).timestamp()})
        return self.events


class Fleet:
    """Broker, aggregator and `devices` agents below `root`, none of them started yet."""

    def __init__(self, root: Path, devices: int, rounds: int, model: Model = MILLION) -> None:
        root = root.absolute()
        self._model = model
        self.root, self.folder, self.devices = root, root / "fleet", devices
        port = free_port()
        ca.init_fleet(self.folder, TASK, ["127.0.0.1"], now=time.time(), passphrase=None, port=port, bind="127.0.0.1")
        self.port = port
        self.broker = Broker(self.folder / "broker", port)
        self.agents: list[subprocess.Popen[bytes]] = []
        self.aggregator: subprocess.Popen[bytes] | None = None
        self.task = root / "task.toml"
        self.task.write_text(_task(devices, rounds, model.features), encoding="utf-8")
        # A socket's path has at most 107 characters, and the checkout may lie deep.
        self._sockets = Path(tempfile.mkdtemp(prefix="fieldfare-"))

    def bundle(self, device: int) -> Path:
        """The folder of a device, made when first asked for."""
        path = self.root / f"dev-{device}"
        if not path.exists():
            ca.add_device(self.folder, path.name, path, now=time.time(), passphrase=None)
        return path

    def start(self) -> None:
        """The broker and the aggregator."""
        self.broker.start()
        config = self.folder / "aggregator" / "aggregator.toml"
        self.aggregator = self._daemon("aggregator", config)

    def start_agents(self) -> None:
        """Every device's agent; returns when the last is connected."""
        for device in range(self.devices):
            bundle = self.bundle(device)
            _examples(bundle / "data.npz", self._model.features, device)
            extra = bundle / "agent.toml.d"
            extra.mkdir()
            device_text = f'[device]\nstate_dir = "{bundle / "state"}"\nrun_dir = "{self.run_dir(device)}"\n'
            data_text = f'[data.{TASK}]\npath = "{bundle / "data.npz"}"\n'
            (extra / "bench.toml").write_text(device_text + data_text + _POLICY, encoding="utf-8")
            self.agents.append(self._daemon("edge-agent", bundle / "agent.toml"))
        self.until("every agent is connected", self._all_connected, 60)

    def run_dir(self, device: int) -> Path:
        """Where a device's control socket lies."""
        return self._sockets / f"dev-{device}"

    def ask(self, device: int) -> dict[str, Any]:
        """What `edge-agent status --json` prints, without its start-up cost."""
        return control.ask(self.run_dir(device), control.Request("status"))

    def trainers(self) -> list[int]:
        """The trainer of every agent that has one."""
        return [child for agent in self.agents for child in children(agent.pid)]

    def build(self) -> Path:
        """The signed release file, made by the command line."""
        out = self.root / "release.msgpack"
        model = f"{HERE / 'model.py'}:{self._model.name}"
        fleet = ["--fleet", str(self.folder)]
        _command("release", "build", model, "--loss", "cross_entropy", "--task", str(self.task), *fleet, "-o", str(out))
        return out

    def publish(self, release: Path) -> None:
        """Publish it by the command line."""
        _command("release", "publish", str(release), "--fleet", str(self.folder))

    def log(self, name: str = "aggregator") -> Log:
        """The log of `aggregator` or of the agent `dev-N`."""
        return Log(self.root / f"{name}.log")

    def until(self, what: str, true: Callable[[], bool], seconds: float) -> None:
        """Wait until `true()`; BenchError when that takes too long or a daemon ends before."""
        end = time.monotonic() + seconds
        while not true():
            for daemon in [*self.agents, *([self.aggregator] if self.aggregator else [])]:
                if daemon.poll() is not None:
                    raise BenchError(f"a daemon ended early with status {daemon.poll()}; see the logs in {self.root}")
            if time.monotonic() > end:
                raise BenchError(f"after {seconds:.0f} s still not: {what}; see the logs in {self.root}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End everything, agents first."""
        for group in (self.agents, [self.aggregator] if self.aggregator else []):
            for daemon in group:
                daemon.terminate()
            for daemon in group:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        self.broker.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _all_connected(self) -> bool:
        try:
            return all(self.ask(device)["link"]["connected"] for device in range(self.devices))
        except LinkError:
            return False

    def _daemon(self, program: str, config: Path) -> subprocess.Popen[bytes]:
        name = config.parent.name
        leash = [found, "--pdeathsig", "KILL", "--"] if (found := shutil.which("setpriv")) else []
        with (self.root / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*leash, installed(program), "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def installed(program: str) -> str:
    """The path of one of our commands."""
    return str(Path(sysconfig.get_path("scripts"), program))


def _command(*arguments: str) -> None:
    ran = subprocess.run([installed("aggregator"), *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise BenchError(f"aggregator {' '.join(arguments[:2])} failed: {ran.stderr.strip()[-500:]}")


def _examples(path: Path, features: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((EXAMPLES, features), np.float32)
    np.savez(path, x=x, y=random.integers(0, CLASSES, EXAMPLES))


def _task(devices: int, rounds: int, features: int) -> str:
    return f"""\
name = "{TASK}"
clip = 10.0

[training]
lr = 0.001
batch_size = {EXAMPLES}
steps = 1

[data]
dataset = "{TASK}"

[[data.inputs]]
name = "x"
dtype = "float32"
shape = [{features}]

[data.target]
name = "y"
dtype = "int64"
shape = []
classes = {CLASSES}

[plan]
goal = {devices}
min_updates = {devices}
over_select = 1.0
rounds = {rounds}
deadline = 300
"""
