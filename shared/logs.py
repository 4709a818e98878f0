"""The log: one line an event, written where this process runs. The only module that imports structlog.

Under systemd it speaks the journal's own protocol with indexed fields (`journalctl TASK=digits ROUND=7`), on a terminal
it is for eyes, elsewhere it is JSON lines on standard error. What Python's own logging says (apscheduler, paho) and
its warnings come the same way. A field is text, a number, a truth value, or a list of these; bytes and foreign objects
are never written out, only their size or type, so no payload, key or gradient can slip in. Writing never fails and
never raises.
"""

import array
import errno
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, TextIO

import structlog

from shared.events import Event, level_of, message_id_of

JOURNAL = "/run/systemd/journal/socket"
TEXT_MAX = 4096
"""Characters of one field; the rest is cut off."""

_ITEMS_MAX = 64
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""Control characters would move a terminal's cursor; tab and line feed are dealt with where lines are written."""
_ONE_LINE = {**_ESCAPED, 9: " ", 10: "\\n"}

Format = Literal["auto", "journal", "json", "console"]
Write = Callable[[Event, str, Mapping[str, Any]], None]
"""(event, level, cleaned fields) -> written."""


def tell(event: Event, /, **fields: object) -> None:
    """Log `event`. Usual fields: task, round, device, release, reason, seconds, bytes."""
    getattr(structlog.get_logger(), level_of(event))(event, **fields)


def configure(
    level: str = "info",
    form: Format = "auto",
    *,
    environ: Mapping[str, str],
    identifier: str,
    stream: TextIO | None = None,
    journal: str = JOURNAL,
    **always: object,
) -> None:
    """Set the log of this process up: `always` are fields of every event, such as the device's name."""
    stream = sys.stderr if stream is None else stream
    found = _detect(stream, environ) if form == "auto" else form
    write: Write
    if found == "journal":
        write = _Journal(journal, identifier, stream)
    elif found == "console":
        write = _Console(stream)
    else:
        write = _Lines(stream)

    steady = clean(always)

    def finish(_: Any, method: str, event_dict: MutableMapping[str, Any]) -> Any:
        event = event_dict.pop("event")
        write(event, method, {**steady, **clean(event_dict)})
        raise structlog.DropEvent

    structlog.configure(
        processors=[finish],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_FromLibraries(logging.WARNING)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)  # a peer's odd certificate can cause one


def clean(fields: Mapping[str, object]) -> dict[str, Any]:
    """The fields as they may be written: plain values only, and no control characters but tab and line feed."""
    return {_plain(name): _plain(value) for name, value in fields.items() if value is not None}


def sentence(event: Event, fields: Mapping[str, Any]) -> str:
    """The event for people, on one line: "Round opened: task digits, round 7"."""
    head = event.value.replace(".", " ").replace("_", " ").capitalize()
    said = ", ".join(f"{_word(name.replace('_', ' '))} {_word(value)}" for name, value in fields.items())
    return f"{head}: {said}" if said else head


def _detect(stream: TextIO, environ: Mapping[str, str]) -> Format:
    """The journal if systemd connected this very stream to it, a terminal if it is one, else lines."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "json"
    if (device, inode) == (str(status.st_dev), str(status.st_ino)):
        return "journal"
    return "console" if stream.isatty() else "json"


def _plain(value: object, depth: int = 0) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, depth)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, str):
        text = value if len(value) <= TEXT_MAX else value[:TEXT_MAX] + "..."
        return text.encode("utf-8", "replace").decode().translate(_ESCAPED)
    if isinstance(value, PurePath | BaseException):
        return _plain(str(value), depth)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, list | tuple | set | frozenset) and depth < 3:
        return [_plain(item, depth + 1) for item in list(value)[:_ITEMS_MAX]]
    if isinstance(value, Mapping) and depth < 3:
        return {_plain(str(key)): _plain(item, depth + 1) for key, item in list(value.items())[:_ITEMS_MAX]}
    return f"<{type(value).__name__}>"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list):
        return " ".join(_word(item) for item in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{_word(name)}={_word(item)}" for name, item in value.items()) or "none"
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return text.translate(_ONE_LINE)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else str(value)


# -- where it goes -------------------------------------------------------------------------------------------------


def _put(stream: TextIO, line: str) -> None:
    try:
        stream.write(line + "\n")
        stream.flush()
    except (OSError, ValueError):
        pass  # a log that cannot be written must not end what it tells about


class _Lines:
    """JSON, one object a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)

    def __call__(self, event: Event, level: str, fields: Mapping[str, Any]) -> None:
        stamp = self._stamp(None, level, {})["timestamp"]
        line = {"time": stamp, "level": level, "event": event.value, **_renamed(fields, {"time", "level", "event"})}
        _put(self._stream, json.dumps(line, ensure_ascii=False))


class _Console:
    """For eyes: time, level, sentence."""

    COLOURS: Mapping[str, str] = {"debug": "2", "info": "0", "warning": "33", "error": "31"}

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        self._colours = stream.isatty()

    def __call__(self, event: Event, level: str, fields: Mapping[str, Any]) -> None:
        said = sentence(event, fields)
        text = f"\x1b[{self.COLOURS[level]}m{said}\x1b[0m" if self._colours else said
        _put(self._stream, f"{self._stamp(None, level, {})['timestamp']} {level:<7} {text}")


class _Journal:
    """The journal's native protocol: a datagram of fields; one that is too large goes as a sealed memory file."""

    def __init__(self, address: str, identifier: str, stream: TextIO) -> None:
        self._address, self._identifier = address, identifier
        self._fallback = _Lines(stream)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(1.0)

    def __call__(self, event: Event, level: str, fields: Mapping[str, Any]) -> None:
        found = {_field(name): _text(value) for name, value in fields.items()}
        found |= {
            "MESSAGE": sentence(event, fields),
            "MESSAGE_ID": message_id_of(event),
            "PRIORITY": str(_PRIORITY[level]),
            "SYSLOG_IDENTIFIER": self._identifier,
            "EVENT": event.value,
        }
        record = b"".join(_encoded(name, value) for name, value in found.items())
        try:
            self._send(record)
        except OSError:
            self._fallback(event, level, fields)

    def _send(self, record: bytes) -> None:
        try:
            self._socket.sendto(record, self._address)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(record)

    def _send_file(self, record: bytes) -> None:
        import fcntl  # Linux only, as is the journal

        file = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(file, record)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
            self._socket.sendmsg([], [rights], 0, self._address)
        finally:
            os.close(file)


def _field(name: str) -> str:
    """A journal field's name: A-Z, 0-9 and _, not beginning with _ or a digit, at most 64 characters."""
    found = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name).upper().strip("_")
    return (found if found[:1].isalpha() else f"F_{found}")[:64]


def _encoded(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _renamed(fields: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    return {f"{name}_" if name in taken else name: value for name, value in fields.items()}


class _FromLibraries(logging.Handler):
    """What libraries say through Python's logging, as an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = str(record.msg)
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text.strip()}: {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        level = "error" if record.levelno >= logging.ERROR else "warning"
        logger = structlog.get_logger()
        getattr(logger, level)(Event.LIBRARY_SAID, library=record.name, text=text)
