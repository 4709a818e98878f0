"""What the agent does without, and that it is there all the same for who wants it."""

import subprocess
import sys

_AGENT = """
import sys
from edge_agent import lean
lean.put_off()
import edge_agent.cli, edge_agent.service
"""


def ran(script: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", _AGENT + script], check=True, capture_output=True, text=True).stdout


def test_the_agent_does_without() -> None:
    """Nothing of the agent's own asks for them, so that they stay away."""
    heavy = ["rich.console", "asyncio.events", "http.client", "email.message"]
    assert ran(f"print([name for name in {heavy} if name in sys.modules])") == "[]\n"


def test_they_are_there_for_who_asks() -> None:
    """By the module that was imported while they were put off, and by one that is imported afterwards."""
    script = """
import paho.mqtt.client, structlog.stdlib
print(structlog.stdlib.asyncio.run, paho.mqtt.client.urllib.request.proxy_bypass("localhost"))
import asyncio, urllib.request
async def five(): return 5
print(asyncio.run(five()), urllib.request.Request("http://localhost/").host)
"""
    assert "function run" in (said := ran(script)) and said.endswith("5 localhost\n")


def test_a_library_that_wants_them_after_all() -> None:
    """The calendar's scheduler imports names out of asyncio, which asks for more than one thing of it."""
    script = """
from apscheduler.schedulers.background import BackgroundScheduler
from urllib.request import Request, urlopen
import asyncio.subprocess, structlog.stdlib
print(asyncio.subprocess.PIPE, structlog.stdlib.asyncio.run is asyncio.run)
"""
    assert ran(script) == "-1 True\n"


def test_what_is_imported_already_stays() -> None:
    """A program that uses asyncio itself keeps the module that it has."""
    script = (
        "import asyncio; from edge_agent import lean; lean.put_off(); import asyncio as again; print(again is asyncio)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"True\n"
