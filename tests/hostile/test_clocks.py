"""An aggregator whose clock is years off: what it refuses it refuses typed, and no round hangs once it is right."""

import time
from collections.abc import Iterator

import pytest

from aggregator.broker import Broker
from shared import wire
from shared.messages import Outcome
from tests.broker.broker import Fleet
from tests.hostile import records
from tests.hostile.clock import Wall
from tests.hostile.records import DAY, update
from tests.hostile.site import Site
from tests.hostile.test_updates import silence

YEAR = 365 * DAY


@pytest.fixture(scope="module")
def wall(tmp_path_factory: pytest.TempPathFactory) -> Wall:
    """Right at first."""
    return Wall(tmp_path_factory.mktemp("wall"))


@pytest.fixture(scope="module")
def site(fleet: Fleet, broker: Broker, wall: Wall) -> Iterator[Site]:
    """A running aggregator whose clock is the test's."""
    made = Site(fleet, wall.path)
    wall.set(0)
    with made.daemon:
        made.begin()
        yield made
        assert [line["event"] for line in made.daemon.read()].count("daemon.started") == 1
        assert made.daemon.stop() == 0
        made.daemon.read()


def send(site: Site, task: str) -> tuple[Outcome, str]:
    """What a new device's correct update for a task's open round gets."""
    device = site.fresh()
    (answer,) = site.send(device, update(device, site.offer(task)))
    return answer.outcome, answer.reason


@pytest.mark.parametrize("years", [-3, -30, 40])
def test_the_aggregators_clock_jumps(site: Site, wall: Wall, years: int) -> None:
    """An open round goes on; what its certificates cannot be checked for is refused typed, until the clock is right."""
    wall.set(years * YEAR)
    assert send(site, "main") == (Outcome.ACCEPTED, "")
    number = site.offer("short").round
    assert send(site, "short") == (Outcome.ACCEPTED, "")
    if years > 0:
        # Nothing opens under a manifest that has expired, as far as this clock goes.
        site.daemon.wait("round.closed", task="short", round=number)
        wall.set(0)
        site.online("live-1")
    site.daemon.wait("round.opened", task="short", round=number + 1)
    if years < 0:
        before = site.snapshot()
        start = len(site.daemon.read())
        device = site.fresh()
        waiting = update(device, site.offer("short"))
        silence(site, device, waiting)
        assert [line["event"] for line in site.daemon.lines[start:] if line["event"] != "message.refused"] == [
            "update.rejected"
        ]
        assert site.snapshot() == before
        wall.set(0)
        (answer,) = site.send(device, waiting)
        assert answer.outcome is Outcome.ACCEPTED, "the very update that found a wrong clock"
    else:
        assert send(site, "short") == (Outcome.ACCEPTED, ""), "the round does not hang once the clock is right"
    site.daemon.wait("round.closed", task="short", round=number + 1)
    site.accepts()


def test_an_expired_release_under_an_old_clock(site: Site, wall: Wall) -> None:
    """Set back, the clock lets a release of the past be adopted; nobody trains on it who has the time."""
    old = records.manifest(site.keys, "past", expires=int(time.time()) - DAY)
    lines = site.provoke(lambda: site.publish(wire.pack(records.release(site.keys, old))))
    assert [line["reason"] for line in lines] == ["expired"]
    wall.set(40 * YEAR)
    new = records.manifest(site.keys, "present")
    lines = site.provoke(lambda: site.publish(wire.pack(records.release(site.keys, new))))
    assert [line["reason"] for line in lines] == ["expired"]
    wall.set(0)
    site.accepts()
