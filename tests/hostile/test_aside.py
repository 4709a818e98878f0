"""A device whose owner needs it, or that is switched off, in the middle of a training: the work is not lost.

And what its owner allows the trainer is what the trainer gets.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.broker import Broker
from edge_agent import control
from shared import tensors
from shared.control import ask
from shared.messages import DataContract, RoundOffer, Sgd, Training
from tests.broker.broker import Fleet
from tests.hostile.daemon import Line, until
from tests.hostile.field import Field
from tests.hostile.records import INPUT, LAYOUT, TARGET

GRACE = 1.5


class House:
    """Where the agent's device gets its power."""

    def __init__(self, root: Path) -> None:
        self._online = root / "class/power_supply/AC/online"
        self._online.parent.mkdir(parents=True)
        (self._online.parent / "type").write_text("Mains\n")
        self.plug(True)

    def plug(self, there: bool) -> None:
        """Power comes, or goes."""
        self._online.write_text(f"{int(there)}\n")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """A device on mains, which its owner asks for."""
    for name, value in {
        "DEVICE__SYS_ROOT": str(tmp_path / "sys"),
        "POLICY__MAINS": "true",
        "POLICY__GRACE": str(GRACE),
        "POLICY__SENSE": "1",
        "POLICY__SENSE_TRAINING": "0.5",
    }.items():
        monkeypatch.setenv(f"FIELDFARE_{name}", value)
    return House(tmp_path / "sys")


@pytest.fixture
def field(fleet: Fleet, broker: Broker, house: House, tmp_path: Path) -> Iterator[Field]:
    """A running agent with enough to do for a while."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(400, 4)).astype("f4"), y=rng.integers(0, 3, 400))
    made = Field(fleet, f'[data.d]\npath = "{tmp_path / "d.npz"}"\n\n[trainer]\nthreads = 1\n')
    with made.daemon:
        made.start()
        yield made
        assert made.daemon.stop() == 0
        made.daemon.read()


def again(field: Field, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """The agent starts anew with other settings, which are named SECTION__NAME."""
    for name, value in settings.items():
        monkeypatch.setenv(f"FIELDFARE_{name}", str(value))
    assert field.daemon.stop() == 0
    field.start()


def ask_for(field: Field, steps: int) -> RoundOffer:
    """A round whose training takes a while."""
    training = Training(optimizer=Sgd(lr=0.001, momentum=0.9), batch_size=8, steps=steps)
    field.task("t", data=DataContract(dataset="d", inputs=[INPUT], target=TARGET, min_examples=1), training=training)
    return field.offer("t")


def begin(field: Field, steps: int) -> tuple[int, RoundOffer]:
    """Such a round is being trained: the trainer's process id, and the offer."""
    start = len(field.daemon.lines)
    offer = ask_for(field, steps)
    field.daemon.wait("training.started", start, task="t")
    trainer: int = field.daemon.wait("trainer.started", start)["pid"]
    until(lambda: ((field.asked()["training"] or {}).get("step") or 0) > 20 or None, "some steps")
    return trainer, offer


def state(pid: int) -> str:
    """The kernel's letter for what a process does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def finished(field: Field, since: int, steps: int) -> Line:
    """The round's training was finished, with all of its steps, and the update is on its way."""
    line = field.daemon.wait("training.finished", since, task="t")
    assert line["steps"] == steps
    until(lambda: any(topic.startswith("fl/up/") for topic, _ in field.collect()) or None, "an update")
    assert not list((field.state / "jobs").iterdir())
    return line


def test_unplugged_and_plugged_in(field: Field, house: House) -> None:
    """The trainer stands still within a second of the power's going, and goes on when it is back."""
    steps = 8_000
    trainer, _ = begin(field, steps)
    start = len(field.daemon.lines)
    house.plug(False)
    gone = time.monotonic()
    field.daemon.wait("training.frozen", start, task="t")
    assert time.monotonic() - gone < 1.0 and state(trainer) == "T"
    shown = field.asked()
    assert (shown["state"], shown["training"]["state"]) == ("frozen", "frozen")
    assert [each["name"] for each in shown["obstacles"]] == ["mains"]
    house.plug(True)
    field.daemon.wait("training.thawed", start, task="t")
    assert state(trainer) != "T"
    finished(field, start, steps)
    about = json.loads((field.state / "models" / "t" / "model.json").read_text())
    assert (about["task"], about["release"]) == ("t", 0)


def test_unplugged_for_long(field: Field, house: House) -> None:
    """After the grace the trainer leaves with a checkpoint and its memory is free; later the same job goes on."""
    steps = 8_000
    trainer, _ = begin(field, steps)
    start = len(field.daemon.lines)
    house.plug(False)
    left = field.daemon.wait("training.left", start, task="t")
    assert left["checkpoint"] is True
    until(lambda: not Path(f"/proc/{trainer}").exists() or None, "the trainer's end")
    (job, checkpoint) = sorted((field.state / "jobs").iterdir())
    assert checkpoint.name == f"{job.name}.checkpoint"
    assert field.asked()["left"] == {"t": 1}
    house.plug(True)
    field.daemon.wait("training.started", start, task="t", again=True)
    finished(field, start, steps)


def test_paused_by_its_owner(field: Field) -> None:
    """A pause frees the memory at once, and its end brings the work back."""
    steps = 8_000
    trainer, _ = begin(field, steps)
    start = len(field.daemon.lines)
    ask(field._run, control.Request("pause"), control.DOOR)
    field.daemon.wait("training.left", start, task="t")
    until(lambda: not Path(f"/proc/{trainer}").exists() or None, "the trainer's end")
    ask(field._run, control.Request("resume"), control.DOOR)
    finished(field, start, steps)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_switched_off(field: Field, monkeypatch: pytest.MonkeyPatch, end: signal.Signals) -> None:
    """A device that is shut down, or loses its power, in mid-training goes on with the same job when it is back."""
    again(field, monkeypatch, TRAINER__CHECKPOINT=0.2)
    steps = 8_000
    trainer, offer = begin(field, steps)
    (job,) = [path for path in (field.state / "jobs").iterdir() if path.suffix != ".checkpoint"]
    checkpoint = job.with_name(f"{job.name}.checkpoint")
    start = len(field.daemon.lines)
    if end is signal.SIGTERM:
        assert field.daemon.stop() == 0
        assert [line["event"] for line in field.daemon.read()[start:]].count("training.left") == 1
    else:
        until(lambda: checkpoint.exists() or None, "a checkpoint")
        field.daemon.kill()
    until(lambda: not Path(f"/proc/{trainer}").exists() or None, "the trainer's end")
    assert checkpoint.exists()
    start = len(field.daemon.read())
    field.start()
    field.publish("models/t/round", field.signed(offer))
    field.daemon.wait("training.started", start, task="t", again=True)
    finished(field, start, steps)


def test_a_worse_release_is_refused(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its owner asks for that, the model in use stays when the trainer finds the next one clearly worse here."""
    again(field, monkeypatch, LOCAL__REFUSE="true")
    contract = DataContract(dataset="d", inputs=[INPUT], target=TARGET, min_examples=1)
    training = Training(optimizer=Sgd(lr=0.01), batch_size=8, epochs=1, holdout=0.5)
    start = len(field.daemon.lines)
    field.task("q", data=contract, training=training, metric="loss")
    field.daemon.wait("model.used", start, task="q", release=0)
    start = len(field.daemon.lines)
    field.next_release("q")
    used = field.daemon.wait("model.used", start, task="q", release=1)
    assert used["metric_loss"] > 0  # the same weights under another number are not worse
    skewed = np.zeros((3, 4), np.float32)
    skewed[0] = 100.0
    start = len(field.daemon.lines)
    field.next_release("q", tensors.save(LAYOUT, {"weight": skewed}))
    refused = field.daemon.wait("model.refused", start, task="q", release=2)
    assert "local.ratio" in refused["why"]
    assert json.loads((field.state / "models" / "q" / "model.json").read_text())["release"] == 1


ENDLESS = 10_000_000
"""Steps."""


def constraint(field: Field, name: str) -> dict[str, Any]:
    """What `edge-agent why` says of one, after a look."""
    judged = control.ask(field._run, control.Request("why"))["constraints"]
    return next(each for each in judged if each["name"] == name)


def test_a_budget_that_is_spent(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running trainer's CPU time is counted: it leaves in the middle, and a restart in order gives nothing back."""
    budget = 4.0
    again(field, monkeypatch, POLICY__CPU_BUDGET=budget, TRAINER__SCHEDULING="normal", TRAINER__NICE=0)
    start = len(field.daemon.lines)
    offer = ask_for(field, ENDLESS)
    field.daemon.wait("training.left", start, task="t")
    assert [each["name"] for each in field.asked()["obstacles"]] == ["budget"]
    assert field.daemon.stop() == 0
    # A crash would have cost up to 30 s more.
    assert budget <= json.loads((field.state / "budget.json").read_text())["seconds"] < budget + 15
    start = len(field.daemon.read())
    field.start()
    field.publish("models/t/round", field.signed(offer))
    found = constraint(field, "budget")
    assert found["verdict"] == "unmet" and budget <= found["value"] < budget + 15
    field.fence()
    assert not [line for line in field.daemon.read()[start:] if line["event"] == "training.started"]


@pytest.mark.timeout(240)  # it waits for the turns of two minutes
def test_windows_of_the_calendar(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that ends while it trains costs no step: the job is left with a checkpoint, and the next goes on."""
    time.sleep(max(0.0, 25 - time.time() % 60))  # so that the end is near
    if time.time() % 60 > 45:
        time.sleep(85 - time.time() % 60)
    minute = int(time.time() // 60) * 60
    windows = [
        "-".join(time.strftime("%H:%M", time.gmtime(minute + edge)) for edge in edges)
        for edges in ((0, 60), (120, 600))
    ]
    again(field, monkeypatch, POLICY__TIMEZONE="UTC", POLICY__WINDOWS=json.dumps(windows))
    start = len(field.daemon.lines)
    begin(field, ENDLESS)
    time.sleep(max(0.0, minute + 55 - time.time()))
    left = field.daemon.wait("training.left", start, task="t")
    assert left["checkpoint"] is True
    assert minute + 60 <= time.time() < minute + 75
    assert constraint(field, "calendar")["verdict"] == "unmet"
    time.sleep(max(0.0, minute + 115 - time.time()))
    assert not [line for line in field.daemon.read()[start:] if line.get("again")]
    field.daemon.wait("training.started", start, task="t", again=True)
    assert time.time() >= minute + 120


def test_the_trainer_takes_what_nobody_else_wants(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configured: the idle class by default, or niceness alone, and so much memory."""
    trainer, _ = begin(field, ENDLESS)
    assert os.sched_getscheduler(trainer) == os.SCHED_IDLE
    again(field, monkeypatch, TRAINER__SCHEDULING="normal", TRAINER__NICE=7, TRAINER__MEMORY_MAX=900 << 20)
    start = len(field.daemon.lines)
    field.offer("t", 2)
    trainer = field.daemon.wait("trainer.started", start)["pid"]
    limited = Path(f"/proc/{trainer}/oom_score_adj")  # written last
    until(lambda: limited.read_text() == "500\n" or None, "the limits")
    assert os.sched_getscheduler(trainer) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, trainer) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    limits = Path(f"/proc/{trainer}/limits").read_text().splitlines()
    (line,) = [each.split() for each in limits if each.startswith("Max data size")]
    assert line[-3:-1] == [str(900 << 20)] * 2


class Kernel:
    """What a kernel tells of CPU time, in clock ticks, and a unit's control group to which it delegates, as files."""

    def __init__(self, proc: Path, sys: Path) -> None:
        self.proc, self.unit = proc, sys / "fs/cgroup/system.slice/edge-agent.service"
        (self.unit / "trainer").mkdir(parents=True)
        (self.unit / "agent").mkdir()
        for name in ("cgroup.procs", "cgroup.subtree_control", "agent/cgroup.procs", "trainer/memory.max"):
            (self.unit / name).write_text("")
        self.write("self/cgroup", "0::/system.slice/edge-agent.service")

    def write(self, name: str, text: str) -> None:
        """A file of /proc, replaced at once."""
        file = self.proc / name
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(text + "\n")
        fresh.replace(file)

    def process(self, pid: int, ticks: int) -> None:
        """A process that has used so much."""
        self.write(f"{pid}/stat", f"{pid} (python) S" + " 0" * 10 + f" {ticks} 0 0 0" + " 0" * 30)

    def cpus(self, busy: int, idle: int) -> None:
        """All CPUs together."""
        self.write("stat", f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0")


def test_our_own_trainer_is_no_load(field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has used half of the CPUs, others nothing: that is what counts, and training goes on."""
    kernel = Kernel(tmp_path / "proc", tmp_path / "sys")
    again(field, monkeypatch, DEVICE__PROC_ROOT=kernel.proc, POLICY__CPU_OTHERS=40)
    trainer, _ = begin(field, ENDLESS)
    for pid in (field.daemon.pid, trainer):
        kernel.process(pid, 0)
    kernel.cpus(busy=1000, idle=1000)
    assert constraint(field, "cpu")["value"] is None  # a first look compares with nothing
    kernel.process(trainer, 2000)
    kernel.cpus(busy=3000, idle=3000)
    assert constraint(field, "cpu")["value"] == 0.0
    kernel.process(trainer, 4000)
    kernel.cpus(busy=6000, idle=3000)
    assert 0.0 < constraint(field, "cpu")["value"] < 40.0
    assert field.asked()["state"] == "training"


def test_its_group_is_bounded(field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as a service with its group delegated, the agent gives the trainer's group the owner's limit."""
    kernel = Kernel(tmp_path / "proc", tmp_path / "sys")
    monkeypatch.setenv("INVOCATION_ID", "0123")
    again(field, monkeypatch, DEVICE__PROC_ROOT=kernel.proc, TRAINER__MEMORY_MAX=900 << 20)
    assert (kernel.unit / "agent/cgroup.procs").read_text() == str(field.daemon.pid)
    assert (kernel.unit / "trainer/memory.max").read_text() == str(900 << 20)
    assert field.asked()["sandbox"]["delegated"] is True


def test_the_kernel_is_asked_to_wake_it(field: Field) -> None:
    """Where it grants what the policy is about, which here is nothing, an idle agent does not look by the clock."""
    assert field.asked()["sensing"] == "by pressure triggers"
