"""The Debian packages on a real machine: installed, enrolled, trained with, upgraded, misconfigured, purged."""

import gzip
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.deb import contents
from edge_agent import install
from edge_agent.libraries import WANTED
from shared.events import Event, message_id_of
from shared.version import VERSION
from tests.hostile.daemon import LEASH, until
from tests.system import plant
from tests.system.conftest import ROOT, Packages
from tests.system.machine import Machine
from tests.system.plant import LENT, SITE, VENV, lend_trainer, needs_same_python, points, publish, status, waited

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]  # the first one builds packages and root file system

MODEL = '''
"""A small net for points in six dimensions."""
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
'''

TASK = """
name = "clouds"
metric = "accuracy"
clip = 10.0
[training]
optimizer = "sgd"
lr = 0.01
batch_size = 8
epochs = 2
[data]
dataset = "clouds"
inputs = [{ name = "x", dtype = "float32", shape = [6] }]
target = { name = "y", dtype = "int64", shape = [], classes = 3 }
[plan]
goal = 1
min_updates = 1
rounds = 3
deadline = 60
"""


# -- the packages as files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lintian(packages: Packages) -> Iterator[subprocess.Popen[str]]:
    """Debian's own checker, at work beside the tests, because it takes a minute."""
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    command = [
        *LEASH,
        "lintian",
        "--allow-root",
        "--tag-display-limit=0",
        str(packages.agent),
        str(packages.aggregator),
    ]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield started
    started.kill()
    started.wait()


@pytest.fixture(scope="module", autouse=True)
def _begin_early(request: pytest.FixtureRequest) -> None:
    if shutil.which("lintian") is not None:
        request.getfixturevalue("lintian")


def test_every_override_has_its_reason() -> None:
    """A line that silences lintian stands below a comment that says why."""
    files = sorted((ROOT / "deploy/deb/debian").glob("*.lintian-overrides"))
    for file in files:
        before = ""
        for line in file.read_text().splitlines():
            assert line.startswith("#") or before.startswith(("#", line.split(":")[0])), (file.name, line)
            before = line
    assert len(files) == 2


@pytest.mark.parametrize(("program", "package"), [("edge-agent", "agent"), ("aggregator", "aggregator")])
def test_manual_and_completions_are_inside(packages: Packages, program: str, package: str, tmp_path: Path) -> None:
    """The package has the manual page and the completions that tests/unit/test_deb_contents.py judges."""
    wanted = {f"man/man1/{program}.1.gz": contents.manual(program)}
    places = {
        "bash": f"bash-completion/completions/{program}",
        "zsh": f"zsh/vendor-completions/_{program}",
        "fish": f"fish/vendor_completions.d/{program}.fish",
    }
    wanted |= {place: contents.completion(program, shell) for shell, place in places.items()}
    subprocess.run(["dpkg-deb", "-x", getattr(packages, package), tmp_path], check=True)
    for name, text in wanted.items():
        inside = (tmp_path / "usr/share" / name).read_bytes()
        assert (gzip.decompress(inside) if name.endswith(".gz") else inside).decode() == text, name


# -- a device that is set up, trains, is upgraded and taken down -----------------------------------------------------


@pytest.fixture(scope="module")
def machine(machines: Callable[..., Machine], packages: Packages) -> Machine:
    """A fresh Debian with both packages installed, and nothing configured."""
    made = machines("pump", lend={SITE: LENT})
    packages.install(made)
    return made


@pytest.fixture(scope="module")
def field(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The same as a whole fleet: broker, aggregator and one device, all running; no torch, and no task yet."""
    plant.set_up(machine, points(tmp_path_factory.mktemp("data") / "clouds.npz", (6,)), "clouds")
    return machine


def test_installation_starts_nothing(machine: Machine) -> None:
    """The packages bring commands, users, units and a sample of the configuration; what runs is for people to say."""
    for unit in ("edge-agent", "aggregator"):
        assert machine.run("systemctl", "is-enabled", unit, check=False).stdout.strip() == "disabled"
        assert machine.run("systemctl", "is-active", unit, check=False).stdout.strip() == "inactive"
    for user in ("fieldfare-agent", "fieldfare-aggregator"):
        assert machine.run("id", "-un", user).stdout.strip() == user
    for command in ("edge-agent", "aggregator"):
        assert machine.run(command, "--version").stdout.split() == [command, VERSION]
        machine.shell(f"source /usr/share/bash-completion/completions/{command}; complete -p {command}")
    assert "[policy]" in machine.read("/etc/fieldfare/agent.toml")
    found = json.loads(machine.run("edge-agent", "trainer", "status", "--json").stdout)
    assert (found["torch"], found["missing"]) == (None, list(WANTED))
    site = f"{VENV}/lib/python3.11/site-packages"
    assert not machine.exists(f"{site}/numpy") and not machine.exists(f"{site}/aggregator")


def test_without_configuration_it_stays_down(machine: Machine) -> None:
    """A device that was never enrolled says what is missing, once, and systemd does not try again and again."""
    machine.run("systemctl", "start", "edge-agent", check=False)
    until(lambda: machine.show("edge-agent", "ActiveState") == "failed" or None, "the end of the agent")
    assert (machine.show("edge-agent", "ExecMainStatus"), machine.show("edge-agent", "NRestarts")) in (
        ("78", "0"),
        ("243", "0"),  # no key to hand out: systemd's word for a missing credential
    )
    machine.run("systemctl", "reset-failed", "edge-agent")
    ran = machine.run("edge-agent", "config", "check", check=False)
    assert ran.returncode == 78 and "/etc/fieldfare/agent.toml: broker: is missing" in ran.stderr


def test_no_trainer_is_an_obstacle(field: Machine) -> None:
    """Without torch the agent starts, connects and says what it lacks and how to get it."""
    field.wait_journal("edge-agent", EVENT="link.up")
    waited(field, "no_trainer")
    found = status(field)
    assert found["link"]["connected"] and not found["eligible"]
    assert "edge-agent trainer install" in found["obstacles"][0]["text"]
    assert "edge-agent trainer install" in field.show("edge-agent", "StatusText")
    assert field.wait_journal("edge-agent", EVENT="device.blocked")["OBSTACLES"]


@needs_same_python
def test_device_trains_and_reports(field: Machine, tmp_path: Path) -> None:
    """torch comes without a restart; a model published to models/release is trained, and the journal shows it all."""
    before = field.show("edge-agent", "MainPID")
    lend_trainer(field)
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "task.toml").write_text(TASK)
    publish(field, f"{tmp_path / 'net.py'}:net", tmp_path / "task.toml")
    accepted = field.wait_journal("edge-agent", TASK="clouds", ROUND=1, EVENT="update.answered")
    assert accepted["OUTCOME"] == "accepted"
    finished = field.wait_journal("edge-agent", TASK="clouds", ROUND=1, EVENT="training.finished")
    assert finished["MESSAGE_ID"] == message_id_of(Event.TRAINING_FINISHED)
    assert finished["_SYSTEMD_UNIT"] == "edge-agent.service" and finished["SYSLOG_IDENTIFIER"] == "edge-agent"
    assert int(finished["EXAMPLES"]) > 50 and finished["PRIORITY"] == "6"
    closed = field.wait_journal("aggregator", TASK="clouds", ROUND=1, EVENT="round.closed")
    assert closed["MESSAGE_ID"] == message_id_of(Event.ROUND_CLOSED)
    assert field.show("edge-agent", "MainPID") == before and field.show("edge-agent", "NRestarts") == "0"
    assert "clouds release" in field.show("edge-agent", "StatusText")


def newer(package: Path, folder: Path, renames: str = "", revision: int = 99) -> Path:
    """The same package with a higher revision, and settings of the agent's that it renames."""
    subprocess.run(["dpkg-deb", "-R", package, folder / "tree"], check=True)
    control = folder / "tree/DEBIAN/control"
    text = re.sub(r"(?m)^Version: (.*)-\d+$", rf"Version: \1-{revision}", control.read_text())
    control.write_text(text)
    if renames:
        (migration,) = (folder / "tree").glob("usr/lib/*/lib/python3*/site-packages/shared/migration.py")
        before = migration.read_text()
        migration.write_text(re.sub(r"(?m)^(AGENT: .*) = \(\)$", rf"\1 = {renames}", before))
        assert migration.read_text() != before
    made = folder / f"{package.name.split('_')[0]}_new.deb"
    subprocess.run(
        ["dpkg-deb", "-Znone", "--root-owner-group", "-b", folder / "tree", made], check=True, stdout=subprocess.DEVNULL
    )
    return made


def test_upgrade_keeps_state(field: Machine, packages: Packages, tmp_path: Path) -> None:
    """An upgrade in place restarts what runs, and only that; state, outbox, settings and torch stay."""
    kept = "find /var/lib/fieldfare-agent /etc/fieldfare -type f ! -name clock -printf '%p %s %m %u\\n' | sort"
    field.run("edge-agent", "pause")
    before, pid, tasks = field.shell(kept), field.show("edge-agent", "MainPID"), status(field)["tasks"]
    upgrade = newer(packages.agent, tmp_path)
    packages.install(field, upgrade)
    assert field.run("dpkg-query", "-W", "-f", "${Version}", "fieldfare-agent").stdout.endswith("-99")
    assert field.shell(kept) == before
    until(lambda: field.show("edge-agent", "ActiveState") == "active" or None, "the agent")
    assert field.show("edge-agent", "MainPID") != pid
    after = status(field)
    assert after["tasks"].keys() == tasks.keys() and after["tasks"]["clouds"]["release"] >= 1
    assert {each["name"] for each in after["obstacles"]} == {"paused"}
    assert field.run("systemctl", "is-enabled", "edge-agent").stdout.strip() == "enabled"

    field.run("systemctl", "stop", "edge-agent")
    packages.install(field, upgrade)
    assert field.show("edge-agent", "ActiveState") == "inactive"
    assert field.shell(kept) == before
    field.run("systemctl", "start", "edge-agent")
    field.run("edge-agent", "resume")


def test_upgrade_renames_settings(field: Machine, packages: Packages, tmp_path: Path) -> None:
    """A setting that the new version calls otherwise has its new name afterwards, comment and all, and is heeded."""
    file = "/etc/fieldfare/agent.toml.d/zz.toml"
    field.write(file, "[policy]\nrest = 7.0  # seconds\n")
    packages.install(field, newer(packages.agent, tmp_path, '(("policy.rest", "policy.spacing"),)', 100))
    assert field.read(file) == "[policy]\nspacing = 7.0  # seconds\n"
    assert json.loads(field.run("edge-agent", "config", "check", "--json").stdout)["policy"]["spacing"] == 7.0
    until(lambda: field.show("edge-agent", "ActiveState") == "active" or None, "the agent")
    field.run("rm", file)


def test_wrong_configuration(field: Machine) -> None:
    """A wrong setting ends with 78 and is not tried again; the journal's line names file and key."""
    field.write("/etc/fieldfare/agent.toml.d/zz.toml", "[policy]\nmains = 'perhaps'\n")
    field.run("systemctl", "restart", "edge-agent", check=False)
    until(lambda: field.show("edge-agent", "ActiveState") == "failed" or None, "the end of the agent")
    time.sleep(0.1)
    assert (field.show("edge-agent", "ExecMainStatus"), field.show("edge-agent", "NRestarts")) == ("78", "0")
    said = [str(line["MESSAGE"]) for line in field.journal("edge-agent")][-8:]
    assert any("/etc/fieldfare/agent.toml.d/zz.toml: policy.mains" in line for line in said), said
    field.run("rm", "/etc/fieldfare/agent.toml.d/zz.toml")
    field.run("systemctl", "restart", "edge-agent")


def test_remove_and_purge(field: Machine) -> None:
    """Removing stops the daemons and keeps what is the owner's; purging leaves nothing but the accounts."""
    mine = "find / -xdev \\( -name '*fieldfare*' -o -name '*edge-agent*' -o -path '*/systemd/*aggregator*' \\)"
    ours = f"{mine} -not -path '/root/*' -not -path '/var/log/*' -not -path '/etc/mosquitto/*' -not -path '/proc/*'"
    assert field.show("edge-agent", "ActiveState") == "active"
    field.run("apt-get", "remove", "-y", "-q", "fieldfare-agent")
    assert field.run("pgrep", "-u", "fieldfare-agent", check=False).stdout == ""
    assert not field.exists(VENV) and not field.exists("/usr/bin/edge-agent")
    assert field.exists("/var/lib/fieldfare-agent") and field.exists("/etc/fieldfare/device.key")
    assert field.show("aggregator", "ActiveState") == "active"

    field.run("apt-get", "purge", "-y", "-q", "fieldfare-agent")
    left = field.shell("ls /etc/fieldfare").split()
    assert {"aggregator.toml", "ca.crt", "root.msgpack"} <= set(left) and not set(left) & {"agent.toml", "device.key"}
    field.run("apt-get", "purge", "-y", "-q", "fieldfare-aggregator")
    assert field.run("pgrep", "-u", "fieldfare-aggregator", check=False).stdout == ""
    assert field.shell(ours).split() == ["/etc/systemd/system/mosquitto.service.d/fieldfare.conf"]
    assert field.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"


# -- torch for real --------------------------------------------------------------------------------------------------


@needs_same_python
def test_trainer_install_from_a_folder(machines: Callable[..., Machine], packages: Packages, wheels: Path) -> None:
    """`edge-agent trainer install --wheels` lets a device without a network train, and `remove` takes it back."""
    device = machines("spare", lend={wheels: "/srv/wheels"})
    packages.install(device, packages.agent)

    refused = device.run("setpriv", "--reuid=nobody", "--clear-groups", "edge-agent", "trainer", "install", check=False)
    assert refused.returncode == 1 and "sudo" in refused.stderr
    offline = device.run("edge-agent", "trainer", "install", "--index", "http://127.0.0.1:9/simple", check=False)
    assert offline.returncode == 1 and "cannot be reached" in offline.stderr.splitlines()[-1]

    done = device.run("edge-agent", "trainer", "install", "--wheels", "/srv/wheels", "--json", timeout=300)
    found = json.loads(done.stdout)
    assert found["missing"] == [] and found["torch"].startswith(install.torch_version())
    user = ["setpriv", "--reuid=fieldfare-agent", "--regid=fieldfare-agent", "--clear-groups"]
    device.run(*user, f"{VENV}/bin/python", "-P", "-m", "edge_agent.trainer", "--help")
    assert not device.shell(f"ls -A {VENV} | grep trainer || true")

    device.run("edge-agent", "trainer", "remove", timeout=120)
    found = json.loads(device.run("edge-agent", "trainer", "status", "--json").stdout)
    assert (found["torch"], found["missing"]) == (None, list(WANTED))
    assert device.run("edge-agent", "--version").returncode == 0


def test_lintian_has_nothing_to_say(lintian: subprocess.Popen[str]) -> None:
    """Debian's own checker finds nothing that is not overridden with its reason."""
    said, _ = lintian.communicate(timeout=300)
    assert lintian.returncode == 0 and not re.search(r"^[EW]: ", said, re.MULTILINE), said
