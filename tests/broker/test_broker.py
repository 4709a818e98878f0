"""aggregator.broker: a mosquitto of our own, started, stopped and killed; and what its limits let through."""

import os
import signal
import socket
from pathlib import Path

import pytest

from aggregator.broker import Broker, free_port
from shared.errors import LinkError, LocalProtocolError
from tests.broker.broker import Fleet, Peer, make_fleet


@pytest.fixture
def own(fleet: Fleet, tmp_path: Path) -> Fleet:
    """A fleet of the test's own, whose broker it may break; `fleet` skips where there is no mosquitto."""
    return make_fleet(tmp_path)


def test_it_comes_back(own: Fleet) -> None:
    """Stopped or killed, it starts again on the same port; a clean stop keeps what was retained."""
    with own.broker:
        with Peer(own, own.aggregator) as aggregator:
            assert aggregator.publish("models/digits/release", b"kept", retain=True) < 128
        own.broker.stop()
        assert own.broker.pid is None
        own.broker.start()
        assert own.broker.pid is not None
        os.kill(own.broker.pid, signal.SIGKILL)
        own.broker.kill()
        assert own.broker.pid is None
        own.broker.start()
        with Peer(own, own.device("dev-1")) as device:
            device.subscribe("models/+/release")
            assert device.fence() == [("models/digits/release", b"kept")]
    assert own.broker.pid is None
    own.broker.stop()


def test_it_runs_once(own: Fleet) -> None:
    """A second start is a mistake of the caller and leaves the first one running."""
    with own.broker:
        pid = own.broker.pid
        with pytest.raises(LocalProtocolError):
            own.broker.start()
        assert own.broker.pid == pid


def test_a_port_that_is_taken(own: Fleet) -> None:
    """Another listener on the port is not taken for our broker; the error shows mosquitto's own words."""
    with socket.create_server(("127.0.0.1", own.port)), pytest.raises(LinkError, match="Address already in use"):
        own.broker.start()
    assert own.broker.pid is None


def test_a_configuration_that_mosquitto_refuses(own: Fleet) -> None:
    """A damaged configuration ends the start with mosquitto's words for it."""
    with (own.folder / "broker" / "mosquitto.conf").open("a") as file:
        file.write("surprise true\n")
    with pytest.raises(LinkError, match="surprise"):
        own.broker.start()


def test_no_mosquitto(own: Fleet) -> None:
    """Where the program is missing the error says how to get it."""
    with pytest.raises(LinkError, match="apt-get install mosquitto"):
        Broker(own.folder / "broker", own.port, program="no-such-mosquitto").start()


def test_a_free_port() -> None:
    """A free port can be listened on, and is none that systems give to outgoing connections."""
    port = free_port()
    assert 20_000 <= port < 32_000
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.usefixtures("broker")
def test_a_large_message(fleet: Fleet) -> None:
    """Five megabytes arrive whole (a limit of mosquitto's own choosing loses them)."""
    body = os.urandom(5 << 20)
    with Peer(fleet, fleet.device("dev-1")) as device, Peer(fleet, fleet.aggregator) as aggregator:
        device.subscribe("models/+/release")
        device.fence()
        assert aggregator.publish("models/digits/release", body) < 128
        assert device.fence() == [("models/digits/release", body)]


@pytest.mark.usefixtures("broker")
def test_too_large_a_message(fleet: Fleet) -> None:
    """A packet beyond the limit ends its sender's connection, and nobody else's."""
    with Peer(fleet, fleet.device("dev-1")) as device, Peer(fleet, fleet.device("dev-2")) as other:
        assert isinstance(device.packet_max, int)
        with pytest.raises((EOFError, OSError)):
            device.publish("fl/dev/dev-1/status", bytes(device.packet_max))
        assert other.is_up()
