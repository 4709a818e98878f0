"""deploy.deb.contents: what the Debian packages say and install, made from the parsers, the lock and systemd/."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.deb import contents
from shared import lock

ROOT = Path(__file__).parents[2]
PACKAGES = ("fieldfare-agent", "fieldfare-aggregator")


@pytest.mark.parametrize("program", contents.PARSERS)
def test_every_command_is_explained_and_completed(program: str) -> None:
    """Manual page and completions name every command with every option, whatever is added to the command line."""
    page = contents.manual(program).replace("\\-", "-")
    shells = [contents.completion(program, shell) for shell in contents.SHELLS]
    commands = contents.commands(contents.PARSERS[program]())
    assert len(commands) == len({command.prog for command in commands}) > 5
    for command in commands:
        assert page.count(f".SH {command.prog.upper()}\n") == 1
        words = command.prog.split()[1:] + [option for action in command._actions for option in action.option_strings]
        for word in words:
            assert word in page and all(word.lstrip("-") in shell for shell in shells), (command.prog, word)
    assert ".SH NAME\n" in page and ".SH EXIT STATUS\n.TP\n0\ndone\n" in page


@pytest.mark.parametrize("program", contents.PARSERS)
def test_the_manual_page_is_one(program: str, tmp_path: Path) -> None:
    """man finds no fault in the page."""
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    ran = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8"], input=contents.manual(program), capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("program", contents.PARSERS)
def test_completions_are_scripts(program: str) -> None:
    """bash reads what is meant for it."""
    ran = subprocess.run(["bash", "-n"], input=contents.completion(program, "bash"), capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_each_package_installs_what_it_needs() -> None:
    """The agent's environment stays small, the aggregator's has no torch; every file is known by its hash."""
    agent, aggregator = (contents.requirements(package) for package in PACKAGES)
    assert {"cryptography", "paho-mqtt", "apscheduler"} <= lock.names(agent) < lock.names(aggregator)
    assert not lock.names(agent) & {"numpy", "zstandard", "rich", "sqlalchemy", "pytest"}
    assert {"numpy", "sqlalchemy", "starlette", "uvicorn"} <= lock.names(aggregator)
    assert not lock.names(aggregator) & {"torch", "pytest", "scikit-learn"}
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", aggregator))


@pytest.mark.parametrize("kind", ["sysusers", "tmpfiles", "preset"])
def test_systemds_files_are_shared_out(kind: str) -> None:
    """Every line of a file in systemd/ is in one of the packages, and only what both need is in both."""
    whole = {line for line in (ROOT / "systemd" / f"fieldfare.{kind}").read_text().splitlines() if line[:1] != "#"}
    agent, aggregator = (set(contents.systemd_file(kind, package).splitlines()) for package in PACKAGES)
    assert agent | aggregator == whole
    assert agent & aggregator == ({"d /etc/fieldfare 0755 root root -"} if kind == "tmpfiles" else set())
    assert agent and aggregator and not any("agg" in line for line in agent)
