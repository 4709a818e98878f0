"""Asks the device's message bus what no file tells: whether somebody uses the device, whether the network counts bytes,
and whether a power supply that the kernel does not know has failed. Through busctl, so no library is needed.

    look -> (a thread for what is due: busctl -> BusSaid, posted) -> told

The owner never waits: `look` gives the newest answers, and what is not known, or not any more, is just missing. A
question that nobody wants answered is never asked, nothing is asked where there is no bus, and no service is started
by being asked. An answer is bounded in time and size and believed only in the form that it must have.
"""

import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.eligibility import Question

FRESH, FRESH_TRAINING = 30.0, 5.0
"""Seconds for which an answer stands, and the same while we train: whoever comes back to the device waits for us."""
RARE = 600.0
"""Seconds until a source of power that did not answer is asked again: most devices have none, for good."""
TIMEOUT = 3.0
"""Seconds for one answer."""

_ANSWER_MAX = 4096
_SOCKET = Path("/run/dbus/system_bus_socket")
_ADDRESS = "DBUS_SYSTEM_BUS_ADDRESS"
_PROPERTIES: Final[Mapping[Question, tuple[str, str, str, str]]] = {
    Question.USER: ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "IdleHint"),
    Question.METERED: (
        *("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"),
        *("org.freedesktop.NetworkManager", "Metered"),
    ),
    Question.POWER: ("org.freedesktop.UPower", "/org/freedesktop/UPower", "org.freedesktop.UPower", "OnBattery"),
}
_METERED: Final[Mapping[int, bool]] = {1: True, 2: False, 3: True, 4: False}
"""NMMetered: yes, no, guessed yes, guessed no; 0 is unknown."""


@dataclass(frozen=True, slots=True)
class BusSaid:
    """What was asked, with True or False as the answer (user idle, network metered, on battery), or None."""

    answers: Mapping[Question, bool | None]


class Bus:
    """The newest answers. `look` and `told` belong to the owner's thread; `post` is called by another."""

    def __init__(
        self,
        post: Callable[[BusSaid], None],
        program: str = "busctl",
        address: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """`address` is another bus than the system's."""
        self._post, self._program, self._address, self._timeout = post, program, address, timeout
        self._answers: dict[Question, tuple[bool | None, float]] = {}
        self._asking = False

    def look(self, wanted: frozenset[Question], mono: float, training: bool = False) -> Mapping[Question, bool]:
        """What is known; what is wanted and due is asked meanwhile, one thread at a time."""
        due = frozenset(each for each in wanted if self._due(each, mono, training))
        if due and not self._asking and self._there():
            self._asking = True
            threading.Thread(target=self._ask, args=(due,), name="bus", daemon=True).start()
        known = {each: answer for each, (answer, _) in self._answers.items() if each in wanted}
        return {each: answer for each, answer in known.items() if answer is not None}

    def told(self, said: BusSaid, mono: float) -> bool:
        """Take the answers over; whether one of them is another than before."""
        self._asking = False
        before = {each: answer for each, (answer, _) in self._answers.items()}
        self._answers |= {each: (answer, mono) for each, answer in said.answers.items()}
        return any(before.get(each) != answer for each, answer in said.answers.items())

    def _due(self, question: Question, mono: float, training: bool) -> bool:
        answer, asked = self._answers.get(question, (None, None))
        if asked is None:
            return True
        if question is Question.POWER and answer is None:
            return mono - asked >= RARE
        return mono - asked >= (FRESH_TRAINING if training else FRESH)

    def _there(self) -> bool:
        return self._address is not None or _ADDRESS in os.environ or _SOCKET.exists()

    def _ask(self, questions: frozenset[Question]) -> None:
        self._post(BusSaid({each: self._answer(each) for each in questions}))

    def _answer(self, question: Question) -> bool | None:
        bus = "--system" if self._address is None else f"--address={self._address}"
        options = (bus, "--json=short", "--auto-start=no", f"--timeout={max(1, int(self._timeout))}")
        text = _output([self._program, *options, "get-property", *_PROPERTIES[question]], self._timeout)
        return parsed(question, text)


def parsed(question: Question, text: bytes) -> bool | None:
    """The answer in what busctl printed, such as {"type":"b","data":true}; None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kind, data = (found.get("type"), found.get("data")) if isinstance(found, dict) else (None, None)
    if question is Question.METERED:
        return _METERED.get(data) if kind == "u" and isinstance(data, int) and not isinstance(data, bool) else None
    return data if kind == "b" and isinstance(data, bool) else None


def _output(command: list[str], timeout: float) -> bytes:
    """What a command prints, if it ends well, in time and with few words; else nothing."""
    seen = {name: os.environ[name] for name in ("PATH", _ADDRESS) if name in os.environ}
    try:
        child = subprocess.Popen(
            command, env=seen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return b""
    assert child.stdout is not None
    found, end = b"", time.monotonic() + timeout
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    with child:
        while len(found) <= _ANSWER_MAX and poll.poll(max(0.0, end - time.monotonic()) * 1000):
            piece = os.read(child.stdout.fileno(), _ANSWER_MAX)
            if not piece:
                try:
                    return found if child.wait(max(0.0, end - time.monotonic())) == 0 else b""
                except subprocess.TimeoutExpired:
                    break
            found += piece
        child.kill()
    return b""
