"""A private message bus, by the real dbus-daemon, and a service with properties on it: as much of D-Bus as that is."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

_CONFIG = """<busconfig>
<type>session</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>"""
_CALL, _RETURN, _ERROR = 1, 2, 3
_BUS = {1: "/org/freedesktop/DBus", 2: "org.freedesktop.DBus", 6: "org.freedesktop.DBus"}


@contextlib.contextmanager
def private_bus(folder: Path) -> Iterator[str]:
    """The address of a bus of our own; skips where busctl or dbus-daemon is missing."""
    for program in ("dbus-daemon", "busctl"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")
    where = folder / "bus"
    (folder / "bus.conf").write_text(_CONFIG.format(socket=where))
    command = ["dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", "--print-address=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline()  # it listens
            yield f"unix:path={where}"
        finally:
            daemon.terminate()


class Service:
    """The owner of `name` on the bus at `address`; `properties` are (signature, value) by name, b or u, or absent."""

    def __init__(self, address: str, name: str, properties: Mapping[str, tuple[str, int]]) -> None:
        self.properties = dict(properties)
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address.removeprefix("unix:path="))
        self._file = self._socket.makefile("rb")
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        assert self._file.readline().startswith(b"OK")
        self._socket.sendall(b"BEGIN\r\n")
        self._call("Hello")
        named = _text(name)
        self._call("RequestName", "su", named + b"\0" * (-len(named) % 4) + struct.pack("<I", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Leave the bus."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()

    def _call(self, member: str, signature: str = "", body: bytes = b"") -> None:
        self._send(_CALL, {**_BUS, 3: member, 8: signature}, body)
        while self._receive()[0] != _RETURN:
            pass

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error):
            while True:
                kind, serial, fields, body = self._receive()
                if kind != _CALL:
                    continue
                reply: dict[int, str | int] = {5: serial, 6: fields.get(7, "")}
                found = self.properties.get(_second_text(body)) if fields.get(3) == "Get" else None
                if found is None:
                    self._send(_ERROR, {**reply, 4: "org.freedesktop.DBus.Error.UnknownProperty"}, b"")
                else:
                    # A variant: its signature, then, aligned to 4, the value; both of ours have 4 bytes.
                    signature = found[0].encode()
                    self._send(_RETURN, {**reply, 8: "v"}, b"\1" + signature + b"\0\0" + struct.pack("<I", found[1]))

    def _send(self, kind: int, fields: Mapping[int, str | int], body: bytes) -> None:
        self._serial += 1
        packed = b""
        for code, value in fields.items():
            if value == "":
                continue
            packed += b"\0" * (-len(packed) % 8)
            if isinstance(value, int):
                packed += bytes([code]) + b"\1u\0" + struct.pack("<I", value)
            elif code == 8:
                packed += bytes([code]) + b"\1g\0" + bytes([len(value)]) + value.encode() + b"\0"
            else:
                packed += bytes([code]) + (b"\1o\0" if code == 1 else b"\1s\0") + _text(value)
        header = struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), self._serial, len(packed)) + packed
        self._socket.sendall(header + b"\0" * (-len(header) % 8) + body)

    def _receive(self) -> tuple[int, int, dict[int, str | int], bytes]:
        _, kind, _, _, size, serial, length = struct.unpack("<cBBBIII", self._file.read(16))
        data = self._file.read(length + -length % 8)
        fields: dict[int, str | int] = {}
        at = 0
        while at < length:
            at += -at % 8
            code, signature = data[at], data[at + 2 : at + 3]
            at += 4
            if signature == b"g":
                fields[code], at = data[at + 1 : at + 1 + data[at]].decode(), at + 2 + data[at]
            else:
                (number,) = struct.unpack_from("<I", data, at)
                fields[code] = number if signature == b"u" else data[at + 4 : at + 4 + number].decode()
                at += 4 if signature == b"u" else 5 + number
        return kind, serial, fields, self._file.read(size)


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def _second_text(body: bytes) -> str:
    """Of two strings, as Properties.Get takes them."""
    at = 5 + struct.unpack_from("<I", body)[0]
    at += -at % 4
    return body[at + 4 : at + 4 + struct.unpack_from("<I", body, at)[0]].decode()
