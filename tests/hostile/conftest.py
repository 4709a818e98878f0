"""Fixtures of the tests that send bad input to real daemons: a fleet and a broker for each module."""

import shutil
from collections.abc import Iterator

import pytest

from aggregator.broker import Broker
from tests.broker.broker import Fleet, make_fleet
from tests.hostile.site import Site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the broker."""
    for item in items:
        if "tests/hostile/" in item.path.as_posix():
            item.add_marker(pytest.mark.broker)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet's folder; its broker does not run yet."""
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("needs mosquitto: sudo apt-get install mosquitto")
    made = make_fleet(tmp_path_factory.mktemp("site"))
    yield made
    made.broker.kill()


@pytest.fixture(scope="module")
def broker(fleet: Fleet) -> Iterator[Broker]:
    """The fleet's broker, running and empty at first."""
    fleet.fresh_broker()
    yield fleet.broker
    fleet.broker.stop()


@pytest.fixture(scope="module")
def site(fleet: Fleet, broker: Broker) -> Iterator[Site]:
    """A running aggregator; it must still be there at the end, and leave in order."""
    made = Site(fleet)
    with made.daemon:
        made.begin()
        yield made
        made.audit()
        assert made.daemon.stop() == 0
        made.daemon.read()
