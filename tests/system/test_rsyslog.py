"""The recipe of docs/howto/logs.md, on a real machine: our own log in the real journal, read by the real rsyslog."""

import base64
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import logs
from shared.events import Event, message_id_of
from shared.logs import tell
from tests.hostile.daemon import until
from tests.system.conftest import ROOT
from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

SEND = (
    "import base64, socket, sys\n"
    "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "for line in sys.argv[1:]: s.sendto(base64.b64decode(line), '/run/systemd/journal/socket')\n"
    "import time; time.sleep(2)\n"
)
"""Stays for a moment, since the journal learns a line's unit from the process that sent it."""


def recipe() -> str:
    """What the page tells to write."""
    page = (ROOT / "docs/howto/logs.md").read_text()
    (found,) = re.findall(r"```\n(# /etc/rsyslog.d/30-fieldfare.conf\n.*?)```", page, re.DOTALL)
    return str(found)


def recorded(folder: Path, *events: tuple[Event, dict[str, object]]) -> list[str]:
    """The datagrams that our log sends to the journal, in base64."""
    address = folder / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(address))
        logs.configure(form="journal", environ={}, identifier="edge-agent", journal=str(address))
        for event, fields in events:
            tell(event, **fields)
        return [base64.b64encode(journal.recv(65_536)).decode() for _ in events]


def test_rsyslog_reads_the_fields(machines: Callable[..., Machine], tmp_path: Path) -> None:
    """Each event is one JSON line with its fields, a line feed in one included; other units' lines are not there."""
    machine = machines("rsyslog")
    machine.write("/etc/rsyslog.d/30-fieldfare.conf", recipe())
    page = (ROOT / "docs/howto/logs.md").read_text()
    (commands,) = re.findall(r"```sh\n(sudo sed -i .*?)```", page, re.DOTALL)
    machine.shell(commands.replace("sudo ", ""))  # its only user is root
    sent = recorded(
        tmp_path,
        (Event.TRAINING_FINISHED, {"task": "digits", "round": 7, "seconds": 1.5}),
        (Event.UPDATE_REJECTED, {"task": "digits", "device": "sensor-1", "reason": 'a "word"\nand more'}),
    )
    machine.run("systemd-run", "--quiet", "--wait", "--unit=edge-agent", "python3", "-c", SEND, *sent)
    machine.run("systemd-run", "--quiet", "--wait", "--unit=other", "sh", "-c", "echo once; sleep 1")

    def read() -> list[dict[str, str]] | None:
        text = machine.run("cat", "/var/log/fieldfare.json", check=False).stdout
        return [json.loads(line) for line in text.splitlines()] if text.count("\n") >= 2 else None

    until(lambda: "once" in machine.run("cat", "/var/log/syslog", check=False).stdout or None, "the other unit's line")
    assert len(re.findall(r"\bonce$", machine.read("/var/log/syslog"), re.MULTILINE)) == 1
    finished, rejected = until(read, "two lines", 60.0)
    assert (finished["event"], finished["task"], finished["round"], finished["seconds"]) == (
        *("training.finished", "digits"),
        *("7", "1.5"),
    )
    assert finished["message_id"] == message_id_of(Event.TRAINING_FINISHED) and finished["priority"] == "6"
    assert finished["unit"] == "edge-agent.service" and "digits" in finished["message"]
    assert (rejected["device"], rejected["priority"]) == ("sensor-1", "4")
    assert rejected["reason"].startswith('a "word"') and "and more" in rejected["reason"]
