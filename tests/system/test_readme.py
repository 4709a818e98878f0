"""The README's walk, run as it is written, and every command, link and sample of the documents held against the truth.

In README.md a comment before a code block says what the test does with it: `file: NAME` writes it, `append: NAME` adds
it to a configuration, `test: NAME` has the method `Walk.NAME` do without root, systemd and a second machine what the
block does with them. Without a comment a `sh` block is run as it stands, places and port apart.
"""

import json
import os
import re
import shlex
import shutil
import signal
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
from aggregator.task import TaskFile, TrainingSection
from edge_agent import cli as agent_cli
from shared.events import Event
from shared.logs import sentence
from shared.messages import Conditions, DataContract, Plan
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
        for folder in ("work", "server/mosquitto", "server/data", "server/etc", "device/etc", "device/srv"):
            (self.home / folder).mkdir(parents=True)
        self.work = self.home / "work"
        self.agent_toml, self.aggregator_toml = (
            self.home / "device/etc/agent.toml",
            self.home / "server/etc/aggregator.toml",
        )

    def here(self, text: str) -> str:
        """`text` with the places of this machine instead of those of the README."""
        for there, here in {
            "--host broker.example.org": f"--host localhost --port {self.port}",
            "broker.example.org -p 8883": f"localhost -p {self.port}",
            "--broker-user mosquitto": f"--broker-user {getuser()}",
            "/etc/mosquitto/fieldfare": f"{self.home}/server/mosquitto",
            "/var/lib/mosquitto": f"{self.home}/server/data",
            "/srv/": f"{self.home}/device/srv/",
        }.items():
            text = text.replace(there, here)
        return text

    def shell(self, text: str, cwd: Path | None = None) -> str:
        """Run commands as a user would, and return what they print; they must succeed."""
        environ = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            aggregator_cli.PASSPHRASE: PASSPHRASE,
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", "-euo", "pipefail", "-c", text]
        ran = subprocess.run(
            command, cwd=cwd or self.work, env=environ, capture_output=True, text=True, timeout=PATIENCE
        )
        assert ran.returncode == 0, f"{text}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def step(self, block: Block) -> None:
        """Do what one block of the README says."""
        match block:
            case Block(todo="file", what=name):
                (self.work / name).write_text(block.text)
            case Block(todo="append", what="agent.toml"):
                self.agent_toml.write_text(f"{self.agent_toml.read_text()}\n{self.here(block.text)}")
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
                self.said = self.shell(self.here(block.text))
            case _:
                pytest.fail(f"nothing knows what to do with {block}")

    def install(self, _: Block) -> None:
        """The commands of this environment are the ones under test; tests/system/test_wheel.py installs the wheel."""
        assert self.shell("command -v aggregator edge-agent")

    def broker(self, _: Block) -> None:
        """What is copied there and started, without mosquitto's own user."""
        for name in ("mosquitto.conf", "acl", "ca.crt", "server.crt", "server.key"):
            shutil.copy(self.work / "fleet/broker" / name, self.home / "server/mosquitto")
        self.broker_process = Broker(self.home / "server/mosquitto", self.port)
        self.broker_process.start()

    def aggregator(self, block: Block) -> None:
        """The same files, and the drop-in as it is written there, its folder apart."""
        shutil.copytree(self.work / "fleet/aggregator", self.aggregator_toml.parent, dirs_exist_ok=True)
        (drop_in,) = re.findall(r"printf '(\[state\].*?)'", block.text)
        folder = self.aggregator_toml.with_name("aggregator.toml.d")
        folder.mkdir()
        state = drop_in.replace("\\n", "\n").replace("/var/lib/fieldfare-aggregator", f"{self.home}/server/state")
        (folder / "state.toml").write_text(state)
        self._start("aggregator", self.aggregator_toml)

    def device(self, block: Block) -> None:
        """The bundle unpacked as it is written there."""
        (unpack,) = re.findall(r"^sudo (tar .*)$", block.text, re.M)
        self.shell(unpack.replace("/etc/fieldfare", str(self.agent_toml.parent)))
        folder = self.agent_toml.with_name("agent.toml.d")
        folder.mkdir()
        # Where systemd makes folders for the agent, and a policy that minds no other test on this machine.
        (folder / "test.toml").write_text(
            f"""
            [device]
            state_dir = "{self.home}/device/state"
            run_dir = "{self.home}/device/run"
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
        """The data, made by the README's own program, put where its configuration says; then the agent."""
        self.shell("python data.py")
        (copy,) = re.findall(r"^sudo (install .*)$", block.text, re.M)
        self.shell(self.here(copy))
        assert str(self.home) in self.shell(f"edge-agent config check --config {self.agent_toml}")
        self._start("edge-agent", self.agent_toml)

    def watch(self, _: Block) -> None:
        """Until every round of the task is done and the device has its release."""
        (rounds,) = re.findall(r"^rounds = (\d+)", (self.work / "task.toml").read_text(), re.M)
        self.until("edge-agent", f"Release accepted: task pump, version 1, release {rounds}, ")

    def status(self, block: Block) -> None:
        """The same questions, asked of the configurations here."""
        files = {"aggregator": self.aggregator_toml, "edge-agent": self.agent_toml}
        asked = [shlex.split(line, comments=True)[1:] for line in block.text.splitlines()]
        self.said = "".join(self.shell(f"{shlex.join(words)} --config {files[words[0]]}") for words in asked)

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

    def _start(self, program: str, config: Path) -> None:
        command = [*LEASH, str(Path(sys.executable).parent / program), "run", "--config", str(config)]
        with (self.home / f"{program}.log").open("wb") as log:
            self.daemons[program] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
                yield shlex.join([found[1], *shlex.split(found[2], comments=True)]), True
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
    program, *words = shlex.split(re.sub(r"[][]", "", command).replace("TIME", "2h"))
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
    sections = re.split(r"^## `\[(\w+)\]`.*$", text, flags=re.M)
    named = {"": sections[0]} | dict(zip(sections[1::2], sections[2::2], strict=True))
    parts: dict[str, type[msgspec.Struct]]
    parts = {"training": TrainingSection, "data": DataContract, "plan": Plan, "conditions": Conditions}
    wanted = {"": _keys(TaskFile) - set(parts)} | {name: _keys(kind) for name, kind in parts.items()}
    found = {
        name: {key for row in re.findall(r"^\| (`.*?) \|", section, re.M) for key in re.findall(r"`(\w+)`", row)}
        for name, section in named.items()
    }
    assert found == wanted
