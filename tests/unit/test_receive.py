"""shared.receive against paho's own client, on the same bytes: what arrives, what is answered, what ends a connection.

The client has no thread and no network here: its socket is a list of pieces that the test fills.
"""

import hashlib
import inspect
import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion

from shared.receive import LARGE, Receiver

LIMIT = 300_000


class Wire:
    """A socket out of pieces, as TLS gives them: a read never gets more than what is left of one."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = [bytearray(piece) for piece in pieces if piece]
        self.asked: list[int] = []
        self.sent: list[bytes] = []
        self.closed = False

    def recv(self, size: int) -> bytes:
        """At most `size` bytes."""
        self.asked.append(size)
        if not self.pieces:
            raise BlockingIOError
        taken = bytes(self.pieces[0][:size])
        del self.pieces[0][:size]
        if not self.pieces[0]:
            del self.pieces[0]
        return taken

    def recv_into(self, buffer: memoryview) -> int:
        """The same, into memory that is there."""
        taken = self.recv(len(buffer))
        buffer[: len(taken)] = taken
        return len(taken)

    def send(self, data: bytes) -> int:
        """Takes all."""
        self.sent.append(bytes(data))
        return len(data)

    def fileno(self) -> int:
        """None that a system would know."""
        return -1

    def close(self) -> None:
        """For good."""
        self.closed = True


@dataclass
class Seen:
    """All that one client did with the bytes it was given."""

    messages: list[tuple[str, bytes, int, bool, bool, int]] = field(default_factory=list)
    answered: bytes = b""
    ended: bool = False
    complaints: list[str] = field(default_factory=list)
    payloads: list[bytes | bytearray] = field(default_factory=list)


def receive(kind: type[paho.Client], wire: Wire, *, acks: bool = False) -> Seen:
    """Let a client read until nothing is left or it gives up."""
    seen = Seen()
    client = kind(
        CallbackAPIVersion.VERSION2, client_id="one", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=not acks
    )
    if isinstance(client, Receiver):
        client.packet_limit = LIMIT

    def took(_c: object, _u: object, got: paho.MQTTMessage) -> None:
        seen.payloads.append(got.payload)
        seen.messages.append((got.topic, bytes(got.payload), got.qos, got.retain, got.dup, got.mid))

    def said(_c: object, _u: object, level: int, text: str) -> None:
        if level == LogLevel.MQTT_LOG_ERR:
            seen.complaints.append(text)

    client.on_message, client.on_log = took, said
    client._sock = wire  # type: ignore[assignment]  # as much of a socket as is used
    while wire.pieces and not seen.ended:
        seen.ended = client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS
    while not wire.closed and client.want_write():
        client.loop_write()
    seen.answered = b"".join(wire.sent)
    return seen


def packet(command: int, rest: bytes) -> bytes:
    """A control packet with its length."""
    size, left = bytearray(), len(rest)
    while True:
        left, digit = left >> 7, left & 127
        size.append(digit | (128 if left else 0))
        if not left:
            return bytes([command]) + bytes(size) + rest


def publish(payload: bytes, qos: int = 1, flags: int = 0, topic: bytes = b"fl/up/0/d/x/1", props: bytes = b"") -> bytes:
    """A PUBLISH with id 7."""
    mid = b"\0\7" if qos else b""
    head = struct.pack(">H", len(topic)) + topic + mid + bytes([len(props)]) + props
    return packet(0x30 | qos << 1 | flags, head + payload)


# By name, so that a failure is shown in less than a megabyte.
PARTS = {
    "pingresp": packet(0xD0, b""),
    "puback": packet(0x40, b"\0\1"),
    "pubrel": packet(0x62, b"\0\7"),
    "suback": packet(0x90, b"\0\3\0\1"),
    "topic beyond the end": packet(0x32, b"\xff\xff" + bytes(LARGE)),
    "length of properties too long": packet(0x32, b"\0\1a\0\7" + b"\xff" * LARGE),
    "unknown property": packet(0x32, b"\0\1a\0\7\x05\xee" + bytes(LARGE)),
    "half an id": packet(0x32, b"\0\1a\0"),
    "nothing": packet(0x30, b""),
    "half a length": packet(0x30, b"\0"),
    "qos 3": packet(0x36, b"\0\1a\0\7\0" + bytes(LARGE)),
    "unknown command": packet(0xF0, bytes(LARGE)),
    "length of five bytes": b"\x32\xff\xff\xff\xff\x01",
    "begun": b"\x32",
}
PUBLISHES = st.tuples(
    st.sampled_from([0, 1, 100, LARGE - 30, LARGE - 17, LARGE, LARGE + 1, 60_000, 130_000, 280_000]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 1, 8, 9]),
    st.sampled_from([b"a", b"fl/up/0/d/x/1", "grün".encode(), b"t" * 400]),
    st.sampled_from([b"", b"\x26\0\1a\0\1b"]),
)
Part = str | tuple[int, int, int, bytes, bytes]


@settings(phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(PUBLISHES | PUBLISHES | st.sampled_from(sorted(PARTS)), max_size=6),
    st.lists(st.integers(0, 300_000), max_size=12),
    st.booleans(),
)
@example([(LARGE, 1, 0, b"a", b""), "begun"], [], False)
@example([(LARGE, 0, 0, b"a", b"")] * 3, [2, 3, 20, LARGE], True)
@example([(LARGE, 2, 0, b"a", b""), "pubrel"], [], False)
def test_the_same_as_paho(parts: list[Part], cuts: list[int], acks: bool) -> None:
    """However a stream is cut: the same messages in order, the same answers, the same end as with paho alone."""
    stream = bytearray()
    for part in parts:
        stream += (
            PARTS[part]
            if isinstance(part, str)
            else publish(bytes(range(256)) * (part[0] // 256) + bytes(part[0] % 256), *part[1:])
        )
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [bytes(stream[a:b]) for a, b in itertools.pairwise(edges)]
    ours = receive(Receiver, Wire(pieces), acks=acks)
    theirs = receive(paho.Client, Wire(pieces), acks=acks)
    # Compared apart from the message that a failure shows.
    same = (ours.messages, ours.answered, ours.ended) == (theirs.messages, theirs.answered, theirs.ended)
    assert same, (len(ours.messages), ours.answered, ours.ended, len(theirs.messages), theirs.answered, theirs.ended)


def test_the_payload_is_a_buffer_of_its_own() -> None:
    """A large message stays where it was read; the next one gets memory of its own."""
    seen = receive(Receiver, Wire([publish(b"a" * 60_000) + publish(b"b" * 60_000)]))
    assert [type(each) for each in seen.payloads] == [bytearray, bytearray]
    assert [set(each) for each in seen.payloads] == [{ord("a")}, {ord("b")}]
    assert [len(each) for each in seen.payloads] == [60_000, 60_000]


def test_the_limit_comes_before_the_memory() -> None:
    """A packet beyond what was announced ends the connection at its header; one byte less is read."""
    wire = Wire([publish(bytes(LIMIT - 21))[:100]])
    seen = receive(Receiver, wire)
    assert seen.ended and wire.closed and seen.messages == []
    assert seen.complaints == [f"a packet of {LIMIT + 1} bytes, where {LIMIT} were announced"]
    assert max(wire.asked) == 1
    whole = publish(bytes(LIMIT - 22))
    assert len(whole) == LIMIT
    assert len(receive(Receiver, Wire([whole])).messages) == 1


@pytest.mark.parametrize("command", [0x20, 0x40, 0x90, 0xF0])
def test_the_limit_holds_for_every_packet(command: int) -> None:
    """What is no PUBLISH has the same limit."""
    wire = Wire([packet(command, bytes(LIMIT))[:50]])
    assert receive(Receiver, wire).ended and max(wire.asked) == 1


def test_a_reserved_command() -> None:
    """Command 0 ends the connection at its header; it is not waited for."""
    wire = Wire([packet(0x00, bytes(LARGE))])
    assert receive(Receiver, wire).ended and wire.closed and max(wire.asked) == 1


def test_a_cut_within_a_large_packet() -> None:
    """An end of the stream or an error of the socket in the middle of a payload is a lost connection."""

    class Ends(Wire):
        def recv_into(self, buffer: memoryview) -> int:
            return super().recv_into(buffer) if len(self.pieces) > 1 else 0

    class Fails(Wire):
        def recv_into(self, buffer: memoryview) -> int:
            raise ConnectionResetError("reset by peer")

    for kind in (Ends, Fails):
        wire = kind([publish(bytes(LARGE))[:10_000], b"never read"])
        seen = receive(Receiver, wire)
        assert seen.ended and wire.closed and seen.messages == []
    assert seen.complaints == ["failed to receive on socket: reset by peer"]


def test_a_new_connection_begins_anew() -> None:
    """What was read of a packet when the connection broke is no part of the next one's first packet."""
    client = Receiver(CallbackAPIVersion.VERSION2, client_id="one", protocol=MQTTProtocolVersion.MQTTv5)
    came: list[bytes] = []
    client.on_message = lambda _c, _u, got: came.append(bytes(got.payload))
    client._sock = Wire([publish(b"a" * 60_000)[:30_000]])  # type: ignore[assignment]
    client.loop_read()
    client._create_socket = lambda: Wire([])  # type: ignore[assignment,method-assign,return-value]
    client._host = "localhost"
    with pytest.raises(AttributeError):  # a Wire cannot be told not to block: far enough
        client.reconnect()
    client._sock = Wire([publish(b"b" * 50_000)])  # type: ignore[assignment]
    client.loop_read()
    assert came == [b"b" * 50_000]


def test_writing_gets_its_turn() -> None:
    """However much there is to read, a call comes to an end after some of it."""
    wire = Wire([publish(bytes(100_000))] * 40)
    client = Receiver(CallbackAPIVersion.VERSION2, client_id="one", protocol=MQTTProtocolVersion.MQTTv5)
    client._sock = wire  # type: ignore[assignment]
    client.loop_read()
    assert 25 < len(wire.pieces) < 30


def test_acknowledgements_go_out_together() -> None:
    """A run of PUBACKs is one write, before what comes later; none is lost when only a part is taken."""
    client = Receiver(
        CallbackAPIVersion.VERSION2, client_id="one", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
    )
    wire = Wire([])

    def partly(data: bytes) -> int:
        wire.sent.append(bytes(data[:7]))
        return len(wire.sent[-1])

    client._sock = wire  # type: ignore[assignment]
    client._thread = True  # type: ignore[assignment]  # so that nothing is written at once
    acks = [b"\x40\x02" + struct.pack(">H", mid) for mid in range(1, 31)]
    for mid in range(1, 31):
        client.ack(mid, 1)
    client._send_pingreq()
    client.loop_write()
    assert wire.sent == [b"".join(acks), b"\xc0\0"]
    wire.sent.clear()
    wire.send = partly  # type: ignore[method-assign]
    for mid in range(1, 31):
        client.ack(mid, 1)
    client.loop_write()
    assert b"".join(wire.sent) == b"".join(acks)
    client._thread = None


# What Receiver and the link override or call. When paho changes one, read the change before you write the new sum here.
INTERNALS = {
    "loop_read": "4fa11ca2d451dbec",
    "_loop_rc_handle": "ee5ad3b7849433a4",
    "_packet_read": "bbe32d8af1e37955",
    "_packet_write": "d097b7b51bed128d",
    "_packet_queue": "e298fa9ab31e5f79",
    "_sock_recv": "c3b9043a46dd81b7",
    "_handle_publish": "1bbaa3ef0e3afc6d",
    "_handle_on_message": "8ccc46fdb090aead",
    "_messages_reconnect_reset_out": "464a42c69618a49b",
    "_ssl_wrap_socket": "a71513b1452dc33b",
    "_easy_log": "02c7afc1854c3a9d",
}


def test_paho_is_as_we_read_it() -> None:
    """The private methods that we build on are those that were read, to the letter."""
    found: dict[str, Any] = {}
    for name in INTERNALS:
        found[name] = hashlib.sha256(inspect.getsource(getattr(paho.Client, name)).encode()).hexdigest()[:16]
    assert found == INTERNALS
