"""kill -9 or a dead line in the middle of an upload of 20 MB: it ends well, counts once, and wastes few bytes."""

import time
from collections.abc import Iterator

import pytest

from shared.chunks import CHUNK_SIZE
from shared.messages import Plan
from tests.broker.broker import Fleet
from tests.broker.plot import Light, Plot, note
from tests.broker.relay import Relay
from tests.hostile.daemon import until

CELLS, SIZE = 5_000_000, 20_000_000
PLAN = Plan(goal=2, min_updates=2, rounds=1, deadline=3600, over_select=100.0)
RATE = 4e6
"""Bytes a second on the device's link, so that there is a middle."""
KEEPALIVE = 5
"""Seconds."""
PATIENCE = 240.0
UNDER_WAY = 20 * CHUNK_SIZE
"""Bytes that may have been sent and not have arrived when a device dies: what the broker has not acknowledged."""


@pytest.fixture
def relay(fleet: Fleet) -> Iterator[Relay]:
    """The link of the first device."""
    with Relay(fleet.port) as made:
        yield made


@pytest.fixture
def plot(fleet: Fleet, relay: Relay) -> Iterator[Plot]:
    """Two devices, of which the first has sent half of its update."""
    fleet.fresh_broker()
    with Plot(fleet, 2) as made:
        made.devices[0].reach(relay.port, KEEPALIVE)
        made.aggregator.memory_max = (100 << 20) + 12 * SIZE  # two updates in assembly, the sum, and closing it
        for daemon in made.daemons:
            daemon.start()
        for daemon in made.daemons:
            daemon.wait("link.up")
        made.publish(PLAN, cells=CELLS)
        until(lambda: trainings(made.devices[0]) or None, "a training", PATIENCE)
        relay.rate = RATE
        before = relay.moved["up"]
        until(lambda: relay.moved["up"] - before > SIZE // 2 or None, "half of an upload", PATIENCE)
        yield made
        made.end()


def trainings(device: Light) -> int:
    """How often it has trained."""
    return sum(line["event"] == "training.started" for line in device.daemon.read())


def ends_well(plot: Plot) -> None:
    """The round is released with both updates, each once; the one that was interrupted was made once."""
    plot.beds[0].released(1, PATIENCE)
    for device in plot.devices:
        device.daemon.wait("update.answered", outcome="accepted")
    audit = plot.beds[0].audit()
    assert (audit.rounds, audit.updates, audit.receipts) == ([1], 2, 2)
    assert trainings(plot.devices[0]) == 1


@pytest.mark.timeout(900)
def test_the_device(plot: Plot, relay: Relay) -> None:
    """The second part of the upload is what was missing, and nothing else."""
    device = plot.devices[0].daemon
    device.kill()
    first = relay.moved["up"]
    device.start()
    ends_well(plot)
    second = relay.moved["up"] - first
    note(f"killed after {first:,} bytes up, then {second:,} more of {SIZE:,}")
    assert second < SIZE - (first - 2 * UNDER_WAY)
    assert first + second < SIZE + UNDER_WAY + 100_000


@pytest.mark.timeout(900)
def test_the_aggregator(plot: Plot, relay: Relay) -> None:
    """It has to ask anew, because half an update lies in its memory only; the same head is all that it needs."""
    first = relay.moved["up"]
    plot.aggregator.kill()
    plot.aggregator.start()
    ends_well(plot)
    note(f"killed after {first:,} bytes up, then {relay.moved['up'] - first:,} more of {SIZE:,}")
    assert relay.moved["up"] < 2 * SIZE


@pytest.mark.timeout(900)
def test_the_broker(plot: Plot, relay: Relay) -> None:
    """What it had acknowledged and not handed on is asked for once more; the rest is not sent again."""
    first = relay.moved["up"]
    plot.fleet.broker.kill()
    plot.fleet.broker.start()
    ends_well(plot)
    note(f"killed after {first:,} bytes up, then {relay.moved['up'] - first:,} more of {SIZE:,}")
    assert relay.moved["up"] < SIZE + 64 * CHUNK_SIZE


@pytest.mark.timeout(900)
def test_the_line(plot: Plot, relay: Relay) -> None:
    """Half-open: nobody is told, so both ends find out by the keep-alive; alive again, the line carries the rest."""
    device = plot.devices[0].daemon
    since = len(device.read())
    relay.swallow()
    first, began = relay.moved["up"], time.monotonic()
    until(lambda: any(line["event"] == "link.down" for line in device.read()[since:]) or None, "a word", PATIENCE)
    seconds = time.monotonic() - began
    relay.swallow(False)
    ends_well(plot)
    note(f"noticed after {seconds:.1f} s at {first:,} bytes up, then {relay.moved['up'] - first:,} more of {SIZE:,}")
    assert seconds >= KEEPALIVE / 2
    assert relay.moved["up"] < SIZE + 64 * CHUNK_SIZE
