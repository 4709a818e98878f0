"""A fleet and a real mosquitto for tests, and a bare MQTT 5 client whose every packet a test can see.

The client has no thread and no clock: because mosquitto handles one packet after the other, `fence` tells for certain
what was delivered and what never will be.
"""

import socket
import ssl
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from aggregator import ca
from aggregator.broker import Broker, free_port

HOST = "localhost"
NOT_AUTHORIZED = 135


class LetIn(AssertionError):
    """A client that should have been refused was not."""


class Refused(Exception):
    """The broker ended the connection: no TLS, no CONNACK, or one that says no."""


@dataclass(frozen=True)
class Identity:
    """Where a client's certificate and key lie."""

    certificate: Path
    key: Path


@dataclass
class Fleet:
    """A fleet's folder made by the product, its broker, and bundles of devices made when first asked for."""

    folder: Path
    bundles: Path
    broker: Broker
    _made: dict[str, Path] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """The broker's, the same as long as the fleet lives."""
        return self.broker.port

    @property
    def authority(self) -> Path:
        """The CA's certificate."""
        return self.folder / "ca" / "ca.crt"

    @property
    def operator(self) -> Identity:
        """Who publishes models."""
        return _identity(self.folder / "operator", "operator")

    @property
    def aggregator(self) -> Identity:
        """Who owns shard 0."""
        return _identity(self.folder / "aggregator", "agg-0")

    def bundle(self, device: str) -> Path:
        """The folder that `device add` makes."""
        if device not in self._made:
            self._made[device] = ca.add_device(
                self.folder, device, self.bundles / device, now=time.time(), passphrase=None
            )
        return self._made[device]

    def device(self, device: str) -> Identity:
        """A device's certificate and key."""
        return _identity(self.bundle(device), "device")

    def fresh_broker(self) -> None:
        """Start the broker, or start it again, without anything retained or queued."""
        self.broker.kill()
        for file in (self.folder / "broker" / "data").iterdir():
            file.unlink()
        self.broker.start()


def make_fleet(root: Path, days_old: int = 0) -> Fleet:
    """A fleet of the product's own making, with a broker on a free loopback port that is not started yet."""
    port, born = free_port(), time.time() - days_old * 86_400
    ca.init_fleet(root / "fleet", "test-fleet", [HOST], now=born, passphrase=None, port=port, bind="127.0.0.1")
    return Fleet(root / "fleet", root / "bundles", Broker(root / "fleet" / "broker", port))


def _identity(folder: Path, stem: str) -> Identity:
    return Identity(folder / f"{stem}.crt", folder / f"{stem}.key")


def refusal(fleet: Fleet, identity: Identity | None) -> str:
    """The TLS alert with which the broker ends the handshake of a client that says nothing; raises LetIn."""
    # Nothing is sent after the handshake: an answer to that would be a reset, which may overtake the alert.
    plain = socket.create_connection(("127.0.0.1", fleet.port), timeout=1)
    try:
        with _context(fleet, identity, ssl.TLSVersion.TLSv1_3).wrap_socket(plain, server_hostname=HOST) as secure:
            secure.recv(1)
    except TimeoutError:
        raise LetIn("the broker waits for a CONNECT") from None
    except ssl.SSLError as error:
        return str(error)
    return "closed without an alert"


def _context(fleet: Fleet, identity: Identity | None, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(fleet.authority))
    context.minimum_version = context.maximum_version = version
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    return context


@dataclass(frozen=True)
class Will:
    """What the broker publishes when a client is gone."""

    topic: str
    payload: bytes


class Peer:
    """One connection. Closing it without `bye` is what a crash looks like to the broker."""

    def __init__(
        self,
        fleet: Fleet,
        identity: Identity | None,
        client_id: str = "",
        *,
        clean: bool = True,
        will: Will | None = None,
        tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        self.messages: list[tuple[str, bytes]] = []
        """What was delivered so far and not taken by `fence`."""
        self._mid = 0
        try:
            plain = socket.create_connection(("127.0.0.1", fleet.port), timeout=10)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = _context(fleet, identity, tls).wrap_socket(plain, server_hostname=HOST)
            self._send(0x10, _connect(client_id, clean, will))
            flags_and_code = self._until(0x20)
        except (OSError, EOFError) as error:
            raise Refused(str(error)) from None
        if flags_and_code[1] != 0:
            raise Refused(f"CONNACK {flags_and_code[1]}")
        self.session_present = bool(flags_and_code[0] & 1)
        properties = _properties(flags_and_code[2:])
        self.name = properties.get(0x12, client_id)
        """The client id that the broker gave, whatever was asked for."""
        self.packet_max = properties.get(0x27)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> int:
        """Send with QoS 1; the reason code of the acknowledgement, below 128 when taken."""
        self._mid += 1
        self._send(0x32 | retain, _text(topic) + struct.pack(">H", self._mid) + b"\0" + payload)
        answer = self._until(0x40)
        return answer[2] if len(answer) > 2 else 0

    def subscribe(self, filter_: str, qos: int = 1) -> int:
        """Ask for a filter; the reason code of the acknowledgement. QoS 0 brings more than 20 messages at once."""
        self._mid += 1
        self._send(0x82, struct.pack(">H", self._mid) + b"\0" + _text(filter_) + bytes([qos]))
        return self._until(0x90)[-1]

    def fence(self) -> list[tuple[str, bytes]]:
        """All that was delivered until now: what the broker acknowledged before this call is in it or never comes."""
        self._send(0xC0, b"")
        self._until(0xD0)
        taken, self.messages = self.messages, []
        return taken

    def is_up(self) -> bool:
        """Whether the broker still answers on this connection."""
        try:
            self._send(0xC0, b"")
            self._until(0xD0)
        except (OSError, EOFError):
            return False
        return True

    def bye(self) -> None:
        """Leave in order: no will."""
        self._send(0xE0, b"")
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _until(self, kind: int) -> bytes:
        while True:
            first, body = self._packet()
            if first & 0xF0 == kind:
                return body
            if first & 0xF0 == 0x30:
                self._take(first, body)
            elif first & 0xF0 == 0xE0:
                raise EOFError(f"DISCONNECT {body[0] if body else 0}")

    def _take(self, first: int, body: bytes) -> None:
        (length,) = struct.unpack_from(">H", body)
        topic, rest = body[2 : 2 + length].decode(), body[2 + length :]
        if first & 0x06:
            self._send(0x40, rest[:2])
            rest = rest[2:]
        size, used = _varint(rest)
        self.messages.append((topic, rest[used + size :]))

    def _packet(self) -> tuple[int, bytes]:
        first = self._read(1)[0]
        head = self._read(1)
        while head[-1] & 0x80:
            head += self._read(1)
        return first, self._read(_varint(head)[0])

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise EOFError("the broker closed the connection")
            data += piece
        return bytes(data)

    def _send(self, first: int, body: bytes) -> None:
        size, length = len(body), bytearray()
        while size > 127:
            length.append(size & 0x7F | 0x80)
            size >>= 7
        self._socket.sendall(bytes([first]) + bytes([*length, size]) + body)


def _connect(client_id: str, clean: bool, will: Will | None) -> bytes:
    flags = (0x02 if clean else 0) | (0x04 if will else 0)
    # Session expiry of an hour, so that a session that is not clean is durable.
    properties = b"" if clean else b"\x11" + struct.pack(">I", 3600)
    body = _text("MQTT") + bytes([5, flags]) + struct.pack(">H", 60) + bytes([len(properties)]) + properties
    body += _text(client_id)
    if will is not None:
        body += b"\0" + _text(will.topic) + struct.pack(">H", len(will.payload)) + will.payload
    return body


def _properties(data: bytes) -> dict[int, object]:
    """Those of a CONNACK that tests look at: 0x12 the assigned client id, 0x27 the largest packet."""
    size, used = _varint(data)
    rest, found = data[used : used + size], dict[int, object]()
    while rest:
        kind, rest = rest[0], rest[1:]
        if kind == 0x12:
            (length,) = struct.unpack_from(">H", rest)
            found[kind], rest = rest[2 : 2 + length].decode(), rest[2 + length :]
        elif kind in (0x11, 0x27):
            (found[kind],), rest = struct.unpack_from(">I", rest), rest[4:]
        elif kind in (0x21, 0x22, 0x13):
            (found[kind],), rest = struct.unpack_from(">H", rest), rest[2:]
        else:
            found[kind], rest = rest[0], rest[1:]
    return found


def _varint(data: bytes) -> tuple[int, int]:
    value = used = 0
    for used, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * used)
        if not byte & 0x80:
            break
    return value, used + 1


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data
