"""edge_agent.bus: real busctl against a real bus, and whatever does not answer is not known."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import bus
from edge_agent.bus import FRESH, FRESH_TRAINING, RARE, Bus, BusSaid, parsed
from edge_agent.eligibility import Question
from tests.unit.message_bus import Service, private_bus

ALL = frozenset(Question)
USER = frozenset({Question.USER})


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A message bus of our own."""
    with private_bus(tmp_path) as found:
        yield found


class Asked:
    """A bus with its answers; `ask` waits for those of one look."""

    def __init__(self, **how: object) -> None:
        self.said: queue.SimpleQueue[BusSaid] = queue.SimpleQueue()
        self.bus = Bus(self.said.put, **how)  # type: ignore[arg-type]

    def ask(self, wanted: frozenset[Question], mono: float = 0.0) -> bool:
        """Whether something is another than before."""
        self.bus.look(wanted, mono)
        return self.bus.told(self.said.get(timeout=30), mono)


def test_real_answers(address: str) -> None:
    """What logind, NetworkManager and UPower would say over a real bus, by the real busctl."""
    services = [
        Service(address, "org.freedesktop.login1", {"IdleHint": ("b", 1)}),
        Service(address, "org.freedesktop.NetworkManager", {"Metered": ("u", 4)}),
        Service(address, "org.freedesktop.UPower", {"OnBattery": ("b", 1)}),
    ]
    asked = Asked(address=address)
    assert asked.bus.look(ALL, 0.0) == {}
    assert asked.bus.told(asked.said.get(timeout=30), 0.0)
    assert asked.bus.look(ALL, 1.0) == {Question.USER: True, Question.METERED: False, Question.POWER: True}
    assert asked.bus.look(USER, 1.0) == {Question.USER: True}
    services[0].properties["IdleHint"] = ("b", 0)
    assert asked.ask(USER, FRESH)
    assert asked.bus.look(USER, FRESH) == {Question.USER: False}
    assert not asked.ask(USER, 2 * FRESH)
    for service in services:
        service.close()
    assert asked.ask(USER, 3 * FRESH)
    assert asked.bus.look(ALL, 3 * FRESH) == {Question.METERED: False, Question.POWER: True}


def test_a_service_without_the_property(address: str) -> None:
    """An error of the service is no answer, and so is a service that is not there."""
    service = Service(address, "org.freedesktop.login1", {})
    asked = Asked(address=address)
    assert not asked.ask(ALL)
    assert asked.bus.look(ALL, 1.0) == {}
    service.close()


def test_no_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is none nothing is started; one that does not answer is not known."""
    monkeypatch.setattr(bus, "_SOCKET", tmp_path / "none")
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS", raising=False)
    silent = Bus(lambda said: pytest.fail("asked"), program=str(tmp_path / "busctl"))
    assert silent.look(ALL, 0.0) == {}
    assert not silent._asking
    asked = Asked(address=f"unix:path={tmp_path}/none")
    assert not asked.ask(ALL)


def test_no_busctl(tmp_path: Path) -> None:
    """A device without the program is one without the facts."""
    asked = Asked(program=str(tmp_path / "busctl"), address="unix:path=/nowhere")
    assert not asked.ask(ALL)


def program(folder: Path, text: str) -> str:
    """A stand-in for busctl."""
    file = folder / "busctl"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    "text",
    [
        "exec sleep 600",
        'echo \'{"type":"b","data":true}\'; exec >&-; exec sleep 600',
        "yes",
        'echo \'{"type":"b","data":true}\'; exit 1',
        "kill -9 $$",
    ],
    ids=["hangs", "closes and hangs", "never stops talking", "fails", "is killed"],
)
def test_a_program_that_misbehaves(tmp_path: Path, text: str) -> None:
    """It is ended in time, with nothing believed; the owner has not waited."""
    asked = Asked(program=program(tmp_path, text), address="unix:path=/nowhere", timeout=0.5)
    before = time.monotonic()
    asked.bus.look(USER, 0.0)
    assert time.monotonic() - before < 0.4
    assert not asked.bus.told(asked.said.get(timeout=30), 0.0)
    assert asked.bus.look(USER, 0.0) == {}


def test_it_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the agent's environment busctl gets the path and the bus, and never what else is there."""
    monkeypatch.setenv("FIELDFARE_SECRET", "x")
    text = 'test -z "$FIELDFARE_SECRET" && echo "{\\"type\\":\\"b\\",\\"data\\":true}"'
    assert Asked(program=program(tmp_path, text), address="unix:path=/nowhere").ask(USER)


def test_it_asks_no_more_than_needed(tmp_path: Path) -> None:
    """One look at a time; an answer stands for a while, less while we train; silent power is asked for seldom."""
    asked = Asked(program=program(tmp_path, "exit 1"), address="unix:path=/nowhere")
    bus = asked.bus

    def asks(wanted: frozenset[Question], mono: float, training: bool = False) -> bool:
        bus.look(wanted, mono, training)
        if not bus._asking:
            return False
        bus.look(ALL, mono)  # meanwhile
        bus.told(asked.said.get(timeout=30), mono)
        return True

    assert not asks(frozenset(), 0.0)
    assert asks(ALL, 0.0)
    assert not asks(ALL, FRESH_TRAINING)
    assert asks(USER, FRESH_TRAINING, training=True)
    assert not asks(frozenset({Question.POWER}), FRESH)
    assert asks(ALL, FRESH)
    assert asks(frozenset({Question.POWER}), RARE)
    assert asked.said.empty()


@pytest.mark.parametrize(
    ("question", "text", "answer"),
    [
        (Question.USER, b'{"type":"b","data":true}\n', True),
        (Question.USER, b'{"type":"b","data":false}\n', False),
        (Question.USER, b'{"type":"u","data":1}', None),
        (Question.USER, b'{"type":"b","data":1}', None),
        (Question.METERED, b'{"type":"u","data":0}', None),
        (Question.METERED, b'{"type":"u","data":1}', True),
        (Question.METERED, b'{"type":"u","data":2}', False),
        (Question.METERED, b'{"type":"u","data":3}', True),
        (Question.METERED, b'{"type":"u","data":4}', False),
        (Question.METERED, b'{"type":"u","data":5}', None),
        (Question.METERED, b'{"type":"u","data":true}', None),
        (Question.METERED, b'{"type":"u","data":[]}', None),
        (Question.POWER, b'{"type":"b","data":true}', True),
        (Question.POWER, b"", None),
        (Question.POWER, b"[" * 4000, None),
        (Question.POWER, b'{"type":"b"}', None),
    ],
)
def test_answers_have_one_form(question: Question, text: bytes, answer: bool | None) -> None:
    """What is not exactly an answer is none."""
    assert parsed(question, text) is answer


@given(st.sampled_from(Question), st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_an_answer_or_none(question: Question, text: bytes) -> None:
    """Whatever a program prints raises nothing."""
    assert parsed(question, text) in (True, False, None)
