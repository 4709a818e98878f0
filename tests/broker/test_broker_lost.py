"""A broker that comes back with nothing, or with what it knew a while ago, in the middle of a round.

The aggregator reads back what is retained and mends it; devices go on, also those that meet the broker for the first
time, and every sum is exact.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import wire
from shared.messages import OfferState, Plan, Release, ReleaseMessage, RoundOffer, Signed
from tests.broker.broker import Fleet, Peer
from tests.broker.nursery import Nursery
from tests.broker.plot import TASK, Plot
from tests.hostile.daemon import until

DEVICES, FIRST = 9, 6
"""All devices, and those that take part from the beginning."""
PLAN = Plan(goal=6, min_updates=3, rounds=1_000_000, deadline=3600, start_jitter=1, over_select=100.0)
CELLS = 60_000
"""Values of the model: 240 KB, so that releases and updates come in chunks."""
PATIENCE = 240.0


@pytest.fixture
def plot(fleet: Fleet) -> Iterator[Plot]:
    """Six of nine devices at work."""
    fleet.fresh_broker()
    with Nursery() as nursery, Plot(fleet, DEVICES, nursery) as made:
        made.aggregator.start()
        made.aggregator.wait("link.up")
        made.publish(PLAN, cells=CELLS)
        for device in made.devices[:FIRST]:
            device.daemon.start()
        yield made


def retained(fleet: Fleet) -> tuple[Release, RoundOffer] | None:
    """The release and the offer that a device finds that comes now; None while one of them is not there."""
    with Peer(fleet, fleet.device("watcher")) as peer:
        peer.subscribe(f"models/{TASK}/+")
        found = dict(peer.fence())
    try:
        message = wire.unpack(found[f"models/{TASK}/release"], ReleaseMessage)
        offer = wire.unpack(found[f"models/{TASK}/round"], Signed)
    except KeyError:
        return None
    return wire.unpack(message.release.payload, Release), wire.unpack(offer.payload, RoundOffer)


def in_the_middle(plot: Plot) -> int:
    """Half of the first devices are gone, the other half has contributed: returns the release it is about."""
    for device in plot.devices[: FIRST // 2]:
        device.daemon.kill()
    query = "SELECT COUNT(*) FROM contributions WHERE origin_round = (SELECT MAX(round) FROM rounds)"

    def stuck() -> int | None:
        ((count,),) = plot.query(query)
        return plot.beds[0].look() if count == FIRST // 2 else None

    return until(stuck, "half of the updates", PATIENCE)


def goes_on(plot: Plot, release: int) -> None:
    """The broker has the newest again, though nobody new could end a round; then those that were away make it whole."""

    def mended() -> bool | None:
        found = retained(plot.fleet)
        return (found is not None and (found[0].number, found[1].round) == (release, release + 1)) or None

    until(mended, f"release {release} and its round on the broker", PATIENCE)
    found = retained(plot.fleet)
    assert found is not None and found[1].state is OfferState.OPEN
    assert plot.beds[0].look() == release
    for device in plot.devices[: FIRST // 2] + plot.devices[FIRST:]:
        device.daemon.start()
    plot.beds[0].released(release + 3, PATIENCE)
    for device in plot.devices:
        until(lambda device=device: device.accepted() or None, f"a receipt for {device.name}", PATIENCE)  # type: ignore[misc]
    plot.end()
    audit = plot.beds[0].audit()
    assert audit.seen > len(audit.rounds) // 2


def saved(fleet: Fleet) -> Path:
    """A copy of what the broker has on its disk, once it has saved what it knows now."""
    data = fleet.folder / "broker" / "data" / "mosquitto.db"
    before = data.stat().st_mtime_ns if data.exists() else 0
    assert fleet.broker.pid is not None
    os.kill(fleet.broker.pid, signal.SIGUSR1)
    until(lambda: (data.exists() and data.stat().st_mtime_ns != before) or None, "a saved state")
    return Path(shutil.copy(data, fleet.folder / "broker" / "older.db"))


@pytest.mark.timeout(900)
def test_empty(plot: Plot) -> None:
    """Everything that was retained is gone, and the aggregator's session too."""
    plot.beds[0].released(2, PATIENCE)
    release = in_the_middle(plot)
    plot.fleet.fresh_broker()
    goes_on(plot, release)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("restarted", [False, True], ids=["aggregator_stays", "aggregator_restarts"])
def test_rolled_back(plot: Plot, restarted: bool) -> None:
    """Retained is what was newest some releases ago, and the session says that nothing happened."""
    plot.beds[0].released(1, PATIENCE)
    older = saved(plot.fleet)
    then = retained(plot.fleet)
    assert then is not None
    plot.beds[0].released(then[0].number + 2, PATIENCE)
    release = in_the_middle(plot)
    plot.fleet.broker.kill()
    if restarted:
        plot.aggregator.kill()
    shutil.move(older, plot.fleet.folder / "broker" / "data" / "mosquitto.db")
    plot.fleet.broker.start()
    if restarted:
        plot.aggregator.start()
    goes_on(plot, release)


@pytest.mark.timeout(900)
def test_empty_and_the_aggregator_killed(plot: Plot) -> None:
    """Both at once: what the disk holds is enough."""
    plot.beds[0].released(1, PATIENCE)
    release = in_the_middle(plot)
    plot.aggregator.kill()
    plot.fleet.fresh_broker()
    plot.aggregator.start()
    goes_on(plot, release)
