"""What an owner asks a real agent on a real broker: status, why and doctor, as the commands print them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.broker import Broker
from edge_agent import cli
from tests.broker.broker import Fleet
from tests.hostile.daemon import until
from tests.hostile.field import AGENT, Field

pytestmark = pytest.mark.usefixtures("broker")


@pytest.fixture(scope="module")
def field(fleet: Fleet, broker: Broker) -> Iterator[Field]:
    """An agent that runs, and knows a task for which it has no data."""
    made = Field(fleet, '[trainer]\npython = "/nowhere/bin/python"\n')
    with made.daemon:
        made.start()
        made.task("points")
        made.offer("points")
        made.fence()
        yield made
        assert made.daemon.stop() == 0


def told(capsys: pytest.CaptureFixture[str], fleet: Fleet, *command: str, code: int = 0) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert cli.main([*command, "--config", str(fleet.bundle(AGENT) / "agent.toml")]) == code
    return capsys.readouterr().out


def checks(text: str) -> dict[str, dict[str, Any]]:
    """The doctor's findings by name."""
    return {each["name"]: each for each in json.loads(text)["checks"]}


def test_status_and_why(field: Field, fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason stands in the first lines of both; a program reads the same in stable keys."""
    shown = told(capsys, fleet, "status").splitlines()
    assert shown[0].startswith(f"{AGENT}: ") and "no data set" in shown[1]
    assert any(line.startswith("link") and "connected to localhost" in line for line in shown)
    found = json.loads(told(capsys, fleet, "why", "--json"))
    assert found["training"] is False and "no data set" in found["answer"]
    (reason,) = found["tasks"]["points"]["reasons"]
    assert reason["name"] == "no_data"
    assert {each["name"] for each in found["constraints"]} >= {"mains", "paused", "calendar", "cpu"}
    told(capsys, fleet, "pause", "--for", "2h")
    text = told(capsys, fleet, "why", "points")
    assert "the operator paused it until" in text.splitlines()[0] and "edge-agent resume" in text
    told(capsys, fleet, "resume")


def test_doctor_asks_the_agent_that_runs(field: Field, fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes nothing over: the link stays up, and the broker's acknowledgement is the agent's own."""
    (fleet.bundle(AGENT) / "state").chmod(0o700)
    lines = len(field.daemon.read())
    found = checks(told(capsys, fleet, "doctor", "--json", code=1))
    assert {name for name, each in found.items() if each["result"] == "failed"} == {"trainer"}  # as configured
    for name in ("agent", "broker", "permission", "key", "certificate", "root record", "state directory", "disk"):
        assert found[name]["result"] == "ok", found[name]
    assert found["tasks"]["result"] == "warning"
    assert [line for line in field.daemon.read()[lines:] if line["event"].startswith("link.")] == []


def test_doctor_connects_by_itself_where_no_agent_runs(
    field: Field, fleet: Fleet, broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Let in and allowed to publish; not allowed to, by the broker's own word; and not let in at all."""
    assert field.daemon.stop() == 0
    config = fleet.bundle(AGENT) / "agent.toml"
    found = checks(told(capsys, fleet, "doctor", "--json", code=1))
    assert (found["agent"]["result"], found["broker"]["result"]) == ("warning", "ok")
    assert found["permission"]["result"] == "ok"
    before = config.read_text()
    config.write_text(before.replace("[broker]\n", '[broker]\nprefix = "other"\n'))
    refused = checks(told(capsys, fleet, "doctor", "--json", code=1))["permission"]
    assert refused["result"] == "failed" and "Not authorized" in refused["text"]
    config.write_text(before.replace(f"port = {fleet.port}", "port = 1"))
    start = time.monotonic()
    unreachable = checks(told(capsys, fleet, "doctor", "--json", code=1))["broker"]
    assert unreachable["result"] == "failed" and "nothing listens" in unreachable["text"]
    assert time.monotonic() - start < 60.0
    config.write_text(before)
    field.daemon.start()
    until(lambda: Path(config.parent / "run" / "control.sock").exists() or None, "the agent")
