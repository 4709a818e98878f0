"""A daemon with a bad configuration does not start: exit status 78 and one line with file, key and remedy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.broker.broker import Fleet
from tests.hostile.field import configuration

Edit = Callable[[str, Path], str]
"""(text of the file, its folder) -> the bad text."""


def put(section: str, line: str) -> Edit:
    """A line at the head of a section."""
    return lambda text, folder: text.replace(f"[{section}]\n", f"[{section}]\n{line}\n")


def replaced(key: str, line: str) -> Edit:
    """Another line in place of a key's."""
    return lambda text, folder: "\n".join(
        line if old.split("=")[0].strip() == key else old for old in text.splitlines()
    )


def emptied(name: str) -> Edit:
    """One of the files that the configuration names holds something else."""

    def edit(text: str, folder: Path) -> str:
        (folder / name).write_bytes(b"something else\n")
        return text

    return edit


def gone(name: str) -> Edit:
    """One of the files that the configuration names is not there."""

    def edit(text: str, folder: Path) -> str:
        (folder / name).unlink()
        return text

    return edit


Package = Literal["aggregator", "edge_agent"]
CASES: dict[str, tuple[Package, Edit, tuple[str, ...]]] = {
    "agent_unknown_key": ("edge_agent", put("broker", "hots = 1"), ("agent.toml", "broker.hots", "host")),
    "agent_unknown_section": ("edge_agent", lambda t, f: t + "\n[brokers]\n", ("agent.toml", "brokers", "broker")),
    "agent_wrong_type": ("edge_agent", replaced("port", 'port = "8883"'), ("agent.toml", "broker.port")),
    "agent_out_of_range": ("edge_agent", replaced("port", "port = 70000"), ("agent.toml", "broker.port", "65535")),
    "agent_no_host": ("edge_agent", replaced("host", ""), ("agent.toml", "broker.host")),
    "agent_no_toml": ("edge_agent", lambda t, f: t + "\nthis is not TOML\n", ("agent.toml", "line")),
    "agent_no_text": ("edge_agent", lambda t, f: t + "\udcff", ("agent.toml",)),
    "agent_missing_file": ("edge_agent", gone("root.msgpack"), ("trust.root", "root.msgpack")),
    "agent_missing_key": ("edge_agent", gone("device.key"), ("broker.key", "device.key")),
    "agent_certificate_is_none": ("edge_agent", emptied("device.crt"), ("device.crt", "certificate")),
    "agent_key_is_none": ("edge_agent", emptied("device.key"), ("device.key", "key")),
    "agent_ca_is_none": ("edge_agent", emptied("ca.crt"), ("ca.crt", "broker.ca", "certificate")),
    "agent_root_is_none": ("edge_agent", emptied("root.msgpack"), ("root.msgpack", "root record")),
    "agent_another_name": ("edge_agent", put("device", 'name = "another"'), ("device.name", "another")),
    "agent_bad_window": ("edge_agent", put("policy", 'windows = ["25:00-26:00"]'), ("policy.windows", "25:00")),
    "agent_bad_zone": ("edge_agent", put("policy", 'timezone = "Nowhere/Town"'), ("policy.timezone", "Europe/Berlin")),
    "agent_data_of_no_kind": ("edge_agent", lambda t, f: t + '\n[data.d]\npath = "d.xls"\n', ("data.d", "kind")),
    "aggregator_unknown_key": ("aggregator", put("state", "dir = 1"), ("aggregator.toml", "state.dir", "directory")),
    "aggregator_wrong_type": (
        "aggregator",
        replaced("message_max", "message_max = true"),
        ("aggregator.toml", "broker.message_max"),
    ),
    "aggregator_missing_file": ("aggregator", gone("signing.key"), ("trust.signing_key", "signing.key")),
    "aggregator_key_is_none": ("aggregator", emptied("signing.key"), ("signing.key", "key")),
    "aggregator_root_is_none": ("aggregator", emptied("root.msgpack"), ("root.msgpack", "root record")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_configuration(fleet: Fleet, tmp_path: Path, case: str) -> None:
    """It exits with 78 and one line that names the file, the key and what belongs there."""
    package, edit, named = CASES[case]
    source = configuration(fleet) if package == "edge_agent" else fleet.folder / "aggregator" / "aggregator.toml"
    for file in source.parent.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / source.name
    text = edit(config.read_text(), tmp_path)
    config.write_text(text, errors="surrogateescape")
    refused(package, config, named)


@pytest.mark.parametrize("package", ["aggregator", "edge_agent"])
def test_no_configuration(tmp_path: Path, package: Package) -> None:
    """A configuration that is not there is told like a bad one."""
    refused(package, tmp_path / "absent.toml", ("absent.toml",))


def refused(package: Package, config: Path, named: tuple[str, ...]) -> None:
    """Run the daemon; it must end at once."""
    done = subprocess.run(
        [sys.executable, "-m", f"{package}.cli", "run", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    for word in (str(config.parent), *named):
        assert word in line
