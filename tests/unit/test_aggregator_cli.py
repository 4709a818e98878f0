"""aggregator.cli: the operator's command line, from a new fleet to an exported model, and what goes wrong."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from aggregator import cli, control
from aggregator.config import load
from aggregator.store import Store
from shared.version import VERSION
from tests.records import Records
from tests.unit.test_aggregator_store import begun, row

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
BUILD = ["release", "build", f"{DIGITS / 'model.py'}:Digits", "--loss", "cross_entropy", "--task"]
COMMANDS = [
    ["fleet"],
    ["fleet", "init"],
    ["device"],
    ["device", "add"],
    ["release"],
    ["release", "build"],
    ["release", "show"],
    ["release", "publish"],
    ["model"],
    ["model", "export"],
    ["run"],
    ["status"],
    ["devices"],
    ["backup"],
    ["restore"],
    ["task"],
    ["task", "list"],
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet with open keys and the demo's release, made by the command line."""
    folder = tmp_path_factory.mktemp("site")
    assert cli.main(["fleet", "init", str(folder / "fleet"), "--host", "localhost", "--no-passphrase"]) == 0
    task = str(DIGITS / "task.toml")
    fleet = ["--fleet", str(folder / "fleet")]
    assert cli.main([*BUILD, task, "-o", str(folder / "digits.msgpack"), *fleet]) == 0
    return folder


@pytest.fixture
def fleet(site: Path) -> list[str]:
    """The option that names the fleet."""
    return ["--fleet", str(site / "fleet")]


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.PASSPHRASE, raising=False)


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_help_is_complete(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself; one that does something shows an example and the exit codes."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "exit codes:" in out
    assert command in (["fleet"], ["device"], ["release"], ["model"], ["task"]) or "aggregator " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No option and no argument goes without words."""
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    out = capsys.readouterr().out.partition("exit codes:")[0]
    lines = out.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"^  (-|[A-Z])", line) and line != "  COMMAND":
            words = line.strip().split("  ", 1)
            following = lines[number + 1] if number + 1 < len(lines) else ""
            assert len(words) == 2 or following.startswith(" " * 10) or line.startswith("  aggregator"), line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the one version."""
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"aggregator {VERSION}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["fleet", "init", "x"],
        ["fleet", "init", "x", "--host", "h", "--port", "0"],
        ["fleet", "init", "x", "--host", "h", "--message-max", "10"],
        ["fleet", "init", "x", "--host", "h", "--message-max", "268435456"],
        ["device", "add", "x"],
        ["release", "publish", "x", "--wait", "long"],
        ["release", "publish", "x", "--wait", "nan"],
        ["release", "show", "x", "--jsn"],
        ["model", "export", "x"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments end with 2 and one line that says where to read more."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "--help" in err


def test_help_imports_little() -> None:
    """Help and version wait for no library."""
    script = """
import sys
from aggregator import cli
try:
    cli.main(["release", "publish", "--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "sqlalchemy", "paho", "cryptography", "edge_agent"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_fleet_is_never_overwritten(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second init into the same folder is refused and changes nothing."""
    before = (site / "fleet" / "ca" / "ca.crt").read_bytes()
    assert cli.main(["fleet", "init", str(site / "fleet"), "--host", "localhost", "--no-passphrase"]) == 78
    assert str(site / "fleet") in capsys.readouterr().err
    assert (site / "fleet" / "ca" / "ca.crt").read_bytes() == before


def test_passphrases_come_from_file_and_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encrypted fleet opens with the same passphrase from either place, and with no other."""
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n", encoding="utf-8")
    folder = tmp_path / "fleet"
    init = ["fleet", "init", str(folder), "--host", "localhost", "--json"]
    assert cli.main([*init, "--passphrase-file", str(secret)]) == 0
    assert _json(capsys)["hosts"] == ["localhost"]
    assert b"ENCRYPTED" in (folder / "ca" / "ca.key").read_bytes()
    add = ["device", "add", "--fleet", str(folder)]
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115 - ends with the test
    assert cli.main([*add, "one", "-o", str(tmp_path / "one")]) == 2
    assert cli.PASSPHRASE in capsys.readouterr().err
    monkeypatch.setenv(cli.PASSPHRASE, "wrong")
    assert cli.main([*add, "one", "-o", str(tmp_path / "one")]) == 78
    assert not (tmp_path / "one").exists()
    monkeypatch.setenv(cli.PASSPHRASE, "correct horse")
    assert cli.main([*add, "one", "-o", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "agent.toml").exists()


def test_without_passphrase_or_terminal_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that says nothing of a passphrase gets told, not an open fleet."""
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115 - ends with the test
    assert cli.main(["fleet", "init", str(tmp_path / "fleet"), "--host", "localhost"]) == 2
    assert "--no-passphrase" in capsys.readouterr().err
    assert not (tmp_path / "fleet").exists()


def test_a_bundle_is_a_folder_or_an_archive(
    fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of the output decides; a second certificate must be asked for."""
    archive = tmp_path / "sensor-7.tar.gz"
    assert cli.main(["device", "add", "sensor-7", "-o", str(archive), "--json", *fleet]) == 0
    assert _json(capsys)["bundle"] == str(archive)
    with tarfile.open(archive) as opened:
        assert "sensor-7/agent.toml" in opened.getnames()
    again = ["device", "add", "sensor-7", "-o", str(tmp_path / "again"), *fleet]
    assert cli.main(again) == 78
    assert cli.main([*again, "--again"]) == 0


@pytest.mark.parametrize("name", ["_operator", "Sensor", "a/b", "a" * 64, ""])
def test_a_device_cannot_be_named_like_a_service(fleet: list[str], tmp_path: Path, name: str) -> None:
    """Names outside the pattern are refused before anything is made."""
    assert cli.main(["device", "add", "-o", str(tmp_path / "bundle"), *fleet, "--", name]) == 78
    assert not (tmp_path / "bundle").exists()


def test_build_says_what_it_made(site: Path, fleet: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON of a build is the description of the file; a file is replaced only with --force."""
    target = site / "again.msgpack"
    build = [*BUILD, str(DIGITS / "task.toml"), "-o", str(target), *fleet]
    assert cli.main([*build, "--json"]) == 0
    found = _json(capsys)
    assert (found["task"], found["number"], found["signatures"]) == ("digits", 0, "verified")
    assert found["bytes"] == target.stat().st_size
    assert cli.main(build) == 1
    assert "--force" in capsys.readouterr().err
    assert cli.main([*build, "--force"]) == 0


def test_build_finds_modules_in_the_working_folder(
    fleet: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model named as package.module:attribute is found as `python -m` would find it."""
    package = tmp_path / "fieldfare_example_package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(DIGITS / "model.py", package / "net.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    model = ["fieldfare_example_package.net:Digits", "--loss", "cross_entropy", "--task", str(DIGITS / "task.toml")]
    assert cli.main(["release", "build", *model, "-o", "out.msgpack", *fleet, "--json"]) == 0
    assert _json(capsys)["task"] == "digits"


def test_build_respects_the_fleets_limit(
    site: Path, fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model over the limit of one message is refused with size, limit and remedy; nothing is written."""
    wide = tmp_path / "wide.py"
    wide.write_text(
        "from torch import nn\nclass Wide(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(64, 300), nn.Linear(300, 10))\n",
        encoding="utf-8",
    )
    build = ["release", "build", f"{wide}:Wide", "--loss", "cross_entropy", "--task", str(DIGITS / "task.toml")]
    build += ["-o", str(tmp_path / "out"), "--limit", "65536", *fleet]
    assert cli.main([*build, "--chunk-size", "0"]) == 1
    err = capsys.readouterr().err
    assert "65536" in err and "max_packet_size" in err and not (tmp_path / "out").exists()
    assert cli.main(build) == 0


def test_a_wrong_task_file_is_78(fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in the task file ends with 78 and names file and key."""
    task = tmp_path / "task.toml"
    task.write_text(
        (DIGITS / "task.toml").read_text(encoding="utf-8").replace("goal = 8", "goal = 0"), encoding="utf-8"
    )
    assert cli.main([*BUILD, str(task), "-o", str(tmp_path / "out"), *fleet]) == 78
    err = capsys.readouterr().err
    assert str(task) in err and "plan.goal" in err and err.count("\n") == 1


def test_show_checks_signatures(
    site: Path, fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good file is described, one of another fleet or a spoilt one ends with 3, an absent one with 1."""
    file = site / "digits.msgpack"
    assert cli.main(["release", "show", str(file), "--json", *fleet]) == 0
    assert _json(capsys)["signatures"] == "verified"
    assert cli.main(["release", "show", str(file), "--fleet", str(tmp_path / "none")]) == 0
    assert "not checked" in capsys.readouterr().out
    assert cli.main(["release", "show", str(file), "--root", str(tmp_path / "none")]) == 78
    spoilt = tmp_path / "spoilt.msgpack"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    spoilt.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["release", "show", str(spoilt), *fleet]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"aggregator: {spoilt}: wrong_digest") and "build it again" in said
    assert cli.main(["release", "show", str(tmp_path / "none"), *fleet]) == 1


def test_nothing_that_devices_refuse_is_published(
    site: Path, fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release that does not verify never reaches the broker: it is refused before connecting."""
    assert cli.main(["fleet", "init", str(tmp_path / "other"), "--host", "localhost", "--no-passphrase"]) == 0
    publish = ["release", "publish", str(site / "digits.msgpack"), "--port", "1", "--host", "127.0.0.1"]
    assert cli.main([*publish, "--fleet", str(tmp_path / "other")]) == 3
    said = capsys.readouterr().err
    assert "unknown_key" in said and "another fleet than --fleet names" in said


def test_what_is_no_release_file(fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text file is told apart from a release that was tampered with."""
    (tmp_path / "notes.txt").write_text("to do\n")
    assert cli.main(["release", "show", str(tmp_path / "notes.txt"), *fleet]) == 3
    said = capsys.readouterr().err
    assert "is no release file" in said and "`aggregator release build`" in said


def test_what_cannot_be_a_task(fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody waits for a task that can have no topic."""
    assert cli.main(["model", "export", "a/b", "-o", str(tmp_path / "x"), *fleet]) == 2
    assert "'a/b' cannot name a task" in capsys.readouterr().err


def test_no_broker_is_5(site: Path, fleet: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A broker that is not there ends with 5 and one line that names it."""
    publish = ["release", "publish", str(site / "digits.msgpack"), "--host", "127.0.0.1", "--port", "1", *fleet]
    assert cli.main(publish) == 5
    err = capsys.readouterr().err
    assert "127.0.0.1:1" in err and err.count("\n") == 1


def test_export_from_a_file(site: Path, fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A release file's weights are written; another task's name is refused."""
    out = tmp_path / "digits.safetensors"
    export = ["model", "export", "digits", "--release", str(site / "digits.msgpack"), "-o", str(out), *fleet]
    assert cli.main([*export, "--json"]) == 0
    assert _json(capsys)["bytes"] == out.stat().st_size
    assert cli.main(export) == 1
    assert cli.main([*export, "--force"]) == 0
    other = ["model", "export", "other", "--release", str(site / "digits.msgpack"), "-o", str(tmp_path / "x"), *fleet]
    assert cli.main(other) == 3


def test_status_says_whether_the_aggregator_runs(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the aggregator wrote of itself is printed; 5 when it does not run."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    status = ["status", "--config", str(config), "--json"]
    assert cli.main(status) == 5
    err = capsys.readouterr().err
    assert "is not running" in err and "starts it" in err
    settings = load(config)
    settings.state.directory.mkdir(exist_ok=True)
    settings.status_file.write_text(json.dumps({"tasks": {}}), encoding="utf-8")
    assert cli.main(status) == 5
    assert _json(capsys) == {"running": False, "tasks": {}}
    with settings.lock_file.open("w") as lock:
        assert cli.main(status) == 5
        fcntl.flock(lock, fcntl.LOCK_EX)
        capsys.readouterr()
        assert cli.main(status) == 0
        assert _json(capsys) == {"running": True, "tasks": {}}
    assert cli.main(status) == 5


def test_status_tells_times_to_people(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds since 1970 are for scripts."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    settings.state.directory.mkdir(exist_ok=True)
    settings.status_file.write_text(json.dumps({"started": 1_795_307_220}), encoding="utf-8")
    cli.main(["status", "--config", str(config)])
    assert "2026-11-22T00:27:00+00:00" in capsys.readouterr().out
    cli.main(["status", "--config", str(config), "--json"])
    assert _json(capsys)["started"] == 1_795_307_220


@pytest.mark.parametrize("text", ["", "[", "[]", '"x"', "{}", "[" * 100_000, "\0"])
def test_a_damaged_status_is_no_traceback(site: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever lies where the status belongs, the answer is one line."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    settings.state.directory.mkdir(exist_ok=True)
    settings.status_file.write_text(text, encoding="utf-8")
    assert cli.main(["status", "--config", str(config)]) in (1, 5)
    assert capsys.readouterr().err.count("\n") == 1


def test_task_list_reads_the_database(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a database the remedy is said; an empty one has no tasks."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    assert cli.main(["task", "list", "--config", str(config)]) == 78
    assert "state.directory" in capsys.readouterr().err
    settings.state.directory.mkdir(exist_ok=True)
    Store(settings.database).close()
    assert cli.main(["task", "list", "--config", str(config), "--json"]) == 0
    assert _json(capsys) == {"tasks": []}
    assert cli.main(["task", "list", "--config", str(config)]) == 0
    assert capsys.readouterr().out.split() == [
        *("task", "version", "release", "round", "wanted", "phase", "updates", "expires")
    ]


def test_devices_come_in_pages_with_their_last_update(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All pages, what each waits for, and from the database what became of its update; words or one JSON object."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    settings.state.directory.mkdir(exist_ok=True)
    store = begun(settings.database)
    with store.transaction():
        store.contribute([row("a", head=b"", outcome="rejected", reason="bad_body")])
    store.close()
    asked: list[control.Request] = []

    def device(name: str, **changes: object) -> dict[str, object]:
        plain = {"device": name, "online": True, "eligible": False, "obstacles": ["mains\x1b"], "datasets": ["d"]}
        return plain | {"version": "1", "heard": 1_795_307_220} | changes

    def owner(event: control.ControlRequest) -> None:
        asked.append(event.request)
        first = not event.request.after
        event.reply({"devices": [device("a" if first else "b")], "more": first})

    door = control.server(settings.state.directory, owner)
    door.start()
    try:
        assert cli.main(["devices", "--waiting", "--json", "--config", str(config)]) == 0
        rows = _json(capsys)["devices"]
        assert isinstance(rows, list)
        a, b = rows
        assert (a["last_task"], a["last_round"], a["last_outcome"]) == ("points", 1, "rejected (bad_body)")
        assert b["last_task"] is None and b["certificate_expires"] is None
        assert [(each.verb, each.after, each.waiting) for each in asked] == [
            ("devices", "", True),
            ("devices", "a", True),
        ]
        assert cli.main(["devices", "--config", str(config)]) == 0
    finally:
        door.stop()
    out = capsys.readouterr().out
    shutil.rmtree(settings.state.directory)
    assert "\x1b" not in out and "points 1: rejected (bad_body)" in out and "2026-11-22" in out


def test_backup_and_restore(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is not replaced unasked, what is damaged is refused (3), and the result is told."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings, output = load(config), str(tmp_path / "backup.tar")
    settings.state.directory.mkdir(exist_ok=True)
    Store(settings.database).close()
    options = ["--config", str(config)]
    assert cli.main(["backup", "-o", output, *options]) == 0
    assert "0 tasks, 0 graphs and weights" in capsys.readouterr().out
    assert cli.main(["backup", "-o", output, *options]) == 1
    assert cli.main(["backup", "-o", output, "--force", "--json", *options]) == 0
    assert _json(capsys) | {"bytes": 0} == {"file": output, "bytes": 0, "tasks": [], "blobs": 0, "left_out": []}
    assert cli.main(["restore", output, *options]) == 1
    assert "--force sets it aside" in capsys.readouterr().err
    assert cli.main(["restore", output, "--force", "--json", *options]) == 0
    assert _json(capsys)["directory"] == str(settings.state.directory)
    Path(output).write_bytes(Path(output).read_bytes()[:-1])
    assert cli.main(["restore", output, "--force", *options]) == 3
    assert "nothing was restored" in capsys.readouterr().err
    assert cli.main(["restore", str(tmp_path / "none.tar"), *options]) == 1
    capsys.readouterr()
    assert cli.main(["backup", "-o", str(tmp_path / "none" / "x.tar"), *options]) == 1
    assert capsys.readouterr().err == (
        f"aggregator: {tmp_path}/none/x.tar cannot be written: there is no folder {tmp_path}/none; make it first\n"
    )


@pytest.mark.parametrize("verb", ["pause", "resume", "stop", "rollback"])
def test_commands_for_a_task_need_the_aggregator(site: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one running the exit code is 5 and the line says how it is started; a name that cannot be one is 2."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    load(config).state.directory.mkdir(exist_ok=True)
    assert cli.main(["task", verb, "digits", "--config", str(config)]) == 5
    err = capsys.readouterr().err
    assert "is not running" in err and "starts it" in err and err.count("\n") == 1
    assert cli.main(["task", verb, "a/b", "--config", str(config)]) == 2


def test_commands_for_a_task_ask_the_aggregator(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each asks its own question and prints the answer; a refusal is 3 with the aggregator's words."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    asked: list[control.Request] = []

    def owner(event: control.ControlRequest) -> None:
        asked.append(event.request)
        event.reply({"error": "points has no such release"} if event.request.to == 9 else {"state": "paused"})

    door = control.server(load(config).state.directory, owner)
    door.start()
    try:
        assert cli.main(["task", "pause", "points", "--config", str(config), "--json"]) == 0
        assert _json(capsys) == {"state": "paused"}
        assert cli.main(["task", "rollback", "points", "--to", "4", "--config", str(config)]) == 0
        assert cli.main(["task", "rollback", "points", "--to", "9", "--config", str(config)]) == 3
        assert "points has no such release" in capsys.readouterr().err
    finally:
        door.stop()
    assert asked == [
        control.Request("pause", "points"),
        control.Request("rollback", "points", 4),
        control.Request("rollback", "points", 9),
    ]


def test_show_of_an_unknown_task(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says which there are."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    settings.state.directory.mkdir(exist_ok=True)
    Store(settings.database).close()
    assert cli.main(["task", "show", "other", "--config", str(config)]) == 3
    assert "there are: none yet" in capsys.readouterr().err
    assert cli.main(["task", "show", "a/b", "--config", str(config)]) == 2


def test_the_phase_of_a_task(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the running aggregator's word; without one the database's, and one whose time is over is expired."""
    config = site / "fleet" / "aggregator" / "aggregator.toml"
    settings = load(config)
    shutil.rmtree(settings.state.directory, ignore_errors=True)
    settings.state.directory.mkdir()
    store, records = Store(settings.database), Records()
    now = int(time.time())
    for name, expires in (("young", now + 1000), ("old", now - 1000)):
        message = records.message(records.manifest(task=name, expires=expires))
        with store.transaction():
            store.adopt(name, 1, message, (b"t" * 32, b"e" * 32))
            store.add_release(name, 1, 0, message.release, b"w" * 32, now)
    store.close()

    def phases() -> list[str]:
        assert cli.main(["task", "list", "--json", "--config", str(config)]) == 0
        tasks = _json(capsys)["tasks"]
        assert isinstance(tasks, list)
        return [task["phase"] for task in tasks]

    try:
        assert phases() == ["expired", "waiting"]
        for phase in ("starved", "catching_up", "needs_manifest", "damaged"):
            told = {"tasks": {"young": {"phase": phase}, "old": {"phase": "finished"}}}
            settings.status_file.write_text(json.dumps(told), encoding="utf-8")
            assert phases() == ["expired", "waiting"]
            with settings.lock_file.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                assert phases() == ["expired", phase]
                assert cli.main(["task", "show", "young", "--json", "--config", str(config)]) == 0
                assert _json(capsys)["phase"] == phase
        with settings.lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            settings.status_file.write_text('{"tasks": [1]}', encoding="utf-8")
            assert phases() == ["expired", "waiting"]
    finally:
        shutil.rmtree(settings.state.directory)


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["status"],
        ["task", "list"],
        ["task", "pause", "x"],
        ["backup", "-o", "nowhere.tar"],
        ["restore", "nowhere.tar"],
    ],
)
def test_a_bad_configuration_is_78(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong configuration ends every command that reads it with 78 and one line that names file and key."""
    config = tmp_path / "aggregator.toml"
    config.write_text("[broker]\nhots = 'x'\n", encoding="utf-8")
    assert cli.main([*command, "--config", str(config)]) == 78
    err = capsys.readouterr().err
    assert str(config) in err and "broker.hots" in err and err.count("\n") == 1
