"""Devices whose clock is years off and was never set: they work, believe no past, and go back on nothing."""

import time
from collections.abc import Iterator

import pytest

from aggregator.broker import Broker
from shared import wire
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.clock import Wall
from tests.hostile.field import Field
from tests.hostile.records import DAY

YEAR = 365 * DAY


@pytest.fixture(scope="module")
def wall(tmp_path_factory: pytest.TempPathFactory) -> Wall:
    """Right at first."""
    return Wall(tmp_path_factory.mktemp("wall"))


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker, wall: Wall) -> Iterator[Field]:
    """An agent without data whose clock nothing has set; it stands in 1970 at first."""
    wall.set(-time.time())
    made = Field(fleet, clock=wall.path)
    with made.daemon:
        made.start()
        yield made
        assert made.daemon.pid
        assert made.daemon.stop() == 0
        made.daemon.read()


def test_a_device_that_wakes_up_in_1970(field: Field, wall: Wall) -> None:
    """It works, it takes good releases, and it still knows that what expired before its certificate is over."""
    field.task("main")
    field.offer("main")
    field.fence()
    old = records.manifest(field.keys, "past", expires=int(time.time()) - 3 * DAY)
    payload = wire.pack(records.release(field.keys, old))
    before = field.snapshot()
    for years in (0, 3, 30):
        wall.set(years * YEAR - time.time())
        lines = field.provoke(lambda: field.publish("models/past/release", payload))
        assert [(line["event"], line["reason"]) for line in lines] == [("message.refused", "expired")]
        assert field.snapshot() == before
    wall.set(-time.time())
    field.next_release("main")


def test_a_device_whose_clock_is_set_back(field: Field, wall: Wall) -> None:
    """What it has accepted stays accepted, older records stay refused, and newer ones are taken, over a restart too."""
    wall.set(0)
    field.task("main", 5)
    offered = field.offer("main", 2)
    wall.set(-10 * YEAR)
    field.next_release("main")
    older = wire.pack(records.release(field.keys, records.manifest(field.keys, "main", 4)))
    stale = records.offer(field.manifests["main"], field.messages["main"], 1)
    for _ in range(2):
        lines = field.provoke(lambda: field.publish("models/main/release", older))
        lines += field.provoke(lambda: field.publish("models/main/round", field.signed(stale)))
        assert [line["reason"] for line in lines] == ["rollback", "rollback"]
        assert field.daemon.stop() == 0
        field.start()
    shown = field.asked()["tasks"]["main"]
    assert shown["release"] == 1 and offered.round == 2
    field.next_release("main")
