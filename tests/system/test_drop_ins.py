"""Drop-ins for the agent's unit as the pages have them: data below /home, an encrypted key, models for all, a GPU.

One machine with systemd as PID 1, real mosquitto, and both packages. Every block that is tried is taken from the page,
and run or written as it stands; sudo runs its arguments, since the machine's only user is root. The tests run in this
order on the same device.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.daemon import until
from tests.system import plant
from tests.system.conftest import ROOT, Packages
from tests.system.machine import Machine
from tests.system.plant import AGENT, LENT, SITE, lend_trainer, needs_same_python, points, publish, status
from tests.system.test_package import MODEL, TASK

pytestmark = [pytest.mark.system, pytest.mark.timeout(600), needs_same_python]

UNIT = "edge-agent.service"
KEY = "/etc/fieldfare/device.key"
DATA = "/home/press/measurements"


def block(page: str, kind: str, word: str) -> str:
    """The only block of this kind on a page that has this word."""
    found = re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    (one,) = [text for text in found if word in text]
    return str(one)


class Press:
    """The device, its fleet, and what its owner does."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self._folder = machine, folder

    def do(self, script: str) -> str:
        """Run a block of a page."""
        return self.machine.shell('sudo() { "$@"; }\n' + script)

    def drop_in(self, name: str, text: str) -> None:
        """Change the unit and start it anew."""
        self.machine.drop_in(UNIT, name, text)
        self.restart()

    def restart(self) -> None:
        """The agent runs anew and has its link."""
        self.machine.run("systemctl", "restart", AGENT)

        def up() -> bool | None:
            ran = self.machine.run(AGENT, "status", "--json", check=False)
            return True if ran.returncode == 0 and json.loads(ran.stdout)["link"]["connected"] else None

        until(up, "the link", 60.0)

    def publish(self, name: str) -> None:
        """A task of one round."""
        (self._folder / "net.py").write_text(MODEL)
        task = self._folder / f"{name}.toml"
        task.write_text(TASK.replace('name = "clouds"', f'name = "{name}"').replace("rounds = 3", "rounds = 1"))
        publish(self.machine, f"{self._folder / 'net.py'}:net", task)

    def doctor(self) -> dict[str, dict[str, Any]]:
        """What it finds, by name."""
        ran = self.machine.run(AGENT, "doctor", "--json", check=False, timeout=120)
        assert ran.returncode in (0, 1), ran
        return {each["name"]: each for each in json.loads(ran.stdout)["checks"]}

    def inside(self, *command: str) -> str:
        """What a command says that sees the files as the unit does."""
        pid = self.machine.show(UNIT, "MainPID")
        return self.machine.run("nsenter", f"--target={pid}", "--mount", *command).stdout


@pytest.fixture(scope="module")
def press(machines: Callable[..., Machine], packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Press:
    """A fleet with one device, whose user `press` keeps the measurements to itself."""
    machine = machines("press", lend={SITE: LENT})
    packages.install(machine)
    folder = tmp_path_factory.mktemp("press")
    plant.set_up(machine, points(folder / "clouds.npz", (6,)), "clouds")
    lend_trainer(machine)
    machine.shell(
        f"""
        useradd --create-home press
        chmod 700 /home/press
        install -d -m 750 -o press -g press {DATA}
        install -m 640 -o press -g press /srv/data/clouds.npz {DATA}
        rm -r /srv/data
        """
    )
    machine.write("/etc/fieldfare/agent.toml.d/zz.toml", f'[data.clouds]\npath = "{DATA}/clouds.npz"\n')
    return Press(machine, folder)


def failed(checks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that are not well."""
    return {name: each for name, each in checks.items() if each["result"] == "failed"}


def test_data_below_home(press: Press) -> None:
    """The agent trains from a folder in a closed home that the drop-in lets in, and sees nothing else of any home."""
    press.drop_in("home", block("howto/install.md", "ini", "BindReadOnlyPaths="))
    assert press.inside("find", "/home", "-mindepth", "1").split() == ["/home/press", DATA, f"{DATA}/clouds.npz"]
    press.publish("homely")
    answered = press.machine.wait_journal(AGENT, TASK="homely", EVENT="update.answered")
    assert answered["OUTCOME"] == "accepted"
    checks = press.doctor()
    assert failed(checks) == {} and checks["data clouds"]["result"] == "ok", checks


def test_a_key_that_is_encrypted(press: Press) -> None:
    """The agent connects with it; no command of the owner's takes it for lost, and none writes another beside it."""
    machine = press.machine
    key = machine.read(KEY)
    press.do(block("howto/install.md", "sh", "systemd-creds encrypt"))
    assert not machine.exists(KEY) and "PRIVATE" not in machine.read(f"{KEY}.cred")
    press.drop_in("encrypted", block("howto/install.md", "ini", "LoadCredentialEncrypted="))

    checked = machine.run(AGENT, "config", "check", "--json")
    assert json.loads(checked.stdout)["broker"]["key"] == KEY and f"{KEY}.cred is encrypted" in checked.stderr
    checks = press.doctor()
    assert failed(checks) == {}, checks
    assert checks["key"]["result"] == "skipped" and checks["certificate"]["result"] == "ok"
    assert checks["permission"]["result"] == "ok"

    token = f"ff1.abcdefgh.{'A' * 22}.{'A' * 43}"
    again = machine.run(AGENT, "enrol", "https://localhost:8443", token, "--again", check=False)
    assert again.returncode == 1 and f"mv {KEY}.cred" in again.stderr
    assert not machine.exists(KEY)

    machine.run(AGENT, "bugreport", "-o", "/root/report.tar.gz", timeout=120)
    report = machine.run("tar", "--extract", "--to-stdout", "--gzip", "--file=/root/report.tar.gz").stdout
    lines = [*key.splitlines()[1:-1], *machine.read(f"{KEY}.cred").split()]
    assert not [line for line in lines if len(line) > 30 and line in report]
    for name in ("status", "why", "doctor", "config", "versions"):
        said = machine.run(
            "tar", "--extract", "--to-stdout", "--gzip", "--file=/root/report.tar.gz", f"report/{name}.json"
        ).stdout
        assert json.loads(said) and "[redacted]" not in said, said
    assert "LoadCredentialEncrypted=[redacted]" in report and "KillSignal=15" in report and "Link up: " in report

    machine.run("systemctl", "stop", AGENT)
    stopped = press.doctor()
    assert failed(stopped).keys() <= {"data clouds"}, stopped  # without the agent nobody sees what the unit lets it see
    assert stopped["certificate"]["result"] == stopped["broker"]["result"] == "skipped"
    press.restart()


def test_models_for_everybody(press: Press) -> None:
    """Other users predict with the models of a folder that the page opens; while it is closed the agent says so."""
    machine = press.machine
    press.do(block("cli.md", "sh", "/srv/models"))
    machine.write("/etc/fieldfare/agent.toml.d/models.toml", block("cli.md", "toml", "public = true"))
    press.restart()
    said = machine.wait_journal(AGENT, EVENT="storage.failed")
    assert said["PATH"] == "/srv/models" and "ReadWritePaths=" in said["DETAIL"]
    assert "/srv/models" in status(machine)["models"]["closed"]
    assert failed(press.doctor()).keys() == {"models"}

    press.drop_in("models", block("cli.md", "ini", "/srv/models"))
    assert status(machine)["models"] == {"folder": "/srv/models", "closed": None}
    press.publish("shared")
    machine.wait_journal(AGENT, TASK="shared", EVENT="model.used")
    user = ["setpriv", "--reuid=press", "--regid=press", "--init-groups"]
    listed = json.loads(machine.run(*user, AGENT, "models", "--json").stdout)["models"]
    assert "/srv/models/shared" in [each["path"] for each in listed]
    told = machine.run(*user, AGENT, "predict", "shared", f"{DATA}/clouds.npz").stdout.splitlines()
    assert told[0] == "class,output_0,output_1,output_2" and len(told) == 121
    machine.run(*user, "test", "!", "-w", "/srv/models/shared/model.safetensors")


def test_a_gpu(press: Press) -> None:
    """systemd finds no fault in these lines; where their group is missing the unit says so, else it starts with it."""
    machine = press.machine
    machine.drop_in(UNIT, "gpu", block("howto/install.md", "ini", "DeviceAllow="))
    verified = machine.run("systemd-analyze", "verify", "--man=no", UNIT, check=False)
    complaints = [line for line in (verified.stdout + verified.stderr).splitlines() if "edge-agent" in line]
    assert (verified.returncode, complaints) == (0, [])
    machine.run("groupdel", "render", check=False)
    machine.run("systemctl", "restart", AGENT, check=False)
    until(lambda: machine.show(UNIT, "ExecMainStatus") == "216" or None, "216/GROUP")
    machine.run("groupadd", "--system", "render")
    press.restart()
    group = machine.run("getent", "group", "render").stdout.split(":")[2]
    pid = machine.show(UNIT, "MainPID")
    groups = machine.run("grep", "^Groups:", f"/proc/{pid}/status").stdout.split()
    assert group in groups
    assert machine.show(UNIT, "DevicePolicy") == "closed" and machine.show(UNIT, "PrivateDevices") == "no"
    allowed = machine.show(UNIT, "DeviceAllow")
    assert "/dev/nvidia0 rw" in allowed and "/dev/nvidiactl rw" in allowed


def test_purged(press: Press) -> None:
    """The encrypted key goes as a plain one does; drop-ins, models for everybody and data are their owner's."""
    machine = press.machine
    machine.run("apt-get", "purge", "-y", "-q", "fieldfare-agent")
    assert machine.shell("find /etc/fieldfare -name '*device*' -o -name '*agent*'") == ""
    assert not machine.exists("/var/lib/fieldfare-agent")
    for path in ("/srv/models/shared/model.json", f"{DATA}/clouds.npz", f"/etc/systemd/system/{UNIT}.d/home.conf"):
        assert machine.exists(path), path
    machine.run("systemctl", "revert", AGENT)  # as docs/howto/uninstall.md has it
    assert not machine.exists(f"/etc/systemd/system/{UNIT}.d")
