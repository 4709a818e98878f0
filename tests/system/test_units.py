"""systemd/: the units mean something to systemd, shut the daemons in, and name commands and files that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aggregator.config import AggregatorConfig, RegistrarConfig
from edge_agent.config import AgentConfig, Device
from shared.config import PREFIX, effective

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = {
    "edge-agent.service": "fieldfare-agent",
    "aggregator.service": "fieldfare-aggregator",
    "registrar.service": "fieldfare-registrar",
}
COMMANDS = {
    "edge-agent.service": "/usr/lib/fieldfare-agent/bin/edge-agent run --config /etc/fieldfare/agent.toml",
    "aggregator.service": "/usr/lib/fieldfare-aggregator/bin/aggregator run --config /etc/fieldfare/aggregator.toml",
    "registrar.service": (
        "/usr/lib/fieldfare-aggregator/bin/aggregator registrar run --config /etc/fieldfare/registrar.toml"
    ),
}
EXPOSURE_MAX = 1.6
"""Of 10; the usual daemons reach 4.6 to 9.6."""

pytestmark = pytest.mark.system
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_sysusers = pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is missing")
needs_tmpfiles = pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is missing")


class Unit:
    """A unit file; a key may be given several times."""

    def __init__(self, name: str) -> None:
        self._lines = [
            line.partition("=")[::2] for line in (UNITS / name).read_text().splitlines() if re.match(r"\w+=", line)
        ]

    def all(self, key: str) -> list[str]:
        """Every value of `key`."""
        return [value for found, value in self._lines if found == key]

    def one(self, key: str) -> str:
        """Its only value."""
        (value,) = self.all(key)
        return value


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of systemd's."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_no_fault(tmp_path: Path, name: str) -> None:
    """Every key and value is one that systemd knows; a warning is a fault too."""
    program = Unit(name).one("ExecStart").split()[0]
    copy = tmp_path / name
    copy.write_text((UNITS / name).read_text().replace(program, "/bin/true"))
    verified = run("systemd-analyze", "verify", "--man=no", str(copy))
    # It also complains about other units of this machine: only lines about ours count.
    ours = [line for line in (verified.stderr + verified.stdout).splitlines() if name in line]
    assert (verified.returncode, ours) == (0, [])


@needs_analyze
def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """A misspelt key is reported, so the test above can fail."""
    broken = tmp_path / "broken.service"
    broken.write_text("[Service]\nExecStart=/bin/true\nProtectSytem=strict\n")
    assert "ProtectSytem" in run("systemd-analyze", "verify", "--man=no", str(broken)).stderr


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_daemon_is_shut_in(name: str) -> None:
    """What a daemon can reach, beyond what it must, is closed: systemd's own score stays low."""
    threshold = str(int(EXPOSURE_MAX * 10))
    scored = run(
        "systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", str(UNITS / name)
    )
    assert scored.returncode == 0, scored.stdout[-2000:]
    overall = re.search(r"Overall exposure level for .*: ([0-9.]+) ", scored.stdout)
    assert overall is not None
    assert 0 < float(overall[1]) <= EXPOSURE_MAX


@pytest.mark.parametrize("name", SERVICES)
def test_daemon_starts_stops_and_stays_down_as_promised(name: str) -> None:
    """Ready when it says so, watched, restarted unless its configuration is wrong, under a user of its own."""
    unit, user = Unit(name), SERVICES[name]
    assert unit.one("Type") == "notify"
    assert unit.one("Restart") == "on-failure"
    assert "78" in unit.one("RestartPreventExitStatus").split()
    assert unit.all("WatchdogSec")
    assert unit.one("User") == unit.one("StateDirectory") == unit.one("RuntimeDirectory") == user
    assert unit.one("StateDirectoryMode") == "0700"
    assert unit.one("ExecStart") == COMMANDS[name]


def test_agent_keeps_what_training_needs() -> None:
    """Measured: with any of these torch breaks, or idle cannot be told from busy, or a child's death is the agent's."""
    unit = Unit("edge-agent.service")
    assert not unit.all("MemoryDenyWriteExecute")
    assert not unit.all("ProcSubset")
    assert not unit.all("MemoryHigh")
    assert not any("@resources" in value for value in unit.all("SystemCallFilter"))
    assert unit.one("OOMPolicy") == "continue"
    assert set(unit.one("Delegate").split()) == {"cpu", "memory", "pids"}


def test_homes_are_closed_and_can_be_opened() -> None:
    """With `yes` nothing below /home can be bound into the unit's view, as docs/howto/install.md has it done."""
    assert Unit("edge-agent.service").one("ProtectHome") == "tmpfs"
    assert {Unit(name).one("ProtectHome") for name in SERVICES if not name.startswith("edge-")} == {"yes"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("edge-agent.service", AgentConfig),
        ("aggregator.service", AggregatorConfig),
        ("registrar.service", RegistrarConfig),
    ],
)
def test_credentials_reach_settings_that_exist(name: str, kind: type) -> None:
    """Each credential is handed on by an override that names a real key, or the daemon would refuse to start."""
    unit = Unit(name)
    given = {value.partition(":")[0] for value in unit.all("LoadCredential")}
    handed = {}
    for assignment in " ".join(unit.all("Environment")).split():
        variable, _, value = assignment.partition("=")
        if variable.startswith(PREFIX):
            section, key = variable.removeprefix(PREFIX).lower().split("__")
            assert key in kind.__annotations__[section].__struct_fields__
            handed[value.removeprefix("%d/")] = key
    assert set(handed) == given


def test_agent_directories_are_the_configurations_defaults() -> None:
    """The unit makes exactly the directories in which the agent looks."""
    plain = effective(Device())
    unit = Unit("edge-agent.service")
    assert plain["state_dir"] == f"/var/lib/{unit.one('StateDirectory')}"
    assert plain["run_dir"] == f"/run/{unit.one('RuntimeDirectory')}"


@needs_sysusers
def test_users_are_made(tmp_path: Path) -> None:
    """systemd-sysusers makes both users in an empty root."""
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "fieldfare.sysusers"))
    if made.returncode != 0 and "ermission" in made.stderr:
        pytest.skip("making users in another root needs root here")
    assert made.returncode == 0, made.stderr
    users = (tmp_path / "etc/passwd").read_text()
    for user in SERVICES.values():
        assert re.search(rf"^{user}:.*:/var/lib/{user}:/usr/sbin/nologin$", users, re.MULTILINE)


@needs_tmpfiles
def test_keys_become_roots_alone(tmp_path: Path) -> None:
    """systemd-tmpfiles closes keys that were copied with a mode too open."""
    folder = tmp_path / "etc/fieldfare"
    folder.mkdir(parents=True)
    keys = ("device.key", "agg-0.key", "signing.key", "ca.key", "registrar.key")
    for name in (*keys, "ca.crt"):
        (folder / name).write_text("x")
        (folder / name).chmod(0o644)
    made = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(UNITS / "fieldfare.tmpfiles"))
    if "Operation not permitted" in made.stderr:
        pytest.skip("giving files to root needs root")
    assert made.returncode == 0, made.stderr
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()}
    assert modes == dict.fromkeys(keys, "0o600") | {"ca.crt": "0o644"}


def test_nothing_starts_before_it_is_configured() -> None:
    """The preset leaves enabling to the operator."""
    lines = [line for line in (UNITS / "fieldfare.preset").read_text().splitlines() if not line.startswith("#")]
    assert lines == [f"disable {name}" for name in SERVICES]
