"""edge_agent.words: what people read, from what programs read, whatever is missing of it."""

from typing import Any

import pytest

from edge_agent import words

STATUS: dict[str, Any] = {
    "device": "sensor-1",
    "version": "0.4.0",
    "state": "waiting",
    "why": "this device does not train: on battery",
    "uptime": 93_784.0,
    "link": {"connected": True, "broker": "b:8883", "bytes_received": 2_000_000, "bytes_sent": 1_000_000},
    "certificate": {"expires": "2027-01-01T00:00:00+00:00", "days": 20.0, "expiring": True, "renews": None},
    "obstacles": [{"name": "mains", "text": "on battery"}],
    "training": {"task": "digits", "round": 3, "state": "frozen", "epoch": 1, "step": 2},
    "left": {"points": 4},
    "coming": {"points": {"release": 5, "retry": 60.0}},
    "outbox": [],
    "tasks": {
        "digits": {
            "release": 2,
            "round": 3,
            "rounds": 9,
            "round_state": "open",
            "last_round_trained": 2,
            "obstacle": None,
        },
        "other": {"obstacle": "no data set other here"},
    },
    "last_update": {"task": "digits", "round": 2, "outcome": "accepted"},
    "models": {"folder": "/srv/models", "closed": "/srv/models is closed"},
    "memory": {"agent": 40_000_000, "trainer": None},
}


def test_status_is_read_at_a_glance() -> None:
    """Who, how and why not stand at the top; each thing has a line of its own."""
    lines = words.status(STATUS)
    assert lines[:2] == ["sensor-1: waiting", "  this device does not train: on battery"]
    shown = "\n".join(lines)
    for text in (
        "link         connected to b:8883, 2.0 MB received, 1.0 MB sent",
        "certificate  until 2027-01-01T00:00:00+00:00, 20.0 days - EXPIRES SOON",
        "training     digits round 3: frozen, epoch 1, step 2",
        "left         points round 4, to go on from its checkpoint",
        "blocked by   mains: on battery",
        "task         digits: release 2, round 3 of 9 open, this device's last was 2",
        "task         other: no data set other here",
        "download     points release 5, next try in 60 s",
        "last update  digits round 2: accepted",
        "models       none can be put where programs look for them: /srv/models is closed",
        "memory       agent 40.0 MB",
        "running      for 1 d 2 h, version 0.4.0",
    ):
        assert text in shown


@pytest.mark.parametrize("say", [words.status, words.why])
def test_an_answer_of_another_version_is_no_reason_to_fail(say: Any) -> None:
    """What is missing is left out."""
    assert say({})
    for name in STATUS:
        assert say({key: item for key, item in STATUS.items() if key != name})


def test_nothing_moves_the_cursor() -> None:
    """Names come from peers."""
    hostile = {"device": "a\x1b[2J", "tasks": {"x\r": {}}, "obstacles": [{"name": "n\x07", "text": "t"}]}
    assert all(letter.isprintable() for line in words.status(hostile) for letter in line)


def test_why_gives_the_answer_then_the_remedy_then_the_table() -> None:
    """A constraint that is not met has its advice; measured and wanted carry their units."""
    memory = {
        "name": "memory",
        "verdict": "unmet",
        "value": 100 << 20,
        "threshold": 768 << 20,
        "text": "100 MiB of memory available",
        "setting": "policy.memory_free",
        "source": "/proc/meminfo",
        "advice": "end what needs the memory",
    }
    reason = {"name": "no_offer", "text": "no round is open", "advice": "wait", "seconds": None}
    task = {"answer": "a", "reasons": [reason], "constraints": [memory]}
    lines = words.why({"answer": "so", "reasons": [], "constraints": [memory], "tasks": {"digits": task}})
    assert lines[0] == "so"
    assert "  100 MiB of memory available: end what needs the memory" in lines
    assert lines[lines.index("task digits:") + 1] == "  no round is open"
    assert "100 MiB   768 MiB  policy.memory_free  /proc/meminfo" in lines[-1]
    assert sum("end what needs" in line for line in lines) == 1  # the task has no other reason of that kind


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("battery", 20.0, "20 %"),
        ("heat", 61.5, "61.5 °C"),
        ("budget", 3600.0, "3600 s"),
        ("data", 12, "12"),
        ("mains", "mains", "mains"),
        ("calendar", "x" * 99, "x" * 37 + "..."),
        ("disk", None, "-"),
    ],
)
def test_values_have_units(name: str, found: Any, said: str) -> None:
    """As a person says them, and never too wide for a table."""
    assert words.value(name, found) == said


def test_what_is_on_its_way_is_told_in_words() -> None:
    """One line for a download and one for each update: how much, how often, and what it waits for."""
    shown = {"task": "points", "round": 3, "bytes": 20_100_000, "chunks": 164, "asked": 0, "attempts": 2}
    assert words.waiting(shown | {"next_try": 40.2}) == "points round 3, 20.1 MB: sent 2 times, next try in 40 s"
    held = words.waiting(shown | {"next_try": None, "attempts": 0})
    assert held.endswith("not sent yet, held until somebody is there")
    assert words.waiting(shown | {"asked": 64, "next_try": 300.0}).endswith("64 of 164 chunks are on their way")
    download = {"task": "points", "bytes": 5_000_000, "total": 20_000_000, "percent": 25.0}
    assert words.progress(download) == "points: 5.0 MB of 20.0 MB (25 %)"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (61, "1 min 1 s"), (7200, "2 h"), (90_061, "1 d 1 h")])
def test_a_length_of_time(seconds: float, said: str) -> None:
    """By its two largest units."""
    assert words.span(seconds) == said
