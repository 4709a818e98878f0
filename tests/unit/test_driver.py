"""The mailbox's credits and the driver's order of work."""

import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence

from shared.driver import Driver, Mailbox, read_clock
from shared.errors import Reason, RemoteProtocolError
from shared.machine import Instant, Tick

Event = str
Effect = str


class Recorder:
    """A machine and its shell that write down what happens; `bad` is refused, `ask` finds `answer` out."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.deadline: float | None = None

    def handle(self, event: Event | Tick, now: Instant) -> list[Effect]:
        name = "tick" if isinstance(event, Tick) else event
        if name == "bad":
            raise RemoteProtocolError(Reason.EMPTY)
        if name == "tick":
            self.deadline = None
        self.said.append(f"handle {name}")
        return [f"{name}-effect"]

    def refused(self, event: Event | Tick, error: RemoteProtocolError) -> None:
        self.said.append(f"refused {event} {error.reason.value}")

    def commit(self, effects: Sequence[Effect]) -> None:
        self.said.append("commit " + "+".join(effects))

    def perform(self, effect: Effect) -> Iterable[Event]:
        self.said.append(f"perform {effect}")
        if effect == "ask-effect":
            yield "answer"

    def portions(self, batch: Sequence[Event | Tick]) -> Iterable[Sequence[Event | Tick]]:
        names = ["tick" if isinstance(event, Tick) else event for event in batch]
        if "alone" not in names:
            return [batch]
        at = names.index("alone")
        return [batch[:at], batch[at : at + 1], batch[at + 1 :]]

    def settle(self, event: Event | Tick) -> None:
        self.said.append(f"settle {'tick' if isinstance(event, Tick) else event}")


def drive(recorder: Recorder, *events: Event) -> list[str]:
    """One turn over these events."""
    mailbox: Mailbox[Event] = Mailbox()
    for event in events:
        mailbox.post(event)
    Driver(mailbox, recorder, recorder).turn(0.0)
    return recorder.said


def test_everything_is_durable_before_anything_is_done() -> None:
    """All effects of a batch are committed together, then performed in order, then the batch is acknowledged."""
    assert drive(Recorder(), "one", "two") == [
        "handle one",
        "handle two",
        "commit one-effect+two-effect",
        "perform one-effect",
        "perform two-effect",
        "settle one",
        "settle two",
    ]


def test_what_an_effect_finds_out_is_handled_before_the_acknowledgement() -> None:
    """Follow-up events get their own commit, and the batch waits for them."""
    assert drive(Recorder(), "ask") == [
        "handle ask",
        "commit ask-effect",
        "perform ask-effect",
        "handle answer",
        "commit answer-effect",
        "perform answer-effect",
        "settle ask",
    ]


def test_a_portion_is_done_before_the_next_begins() -> None:
    """Committed, performed and acknowledged: what it left behind cannot be lost with the next."""
    said = drive(Recorder(), "one", "alone", "two")
    assert [line for line in said if line.startswith(("handle", "commit", "settle"))] == [
        "handle one",
        "commit one-effect",
        "settle one",
        "handle alone",
        "commit alone-effect",
        "settle alone",
        "handle two",
        "commit two-effect",
        "settle two",
    ]


def test_a_refused_event_is_told_and_acknowledged_and_stops_nothing() -> None:
    """A peer's fault costs its own event only."""
    assert drive(Recorder(), "bad", "good") == [
        "refused bad empty",
        "handle good",
        "commit good-effect",
        "perform good-effect",
        "settle bad",
        "settle good",
    ]


def test_the_deadline_makes_a_tick() -> None:
    """A machine whose time has come is told so, once."""
    recorder = Recorder()
    recorder.deadline = read_clock().mono - 1.0
    assert drive(recorder)[0] == "handle tick"
    recorder.said.clear()
    recorder.deadline = read_clock().mono + 1000.0
    assert drive(recorder) == []


def test_credits_bound_what_waits() -> None:
    """A payload beyond the count or the bytes waits until the owner takes; other events never wait."""
    mailbox: Mailbox[str] = Mailbox(count=2, size=100)
    mailbox.post_payload("a", 60)
    blocked = threading.Thread(target=mailbox.post_payload, args=("b", 60), daemon=True)
    blocked.start()
    mailbox.post("signal")
    blocked.join(0.05)
    assert blocked.is_alive()
    assert mailbox.take(0) == ["a", "signal"]
    blocked.join(5)
    assert mailbox.take(0) == ["b"]


def test_a_payload_above_the_limit_passes_alone() -> None:
    """A message larger than all credits together is not stuck for ever."""
    mailbox: Mailbox[str] = Mailbox(count=2, size=100)
    mailbox.post_payload("huge", 1000)
    assert mailbox.take(0) == ["huge"]


def test_closing_lets_waiting_threads_go() -> None:
    """A network thread that waits for a credit does not keep the process from ending."""
    mailbox: Mailbox[str] = Mailbox(count=1, size=100)
    mailbox.post_payload("a", 1)
    blocked = threading.Thread(target=mailbox.post_payload, args=("b", 1), daemon=True)
    blocked.start()
    mailbox.close()
    blocked.join(5)
    assert not blocked.is_alive()


def test_taking_waits_no_longer_than_asked() -> None:
    """An empty mailbox gives nothing, in time."""
    assert Mailbox[str]().take(0.0) == []


WAITING = """
import os, signal, threading
from shared.driver import Mailbox, on_termination

mailbox = Mailbox()
threading.Thread(target=threading.Event().wait, daemon=True).start()
on_termination(mailbox.post)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
print(mailbox.take(None), mailbox.take(0.0))
"""


def test_a_signal_reaches_an_owner_that_waits() -> None:
    """Also one that came to another thread, or in the moment before the owner slept: a minute later is too late."""
    ran = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout == "[15] []\n"
