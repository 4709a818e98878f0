"""The site that a module of these tests sends its bad input to."""

from collections.abc import Iterator

import pytest

from aggregator.broker import Broker
from tests.broker.broker import Fleet
from tests.hostile.site import Site


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
