"""shared.logs: each event is one line where this process runs, and nothing secret or dangerous is in it."""

import array
import io
import json
import logging
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from shared import logs
from shared.events import Event, level_of, message_id_of
from shared.logs import TEXT_MAX, clean, configure, sentence, tell


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leave logging as it was found."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers = before[0]
    root.setLevel(before[1])


class Journal:
    """A journal's socket that takes records apart."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(5)

    def record(self) -> dict[str, str]:
        """The next record."""
        data, rights, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for level, kind, payload in rights:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            (file,) = array.array("i", payload)
            with open(file, "rb") as sent:
                sent.seek(0)
                data = sent.read()
        return parse(data)

    def empty(self) -> bool:
        """Whether nothing more has come."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        return False


def parse(data: bytes) -> dict[str, str]:
    """The journal's native format, as its documentation describes it."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, separator, value = line.partition(b"=")
        if not separator:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[8 + size :]
            assert data[:1] == b"\n"
            data = data[1:]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal, with the log set up for it."""
    found = Journal(tmp_path / "socket")
    configure(
        form="journal", environ={}, identifier="edge-agent", journal=found.path, stream=io.StringIO(), device="d1"
    )
    return found


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was written as JSON lines."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_journal_gets_indexed_fields(journal: Journal) -> None:
    """`journalctl TASK=digits ROUND=7 -p warning` finds it, and MESSAGE reads like a sentence."""
    tell(Event.UPDATE_REJECTED, task="digits", round=7, reason="not_finite", seconds=1.25)
    assert journal.record() == {
        "TASK": "digits",
        "ROUND": "7",
        "REASON": "not_finite",
        "SECONDS": "1.25",
        "DEVICE": "d1",
        "MESSAGE": "Update rejected: device d1, task digits, round 7, reason not_finite, seconds 1.25",
        "MESSAGE_ID": message_id_of(Event.UPDATE_REJECTED),
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "edge-agent",
        "EVENT": "update.rejected",
    }


def test_value_cannot_forge_another_field(journal: Journal) -> None:
    """A line feed in a value stays in that value, and MESSAGE stays one line."""
    tell(Event.LINK_DOWN, cause="gone\nPRIORITY=0\nMESSAGE=all is well")
    record = journal.record()
    assert record["CAUSE"] == "gone\nPRIORITY=0\nMESSAGE=all is well"
    assert record["PRIORITY"] == "4"
    assert record["MESSAGE"] == "Link down: device d1, cause gone\\nPRIORITY=0\\nMESSAGE=all is well"


def test_field_names_are_the_journals_own_kind(journal: Journal) -> None:
    """Names the journal would drop are made acceptable, and none replaces what we vouch for."""
    tell(Event.LINK_UP, **{"_PID": 1, "9lives": 2, "größe": 3, "message": "forged", "priority": 0, "event_id": "x"})
    record = journal.record()
    assert (record["PID"], record["F_9LIVES"], record["GR__E"], record["EVENT_ID"]) == ("1", "2", "3", "x")
    assert record["MESSAGE"].startswith("Link up: ")
    assert record["PRIORITY"] == "6"


def test_record_too_large_for_a_datagram_goes_as_a_file(journal: Journal) -> None:
    """A long list does not get lost."""
    many = [f"{number}" * 1000 for number in range(64)]
    fields = {f"field{number}": many for number in range(8)}
    tell(Event.LINK_UP, **fields)
    record = journal.record()
    assert json.loads(record["FIELD7"]) == many


def test_journal_that_is_gone_falls_back_to_lines(tmp_path: Path) -> None:
    """The event is still told, on standard error."""
    stream = io.StringIO()
    configure(form="journal", environ={}, identifier="x", journal=str(tmp_path / "absent"), stream=stream)
    tell(Event.LINK_UP, round=1)
    assert [(line["event"], line["round"]) for line in lines(stream)] == [("link.up", 1)]


def test_lines_are_json_with_level_and_time() -> None:
    """In a container a collector reads them; a field never hides event, level or time."""
    stream = io.StringIO()
    configure(form="json", environ={}, identifier="x", stream=stream)
    tell(Event.MESSAGE_REFUSED, topic="a/b\n", level="mine")
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "event": "message.refused", "topic": "a/b\n", "level_": "mine"}


def test_level_silences_what_is_below() -> None:
    """At warning, info is not written."""
    stream = io.StringIO()
    configure("warning", "json", environ={}, identifier="x", stream=stream)
    tell(Event.LINK_UP)
    tell(Event.LINK_DOWN)
    assert [line["event"] for line in lines(stream)] == ["link.down"]


def test_console_is_a_sentence_without_control_characters() -> None:
    """A peer's text cannot move the operator's cursor."""
    stream = io.StringIO()
    configure(form="console", environ={}, identifier="x", stream=stream)
    tell(Event.MESSAGE_REFUSED, topic="\x1b[2J\x07\x9b1m\r\nx")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("warning Message refused: topic \\x1b[2J\\x07\\x9b1m\\x0d\\nx")


def test_place_decides_the_form(tmp_path: Path) -> None:
    """The journal only if systemd connected this very stream; a pipe or file gets JSON, a terminal a console."""
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        ours = f"{status.st_dev}:{status.st_ino}"
        assert logs._detect(stream, {"JOURNAL_STREAM": ours}) == "journal"
        assert logs._detect(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}) == "json"
        assert logs._detect(stream, {}) == "json"
    assert logs._detect(io.StringIO(), {}) == "json"
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert logs._detect(terminal, {}) == "console"
    os.close(leader)


@pytest.mark.parametrize("value", [b"key", bytearray(b"key"), memoryview(b"key"), [b"key"], {"k": (b"key",)}])
def test_bytes_are_never_written(value: object) -> None:
    """A payload or key that slips into a field shows only its size."""
    stream = io.StringIO()
    configure(form="json", environ={}, identifier="x", stream=stream, steady=value)
    tell(Event.LINK_UP, value=value)
    assert "<3 bytes>" in stream.getvalue()
    assert "key" not in stream.getvalue()


def test_foreign_objects_show_only_their_type() -> None:
    """What an object's repr holds is anybody's guess."""

    class Secret:
        """With a talkative repr."""

        def __repr__(self) -> str:
            return "hunter2"

    assert clean({"a": Secret(), "b": None, "c": Path("/x"), "d": ValueError("bad")}) == {
        "a": "<Secret>",
        "c": "/x",
        "d": "bad",
    }


def test_long_values_are_cut() -> None:
    """One event cannot fill the disk."""
    assert len(clean({"a": "x" * 10**6})["a"]) <= TEXT_MAX + 3
    assert len(clean({"a": list(range(10**4))})["a"]) == 64


def test_libraries_come_the_same_way() -> None:
    """apscheduler and paho warn through Python's logging; what they say is an event, their chatter is not."""
    stream = io.StringIO()
    configure(form="json", environ={}, identifier="x", stream=stream)
    logging.getLogger("apscheduler.scheduler").warning("Run time of job %s was missed", "x")
    logging.getLogger("paho").info("chatter")
    logging.getLogger("paho").error("bad %s", "x", "y")
    found = [(line["event"], line["level"], line["library"], line["text"]) for line in lines(stream)]
    assert found == [
        ("library.said", "warning", "apscheduler.scheduler", "Run time of job x was missed"),
        ("library.said", "error", "paho", "bad %s"),
    ]


def test_warnings_come_the_same_way() -> None:
    """A certificate can make a library warn, and then a bare line would stand between the log's own."""
    stream = io.StringIO()
    configure(form="json", environ={}, identifier="x", stream=stream)
    warnings.warn_explicit("an odd serial number", UserWarning, "identity.py", 62)
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["library"]) == ("library.said", "warning", "py.warnings")
    assert "an odd serial number" in line["text"]


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(object())
anything = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(st.dictionaries(st.text(min_size=1), anything, max_size=5))
def test_whatever_is_told_is_written_and_never_raises(fields: dict[str, Any]) -> None:
    """Any value in any field: the record parses back, and the sentence is one printable line."""
    cleaned = clean(fields)
    text = sentence(Event.LINK_UP, cleaned)
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text)
    encoded = b"".join(logs._encoded(logs._field(name), logs._text(value)) for name, value in cleaned.items())
    assert set(parse(encoded)) == {logs._field(name) for name in cleaned}
    json.dumps(cleaned)


def test_closed_stream_is_no_error() -> None:
    """A log that cannot be written must not end what it tells about."""
    stream = io.StringIO()
    configure(form="json", environ={}, identifier="x", stream=stream)
    stream.close()
    tell(Event.LINK_UP)


def test_levels_are_known() -> None:
    """Every event has a level that the log has a method for."""
    assert {level_of(event) for event in Event} <= {"debug", "info", "warning", "error"}
