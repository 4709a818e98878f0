"""The demo end to end, small: real broker, aggregator, agents and trainers; and that it never leaves one behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from examples.digits.report import ENOUGH, dot
from tests.hostile.daemon import LEASH

ROOT = Path(__file__).parents[2]
DEVICES, ROUNDS = 4, 6
INTERRUPTED = "demo: interrupted; all of its processes have ended\n"
DAEMONS = {"mosquitto": 1, "aggregator": 1, "edge-agent": 2, "edge_agent.confined": 2}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
        reason="needs mosquitto: sudo apt-get install mosquitto",
    ),
]


def _command(folder: Path, devices: int, rounds: int) -> list[str]:
    options = ["--devices", str(devices), "--rounds", str(rounds), "--folder", str(folder)]
    return [*LEASH, sys.executable, "-m", "examples.digits.demo", *options]


class Running:
    """A demo of two devices that would go on for long, caught in the middle of its training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            _command(folder, 2, 1000),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # for `interrupt`
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "round  2/1000" in line:
                break
        else:
            assert self.process.stderr is not None
            pytest.fail(f"the demo ended early: {self.process.stderr.read()}")
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> None:
        """Ctrl-C as a terminal sends it: to every process of the demo's group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kinds(self) -> dict[str, int]:
        """How many processes of each kind the demo has."""
        lines = [" ".join(each.cmdline()) for each in self.family]
        named = {"edge-agent": "/edge-agent run", "aggregator": "/aggregator run"}
        return {kind: sum(named.get(kind, kind) in line for line in lines) for kind in DAEMONS}

    def end(self) -> tuple[int, str]:
        """The exit status and what went to standard error."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def survivors(self) -> list[psutil.Process]:
        """What is still there of its processes after a little patience; the dead whom nobody buried do not count."""
        until = time.monotonic() + 10
        while (left := [each for each in self.family if _lives(each)]) and time.monotonic() < until:
            psutil.wait_procs(left, timeout=0.1)
        return left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A demo in the middle of its training."""
    found = Running(tmp_path / "demo")
    yield found
    for process in [psutil.Process(os.getpid()), *found.family][1:]:
        if _lives(process):
            process.kill()
    if found.process.poll() is None:
        found.process.kill()
        found.process.communicate()


def test_demo_trains_a_fleet_and_reports(tmp_path: Path) -> None:
    """It ends by itself, its exit status is the accuracy's verdict, and report.json holds what the summary says."""
    folder = tmp_path / "demo"
    ran = subprocess.run(_command(folder, DEVICES, ROUNDS), cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert (folder / "report.json").exists(), ran.stderr
    found = json.loads((folder / "report.json").read_text())
    assert ran.returncode == (0 if found["accuracy"] >= ENOUGH else 1)
    assert found["passed"] is (ran.returncode == 0)
    if not found["passed"]:
        assert ran.stderr.startswith("demo: an accuracy of ") and ran.stderr.count("\n") == 1

    assert [one["round"] for one in found["rounds"]] == list(range(1, ROUNDS + 1))
    assert [one["release"] for one in found["rounds"]] == list(range(1, ROUNDS + 1))
    assert found["rounds"][-1]["accuracy"] == found["accuracy"]
    # Together they know more than the best of them can alone: each has three digits of ten.
    assert found["own_data_only"]["accuracy_best"] < 0.45 < found["accuracy"]
    assert found["own_data_only"]["digits_known_at_most"] == 3 < len(found["digits_known"])
    assert found["digits"] == 10
    # What the devices measured and sealed is what the demo measures of the same release.
    for before, after in zip(found["rounds"], found["rounds"][1:], strict=False):
        assert after["reported_accuracy"] == pytest.approx(before["accuracy"], abs=1e-3)

    assert len(found["devices"]) == DEVICES
    # One was killed in the middle of a round and came back; nothing of it was lost.
    assert [(one["device"], one["round"]) for one in found["killed"]] == [(f"device-{DEVICES - 1}", ROUNDS // 2 + 1)]
    assert found["killed"][0]["back_after"] > 0
    assert "was killed in the middle of round" in ran.stdout and "is back after" in ran.stdout
    for device in found["devices"]:
        assert len(device["digits"]) == 3
        assert device["updates"] == ROUNDS
        # A release and an update have 19 kB of weights each.
        assert device["bytes_up"] > ROUNDS * 19_000 and device["bytes_down"] > ROUNDS * 19_000
        assert 10 << 20 < device["agent_memory"] < device["trainer_memory"]
    assert sum(device["held_out"] for device in found["devices"]) == found["images_held_out"]
    assert found["bytes_up"] == sum(device["bytes_up"] for device in found["devices"])
    assert found["memory"]["aggregator"] > 10 << 20
    assert any("/proc" in note for note in found["notes"])
    weights = load_file(found["places"]["model"])
    assert {name: list(values.shape) for name, values in weights.items()} == {
        "hidden.bias": [64],
        "hidden.weight": [64, 64],
        "scores.bias": [10],
        "scores.weight": [10, 64],
    }
    for number in range(1, ROUNDS + 1):
        assert f"round {number:>2}/{ROUNDS}" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


def test_demo_below_the_goal_fails_in_one_line(tmp_path: Path) -> None:
    """One round is too little for eight devices: exit 1 and why; of a demo that ran in that folder nothing is left."""
    folder = tmp_path / "demo"
    before = subprocess.run(_command(folder, 1, 1), cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (before.returncode, before.stderr) == (0, "")
    (folder / "logs" / "old.log").touch()
    ran = subprocess.run(_command(folder, 8, 1), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (folder / "report.json").exists(), ran.stderr
    found = json.loads((folder / "report.json").read_text())
    assert found["accuracy"] < ENOUGH and found["passed"] is False
    said = f"demo: an accuracy of {dot(found['accuracy'])} after round 1 is below .700\n"
    assert (ran.returncode, ran.stderr) == (1, said)
    assert len(found["rounds"]) == 1 and len(found["devices"]) == 8
    assert not (folder / "logs" / "old.log").exists()


def test_interrupt_leaves_no_process(running: Running) -> None:
    """Ctrl-C ends everything in good order with one line; meanwhile a second demo in that folder was refused."""
    assert running.kinds() == DAEMONS
    second = subprocess.run(_command(running.folder, 2, 1), cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert "another demo runs in" in second.stderr and second.stderr.count("\n") == 1
    running.interrupt()
    code, said = running.end()
    assert (code, said) == (130, INTERRUPTED)
    assert running.survivors() == []
    # In good order: every daemon said goodbye, and the broker outlived them.
    logs = {log.name: log.read_text() for log in running.folder.glob("logs/*.log")}
    assert len(logs) == 3
    for name, text in logs.items():
        assert "daemon.stopped" in text and "link.down" not in text, name


@pytest.mark.parametrize("loaded", ["/numpy/", "/libtorch_cpu.so", "/sklearn/"])
def test_interrupt_while_libraries_load(tmp_path: Path, loaded: str) -> None:
    """Ctrl-C in the first seconds, when torch and scikit-learn are imported, is one line and exit 130 too."""
    demo = subprocess.Popen(
        _command(tmp_path / "demo", 2, 1), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        maps = Path(f"/proc/{demo.pid}/maps")
        while loaded not in maps.read_text():
            assert demo.poll() is None
        os.killpg(demo.pid, signal.SIGINT)
        _, said = demo.communicate(timeout=30)
    finally:
        demo.kill()
    assert (demo.returncode, said) == (130, INTERRUPTED)
    assert not (tmp_path / "demo").exists()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="without setpriv nothing can promise this")
def test_killing_the_demo_kills_its_processes(running: Running) -> None:
    """Not even SIGKILL leaves one behind."""
    assert running.kinds() == DAEMONS
    running.process.kill()
    running.end()
    assert running.survivors() == []


def test_an_agent_that_dies_is_reported_with_its_last_words(running: Running) -> None:
    """The demo ends with exit 1, names the process, how it ended and where its log lies, and ends all others."""
    agent = next(each for each in running.family if "device-1/agent.toml" in " ".join(each.cmdline()))
    agent.send_signal(signal.SIGTERM)
    code, said = running.end()
    assert code == 1
    first, *lines = said.splitlines()
    log = running.folder / "logs" / "device-1.log"
    assert first == f"demo: device-1 ended early (exit status 0); the end of {log}:"
    assert "daemon.stopped" in lines[-1]
    assert "Traceback" not in said
    assert running.survivors() == []


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_the_promised_demo(tmp_path: Path) -> None:
    """`make demo` as documented: eight devices that know three digits each learn all ten, in under three minutes."""
    folder = tmp_path / "demo"
    ran = subprocess.run(_command(folder, 8, 15), cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads((folder / "report.json").read_text())
    assert found["accuracy"] >= 0.80
    assert found["digits_known"] == list(range(10))
    assert found["own_data_only"]["accuracy_best"] < 0.40
    assert [one["round"] for one in found["rounds"]] == list(range(1, 16))
