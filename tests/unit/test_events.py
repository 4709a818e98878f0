"""shared.events: the documented events are exactly the ones the code can tell, and every one of them is told."""

import re
from pathlib import Path

import pytest

from shared.events import Event, level_of, message_id_of

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([a-z.]+)` \| (\w+) \| (.+) \| ([0-9a-f]{32}) \|$", re.MULTILINE)


def test_documentation_lists_exactly_these_events() -> None:
    """docs/events.md has a row for each, with its level, a meaning and its MESSAGE_ID."""
    rows = ROW.findall((ROOT / "docs/events.md").read_text())
    found = [(name, level, id) for name, level, _, id in rows]
    assert found == [(event.value, level_of(event), message_id_of(event)) for event in Event]


@pytest.mark.parametrize("event", Event)
def test_names_are_noun_and_participle(event: Event) -> None:
    """`noun.past_participle` in lower case, which is also a metric's name."""
    assert re.fullmatch(r"[a-z]+\.[a-z]+", event.value)


def test_every_event_is_told_somewhere() -> None:
    """An event that nothing tells would be a promise nobody keeps."""
    sources = [
        file.read_text()
        for package in ("shared", "edge_agent", "aggregator")
        for file in (ROOT / package).glob("*.py")
        if file.name != "events.py"
    ]
    silent = [event.name for event in Event if not any(f"Event.{event.name}" in source for source in sources)]
    assert silent == []


def test_message_ids_are_fixed_for_ever() -> None:
    """They follow from the name alone, and no two are the same."""
    assert message_id_of(Event.ROUND_OPENED) == "53e83570d1329ed4ec52b8e7dbab18c7"
    assert len({message_id_of(event) for event in Event}) == len(Event)
