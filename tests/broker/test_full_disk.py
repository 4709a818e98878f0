"""`aggregator run` on a disk that is really full: nothing is acknowledged or lost, and it goes on by itself."""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.broker import Broker
from shared.messages import Outcome
from tests.broker.broker import Fleet, Peer
from tests.broker.test_aggregator import NAMES, UNIFORM, Yard, cells, plan, post
from tests.hostile.daemon import until
from tests.unit.full_disk import filled, small_disk

SIZE = 8 << 20


@pytest.fixture
def cramped(fleet: Fleet, broker: Broker, tmp_path: Path) -> Iterator[Yard]:
    """An aggregator without a past whose state is on a small disk of its own, with eight devices online."""
    state = fleet.folder / "aggregator" / "state"
    shutil.rmtree(state, ignore_errors=True)
    fleet.fresh_broker()
    (fleet.folder / "aggregator" / "aggregator.log").write_bytes(b"")
    with small_disk(state, SIZE):
        made = Yard(fleet)
        with made.daemon:
            made.start()
            made.everybody()
            yield made
            assert made.daemon.stop() == 0
            made.daemon.read()


def test_a_full_disk(cramped: Yard) -> None:
    """It says so once and waits; what it could not keep is not acknowledged; with room again the round goes on."""
    cramped.task("main", plan=plan(8), algorithm=UNIFORM)
    cramped.give(0)
    offer = cramped.offer("main")
    mine = cramped.unit(1, offer)
    since = len(cramped.daemon.read())
    with Peer(cramped.fleet, cramped.fleet.device(NAMES[1])) as peer:
        peer.subscribe(f"fl/dev/{NAMES[1]}/cmd/receipt")
        with filled(cramped.state):
            peer.publish(f"fl/up/0/{NAMES[1]}/{mine.name}/head", mine.payload)
            post(cramped, [cramped.unit(each, offer) for each in range(2, 7)])
            told = cramped.daemon.wait("storage.failed", since)
            assert told["level"] == "error" and str(cramped.state) in told["path"]
            time.sleep(6.0)  # two tries and more
            assert [line["event"] for line in cramped.daemon.read()[since:]] == ["storage.failed"]
            assert peer.fence() == []
        cramped.daemon.wait("storage.recovered", since)
        ((_, data),) = until(lambda: peer.fence() or None, "a receipt")
        assert cramped.opened(data).outcome is Outcome.ACCEPTED
    cramped.give(7)
    cramped.released(1)
    assert cramped.model() == cells(*range(8), value=1 / 8)
    assert cramped.rows("SELECT COUNT(*), COUNT(DISTINCT device) FROM contributions") == [(8, 8)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ended_while_it_waits_for_the_disk(cramped: Yard, how: signal.Signals) -> None:
    """In order at once, or hard: what it had not kept comes again, and counts once."""
    cramped.task("main", plan=plan(4), algorithm=UNIFORM)
    offer = cramped.offer("main")
    since = len(cramped.daemon.read())
    with filled(cramped.state):
        post(cramped, [cramped.unit(each, offer) for each in range(4)])
        cramped.daemon.wait("storage.failed", since)
        began = time.monotonic()
        status = cramped.daemon.stop(how)
        assert time.monotonic() - began < 4
        assert status == (0 if how is signal.SIGTERM else -how)
    cramped.start()
    cramped.everybody()
    cramped.released(1)
    assert cramped.model() == cells(*range(4), value=1 / 4)
    assert not list((cramped.state / "quarantine").iterdir())
