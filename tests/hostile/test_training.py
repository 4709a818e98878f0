"""A device whose data, weights or trainer are bad: the agent says so and works on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.broker import Broker
from shared import sealing, wire
from shared.graph import Ref, Row
from shared.messages import DataContract, Sgd, Training, UpdateContext, UpdateHead, UpdateMessage
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.daemon import until
from tests.hostile.field import AGENT, Field
from tests.hostile.records import DIMENSION, INPUT, TARGET, Model, graph_bytes

ROWS = 40
SECRET = 12345.678
"""A value of the data that no log may show."""


def sound() -> tuple[np.ndarray, np.ndarray]:
    """Data as the contract wants them."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 4)).astype("f4"), rng.integers(0, 3, ROWS)
    x[0, 0] = SECRET
    return x, y.astype("i8")


def write_data(folder: Path) -> None:
    """One bad data set of each kind, and a good one."""
    x, y = sound()
    folder.mkdir()
    np.savez(folder / "good.npz", x=x, y=y)
    np.savez(folder / "shape.npz", x=x[:, :3], y=y)
    np.savez(folder / "dtype.npz", x=x.astype("f8"), y=y)
    np.savez(folder / "nan.npz", x=np.where(np.arange(ROWS)[:, None] == 7, np.float32("nan"), x), y=y)
    np.savez(folder / "label.npz", x=x, y=np.where(np.arange(ROWS) == 9, 3, y))
    np.savez(folder / "negative.npz", x=x, y=np.where(np.arange(ROWS) == 9, -1, y))
    np.savez(folder / "lengths.npz", x=x, y=y[:-1])
    np.savez(folder / "name.npz", z=x, y=y)
    np.savez(folder / "pickle.npz", x=np.array([{"a": 1}] * ROWS, dtype=object), y=y)
    np.savez(folder / "few.npz", x=x[:3], y=y[:3])
    (folder / "junk.npz").write_bytes(records.random_bytes(5000))
    (folder / "text.csv").write_text("a,b,c,d,y\n1,2,3,4,0\n1,2,three,4,1\n")
    (folder / "columns.csv").write_text("a,b,c,d,y\n1,2,3,4,0\n1,2,3,4\n")
    (folder / "label.csv").write_text("a,b,c,d,y\n1,2,3,4,0\n1,2,3,4,7\n")


BAD = {
    "shape.npz": "[40, 3]",
    "dtype.npz": "float64",
    "nan.npz": "x[7]",
    "label.npz": "y[9]",
    "negative.npz": "y[9]",
    "lengths.npz": "39",
    "name.npz": "'x'",
    "pickle.npz": "pickle.npz",
    "few.npz": "3 examples",
    "junk.npz": "junk.npz",
    "absent.npz": "No such file",
    "text.csv": "line 3",
    "columns.csv": "line 3",
    "label.csv": "line 3",
}
"""What the agent's line must name, besides the file."""


def dataset(file: str) -> str:
    """The name of a data set after its file."""
    return file.replace(".", "-")


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """An agent with every kind of bad data set, and a good one."""
    folder = tmp_path_factory.mktemp("owner") / "data"
    write_data(folder)
    made = Field(
        fleet,
        "\n".join(f'[data.{dataset(file)}]\npath = "{folder / file}"' for file in [*BAD, "good.npz"])
        + "\n[trainer]\nthreads = 1\n",
    )
    with made.daemon:
        made.start()
        yield made
        assert made.daemon.pid
        told = [line["event"] for line in made.daemon.read()]
        assert told.count("daemon.started") == 1
        assert "trainer.said" not in told  # nothing went wrong that nobody foresaw
        assert made.daemon.stop() == 0
        made.daemon.read()


def contract(file: str, examples: int = 10) -> DataContract:
    """What a task asks of one of the data sets."""
    return DataContract(dataset=dataset(file), inputs=[INPUT], target=TARGET, min_examples=examples)


def uploads(field: Field) -> int:
    """How many messages with updates the agent has sent."""
    return sum(topic.startswith("fl/up/") for topic, _ in field.collect())


def fails(field: Field, task: str, reason: str, **changes: Any) -> str:
    """Offer a round that cannot be trained; the detail of the one line that says why."""
    start = len(field.daemon.read())
    counts, sent = field.counters()[1], uploads(field)
    field.offer(task, **changes)
    line = field.daemon.wait("training.failed", start, task=task)
    field.fence()
    told = [each["event"] for each in field.daemon.lines[start:] if each["level"] in ("warning", "error")]
    assert told.count("training.failed") == 1
    assert line["reason"] == reason
    assert field.counters()[1]["training_failed"] == counts["training_failed"] + 1
    assert field.asked()["tasks"][task]["last_round_trained"] == 0
    assert uploads(field) == sent
    detail = line["detail"]
    assert isinstance(detail, str)
    return detail


@pytest.mark.parametrize("file", BAD)
def test_bad_data(field: Field, file: str) -> None:
    """Data that break the contract are refused in one line with file and place, and never a value of theirs."""
    task = f"t-{dataset(file)}"
    field.task(task, data=contract(file, 1 if file.endswith(".csv") else 10))
    detail = fails(field, task, "data")
    assert file in detail
    assert BAD[file] in detail
    assert str(SECRET) not in field.daemon.log.read_text()


def test_bad_data_are_an_obstacle(field: Field) -> None:
    """The fleet is told that this device has data that will not do, not which or how; it still offers the others."""
    first = dataset(next(iter(BAD)))
    status = field.status(lambda said: "data" in said.obstacles)
    assert first not in status.datasets
    assert dataset("good.npz") in status.datasets


def test_weights_that_are_not_finite(field: Field) -> None:
    """Weights that a publisher signed and nobody can train are refused by the trainer, in one line."""
    field.task("t-weights", model=Model(weights=records.weights(float("nan"))), data=contract("good.npz"))
    assert "NaN" in fails(field, "t-weights", "weights")


def test_a_graph_that_does_not_compute(field: Field) -> None:
    """A well-typed graph whose shapes cannot fit fails in the trainer, in one line."""
    broken = graph_bytes("train", [Row("aten.mm.default", (Ref(1), Ref(1)))])
    field.task("t-graph", model=Model(train=broken), data=contract("good.npz"))
    assert fails(field, "t-graph", "graph")


def test_a_key_to_which_everybody_has_the_secret(field: Field) -> None:
    """An aggregator whose round has a public key of low order gets no update."""
    field.task("t-key", data=contract("good.npz"))
    assert "no X25519 key" in fails(field, "t-key", "unsupported", hpke_key=bytes(32))


def test_a_graph_that_asks_for_too_much(field: Field) -> None:
    """A well-typed graph that asks for more memory than the trainer may have ends the job, not the agent."""
    greedy = graph_bytes("train", [Row("aten.zeros.default", ((2**28,),))] * 12)
    field.task("t-memory", model=Model(train=greedy), data=contract("good.npz"))
    start = len(field.daemon.read())
    field.offer("t-memory")
    line = field.daemon.wait("training.failed", start, task="t-memory")
    assert line["reason"] in ("out_of_memory", "trainer_killed")


def trains(field: Field, task: str, number: int) -> None:
    """A round of good data ends in an update that opens with the round's key."""
    private, public = sealing.generate()
    start = len(field.daemon.read())
    field.offer(task, number, hpke_key=public)
    field.daemon.wait("update.sent", start, task=task, round=number)

    def found() -> UpdateMessage | None:
        for topic, payload in field.collect():
            if topic.startswith(f"fl/up/0/{AGENT}/"):
                message = wire.unpack(payload, UpdateMessage)
                context = wire.unpack(wire.unpack(message.head, UpdateHead).context, UpdateContext)
                if (context.task, context.round, context.device) == (task, number, AGENT):
                    return message
        return None

    message = until(found, "the update")
    head = wire.unpack(message.head, UpdateHead)
    assert message.body is not None
    report, delta = sealing.open_sealed(private, head.encapsulation, message.body, head.context)
    assert report.examples + report.holdout == ROWS
    assert np.isfinite(np.frombuffer(delta, "<f4")).all()
    assert len(delta) == 4 * DIMENSION


def test_good_data_are_still_trained_on(field: Field) -> None:
    """After all that the next good task is trained, sealed and sent."""
    field.task("t-zz-good", data=contract("good.npz"))
    trains(field, "t-zz-good", 1)


def test_a_killed_trainer(field: Field) -> None:
    """A trainer that is killed at work is an event: the agent lives, says so and trains the next round."""
    field.task(
        "t-long",
        data=contract("good.npz"),
        training=Training(optimizer=Sgd(lr=0.01), batch_size=1, epochs=10_000),
    )
    start = len(field.daemon.read())
    counts = field.counters()[1]
    agent = field.daemon.pid
    field.offer("t-long")
    field.daemon.wait("training.started", start, task="t-long")
    trainer = [line["pid"] for line in field.daemon.lines if line["event"] == "trainer.started"][-1]
    assert trainer != agent
    os.kill(trainer, signal.SIGKILL)
    died = field.daemon.wait("trainer.died", start)
    assert (died["pid"], died["cause"], died["signal"]) == (trainer, "killed", signal.SIGKILL)
    failed = field.daemon.wait("training.failed", start, task="t-long")
    assert failed["reason"] == "trainer_killed"
    assert failed["retry"] > 0
    after = field.counters()[1]
    assert after["trainer_died"] == counts["trainer_died"] + 1
    trains(field, "t-zz-good", 2)
    assert field.daemon.pid == agent
