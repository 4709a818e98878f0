"""A device's days on a real machine: unplugged, needed, rebooted, short of memory, hung, cut off, upgraded, idle.

One machine with systemd as PID 1, real mosquitto, and the packaged agent, whose trainer trains a convolution with real
torch inside the unit's sandbox. Tests run in this order on the same device; each has a task of its own, whose name
finds its lines in the journal. What needs no such machine is in tests/hostile.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.daemon import until
from tests.system import plant
from tests.system.conftest import Packages
from tests.system.machine import Machine, Power
from tests.system.plant import (
    AGENT,
    FAKETIME,
    LENT,
    OVERRIDE,
    SITE,
    lend_trainer,
    needs_same_python,
    points,
    publish,
    status,
)
from tests.system.test_package import newer

pytestmark = [pytest.mark.system, pytest.mark.timeout(600), needs_same_python]

MODELS = '''
"""A small net with a convolution, and one that wants 640 MB for nothing."""
import torch
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


class Hungry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) + torch.ones(160_000_000).sum()
'''

TASK = """
metric = "accuracy"
clip = 10.0
name = "{name}"
[training]
optimizer = "sgd"
lr = 0.001
batch_size = 8
steps = {steps}
[data]
dataset = "tiles"
inputs = [{{ name = "x", dtype = "float32", shape = [1, 8, 8] }}]
target = {{ name = "y", dtype = "int64", shape = [], classes = 3 }}
[plan]
goal = 1
min_updates = 1
rounds = 1
deadline = 600
"""

SETTINGS = """
[trainer]
checkpoint = 0.5
threads = 1
nice = 0
scheduling = "normal"
memory_max = 734003200
idle_exit = 1.0
"""
MODEST = '[trainer]\nnice = 10\nscheduling = "idle"\n'
"""As the trainer is by default; here it would take long on a machine that has other things to do."""
IDLE = """
[policy]
cpu_pressure = 20.0
memory_pressure = 10.0
io_pressure = 30.0
sense = 30.0
"""
"""As the owner's policy is by default."""
CPUS = os.cpu_count() or 1
LONG = 6_000
"""Steps that take several seconds."""
MINUTES = 150.0
"""For which the broker is away: longer than it keeps a link that says nothing, or the agent waits between two tries."""


class Scene:
    """The machine with its fleet, and what the tests do to it."""

    def __init__(self, machine: Machine, power: Power, folder: Path) -> None:
        self.machine, self.power, self._folder = machine, power, folder
        (folder / "models.py").write_text(MODELS)
        self.open: set[str] = set()
        """Tasks that have not come to an end."""

    def publish(self, name: str, steps: int = LONG, model: str = "net") -> None:
        """A task of one round."""
        self.open.add(name)
        task = self._folder / f"{name}.toml"
        task.write_text(TASK.format(name=name, steps=steps))
        publish(self.machine, f"{self._folder / 'models.py'}:{model}", task)

    def begin(self, name: str, steps: int = LONG) -> int:
        """A task is being trained; the trainer's process id in the machine."""
        self.publish(name, steps)
        self.wait("training.started", name)
        self.step(name)
        return self.trainer

    def step(self, name: str, more: int = 20) -> None:
        """Wait until the training of a task has got somewhere."""

        def got_on() -> bool | None:
            shown = status(self.machine)["training"]
            return True if shown is not None and shown["task"] == name and shown["step"] > more else None

        until(got_on, f"some steps of {name}")

    @property
    def trainer(self) -> int:
        """The trainer's process id in the machine."""
        return int(self.machine.run("pgrep", "-f", "edge_agent.confined").stdout)

    @property
    def agent(self) -> int:
        """The agent's process id in the machine; 0 if it does not run."""
        return int(self.machine.show(AGENT, "MainPID"))

    def wait(self, event: str, task: str | None = None, seconds: float = 60.0, **fields: str | int) -> dict[str, Any]:
        """The newest such line of the agent's journal, as soon as there is one."""
        named = {} if task is None else {"TASK": task}
        return self.machine.wait_journal(AGENT, seconds, EVENT=event, **named, **fields)

    def told(self, event: str, task: str) -> list[dict[str, Any]]:
        """All lines of an event so far."""
        return self.machine.journal(AGENT, EVENT=event, TASK=task)

    def accepted(self, name: str, steps: int = LONG, seconds: float = 60.0) -> None:
        """A task was trained with all of its steps, and the aggregator took the update, once."""
        finished = self.wait("training.finished", name, seconds)
        assert int(finished["STEPS"]) == steps
        assert self.wait("update.answered", name)["OUTCOME"] == "accepted"
        assert len(self.told("training.finished", name)) == len(self.told("update.answered", name)) == 1
        until(lambda: status(self.machine)["outbox"] == [] or None, "an empty outbox")
        self.open.discard(name)

    def settings(self, text: str = "") -> None:
        """The owner's last word in the configuration, by a restart; "" takes it back."""
        self.machine.write(OVERRIDE, text)
        self.machine.run("systemctl", "restart", AGENT)

    def hook(self, more: str = "") -> None:
        """From now on, until the drop-in is removed, the agent has tests/system/hook.py inside."""
        self.machine.copy_in(Path(__file__).with_name("hook.py"), "/srv/hook/sitecustomize.py")
        environment = f"Environment=PYTHONPATH=/srv/hook HOOK=/run/fieldfare-agent/hook {more}\n"
        self.machine.drop_in("edge-agent.service", "hook", f"[Service]\n{environment}")

    def heavy(self, weight: str = "10000") -> None:
        """How much of a CPU the unit gets beside others; much, so that the tests go on on a busy machine."""
        self.machine.run("systemctl", "set-property", "--runtime", "edge-agent.service", f"CPUWeight={weight}")

    def inside(self) -> dict[str, Any]:
        """What the hook tells of the agent."""
        file = "/run/fieldfare-agent/hook"
        self.machine.run("rm", "-f", file)
        self.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=USR1", AGENT)
        until(lambda: self.machine.exists(file) or None, "an answer of the hook")
        found: dict[str, Any] = json.loads(self.machine.read(file))
        return found

    def wake_ups(self) -> dict[str, int]:
        """How often each of the agent's threads has gone to sleep, which is how often it was woken."""
        said = self.machine.shell(f"cd /proc/{self.agent}/task; grep -H ^voluntary_ctxt */status")
        return {line.split("/")[0]: int(line.split()[-1]) for line in said.splitlines()}

    def give_up(self, name: str) -> None:
        """The operator ends a task."""
        self.machine.run("aggregator", "task", "stop", name, check=False)
        self.open.discard(name)

    def connected(self) -> None:
        """Wait until the agent answers and has its link."""

        def up() -> bool | None:
            ran = self.machine.run(AGENT, "status", "--json", check=False)
            return True if ran.returncode == 0 and json.loads(ran.stdout)["link"]["connected"] else None

        until(up, "the link", 90.0)

    def cpu(self, pid: int) -> float:
        """CPU seconds of a process in the machine, to the nanosecond."""
        said = self.machine.shell(f"cat /proc/{pid}/task/*/schedstat")
        return sum(int(line.split()[0]) for line in said.splitlines()) / 1e9

    def freezer(self) -> tuple[str, str]:
        """What the unit's control group of the trainer says of its being frozen, and the trainer's state."""
        found = "for f in /sys/fs/cgroup{,/unified}/edge-agent.service/trainer/cgroup.freeze"
        state = self.machine.shell(f"cut -d' ' -f3 /proc/{self.trainer}/stat").strip()
        return self.machine.shell(f"{found}; do [ ! -e $f ] || cat $f; done").strip(), state

    def busy(self, number: int) -> int:
        """A service of somebody else's that takes all it gets of one CPU; its process id."""
        unit = f"busy-{number}"
        self.machine.run(
            "systemd-run", "--quiet", f"--unit={unit}", f"--property=CPUAffinity={number}", "sh", "-c",
            "while :; do :; done",
        )  # fmt: skip
        return int(self.machine.show(unit, "MainPID"))

    def relax(self) -> None:
        """The others are done."""
        self.machine.run("systemctl", "stop", *(f"busy-{number}" for number in range(CPUS)), check=False)


def say(what: str) -> None:
    """A measurement, for who reads the output of the tests."""
    sys.stdout.write(f"{what}\n")


def when(line: dict[str, Any]) -> float:
    """UTC seconds of a line of the journal."""
    return int(line["_SOURCE_REALTIME_TIMESTAMP"]) / 1e6


@pytest.fixture(scope="module")
def scene(machines: Callable[..., Machine], packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A device that trains whenever it is plugged in."""
    folder = tmp_path_factory.mktemp("scene")
    machine = machines("pump", lend={SITE: LENT})
    packages.install(machine)
    lend_trainer(machine)
    power = machine.fake_power("edge-agent.service")
    plant.set_up(machine, points(folder / "tiles.npz", (1, 8, 8)), "tiles", SETTINGS)
    machine.write("/etc/fieldfare/agent.toml.d/ymains.toml", "[policy]\nmains = true\n")
    return Scene(machine, power, folder)


@pytest.fixture(autouse=True)
def _calm(scene: Scene) -> None:
    """Whatever the test before left, the device is ready: plugged in, as it was packaged, and just started."""
    scene.relax()
    scene.power.set(True)
    scene.heavy()
    for name in ("hook", "watchdog"):
        scene.machine.run("rm", "-f", f"/etc/systemd/system/edge-agent.service.d/{name}.conf")
    scene.machine.run("systemctl", "daemon-reload")
    scene.machine.run("systemctl", "reset-failed")
    scene.machine.run("systemctl", "start", "mosquitto")
    for name in sorted(scene.open):
        scene.give_up(name)
    # An agent that has been busy changing its mind tells the aggregator so at most every five minutes.
    scene.settings()


def test_a_convolution_trains_in_the_sandbox(scene: Scene) -> None:
    """The packaged unit lets torch work as it needs to, and exposes the machine to next to nothing."""
    scene.publish("first", 50)
    scene.accepted("first", 50)
    assert scene.machine.show(AGENT, "MemoryDenyWriteExecute") == "no"
    said = scene.machine.run("systemd-analyze", "security", "--no-pager", "edge-agent.service").stdout
    exposure = re.search(r"exposure level for edge-agent.service: (\d+\.\d+)", said)
    assert exposure is not None and float(exposure[1]) <= 1.6, said[-400:]


def test_unplugged(scene: Scene) -> None:
    """Within a second the trainer stands still and takes no CPU time at all; plugged in, it goes on to the end."""
    trainer = scene.begin("unplugged")
    assert scene.cpu(trainer) > 0
    gone = time.time()
    scene.power.set(False)
    took = when(scene.wait("training.frozen", "unplugged")) - gone
    group, state = scene.freezer()
    spent = scene.cpu(trainer)
    time.sleep(1.0)
    assert scene.cpu(trainer) == spent
    say(f"frozen {took:.2f} s after the cable was pulled; cgroup.freeze {group or 'absent'}, process state {state}")
    assert took < 1.0
    assert group == "1" if status(scene.machine)["sandbox"]["delegated"] else state == "T"
    assert status(scene.machine)["training"]["state"] == "frozen"
    scene.power.set(True)
    scene.wait("training.thawed", "unplugged")
    scene.accepted("unplugged")
    assert len(scene.told("training.frozen", "unplugged")) == 1


def test_somebody_else_needs_the_cpus(scene: Scene) -> None:
    """Two processes that take both CPUs make the agent step aside within seconds; it goes on when they are done."""
    scene.settings("[policy]\ncpu_others = 95.0\n")
    scene.begin("aside")
    scene.heavy("5")  # as in the unit
    begun = time.time()
    for number in range(CPUS):
        scene.busy(number)
    frozen = scene.wait("training.frozen", "aside")
    say(f"stepped aside {when(frozen) - begun:.1f} s after the others began: {frozen['OBSTACLES']}")
    assert when(frozen) - begun < 15.0
    scene.relax()
    scene.heavy()
    scene.wait("training.thawed", "aside")
    scene.accepted("aside")


def test_others_come_first(scene: Scene) -> None:
    """A process gets nearly all of a CPU also while we train, where the owner lets us go on all the same."""
    scene.heavy("5")  # as in the unit
    scene.settings(MODEST)
    others = [scene.busy(number) for number in range(CPUS)]

    def share(seconds: float = 3.0) -> tuple[float, float]:
        begun, before = time.monotonic(), sum(map(scene.cpu, others))
        time.sleep(seconds)
        spent = sum(map(scene.cpu, others)) - before
        return spent / (time.monotonic() - begun) / len(others), spent

    scene.publish("share", 10 * LONG)
    scene.wait("training.started", "share")
    trainer = scene.trainer  # which has two seconds of work before it begins with the first step
    for _ in range(3):  # since what the others get depends on what else this machine does
        scene.machine.run("kill", "-STOP", str(trainer))
        alone, _ = share()
        scene.machine.run("kill", "-CONT", str(trainer))
        ours = scene.cpu(trainer)
        beside, theirs = share()
        ours = scene.cpu(trainer) - ours
        say(f"the others get {alone:.1%} of all CPUs without us and {beside:.1%} beside our training: {ours:.3f} s")
        assert status(scene.machine)["training"]["state"] == "training" and ours > 0
        if beside > 0.9 * alone:
            break
    scene.relax()
    assert ours < 0.05 * (ours + theirs) and beside > 0.9 * alone
    scene.heavy()
    scene.step("share")
    scene.give_up("share")


def test_reboot(scene: Scene) -> None:
    """What is being trained when the machine restarts is gone on with afterwards, as the same job."""
    scene.begin("reboot", 2 * LONG)
    scene.machine.reboot()
    assert scene.wait("training.left", "reboot")["CHECKPOINT"] == "true"
    assert scene.wait("training.started", "reboot", AGAIN="true")["_BOOT_ID"]
    scene.accepted("reboot", 2 * LONG)


def test_power_cut(scene: Scene) -> None:
    """The same without a word of warning: the last checkpoint counts."""
    scene.begin("cut", 2 * LONG)
    kept = "ls /var/lib/fieldfare-agent/jobs/*.checkpoint"
    until(lambda: scene.machine.run("sh", "-c", kept, check=False).stdout or None, "a checkpoint")
    scene.machine.pull_the_plug()
    scene.machine.boot()
    scene.wait("training.started", "cut", AGAIN="true")
    assert not scene.told("training.left", "cut")
    scene.accepted("cut", 2 * LONG)


def test_out_of_memory(scene: Scene) -> None:
    """A task that wants more than its owner allows fails with that reason, and the next one trains, in one go."""
    agent = scene.agent
    scene.publish("greedy", model="Hungry")
    assert scene.wait("training.failed", "greedy")["REASON"] == "out_of_memory"
    assert status(scene.machine)["last_failure"]["reason"] == "out_of_memory"
    scene.give_up("greedy")
    scene.publish("modest", 50)
    scene.accepted("modest", 50)
    assert scene.agent == agent and scene.machine.show(AGENT, "NRestarts") == "0"


def test_killed_for_memory(scene: Scene) -> None:
    """The kernel ends the trainer of a unit that is short of memory; the agent lives, says so, and trains the next."""
    scene.settings("[trainer]\nmemory_max = 0\n")
    agent, limit = scene.agent, "/sys/fs/cgroup/memory/edge-agent.service/memory.limit_in_bytes"
    scene.machine.run("systemctl", "set-property", "--runtime", "edge-agent.service", "MemoryMax=600M")
    found = scene.machine.shell(f"cat {limit} /sys/fs/cgroup/edge-agent.service/memory.max || true")
    if found.strip() != str(600 << 20):
        pytest.skip(f"the kernel does not limit the memory of units here: {found!r}")
    scene.publish("glutton", model="Hungry")
    failed = scene.wait("training.failed", "glutton")
    assert failed["REASON"] == "trainer_killed", failed
    assert scene.wait("trainer.died", SIGNAL=9)["CAUSE"] == "killed"
    assert scene.agent == agent and scene.machine.show(AGENT, "NRestarts") == "0"
    scene.give_up("glutton")
    scene.publish("spared", 50)
    scene.accepted("spared", 50)
    assert scene.agent == agent
    scene.machine.run("systemctl", "set-property", "--runtime", "edge-agent.service", "MemoryMax=infinity")


def test_network_thread_dies(scene: Scene) -> None:
    """Without its network thread the agent is no agent: the watchdog has it restarted, and the job goes on."""
    watched(scene)
    scene.begin("deaf", 3 * LONG)
    scene.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=USR2", AGENT)
    restarted(scene, 1)
    scene.wait("training.started", "deaf", AGAIN="true")
    scene.accepted("deaf", 3 * LONG)


def test_owner_loop_hangs(scene: Scene) -> None:
    """An agent that does nothing any more is ended by the watchdog and restarted."""
    watched(scene)
    scene.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", AGENT)
    restarted(scene, 1)
    scene.connected()


def watched(scene: Scene) -> None:
    """A watchdog that loses patience soon, and a link that is looked after as often."""
    scene.hook()
    scene.machine.drop_in("edge-agent.service", "watchdog", "[Service]\nWatchdogSec=4s\nRestartSec=100ms\n")
    scene.settings("[broker]\nkeepalive = 5\n")
    scene.wait("daemon.started")


def restarted(scene: Scene, times: int) -> None:
    """The watchdog has had the agent restarted so often, and the journal says why."""
    pid = scene.agent
    until(lambda: int(scene.machine.show(AGENT, "NRestarts")) == times or None, "a restart")
    until(lambda: scene.agent not in (0, pid) or None, "another process")
    said = [str(line["MESSAGE"]) for line in scene.machine.journal(AGENT, _PID=1)]
    assert any("Watchdog timeout (limit 4s)" in line for line in said[-12:]), said[-12:]


def test_broker_away_and_upgrade(scene: Scene, packages: Packages, tmp_path: Path) -> None:
    """An update waits for a broker that is away, and a job that an upgrade interrupts is not lost: both get there."""
    scene.begin("away", 2 * LONG)
    scene.publish("later", 2 * LONG)
    until(lambda: status(scene.machine)["tasks"].get("later", {}).get("round") == 1 or None, "an offer")
    gone = time.monotonic()
    scene.machine.run("systemctl", "stop", "mosquitto")
    scene.wait("training.finished", "away")
    scene.step("later")
    assert [each["task"] for each in status(scene.machine)["outbox"]] == ["away"]
    packages.install(scene.machine, newer(packages.agent, tmp_path))
    until(lambda: scene.machine.show(AGENT, "ActiveState") == "active" or None, "the new agent")
    shown = status(scene.machine)
    assert [each["task"] for each in shown["outbox"]] == ["away"] and shown["left"] == {"later": 1}
    assert not shown["link"]["connected"]
    time.sleep(max(0.0, MINUTES - (time.monotonic() - gone)))
    scene.machine.run("systemctl", "start", "mosquitto")
    scene.accepted("away", 2 * LONG, seconds=90.0)
    scene.wait("training.started", "later", AGAIN="true")
    scene.accepted("later", 2 * LONG)


def test_broker_killed(scene: Scene) -> None:
    """A broker that dies without storing anything costs nobody's work."""
    scene.begin("crash")
    since = len(scene.machine.journal(AGENT, EVENT="link.up"))
    scene.machine.run("systemctl", "kill", "--signal=KILL", "mosquitto")
    until(lambda: scene.machine.show("mosquitto", "ActiveState") == "active" or None, "the broker")
    until(lambda: len(scene.machine.journal(AGENT, EVENT="link.up")) > since or None, "the link", 90.0)
    scene.accepted("crash", seconds=90.0)


def test_denied(scene: Scene) -> None:
    """A device that is put on the deny list while it trains is refused with its very next update."""
    scene.begin("denied")
    scene.machine.shell("echo pump-1 >>/etc/fieldfare/deny.txt")
    answered = scene.wait("update.answered", "denied")
    scene.machine.run("rm", "/etc/fieldfare/deny.txt")
    assert (answered["OUTCOME"], answered["REASON"]) == ("rejected", "denied")
    scene.give_up("denied")


def test_clock_in_1970(scene: Scene) -> None:
    """A board without a battery-backed clock connects, trains and is believed, whatever it asks for the time."""
    scene.hook(f"LD_PRELOAD={FAKETIME} FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1 FAKETIME={300 - time.time():.0f}")
    scene.settings()
    until(lambda: scene.inside()["now"] < 86_400 or None, "a clock in 1970")
    scene.publish("epoch", 50)
    scene.accepted("epoch", 50)
    assert set(status(scene.machine)["refused"]) <= {"rollback"}  # of tasks that the broker has forgotten the end of


def test_idle_minute(scene: Scene) -> None:
    """A device that has nothing to do sleeps: few wake-ups, and those of known threads."""
    scene.hook()
    scene.settings(IDLE)
    scene.connected()
    time.sleep(5.0)
    names = {str(pid): name for pid, name in scene.inside()["threads"].items()}
    time.sleep(1.0)
    pid, before = scene.agent, scene.wake_ups()
    time.sleep(60.0)
    after = scene.wake_ups()
    counts = {names.get(thread, f"thread {thread}"): after[thread] - before.get(thread, 0) for thread in after}
    resident = re.search(r"VmRSS:\s+(\d+) kB", scene.machine.read(f"/proc/{pid}/status"))
    assert resident is not None
    shown = status(scene.machine)
    megabytes = int(resident[1]) * 1024 / 1e6
    say(f"idle for a minute: {sum(counts.values())} wake-ups {counts}; {megabytes:.1f} MB resident")
    say(f"it looks at the device {shown['sensing']}, and is {shown['state']}")
    assert shown["memory"]["trainer"] is None and shown["sensing"] == "by pressure triggers"
    assert megabytes <= 45.0
    assert sum(counts.values()) <= 15 and len(after) <= 8


def test_purge_in_mid_training(scene: Scene) -> None:
    """Whatever it was doing, nothing of the agent is left."""
    scene.begin("purged", 3 * LONG)
    scene.machine.run("apt-get", "purge", "-y", "-q", "fieldfare-agent")
    assert scene.machine.run("pgrep", "-u", "fieldfare-agent", check=False).stdout == ""
    for path in ("/var/lib/fieldfare-agent", "/run/fieldfare-agent", "/usr/lib/fieldfare-agent", "/usr/bin/edge-agent"):
        assert not scene.machine.exists(path), path
    groups = scene.machine.shell("find /sys/fs/cgroup -name 'edge-agent.service*'")
    assert groups == ""
