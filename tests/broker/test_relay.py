"""The relay is as bad as it was told to be, and no worse: other proofs lean on it."""

import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.broker.relay import Relay
from tests.hostile.daemon import until


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says back what it hears."""

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65_536):
                    connection.sendall(data)
            except OSError:
                return

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def call(relay: Relay) -> socket.socket:
    """A connection through it."""
    return socket.create_connection(("127.0.0.1", relay.port), timeout=30)


def heard(connection: socket.socket, count: int) -> bytes:
    """So many bytes of an answer."""
    data = bytearray()
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return bytes(data)


def test_hands_on_and_counts(echo: int) -> None:
    """Every byte comes, in order, and is counted once in its direction; connections do not mix."""
    with Relay(echo) as relay, call(relay) as first, call(relay) as second:
        for number, connection in enumerate((first, second)):
            said = bytes([number]) * 100_000
            threading.Thread(target=connection.sendall, args=(said,)).start()
            assert heard(connection, len(said)) == said
        assert relay.moved == {"up": 200_000, "down": 200_000}
        assert (relay.connections, relay.cuts) == (2, 0)


def test_hands_an_end_on(echo: int) -> None:
    """A client that leaves is gone for the server, and the reverse."""
    with Relay(echo) as relay, call(relay) as connection:
        connection.sendall(b"x")
        assert heard(connection, 1) == b"x"
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_slow_line(echo: int) -> None:
    """A rate holds for all connections together: a megabyte at 2 MB/s takes half a second each way."""
    with Relay(echo, rate=2e6) as relay, call(relay) as first, call(relay) as second:
        began = time.monotonic()
        for connection in (first, second):
            threading.Thread(target=connection.sendall, args=(bytes(500_000),)).start()
        for connection in (first, second):
            heard(connection, 500_000)
        assert time.monotonic() - began > 0.48


def test_a_long_line(echo: int) -> None:
    """A delay holds each way, and does not make the line narrow."""
    with Relay(echo, delay=0.1) as relay, call(relay) as connection:
        began = time.monotonic()
        for _ in range(3):
            connection.sendall(b"x")
        heard(connection, 3)
        assert 0.2 <= time.monotonic() - began < 2.0


def test_cuts(echo: int) -> None:
    """A connection is reset after its time, at both ends; the next one works as long."""
    with Relay(echo, cut=0.2) as relay:
        for number in range(2):
            began = time.monotonic()
            with call(relay) as connection:
                connection.sendall(b"x")
                assert heard(connection, 1) == b"x"
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            assert time.monotonic() - began >= 0.2
            assert relay.cuts == number + 1


def test_cut_now(echo: int) -> None:
    """All that is open is reset, and what comes later is not."""
    with Relay(echo) as relay:
        with call(relay) as connection:
            connection.sendall(b"x")
            heard(connection, 1)
            relay.cut_all()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with call(relay) as connection:
            connection.sendall(b"y")
            assert heard(connection, 1) == b"y"


def test_half_open(echo: int) -> None:
    """A dead line accepts, says nothing and ends nothing; alive again it goes on where it was."""
    with Relay(echo) as relay, call(relay) as old:
        old.sendall(b"x")
        heard(old, 1)
        relay.swallow()
        with call(relay) as new:
            for connection in (old, new):
                connection.settimeout(0.2)
                connection.sendall(b"y")
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            relay.swallow(False)
            for connection in (old, new):
                connection.settimeout(30)
                assert heard(connection, 1) == b"y"


def test_nobody_there(echo: int) -> None:
    """A server that does not listen is a connection that ends."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Relay(port) as relay, call(relay) as connection:
        assert connection.recv(1) == b""


def test_ends_with_everything(echo: int) -> None:
    """Closing resets what is open and frees the port."""
    relay = Relay(echo)
    with call(relay) as connection:
        connection.sendall(b"x")
        heard(connection, 1)
        relay.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        socket.create_server(("127.0.0.1", relay.port)).close()
    assert [thread for thread in threading.enumerate() if thread.name == "relay"] == []


def test_counts_rise(echo: int) -> None:
    """The count is of the past: it never falls, and what a cut has lost stays in it."""
    with Relay(echo) as relay:
        seen = [relay.moved["up"]]
        for _ in range(3):
            with call(relay) as connection:
                connection.sendall(b"x")
                heard(connection, 1)
                relay.cut_all()
            seen.append(relay.moved["up"])
        assert all(later == earlier + 1 for earlier, later in pairwise(seen))
        until(lambda: relay.cuts == 3 or None, "three cuts")
