"""How a link receives: paho's client, with large packets read once, into the memory that they stay in.

paho appends a packet's pieces to one another and copies it four times more to take it apart. `Receiver` lets paho read
each header, reads the rest of a large packet itself, and takes a plain PUBLISH apart where it lies; protocol,
keep-alive, reconnecting and every other packet stay paho's. It overrides private methods of the pinned version, so
tests/unit/test_receive.py holds it against paho's own. It must never decide what a message means.
"""

import ssl
import time
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import LogLevel, MessageType, MQTTErrorCode

LARGE = 16 << 10
"""Bytes from which on a packet is read here: what one TLS record holds comes in one piece anyway."""

_TURN = 1 << 20
"""Bytes after which what is to be sent gets its turn, however much there is to read."""

_PLAIN = b"\0"
"""The properties of an MQTT 5 message that has none."""


class Receiver(paho.Client):
    """paho's client; the payload of a message may be a bytearray, to which paho keeps no reference."""

    packet_limit = 268_435_460
    """Bytes of the largest packet that is read at all, its header included: what CONNECT announced."""

    _turn = 0

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """All packets that are there, up to a bound; paho would ask select() before each."""
        self._turn = _TURN
        while self._turn > 0:
            if self._sock is None:
                return MQTTErrorCode.MQTT_ERR_NO_CONN
            self._turn -= 128
            code = self._packet_read()
            if code == MQTTErrorCode.MQTT_ERR_AGAIN:
                break
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return self._loop_rc_handle(code)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_read(self) -> MQTTErrorCode:
        if not self._is_large():
            code = super()._packet_read()  # ends after the header of a large one, because of _sock_recv
            if not self._is_large():
                return code
        code = self._read_large()
        # With nothing left to read, paho handles the packet and makes room for the next.
        return code if code != MQTTErrorCode.MQTT_ERR_SUCCESS else super()._packet_read()

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._is_large():
            raise BlockingIOError
        return super()._sock_recv(bufsize)

    def _is_large(self) -> bool:
        packet = self._in_packet
        return packet["have_remaining"] == 1 and packet["remaining_length"] >= LARGE

    def _read_large(self) -> MQTTErrorCode:
        packet, sock = self._in_packet, self._sock
        if not packet["packet"]:
            if packet["command"] == 0:  # reserved; paho would wait for a command for ever
                return MQTTErrorCode.MQTT_ERR_PROTOCOL
            size = 1 + len(packet["remaining_count"]) + packet["remaining_length"]
            if size > self.packet_limit:
                self._easy_log(
                    LogLevel.MQTT_LOG_ERR, "a packet of %d bytes, where %d were announced", size, self.packet_limit
                )
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            packet["packet"] = bytearray(packet["remaining_length"])
        try:
            with memoryview(packet["packet"]) as buffer:
                while left := packet["to_process"]:
                    got = sock.recv_into(buffer[-left:])  # type: ignore[union-attr]  # a TLS socket
                    if not got:
                        return MQTTErrorCode.MQTT_ERR_CONN_LOST
                    packet["to_process"] -= got
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError as error:
            self._easy_log(LogLevel.MQTT_LOG_ERR, "failed to receive on socket: %s", error)
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        finally:
            with self._msgtime_mutex:
                self._last_bytes_received = time.monotonic()
        self._turn -= packet["remaining_length"]
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_publish(self) -> MQTTErrorCode:
        command, packet = self._in_packet["command"], self._in_packet["packet"]
        qos = command >> 1 & 3
        end = 2 + int.from_bytes(packet[:2], "big")
        start = end + (2 if qos else 0)
        if qos > 1 or packet[start : start + 1] != _PLAIN:
            return super()._handle_publish()  # slower, and the judge of what is malformed
        message = paho.MQTTMessage(int.from_bytes(packet[end:start], "big"), bytes(packet[2:end]))
        message.qos, message.retain, message.dup = qos, bool(command & 1), bool(command & 8)
        del packet[: start + 1]  # moves where the bytearray starts, and copies nothing
        message.payload = packet
        self._handle_on_message(message)
        return MQTTErrorCode.MQTT_ERR_SUCCESS if qos == 0 or self._manual_ack else self._send_puback(message.mid)

    def _packet_write(self) -> MQTTErrorCode:
        # The acknowledgements that wait go out in one piece, not in a TLS record and a system call each.
        waiting, acks = self._out_packet, bytearray()
        while waiting and waiting[0]["command"] == MessageType.PUBACK and len(acks) < LARGE:
            first = waiting.popleft()
            acks += first["packet"][first["pos"] :]
        if acks:
            waiting.appendleft({**first, "packet": acks, "pos": 0, "to_process": len(acks)})
        return super()._packet_write()

    def _easy_log(self, level: LogLevel, fmt: str, *args: Any) -> None:
        if level != LogLevel.MQTT_LOG_DEBUG:  # a text for each packet, which nobody reads
            super()._easy_log(level, fmt, *args)
