"""Three real agents with torch trainers learn together; then one thing after the other goes wrong and rounds go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.broker.broker import Fleet, make_fleet
from tests.hostile.daemon import Daemon, Line, until
from tests.hostile.field import POLICY

pytestmark = pytest.mark.system

TOP = Path(__file__).parents[2]
NAMES = ("dev-0", "dev-1", "dev-2")
STRANGER_TO_TORCH = "dev-3"
NIGHT_WORKER = "dev-4"

MODEL = '''
"""A small net for points in six dimensions."""
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
'''

TASK = """
name = "clouds"
metric = "accuracy"
clip = 10.0

[training]
optimizer = "sgd"
lr = 0.01
batch_size = 4
epochs = 8

[data]
dataset = "clouds"

[[data.inputs]]
name = "x"
dtype = "float32"
shape = [6]

[data.target]
name = "y"
dtype = "int64"
shape = []
classes = 3

[plan]
goal = 3
min_updates = 2
rounds = 10000
deadline = 8
over_select = 2.0
"""


def clouds(path: Path, seed: int) -> None:
    """Points of two of three clouds: no device has seen all."""
    dice = np.random.default_rng(seed)
    y = (seed + dice.integers(0, 2, 240)) % 3
    x = dice.normal(size=(240, 6)) + 3 * np.eye(3, 6)[y]
    np.savez(path, x=x.astype(np.float32), y=y.astype(np.int64))


class Device:
    """One agent as a process, with its folder."""

    def __init__(self, fleet: Fleet, name: str, more: str = "", policy: str = "") -> None:
        self.name, self.folder = name, fleet.bundle(name)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        clouds(self.folder / "clouds.npz", int(name[-1]))
        extra = self.folder / "agent.toml.d"
        extra.mkdir(exist_ok=True)
        (extra / "test.toml").write_text(
            f'[device]\nstate_dir = "{self.folder}/state"\nrun_dir = "{self.folder}/run"\n'
            f'[data.clouds]\npath = "{self.folder}/clouds.npz"\n{POLICY}sense = 1.0\n{policy}\n{more}'
        )
        self.config = self.folder / "agent.toml"
        self.daemon = Daemon("edge_agent", self.config)
        self.daemon.log.write_bytes(b"")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`edge-agent ...` about this agent."""
        command = [sys.executable, "-m", "edge_agent.cli", *words, "--config", str(self.config)]
        return subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=30)

    def status(self) -> dict[str, Any]:
        """`edge-agent status --json`."""
        ran = self.command("status", "--json")
        assert ran.returncode == 0, ran.stderr
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    def pause(self) -> None:
        """`edge-agent pause`; it has stopped training when this returns."""
        ran = self.command("pause", "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout)["paused"] is True
        until(lambda: self.status()["state"] == "waiting" or None, "a waiting device")

    def mark(self) -> int:
        """Lines logged so far."""
        return len(self.daemon.read())

    def trainer(self) -> int:
        """The process id of its newest trainer."""
        return int([line for line in self.daemon.read() if line["event"] == "trainer.started"][-1]["pid"])

    def kill(self) -> None:
        """End the agent as the kernel would."""
        self.daemon.kill()

    def contributes(self, since: int) -> Line:
        """An update of it is accepted."""
        return self.daemon.wait("update.answered", since, outcome="accepted")


class Running:
    """Broker, aggregator and three agents, with the task published by the command line."""

    def __init__(self, folder: Path) -> None:
        self.fleet = make_fleet(folder)
        self.aggregator = Daemon("aggregator", self.fleet.folder / "aggregator" / "aggregator.toml")
        self.devices = [Device(self.fleet, name) for name in NAMES]
        (folder / "net.py").write_text(MODEL)
        (folder / "clouds.toml").write_text(TASK)
        self._release = folder / "clouds.release"
        build = ["build", f"{folder / 'net.py'}:net", "--loss", "cross_entropy", "--task", str(folder / "clouds.toml")]
        self._run("release", *build, "-o", str(self._release))

    def start(self) -> None:
        """All of it, and the first round."""
        self.fleet.broker.start()
        self.aggregator.start()
        for device in self.devices:
            device.daemon.start()
        for daemon in self.daemons:
            until(lambda daemon=daemon: daemon.log.exists() or None, "a log")  # type: ignore[misc]
            daemon.wait("link.up")
        self._run("release", "publish", str(self._release))

    @property
    def daemons(self) -> list[Daemon]:
        """The agents first."""
        return [*(device.daemon for device in self.devices), self.aggregator]

    def mark(self) -> int:
        """Lines that the aggregator has logged so far."""
        return len(self.aggregator.read())

    def released(self, count: int = 1, since: int | None = None) -> list[Line]:
        """The next rounds that close with a release."""
        start = self.mark() if since is None else since

        def found() -> list[Line] | None:
            assert self.aggregator.pid
            closed = [line for line in self.aggregator.read()[start:] if line["event"] == "round.closed"]
            return closed if len(closed) >= count else None

        return until(found, f"{count} closed rounds")

    def end(self) -> None:
        """Whatever became of them, no process is left."""
        for daemon in self.daemons:
            daemon.kill()
        self.fleet.broker.kill()

    def _run(self, *words: str) -> None:
        command = [sys.executable, "-m", "aggregator.cli", *words, "--fleet", str(self.fleet.folder)]
        ran = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A fleet at work; rounds follow each other as long as the tests last."""
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("needs mosquitto: sudo apt-get install mosquitto")
    made = Running(tmp_path_factory.mktemp("fleet"))
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture
def extra(running: Running) -> Iterator[Callable[..., Device]]:
    """Starts one more agent for a test."""
    made: list[Device] = []

    def start(name: str, more: str = "", policy: str = "") -> Device:
        made.append(Device(running.fleet, name, more, policy))
        made[-1].daemon.start()
        made[-1].daemon.wait("link.up")
        return made[-1]

    yield start
    for device in made:
        assert device.daemon.stop() == 0
        device.daemon.read()


def gone(pid: int) -> None:
    """Wait until there is no such process."""

    def found() -> bool | None:
        try:
            return None if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" else True
        except FileNotFoundError:
            return True

    until(found, f"the end of process {pid}", 10.0)


def test_they_learn(running: Running) -> None:
    """Round after round the loss falls on every device's hold-out, which holds clouds that it has and others lack."""
    running.released(4, since=0)

    for device in running.devices:
        done = until(
            lambda device=device: (  # type: ignore[misc]
                found if len(found := _finished(device)) >= 4 else None
            ),
            "four trainings",
        )
        assert done[0]["metric_loss"] > 0.7  # of the publisher's weights, which know nothing
        assert done[3]["metric_loss"] < 0.5 * done[0]["metric_loss"]
        assert done[3]["metric_accuracy"] > max(0.8, done[0]["metric_accuracy"])
    closed = running.released(4, since=0)
    assert closed[3]["metric_loss"] < closed[1]["metric_loss"] < closed[0]["metric_loss"]
    assert [line["release"] for line in closed[:4]] == [1, 2, 3, 4]


def _finished(device: Device) -> list[Line]:
    return [line for line in device.daemon.read() if line["event"] == "training.finished"]


def test_status(running: Running) -> None:
    """`edge-agent status --json` has what a script needs; people get text."""
    device = running.devices[0]
    device.contributes(0)
    found = device.status()
    assert (found["device"], found["pid"], found["eligible"]) == ("dev-0", device.daemon.pid, True)
    assert found["state"] in ("ready", "training") and found["obstacles"] == []
    link = found["link"]
    assert link["connected"] and link["cause"] is None and link["broker"] == f"localhost:{running.fleet.port}"
    assert link["bytes_received"] > 1000 and link["bytes_sent"] > 1000
    task = found["tasks"]["clouds"]
    assert task["release"] >= 1 and task["rounds"] == 10_000 and task["last_round_trained"] >= 1
    assert task["round"] >= task["last_round_trained"] and task["round_state"] in ("open", "closed")
    assert found["last_update"]["task"] == "clouds"
    assert found["counts"]["updates_sent"] >= found["counts"]["updates_accepted"] >= 1
    assert 10 << 20 < found["memory"]["agent"] < 64 << 20 < found["memory"]["trainer"]
    assert found["refused"] == {}
    text = device.command("status")
    assert text.returncode == 0 and "dev-0" in text.stdout and "clouds" in text.stdout


def test_trainer_killed(running: Running) -> None:
    """A trainer that dies in the middle of a job is an event: the agent stays, and works in the next round."""
    device, since = running.devices[0], running.devices[0].mark()
    pid = device.daemon.pid
    device.daemon.wait("training.started", since)
    trainer = device.trainer()
    os.kill(trainer, signal.SIGKILL)
    died = device.daemon.wait("trainer.died", since)
    assert (died["pid"], died["cause"], died["signal"]) == (trainer, "killed", 9)
    failed = device.daemon.wait("training.failed", since)
    assert (failed["task"], failed["reason"]) == ("clouds", "trainer_killed")
    again = device.mark()
    device.contributes(again)
    assert device.trainer() != trainer and device.daemon.pid == pid
    assert device.status()["counts"]["trainer_died"] == 1


def test_agent_killed_and_broker_restarted(running: Running) -> None:
    """A killed agent leaves no trainer; restarted without a broker it has its newest release; then rounds go on."""
    device = running.devices[1]
    since = device.mark()
    device.daemon.wait("training.started", since)
    trainer = device.trainer()
    device.kill()
    gone(trainer)
    # It loses the aggregator's session, and what devices send before that is back: they send it again.
    running.fleet.broker.kill()
    marks = [len(daemon.read()) for daemon in running.daemons]
    accepted = [line for line in device.daemon.lines if line["event"] == "release.accepted"][-1]
    device.daemon.start()
    device.daemon.wait("link.down", marks[1])
    found = device.status()
    assert not found["link"]["connected"] and "Connection refused" in found["link"]["cause"]
    assert found["tasks"]["clouds"]["release"] == accepted["release"]
    assert found["tasks"]["clouds"]["version"] == accepted["version"]

    running.fleet.broker.start()
    for daemon, mark in zip(running.daemons, marks, strict=True):
        daemon.wait("link.up", mark)
    mark = running.mark()
    for each in running.devices:
        running.aggregator.wait("update.accepted", mark, device=each.name)
    assert running.released(1, since=mark)[0]["release"] > accepted["release"]


def test_pause(running: Running) -> None:
    """`edge-agent pause` ends training at once and keeps it so, for the others the rounds go on; `resume` ends it."""
    device = running.devices[2]
    before = device.mark()
    device.pause()
    since, found = device.mark(), device.status()
    assert [each["name"] for each in found["obstacles"]] == ["paused"] and not found["eligible"]
    assert device.daemon.wait("device.blocked", before)["obstacles"]
    running.released(1)
    assert [line for line in device.daemon.read()[since:] if line["event"] == "training.started"] == []

    since = device.mark()
    ran = device.command("resume")
    assert ran.returncode == 0
    device.daemon.wait("device.eligible", since)
    device.contributes(since)


def test_outside_its_window(running: Running, extra: Callable[..., Device]) -> None:
    """A device whose calendar excludes this hour says so, holds the newest release, and does not train."""
    start = datetime.now(UTC) + timedelta(hours=6)
    window = f'windows = ["{start:%H:%M}-{start + timedelta(hours=1):%H:%M}"]\ntimezone = "UTC"'
    device = extra(NIGHT_WORKER, policy=window)
    device.daemon.wait("release.accepted")
    (obstacle,) = device.daemon.wait("device.blocked")["obstacles"]
    (shown,) = device.status()["obstacles"]
    assert shown["name"] == "calendar" and shown["text"] == obstacle
    assert f"{start:%H:%M}" in shown["text"]
    running.released(1)
    assert {line["event"] for line in device.daemon.read()}.isdisjoint({"training.started", "trainer.started"})
    assert device.status()["state"] == "waiting"


def test_no_torch(running: Running, extra: Callable[..., Device], tmp_path: Path) -> None:
    """An agent whose trainer lacks torch stays up, keeps the model, and says what is missing."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:{TOP}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    device = extra(STRANGER_TO_TORCH, f'[trainer]\npython = "{python}"\n')
    device.daemon.wait("trainer.died")  # the job failed, or was left because of the obstacle, whichever came first
    said = " ".join(str(line["line"]) for line in device.daemon.read() if line["event"] == "trainer.said")
    assert "No module named 'torch'" in said
    assert "release.accepted" in {line["event"] for line in device.daemon.read()}
    until(lambda: "no_trainer" in {each["name"] for each in device.status()["obstacles"]} or None, "the obstacle")
    assert device.status()["tasks"]["clouds"]["release"] is not None
    running.released(1)


def test_stopped_and_started(running: Running) -> None:
    """SIGTERM ends every daemon with status 0 within seconds and leaves no process; a start goes on from there."""
    running.released(1)
    for device in running.devices:
        device.daemon.wait("training.started", device.mark())
    trainers = [device.trainer() for device in running.devices]
    newest = running.released(1, since=0)[-1]["release"]
    began = time.monotonic()
    for daemon in running.daemons:
        os.kill(daemon.pid, signal.SIGTERM)
    for daemon in running.daemons:
        assert daemon.ended() == 0
    assert time.monotonic() - began < 25.0  # one that has just begun to import torch leaves when it can listen
    for pid in trainers:
        gone(pid)
    for daemon in running.daemons:
        assert daemon.read()[-1]["event"] == "daemon.stopped"

    marks = [len(daemon.read()) for daemon in running.daemons]
    for daemon in running.daemons:
        daemon.start()
    for daemon, mark in zip(running.daemons, marks, strict=True):
        daemon.wait("link.up", mark)
    assert running.released(1, since=marks[-1])[0]["release"] > newest
