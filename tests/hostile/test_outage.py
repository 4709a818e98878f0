"""The broker is not there, at the start or later: aggregator and agent stay up, say so once and come back."""

import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest

from shared import wire
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import Daemon, Line
from tests.hostile.field import configuration


@pytest.fixture
def daemons(fleet: Fleet) -> Iterator[list[Daemon]]:
    """Aggregator and agent, started without a broker."""
    made = [
        Daemon("aggregator", fleet.folder / "aggregator" / "aggregator.toml"),
        Daemon("edge_agent", configuration(fleet)),
    ]
    with made[0], made[1]:
        for daemon in made:
            daemon.start()
        yield made
        assert all(daemon.pid for daemon in made)
        assert [daemon.stop() for daemon in made] == [0, 0]
    for daemon in made:
        told = [line["event"] for line in daemon.read()]
        assert (told.count("daemon.started"), told[-1]) == (1, "daemon.stopped")


def downs(daemon: Daemon) -> list[Line]:
    """What a daemon said about its lost link."""
    return [line for line in daemon.read() if line["event"] == "link.down"]


def test_no_broker(fleet: Fleet, daemons: list[Daemon]) -> None:
    """Both wait for a broker that comes late, come back to one that was killed, and a release goes through then."""
    for daemon in daemons:
        line = daemon.wait("link.down")
        assert line["level"] == "warning"
        assert f"localhost:{fleet.port}" in line["cause"]
    _hang_up_on(fleet.port, 3)
    broker = fleet.broker
    broker.start()
    for daemon in daemons:
        daemon.wait("link.up")
        # One line while nobody listened and one while somebody else did, however often it was tried.
        assert len(downs(daemon)) <= 3
    _flows(fleet, daemons, 1)

    since = [len(daemon.read()) for daemon in daemons]
    broker.kill()
    for daemon, start in zip(daemons, since, strict=True):
        daemon.wait("link.down", start)
    broker.start()
    for daemon, start in zip(daemons, since, strict=True):
        daemon.wait("link.up", start)
    _flows(fleet, daemons, 2)
    for daemon in daemons:
        causes = [line["cause"] for line in downs(daemon)]
        assert all(first != second for first, second in pairwise(causes)), causes


def _hang_up_on(port: int, count: int) -> None:
    """Stand where the broker should be, and end that many connections without a word."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(30)
        for _ in range(count):
            connection, _ = listener.accept()
            connection.close()


def _flows(fleet: Fleet, daemons: list[Daemon], version: int) -> None:
    keys = records.load_keys(fleet)
    with Peer(fleet, fleet.operator) as operator:
        message = records.release(keys, records.manifest(keys, "main", version))
        assert operator.publish("models/release", wire.pack(message), retain=True) < 128
        daemons[0].wait("task.adopted", version=version)
        daemons[1].wait("release.accepted", version=version)
