"""The disk of a device is full or broken: the agent says so once, waits, can be ended, and loses nothing."""

from collections.abc import Iterator

import pytest

from aggregator.broker import Broker
from shared import wire
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.field import Field


@pytest.fixture
def field(fleet: Fleet, broker: Broker) -> Iterator[Field]:
    """An agent whose state directory the test spoils."""
    made = Field(fleet)
    with made.daemon:
        made.start()
        yield made


def spoil(field: Field, task: str) -> None:
    """The task's folder cannot be made: a file is in its way."""
    (field.state / "tasks" / task).write_text("in the way")


def publish(field: Field, task: str) -> int:
    """A release that cannot be stored; the number of lines before it was noticed."""
    start = len(field.daemon.read())
    field.manifests[task] = records.manifest(field.keys, task)
    field.messages[task] = records.release(field.keys, field.manifests[task])
    field.publish(f"models/{task}/release", wire.pack(field.messages[task]))
    field.daemon.wait("storage.failed", start)
    return start


def test_it_goes_on_when_the_disk_does(field: Field) -> None:
    """The release that waited is accepted, what came meanwhile too, and one line told of each turn."""
    spoil(field, "first")
    start = publish(field, "first")
    field.offer("first")
    (field.state / "tasks" / "first").unlink()
    field.daemon.wait("release.accepted", start, task="first")
    field.fence()
    told = [line["event"] for line in field.daemon.read()[start:]]
    assert (told.count("storage.failed"), told.count("storage.recovered")) == (1, 1)
    assert told.index("storage.recovered") < told.index("release.accepted")
    assert field.asked()["tasks"]["first"]["round"] == 1
    assert field.daemon.stop() == 0


def test_it_can_be_ended_while_it_waits(field: Field) -> None:
    """In order, with nothing half stored; the next start knows no such release."""
    spoil(field, "second")
    publish(field, "second")
    assert field.daemon.stop() == 0
    assert field.daemon.read()[-1]["event"] == "daemon.stopped"
    (field.state / "tasks" / "second").unlink()
    field.start()
    assert "second" not in field.asked()["tasks"]
    field.release("second")
    assert field.daemon.stop() == 0
