"""A device whose owner needs it, or that is switched off, in the middle of a training: the work is not lost."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

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


def begin(field: Field, steps: int) -> tuple[int, RoundOffer]:
    """A round whose training takes a while is being trained: the trainer's process id, and the offer."""
    start = len(field.daemon.lines)
    training = Training(optimizer=Sgd(lr=0.001, momentum=0.9), batch_size=8, steps=steps)
    field.task("t", data=DataContract(dataset="d", inputs=[INPUT], target=TARGET, min_examples=1), training=training)
    offer = field.offer("t")
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
    monkeypatch.setenv("FIELDFARE_TRAINER__CHECKPOINT", "0.2")
    field.daemon.stop()
    field.start()
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
    monkeypatch.setenv("FIELDFARE_LOCAL__REFUSE", "true")
    field.daemon.stop()
    field.start()
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
