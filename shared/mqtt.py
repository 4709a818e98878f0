"""The link to the broker: the only place that knows paho, with shared.receive below it.

paho's network thread runs the callbacks here; each does nothing but post an event to the mailbox. A callback that fails
posts `LinkBroken`, because an exception would otherwise end the thread while the client still claims to be connected.
The owner thread calls `publish`, `subscribe` and `acknowledge`.
"""

import contextlib
import functools
import random
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from shared.errors import ConfigError, LinkError
from shared.receive import Receiver

DURABLE_SESSION = 30 * 86_400
"""Seconds that a broker keeps a durable session while its client is away."""

_MEANINGS = {
    "Connection refused": "nothing listens there: does mosquitto run, and are host and port right?",
    "certificate has expired": "the broker's certificate has, or this machine's clock is wrong",
    "alert certificate expired": "the broker refuses {cert}: it has expired",
    "alert certificate revoked": "the broker refuses {cert}: it is revoked, which only the fleet's operator can change",
    "alert unknown ca": "the broker refuses {cert}: it is of another fleet",
}
"""What to make of an error's words when it names a cause that an operator can remove."""

_PACKET_OVERHEAD = 1024
"""Bytes allowed for topic, header and properties beside a payload."""

_QUEUE_COUNT = 1000
"""Messages that may wait for the broker."""

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, for which Python's ssl has no name."""

_TAKEN_OVER = 142
"""The reason code of a DISCONNECT when another client took this one's name; mosquitto 2.0 cuts without a word."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How to reach the broker. `ca`, `cert` and `key` are PEM files; times are seconds, sizes bytes.

    `clock` tells the time (UTC seconds, from any thread) at which the broker's certificate must not have expired, where
    the system's clock may stand in 1970; None: the system's, and then it must have begun, too.
    """

    host: str
    port: int
    client_id: str
    ca: Path
    cert: Path
    key: Path
    keepalive: int = 60
    connect_timeout: float = 10.0
    message_max: int = 16 << 20
    queue_max: int = 16 << 20
    durable: bool = False
    backoff_min: float = 1.0
    backoff_max: float = 60.0
    clock: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for us when we vanish."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected. `packet_max` is the broker's limit on a packet, None if it states none."""

    session_present: bool
    packet_max: int | None


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Not connected (any more); the link goes on trying by itself."""

    cause: str


@dataclass(frozen=True, slots=True)
class LinkBroken:
    """Our own fault inside a callback: the process must end and be restarted."""

    cause: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the broker; `mid` and `generation` are for `Link.acknowledge`.

    The payload belongs to whoever takes the message: nothing else holds its memory.
    """

    topic: str
    payload: bytes | bytearray
    retain: bool
    qos: int
    mid: int
    generation: int


@dataclass(frozen=True, slots=True)
class Published:
    """The broker answered a QoS 1 publish; `refusal` is empty when it took the message."""

    mid: int
    refusal: str


LinkEvent = LinkUp | LinkDown | LinkBroken | Message | Published


class Post(Protocol):
    """Where a link leaves what happened: a shared.driver.Mailbox."""

    def post(self, event: LinkEvent) -> None:
        """Never waits."""

    def post_payload(self, event: LinkEvent, size: int) -> None:
        """Waits for a credit."""


_LOOP_LEAST = 0.02
"""Seconds: a ping that is due is sent after the wait, not before it."""


class _Client(Receiver):
    """paho's client as a link needs it."""

    clock: Callable[[], float] | None = None
    """See LinkSettings."""

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        sock = super()._ssl_wrap_socket(tcp_sock)
        if self.clock is not None:
            try:
                _check_expiry(sock.getpeercert() or {}, self.clock())
            except ssl.SSLError:
                sock.close()
                raise
        return sock

    def _loop(self, timeout: float = 1.0) -> MQTTErrorCode:
        # paho would look every second whether a ping is due, or has gone unanswered, instead of once when it is. What
        # comes, and what the owner sends, wakes the thread anyhow.
        with self._msgtime_mutex:
            silent = time.monotonic() - min(self._last_msg_out, self._last_bytes_received)
        return super()._loop(min(max(_LOOP_LEAST, self.keepalive - silent), self.keepalive))

    def use(self, context: ssl.SSLContext) -> None:
        """Connect with this from now on; a connection that is up keeps what it began with."""
        self._ssl_context = context

    def waiting(self) -> int:
        """Bytes published with QoS 1 that the broker has not answered."""
        with self._out_message_mutex:
            return sum(len(each.payload) for each in self._out_messages.values())

    def drop_larger(self, limit: int) -> list[int]:
        """Forget what waits and is more than the broker takes, and say which: it would cut the link at each try."""
        with self._out_message_mutex:
            dropped = [mid for mid, each in self._out_messages.items() if _size(each.topic, each.payload) > limit]
            for mid in dropped:
                del self._out_messages[mid]
        return dropped


class Link:
    """One MQTT 5 connection that is kept up until `stop`."""

    def __init__(self, settings: LinkSettings, post: Post, will: Will | None = None) -> None:
        self._settings, self._post = settings, post
        self._packet_max: int | None = None
        self._generation = 0
        self._earlier, self._current = (0, 0), (0, 0)
        self._complaint = ""
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=settings.durable,
        )
        client.clock = settings.clock
        client.tls_set_context(self._context())
        client.connect_timeout = settings.connect_timeout
        client.max_inflight_messages_set(20)
        client.max_queued_messages_set(_QUEUE_COUNT)
        client.packet_limit = settings.message_max + _PACKET_OVERHEAD
        if will is not None:
            client.will_set(will.topic, will.payload, qos=0, retain=True)
        client.on_socket_open = self._guard(self._on_socket_open)
        client.on_socket_close = self._guard(self._on_socket_close)
        client.on_connect = self._guard(self._on_connect)
        client.on_connect_fail = self._guard(self._on_connect_fail)
        client.on_disconnect = self._guard(self._on_disconnect)
        client.on_message = self._guard(self._on_message)
        client.on_publish = self._guard(self._on_publish)
        client.on_log = self._guard(self._on_log)
        self._client = client
        self._spread()

    def start(self) -> None:
        """Begin to connect; returns at once, `LinkUp` or `LinkDown` follow."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = DURABLE_SESSION if self._settings.durable else 0
        properties.MaximumPacketSize = self._client.packet_limit
        self._client.connect_async(
            self._settings.host,
            self._settings.port,
            keepalive=self._settings.keepalive,
            clean_start=not self._settings.durable,
            properties=properties,
        )
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect cleanly (no will is sent) and end the network thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def change_identity(self, cert: Path, key: Path) -> None:
        """Show another certificate of the same name from now on: a connection that is up is cut and made anew.

        That is all that happens: what waits for the broker waits on. ConfigError if the files do not fit.
        """
        self._settings = replace(self._settings, cert=cert, key=key)
        self._client.use(self._context())
        sock: Any = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                # Of the plain socket below TLS, whose own would let the network thread read on without it.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _context(self) -> ssl.SSLContext:
        context = tls(self._settings.ca, self._settings.cert, self._settings.key)
        if self._settings.clock is not None:
            context.verify_flags |= _NO_CHECK_TIME
        return context

    @property
    def connected(self) -> bool:
        """Whether the last word of the broker was a successful CONNACK."""
        return self._client.is_connected()

    @property
    def alive(self) -> bool:
        """Whether the network thread lives."""
        name = f"paho-mqtt-client-{self._settings.client_id}"
        return any(thread.name == name and thread.is_alive() for thread in threading.enumerate())

    @property
    def packet_max(self) -> int | None:
        """Bytes of the largest packet that the broker takes, as it said last; None if it said nothing."""
        return self._packet_max

    @property
    def waiting(self) -> int:
        """Bytes of payloads that were published with QoS 1 and are not answered yet."""
        return self._client.waiting()

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Ask for topics, all in one packet, and return at once; while the link is down nothing is asked for.

        The broker's grant proves nothing, so none is waited for.
        """
        if filters:
            self._client.subscribe([(each, SubscribeOptions(qos=qos)) for each in filters])

    def unsubscribe(self, *filters: str) -> None:
        """Ask for no more of these topics, all in one packet, and return at once."""
        if filters:
            self._client.unsubscribe(list(filters))

    def publish(self, topic: str, payload: bytes | bytearray, *, qos: int = 1, retain: bool = False) -> int:
        """Send a message; its id comes back in `Published`. It is not copied: leave a bytearray alone until then.

        LinkError when it is more than the broker takes; also, for QoS 1, while `queue_max` bytes or 1,000 messages wait
        for the broker already: each `Published` makes room.
        """
        if self._packet_max is not None and _size(topic, payload) > self._packet_max:
            raise LinkError(
                f"{len(payload)} bytes for {topic} are more than the broker takes in one message ({self._packet_max}); "
                "raise max_packet_size in mosquitto.conf or make the model smaller"
            )
        if qos and (waiting := self._client.waiting()) >= self._settings.queue_max:
            raise LinkError(f"{waiting} bytes wait for the broker already; {topic} was not sent")
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise LinkError(f"{_QUEUE_COUNT} messages wait for the broker already; {topic} was not sent")
        return info.mid

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message is dealt with; of use only on a durable link, void after a reconnect."""
        if self._settings.durable and message.qos and message.generation == self._generation:
            self._client.ack(message.mid, message.qos)

    def bytes_moved(self) -> tuple[int, int]:
        """(received, sent) over all connections so far, as the kernel counts them: TLS and MQTT framing included."""
        self._current = _tcp_bytes(self._client.socket()) or self._current
        return self._earlier[0] + self._current[0], self._earlier[1] + self._current[1]

    def _guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(callback)
        def guarded(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception as error:  # noqa: BLE001 - see the module's docstring
                self._post.post(LinkBroken(f"{callback.__name__}: {type(error).__name__}: {error}"))

        return guarded

    def _spread(self, *, patient: bool = False) -> None:
        # paho doubles from min to max without jitter, so a broker's restart would bring the whole fleet back at once.
        longest = self._settings.backoff_max * random.uniform(0.5, 1.5)
        shortest = longest if patient else min(longest, self._settings.backoff_min * random.uniform(0.5, 1.5))
        self._client.reconnect_delay_set(shortest, longest)  # type: ignore[arg-type]  # it only computes with them

    def _on_socket_open(self, _c: object, _u: object, sock: socket.socket) -> None:
        # MQTT answers small packets with small packets; Nagle's algorithm would hold each back for up to 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_socket_close(self, _c: object, _u: object, sock: socket.socket) -> None:
        received, sent = _tcp_bytes(sock) or self._current
        self._earlier = (self._earlier[0] + received, self._earlier[1] + sent)
        self._current = (0, 0)

    def _on_connect(
        self, _c: object, _u: object, flags: paho.ConnectFlags, code: ReasonCode, props: Properties | None
    ) -> None:
        if code.is_failure:
            self._post.post(LinkDown(f"the broker refuses this client: {code}"))
            return
        self._generation += 1
        self._complaint = ""  # of an earlier try
        self._packet_max = getattr(props, "MaximumPacketSize", None)
        # Not at a disconnect: a refusal that comes after the handshake is one, and would begin the back-off anew.
        self._spread()
        dropped = [] if self._packet_max is None else self._client.drop_larger(self._packet_max)
        self._post.post(LinkUp(flags.session_present, self._packet_max))
        for mid in dropped:
            self._post.post(Published(mid, f"more than the broker takes in one message ({self._packet_max})"))

    def _on_connect_fail(self, _c: object, _u: object) -> None:
        # paho calls this inside its except block; the error itself is not among the arguments.
        error = sys.exc_info()[1]
        where = f"{self._settings.host}:{self._settings.port}"
        self._post.post(LinkDown(self._explained(f"no connection to {where}: {error if error else 'unknown cause'}")))

    def _on_disconnect(self, _c: object, _u: object, flags: paho.DisconnectFlags, code: ReasonCode, _p: object) -> None:
        complaint, self._complaint = self._complaint, ""
        silent = code.getName() == "Unspecified error" and not flags.is_disconnect_packet_from_server
        cause = complaint or ("the connection was cut" if silent else str(code))
        if flags.is_disconnect_packet_from_server and code.value == _TAKEN_OVER:
            # Two clients of one name would throw each other out for ever, as fast as they can come back.
            self._spread(patient=True)
            cause = f"another client has connected as {self._settings.client_id}"
        self._post.post(LinkDown(self._explained(cause)))

    def _explained(self, cause: str) -> str:
        """A library's words, and what they mean here."""
        found = next((meaning for word, meaning in _MEANINGS.items() if word in cause), None)
        return cause if found is None else f"{cause}; {found.format(cert=self._settings.cert)}"

    def _on_log(self, _c: object, _u: object, level: int, text: str) -> None:
        # The only place where paho says what a socket's error was, such as the alert that refuses a certificate.
        if level == LogLevel.MQTT_LOG_ERR:
            self._complaint = text

    def _on_message(self, _c: object, _u: object, got: paho.MQTTMessage) -> None:
        # paho keeps no reference to it: what arrived in one piece of memory stays there.
        message = Message(got.topic, got.payload, got.retain, got.qos, got.mid, self._generation)
        self._post.post_payload(message, len(got.payload))

    def _on_publish(self, _c: object, _u: object, mid: int, code: ReasonCode, _p: object) -> None:
        self._post.post(Published(mid, str(code) if code.is_failure else ""))


def _size(topic: str, payload: bytes | bytearray) -> int:
    # A topic of the fleet is ASCII; 64 bytes are more than the header and the properties that we send.
    return len(payload) + len(topic) + 64


def tls(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, trusting only the fleet's CA; ConfigError names the file that does not fit."""
    for path, key_name in ((ca, "broker.ca"), (cert, "broker.cert"), (key, "broker.key")):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(str(path), key_name, f"cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cafile=str(ca))
    except ssl.SSLError as error:
        raise ConfigError(str(ca), "broker.ca", f"is not a PEM certificate: {error}") from None
    try:
        context.load_cert_chain(str(cert), str(key), password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(str(cert), "broker.cert", f"does not fit {key}: {error}") from None
    return context


def _check_expiry(certificate: dict[str, Any], now: float) -> None:
    # One that begins later than now proves that the clock is behind, and nothing else.
    if now > ssl.cert_time_to_seconds(certificate["notAfter"]):
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: certificate has expired")


def _no_password() -> str:
    raise ValueError("the key is passphrase-encrypted; a service needs it in the clear")


def _tcp_bytes(sock: Any) -> tuple[int, int] | None:
    # struct tcp_info of Linux 4.2 and later: tcpi_bytes_acked at 120, tcpi_bytes_received at 128.
    option = getattr(socket, "TCP_INFO", None)
    if sock is None or option is None or not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, option, 136)
    except OSError:
        return None
    if len(info) < 136:
        return None
    acked, received = struct.unpack_from("=QQ", info, 120)
    return received, acked
