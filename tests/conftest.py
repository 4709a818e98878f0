"""What the tests of several folders share: deterministic property tests, one torch thread, a fleet with its broker."""

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings

from aggregator.broker import Broker
from tests.broker.broker import Fleet, make_fleet

# Two cores and many processes: threads inside torch and numpy only take turns. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a busy machine is not a bug. In CI the examples are the same every time.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of these folders needs the broker."""
    for item in items:
        if item.path.parent.name in ("broker", "hostile"):
            item.add_marker(pytest.mark.broker)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A module's own fleet; its broker does not run yet, and does not outlive the module."""
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("needs mosquitto: sudo apt-get install mosquitto")
    made = make_fleet(tmp_path_factory.mktemp("site"))
    yield made
    made.broker.kill()


@pytest.fixture(scope="module")
def broker(fleet: Fleet) -> Iterator[Broker]:
    """The fleet's broker, running and empty at first; a test that stops or kills it starts it again."""
    fleet.fresh_broker()
    yield fleet.broker
    fleet.broker.stop()
