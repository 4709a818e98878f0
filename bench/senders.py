"""All devices of one measurement in one process and one thread: TLS sockets and as much of MQTT 5 as they need.

A thousand connections of the product's own link would be a thousand threads, whose turns would be measured with it.
Each device sends its update when told, hands out the chunks that it is asked for, and is done with its receipt.
"""

import json
import selectors
import socket
import ssl
import struct
import sys
import time
from collections import deque
from pathlib import Path

from bench.device import TOPICS, Device, Made, some_delta
from shared import chunks, wire
from shared.messages import Missing, Outcome, Receipt, RoundOffer, Signed
from shared.topics import TASK_ROUNDS

WINDOW = 20
"""Unanswered messages of a connection that our mosquitto allows."""
AT_ONCE = 64
"""Devices that send at a time: as many updates as an aggregator collects from chunks at a time."""
CONNECT, PUBLISH, PUBACK, SUBSCRIBE = 0x10, 0x32, 0x40, 0x82


class Connection:
    """One device's."""

    def __init__(self, port: int, bundle: Path) -> None:
        self.device = Device(bundle)
        context = ssl.create_default_context(cafile=str(bundle / "ca.crt"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(bundle / "device.crt", bundle / "device.key")
        plain = socket.create_connection(("127.0.0.1", port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        self.made: Made | None = None
        self.outcome = ""
        self._out: deque[memoryview] = deque()
        self._later: deque[bytes] = deque()
        self._flying, self._mid = 0, 0
        self._in = bytearray()
        self._send(CONNECT, _text(b"MQTT"), b"\x05\x02", struct.pack(">H", 3600), b"\0", _text(bundle.name.encode()))
        self.socket.setblocking(False)

    @property
    def wants(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    def subscribe(self, *filters: str) -> None:
        """With QoS 1."""
        self._mid += 1
        self._send(
            SUBSCRIBE, struct.pack(">H", self._mid), b"\0", *(_text(each.encode()) + b"\x01" for each in filters)
        )

    def publish(self, topic: str, payload: bytes | memoryview, *, retain: bool = False) -> None:
        """With QoS 1, when the window has room."""
        self._mid = self._mid % 65_535 + 1
        parts = (_text(topic.encode()), struct.pack(">H", self._mid), b"\0", payload)
        self._later.append(_packet(PUBLISH | retain, *parts))
        self._fill()

    def send(self) -> None:
        """The update, or its head alone."""
        assert self.made is not None
        self.publish(self.made.topic, self.made.message)

    def write(self) -> None:
        """As much as the socket takes."""
        try:
            while self._out:
                sent = self.socket.send(self._out[0])
                left = self._out[0][sent:]
                if left:
                    self._out[0] = left
                else:
                    self._out.popleft()
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass

    def read(self) -> list[tuple[str, bytes]]:
        """The messages that came."""
        try:
            while True:
                data = self.socket.recv(65_536)
                if not data:
                    raise ConnectionError(f"the broker has left {self.device.name}")
                self._in += data
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        return [message for packet in self._packets() if (message := self._take(*packet)) is not None]

    def answer(self, topic: str, payload: bytes) -> bool:
        """Do what a message asks for; whether it was the receipt."""
        assert self.made is not None
        if topic.endswith("/missing"):
            for index in wire.unpack(payload, Missing).chunks:
                start, end = chunks.span(len(self.made.body), chunks.CHUNK_SIZE, index)
                self.publish(TOPICS.upload_chunk(0, self.device.name, self.made.name, index), self.made.body[start:end])
            return False
        if topic.endswith("/receipt"):
            self.outcome = wire.unpack(wire.unpack(payload, Signed).payload, Receipt).outcome.value
            return True
        return False

    def _packets(self) -> list[tuple[int, bytes]]:
        found = []
        while len(self._in) >= 2:
            size, shift, position = 0, 0, 1
            while position < len(self._in):
                digit = self._in[position]
                size, shift, position = size | (digit & 127) << shift, shift + 7, position + 1
                if digit < 128:
                    break
            else:
                break
            if len(self._in) < position + size:
                break
            found.append((self._in[0], bytes(self._in[position : position + size])))
            del self._in[: position + size]
        return found

    def _take(self, command: int, rest: bytes) -> tuple[str, bytes] | None:
        kind = command & 0xF0
        if kind == PUBACK:
            self._flying -= 1
            self._fill()
        elif kind == 0x20 and rest[1]:
            raise ConnectionError(f"the broker refuses {self.device.name}: {rest[1]}")
        elif kind == 0xE0:
            raise ConnectionError(f"the broker ends the connection of {self.device.name}: {rest.hex()}")
        elif kind == 0x30:
            end = 2 + int.from_bytes(rest[:2], "big")
            after = end
            if command & 6:
                self._send(PUBACK, rest[end : end + 2])
                after += 2
            return rest[2:end].decode(), rest[after + 1 + rest[after] :]
        return None

    def _fill(self) -> None:
        while self._later and self._flying < WINDOW:
            self._flying += 1
            self._out.append(memoryview(self._later.popleft()))

    def _send(self, command: int, *parts: bytes) -> None:
        self._out.append(memoryview(_packet(command, *parts)))


def _text(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _packet(command: int, *parts: bytes | memoryview) -> bytes:
    left, size = sum(map(len, parts)), bytearray()
    while True:
        left, digit = left >> 7, left & 127
        size.append(digit | (128 if left else 0))
        if not left:
            return b"".join([bytes([command]), size, *parts])


def _offer(messages: list[tuple[str, bytes]]) -> RoundOffer | None:
    rounds = [payload for topic, payload in messages if topic.startswith("models/")]
    return wire.unpack(wire.unpack(rounds[-1], Signed).payload, RoundOffer) if rounds else None


def main() -> None:
    """Port, values of an update, bytes of a chunk and bundles on the command line; a line of JSON at the end."""
    port, parameters, chunk = map(int, sys.argv[1:4])
    poll = selectors.DefaultSelector()
    everyone = []
    for bundle in sys.argv[4:]:
        connection = Connection(port, Path(bundle))
        name = connection.device.name
        connection.subscribe(*(TOPICS.command(name, kind) for kind in ("missing", "receipt")))
        connection.publish(TOPICS.device_status(name), connection.device.status(), retain=True)
        poll.register(connection.socket, connection.wants, connection)
        everyone.append(connection)
    everyone[0].subscribe(TASK_ROUNDS)

    def turn() -> list[tuple[Connection, list[tuple[str, bytes]]]]:
        came = []
        for key, what in poll.select(60.0) or _silence():
            connection: Connection = key.data
            if what & selectors.EVENT_READ:
                came.append((connection, connection.read()))
            connection.write()
            poll.modify(connection.socket, connection.wants, connection)
        return came

    print("ready", flush=True)
    offer: RoundOffer | None = None
    while offer is None:
        offer = next((found for _, messages in turn() if (found := _offer(messages)) is not None), None)
    delta = some_delta(parameters)
    for connection in everyone:
        connection.made = connection.device.update(offer, delta, chunk)
    print("prepared", flush=True)
    sys.stdin.readline()
    began, waiting, answered = time.monotonic(), deque(everyone), 0

    def start() -> None:
        connection = waiting.popleft()
        connection.send()
        connection.write()
        poll.modify(connection.socket, connection.wants, connection)

    for _ in range(min(AT_ONCE, len(waiting))):
        start()
    while answered < len(everyone):
        for connection, messages in turn():
            for topic, payload in messages:
                if not topic.startswith("models/") and connection.answer(topic, payload):
                    answered += 1
                    if waiting:
                        start()
            connection.write()
            poll.modify(connection.socket, connection.wants, connection)
    seconds = time.monotonic() - began
    refused = sum(connection.outcome != Outcome.ACCEPTED.value for connection in everyone)
    print(json.dumps({"seconds": seconds, "refused": refused}), flush=True)
    sys.stdin.read()


def _silence() -> list[tuple[selectors.SelectorKey, int]]:
    raise TimeoutError("nothing came for a minute")


if __name__ == "__main__":
    main()
