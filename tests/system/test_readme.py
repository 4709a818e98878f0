"""The README's walk, run as it is written, and every command, link and sample of the documents held against the truth.

In README.md a comment before a code block says what the test does with it: `file: NAME` writes it, `append: NAME` adds
it to a configuration, `test: NAME` has the method `Walk.NAME` look at what the block left. Every `sh` block is run by
bash as it stands, with these exceptions, because a test has no root, no systemd, no network and one machine:

- Server and device are folders. An absolute path in a block is one below the folder of its host, and the broker is
  called localhost, at a port of its own (`Walk.here`); the broker runs as the user of the test.
- _PLACES has shell functions for what cannot run: sudo runs its arguments (what needs root refuses to run without it),
  ssh goes to the host's folder, scp copies there, apt-get and journalctl only look at their arguments, systemctl notes
  them, `make setup wheel` asks make whether it knows the targets, install gives no file away, and a venv holds this
  environment's commands, which find their configuration below the folder of the host (tests/system/test_wheel.py builds
  and installs the wheel). systemd-sysusers and systemd-tmpfiles are a few lines of shell that want the files which the
  walk installed (tests/system/test_units.py gives them to the real ones).

What systemctl was told to start is started by the unit and the drop-in that the walk installed, with the credentials
that the unit names.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

import msgspec
import pytest

from aggregator import cli as aggregator_cli
from aggregator.broker import Broker, free_port
from aggregator.task import ConditionsSection, TaskFile, TrainingSection
from edge_agent import cli as agent_cli
from shared.events import Event
from shared.logs import sentence
from shared.messages import DataContract, Gate, Plan
from shared.version import VERSION
from tests.hostile.daemon import LEASH

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(found for folder in ("docs", "mosquitto", "examples", "bench") for found in (ROOT / folder).rglob("*.md")),
    ]
)
PASSPHRASE = "correct horse battery staple"
PATIENCE = 90.0
"""Seconds for anything that the processes of the walk do by themselves."""

_BLOCK = re.compile(r"(?:^<!-- (\w+): (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_JOURNAL = re.compile(r"\w{3} \d\d \d\d:\d\d:\d\d \S+ (aggregator|edge-agent)\[\d+\]: (.+)")
_COMMAND = re.compile(r"(?:^|[;|&] *)(?:sudo )?(?:[\w/.-]*/)?(aggregator|edge-agent) (.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `todo` and `what` are those of the comment before it, empty without one."""

    todo: str
    what: str
    language: str
    text: str


def _blocks(document: Path) -> list[Block]:
    return [
        Block(*(part or "" for part in found.groups()))
        for found in _BLOCK.finditer(document.read_text(encoding="utf-8"))
    ]


# -- the walk ------------------------------------------------------------------------------------------------------


SERVER, DEVICE = "broker.example.org", "sensor-1"
PROGRAMS = Path(sys.executable).parent
WHEEL = f"fieldfare-{VERSION}-py3-none-any.whl"

_PLACES = r"""
set -Eeuo pipefail
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
ssh() { cd "$HOSTS/$1/home"; HERE=$HOSTS/$1; PATH=$HERE/usr/local/bin:$SYSTEM_PATH; }
scp() { local to="${*: -1}"; [[ $to == *: ]]; cp -L "${@:1:$#-1}" "$HOSTS/${to%:}/home/"; }
sudo() { local root=yes; if [[ $1 == */bin/pip ]]; then pip "$@"; else "$@"; fi; }
apt-get() { [[ ${root-} && $* =~ ^install\ (mosquitto|python3-venv)$ ]]; }
systemctl() { [[ ${root-} ]]; echo "$*" >>"$HERE/systemctl"; }
journalctl() { [[ $1 == -u && -f $HERE/etc/systemd/system/$2.service ]]; }
make() { command make -n "$@" >&2; mkdir dist; touch "dist/$WHEEL"; }
install() {  # the same, but only root gives files away
    local kept=()
    [[ ${root-} ]]
    while (($#)); do
        case $1 in -o | -g) [[ $2 == mosquitto ]]; shift ;; *) kept+=("$1") ;; esac
        shift
    done
    command install "${kept[@]}"
}
systemd-sysusers() { [[ ${root-} && -f $HERE/usr/lib/sysusers.d/$1 ]]; }
systemd-tmpfiles() {
    local kind path mode rest
    [[ ${root-} && $1 == --create ]]
    while read -r kind path mode rest; do
        case $kind in
            d) command install -d -m "$mode" "$HERE$path" ;;
            z) if [[ -e $HERE$path ]]; then chmod "$mode" "$HERE$path"; fi ;;
            '#') ;;
            *) false ;;
        esac
    done <"$HERE/usr/lib/tmpfiles.d/$2"
}
python3() {  # -m venv FOLDER
    [[ ${root-} && $# == 3 && "$1 $2" == '-m venv' ]]
    mkdir -p "$3/bin"
    printf '#!/bin/bash\nexec %q "$@"\n' "$PYTHON" >"$3/bin/python"
    chmod +x "$3/bin/python"
}
pip() {  # FOLDER/bin/pip install WHAT
    local bin=${1%/pip} each extra name
    [[ -x $bin/python && $2 == install ]]
    for each in "${@:3}"; do
        case $each in
            --index-url | https://download.pytorch.org/whl/cpu) ;;
            torch==*) grep -q "^$each\b" "$CLONE/requirements/torch.txt" ;;
            *.whl\[*\])
                [[ -f ${each%\[*} ]]
                extra=${each##*\[}
                grep -q "^${extra%]} = \[" "$CLONE/pyproject.toml"
                for name in aggregator edge-agent; do
                    {
                        echo '#!/bin/bash'
                        printf '[[ " $* " == *" --config "* ]] || '
                        printf 'set -- "$@" --config %q\n' "$HERE/etc/fieldfare/${name#edge-}.toml"
                        printf 'exec %q "$@"\n' "$PROGRAMS/$name"
                    } >"$bin/$name"
                    chmod +x "$bin/$name"
                done
                ;;
            *) false ;;
        esac
    done
}
"""


def _settings(unit: Path, key: str) -> list[str]:
    """Every value of `key` in a unit file or a drop-in."""
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.M)


def _files(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir() if each.is_file()}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@dataclass
class Walk:
    """A scratch folder that holds all three places of the walk, and the processes that run in it."""

    home: Path
    port: int = field(default_factory=free_port)
    said: str = ""
    """What the block before printed."""
    broker_process: Broker | None = None
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server, self.device_root = self.home / SERVER, self.home / DEVICE
        # What a fresh Debian and its mosquitto package bring along.
        for host in (self.server, self.device_root):
            for folder in ("home", "etc/mosquitto", "etc/systemd/system", "srv", "usr/lib", "usr/local/bin"):
                (host / folder).mkdir(parents=True)
        (self.server / "var/lib/mosquitto").mkdir(parents=True)
        # The clone: what the walk uses of it.
        clone = self.home / "fieldfare"
        clone.mkdir()
        (clone / ".venv").symlink_to(PROGRAMS.parent)
        for name in ("Makefile", "systemd"):
            (clone / name).symlink_to(ROOT / name)
        self.work = clone
        self.system_path = os.pathsep.join(
            folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != PROGRAMS
        )
        self.path = self.system_path

    def here(self, text: str, host: Path) -> str:
        """`text` with the places of this machine instead of those of the README; absolute paths are those of `host`."""
        for there, here in {
            "--host broker.example.org": f"--host localhost --port {self.port}",
            "broker.example.org -p 8883": f"localhost -p {self.port}",
            "--broker-user mosquitto": f"--broker-user {getuser()}",
        }.items():
            text = text.replace(there, here)
        return re.sub(r"(?<![\w./-])/(?=\w)", f"{host}/", text)

    def shell(self, text: str) -> str:
        """Run commands as a user would, and return what they print; they must succeed."""
        environ = os.environ | {
            "PATH": self.path,
            "SYSTEM_PATH": self.system_path,
            "HOSTS": str(self.home),
            "CLONE": str(ROOT),
            "PROGRAMS": str(PROGRAMS),
            "PYTHON": sys.executable,
            "WHEEL": WHEEL,
            aggregator_cli.PASSPHRASE: PASSPHRASE,
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", "-c", f"{_PLACES}\n{text}"]
        ran = subprocess.run(command, cwd=self.work, env=environ, capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, f"{text}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def step(self, block: Block) -> None:
        """Do what one block of the README says."""
        match block:
            case Block(todo="file", what=name):
                (self.device_root / "home" if name == "data.py" else self.work).joinpath(name).write_text(block.text)
            case Block(todo="append", what="agent.toml"):
                with (self.device_root / "etc/fieldfare/agent.toml").open("a") as config:
                    config.write("\n" + self.here(block.text, self.device_root))
            case Block(todo="test", what=name):
                steps: dict[str, Callable[[Block], None]] = {
                    "install": self.install,
                    "broker": self.broker,
                    "aggregator": self.aggregator,
                    "device": self.device,
                    "agent": self.agent,
                    "watch": self.watch,
                    "status": self.status,
                }
                steps[name](block)
            case Block(todo="", language="sh"):
                self.said = self.shell(self.here(block.text, self.server))
            case _:
                pytest.fail(f"nothing knows what to do with {block}")

    def install(self, block: Block) -> None:
        """The commands are found from now on, by every later block, in the folder that this one ends in."""
        self.shell(f'{block.text}\nprintf "%s\\n" "$PWD" "$PATH" >"$HOSTS/left"')
        folder, self.path = (self.home / "left").read_text().splitlines()
        self.work = Path(folder)
        assert self.work.parent == self.home and not list(self.work.iterdir())
        assert f"dist/{WHEEL}" in block.text and (self.home / "fieldfare/dist" / WHEEL).exists()
        assert self.shell("type -P aggregator edge-agent").split() == [
            str(self.home / "fieldfare/.venv/bin" / name) for name in ("aggregator", "edge-agent")
        ]

    def broker(self, block: Block) -> None:
        """Its files arrive, all of them and closed to others; it starts by the drop-in."""
        self.shell(self.here(block.text, self.server))
        (drop_in,) = (self.server / "etc/systemd/system/mosquitto.service.d").glob("*.conf")
        assert drop_in.read_text().startswith("[Service]\n")
        reset, start = _settings(drop_in, "ExecStart")
        program, option, config = start.split()
        assert (reset, program, option) == ("", f"{self.server}/usr/sbin/mosquitto", "-c")
        folder = Path(config).parent
        assert folder == self.server / "etc/mosquitto/fieldfare" and _mode(folder) == 0o700
        assert _files(folder) == _files(self.work / "fleet/broker")
        assert {_mode(folder / name) for name in _files(folder)} == {0o600}
        assert not (self.server / "home/broker").exists()
        (data,) = re.findall(r"^persistence_location (.*)$", Path(config).read_text(), re.M)
        assert Path(data) == self.server / "var/lib/mosquitto"
        assert self._told(self.server) == ["daemon-reload", "restart mosquitto"]
        self.broker_process = Broker(folder, self.port)
        assert Path(config).name == "mosquitto.conf"  # which is what Broker starts
        self.broker_process.start()

    def aggregator(self, block: Block) -> None:
        """Its files arrive, all of them, the keys closed to others, and no copy stays behind."""
        self.shell(self.here(block.text, self.server))
        folder = self.server / "etc/fieldfare"
        assert _files(folder) == _files(self.work / "fleet/aggregator")
        assert not (self.server / "home/aggregator").exists()
        state = (folder / "aggregator.toml.d/state.toml").read_text()
        assert state == f'[state]\ndirectory = "{self.server}/var/lib/fieldfare-aggregator"\n'
        assert self._told(self.server) == ["enable --now aggregator"]
        self._start("aggregator", self.server)

    def device(self, block: Block) -> None:
        """The bundle is unpacked where the agent looks for it, the key closed to others, and no copy stays behind."""
        self.shell(self.here(block.text, self.device_root))
        folder = self.device_root / "etc/fieldfare"
        assert (folder / "agent.toml").is_file()
        assert (self.device_root / "etc/systemd/system/edge-agent.service").is_file()
        assert not (self.device_root / "home/sensor-1.tar.gz").exists()
        (folder / "agent.toml.d").mkdir()
        # Where systemd makes folders for the agent, and a policy that minds no other test on this machine.
        (folder / "agent.toml.d/test.toml").write_text(
            f"""
            [device]
            state_dir = "{self.device_root}/var/lib/fieldfare-agent"
            run_dir = "{self.device_root}/run/fieldfare-agent"
            [policy]
            mains = false
            settle = 0.0
            cpu_pressure = 100.0
            cpu_others = 100.0
            memory_pressure = 100.0
            io_pressure = 100.0
            memory_free = 0
            disk_free = 0
            """
        )

    def agent(self, block: Block) -> None:
        """The data, made on the device by the README's own program and command, lies where its configuration says."""
        (make_data,) = re.findall(r"`(\S+ data\.py)`", README.read_text(encoding="utf-8"))
        text = f"ssh {DEVICE}\n{make_data}\n{block.text}"
        data = f"{self.device_root}/srv/vibration.npz"
        assert data in self.shell(self.here(text, self.device_root)) and Path(data).is_file()
        assert self._told(self.device_root) == ["enable --now edge-agent"]
        self._start("edge-agent", self.device_root)

    def watch(self, _: Block) -> None:
        """Until every round of the task is done and the device has its release."""
        (rounds,) = re.findall(r"^rounds = (\d+)", (self.work / "task.toml").read_text(), re.M)
        self.until("edge-agent", f"Release accepted: task pump, version 1, release {rounds}, ")

    def status(self, block: Block) -> None:
        """Both commands as they were installed, on whichever host has them, with the configurations they look for."""
        paths = ":".join(f"{host}/usr/local/bin" for host in (self.server, self.device_root))
        self.said = self.shell(f"PATH={shlex.quote(paths)}:$SYSTEM_PATH\n{block.text}")

    def log(self, program: str) -> list[str]:
        """A daemon's log as the journal would show it."""
        assert self.daemons[program].poll() is None, (self.home / f"{program}.log").read_text()
        lines = (self.home / f"{program}.log").read_text().splitlines(keepends=True)
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        usual = {"time", "level", "event"}
        return [
            sentence(Event(line["event"]), {name: value for name, value in line.items() if name not in usual})
            for line in told
        ]

    def until(self, program: str, start: str) -> None:
        """Wait for a line of a daemon's log."""
        end = time.monotonic() + PATIENCE
        while not any(line.startswith(start) for line in self.log(program)):
            assert time.monotonic() < end, self.log(program)
            time.sleep(0.1)

    def stop(self) -> None:
        """End what was started, the newest first."""
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        if self.broker_process is not None:
            self.broker_process.stop()

    def _told(self, host: Path) -> list[str]:
        """What systemctl was told on a host since this was asked before."""
        told = (host / "systemctl").read_text().splitlines()
        (host / "systemctl").unlink()
        return told

    def _start(self, program: str, host: Path) -> None:
        """Start a daemon by its installed unit, which gives it copies of keys that only their owner can read."""
        unit = host / f"etc/systemd/system/{program}.service"
        credentials = host / f"run/credentials/{program}"
        credentials.mkdir(parents=True)
        for name, key in (each.split(":") for each in _settings(unit, "LoadCredential")):
            assert _mode(Path(f"{host}{key}")) == 0o600
            shutil.copy(f"{host}{key}", credentials / name)
        environ = dict(
            each.replace("%d", str(credentials)).split("=", 1)
            for line in _settings(unit, "Environment")
            for each in line.split()
        )
        (start,) = _settings(unit, "ExecStart")
        with (self.home / f"{program}.log").open("wb") as log:
            self.daemons[program] = subprocess.Popen(
                [*LEASH, *self.here(start, host).split()],
                env=os.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.until(program, "Link up")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Walk, dict[str, str]]]:
    """The walk after its last step, and what each `sh` block printed, by its first line."""
    walk, said = Walk(tmp_path_factory.mktemp("walk")), dict[str, str]()
    try:
        for block in _blocks(README)[_beginning() :]:
            if block.language == "text" and not block.todo:
                continue
            walk.step(block)
            said[block.text.splitlines()[0]] = walk.said
        yield walk, said
    finally:
        walk.stop()


def _beginning() -> int:
    return next(number for number, block in enumerate(_blocks(README)) if block.what == "install")


@pytest.mark.system
@pytest.mark.timeout(400)
def test_the_walk_ends_with_a_model_of_the_fleets_making(walked: tuple[Walk, dict[str, str]]) -> None:
    """Every block works in the order in which it stands, and load_state_dict takes what comes out."""
    _, said = walked
    (exported,) = [out for first, out in said.items() if first.startswith("aggregator model export")]
    assert "wrote release 10 of pump" in exported and "<All keys matched successfully>" in exported


@pytest.mark.system
@pytest.mark.timeout(400)
def test_the_journal_says_what_the_readme_shows(walked: tuple[Walk, dict[str, str]]) -> None:
    """Every line of a journal in the README is one that the daemons wrote, numbers apart."""
    walk, _ = walked
    shown = [
        _JOURNAL.fullmatch(line)
        for block in _blocks(README)
        if block.language == "text"
        for line in block.text.splitlines()
    ]
    lines = [found.groups() for found in shown if found]
    assert len(lines) > 8
    for program, line in lines:
        assert _masked(line) in {_masked(told) for told in walk.log(program)}


@pytest.mark.system
@pytest.mark.timeout(400)
def test_the_tables_say_what_the_readme_shows(walked: tuple[Walk, dict[str, str]]) -> None:
    """`task list` prints what the README shows, times and counts apart."""
    _, said = walked
    (shown,) = [block.text for block in _blocks(README) if block.text.startswith("task ")]
    (told,) = [out for first, out in said.items() if first.startswith("sudo edge-agent status")]
    assert _masked(shown) in _masked(told)


def _masked(text: str) -> str:
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?", "#", text)


# -- every document ------------------------------------------------------------------------------------------------


def _written_commands(document: Path) -> Iterator[tuple[str, bool]]:
    """(command, whether it is complete) of every call of ours in a document: in blocks, running text and tables."""
    text = document.read_text(encoding="utf-8")
    prose = _BLOCK.sub("", text)
    blocks = [block.text for block in _blocks(document) if block.language != "text"]
    for block in blocks + re.findall(r"(?:^ {4}.*\n)+", prose, re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if found := _COMMAND.search(line.strip()):
                words = shlex.split(found[2], comments=True)
                own = itertools.takewhile(lambda word: word[0] not in "|<>", words)  # the rest is the shell's
                yield shlex.join([found[1], *own]), True
    for found in re.findall(r"`((?:aggregator|edge-agent) [^`]+)`", prose):
        yield found, False
    for heading, section in re.findall(r"^## `(aggregator|edge-agent)`\n(.*?)(?=^## |\Z)", prose, re.M | re.S):
        for row in re.findall(r"^\| `([^`]+)` \|", section, re.M):
            yield f"{heading} {row}", False


COMMANDS = [
    pytest.param(command, complete, id=f"{document.relative_to(ROOT)}: {command}")
    for document in DOCUMENTS
    for command, complete in dict.fromkeys(_written_commands(document))
]


@pytest.mark.parametrize(("command", "complete"), COMMANDS)
def test_written_commands_are_commands(command: str, complete: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What a document tells to type is what the command takes; in running text arguments may be left out."""
    program, *words = shlex.split(re.sub(r"--to N\b", "--to 1", re.sub(r"[][]", "", command)).replace("TIME", "2h"))
    parser = {"aggregator": aggregator_cli, "edge-agent": agent_cli}[program]._parser()
    try:
        parser.parse_args([word for word in words if word != "..."])
    except SystemExit as ended:
        said = capsys.readouterr().err
        assert ended.code == 0 or (not complete and "arguments are required" in said), said


def test_commands_are_found() -> None:
    """The search for commands finds those of the walk."""
    found = {command.split(" ")[1] for command, _ in _written_commands(README)}
    assert {"fleet", "device", "release", "model", "status", "task", "config"} <= found and len(COMMANDS) > 30


def _links(document: Path) -> list[str]:
    text = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """A link to a file or a heading of this repository finds it."""
    for link in _links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def test_every_page_is_listed() -> None:
    """docs/README.md leads to every page of its folder, README.md to it."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(_links(ROOT / "docs" / "README.md"))
    assert "docs/README.md" in _links(README)


def _keys(kind: type[msgspec.Struct], prefix: str = "") -> set[str]:
    return {f"{prefix}{each.name}" for each in msgspec.structs.fields(kind)}


def test_the_task_files_page_names_every_key() -> None:
    """docs/task-file.md has all keys of a task file and no other."""
    text = (ROOT / "docs" / "task-file.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `\[([\w.]+)\]`.*$", text, flags=re.M)
    named = {"": sections[0]} | dict(zip(sections[1::2], sections[2::2], strict=True))
    parts: dict[str, type[msgspec.Struct]]
    parts = {"training": TrainingSection, "data": DataContract, "plan": Plan, "conditions": ConditionsSection}
    wanted = {"": _keys(TaskFile) - set(parts)} | {name: _keys(kind) for name, kind in parts.items()}
    wanted["plan.gate"] = _keys(Gate)
    found = {
        name: {key for row in re.findall(r"^\| (`.*?) \|", section, re.M) for key in re.findall(r"`(\w+)`", row)}
        for name, section in named.items()
    }
    assert found == wanted
