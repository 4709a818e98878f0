"""edge_agent.cli: the device's command line, against a real socket and real files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aggregator import ca
from edge_agent import cli, control
from edge_agent.control import ControlRequest, Request
from shared.enrolment import Token
from shared.version import VERSION
from tests.unit.test_local import network, publish, rows

NOW = 1_795_000_000.0
COMMANDS = [
    ["run"],
    ["status"],
    ["why"],
    ["doctor"],
    ["bugreport"],
    ["pause"],
    ["resume"],
    ["enrol"],
    ["models"],
    ["predict"],
    ["config"],
    ["config", "check"],
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that enrols a device, made by the product."""
    folder = tmp_path_factory.mktemp("fleet")
    ca.init_fleet(folder / "fleet", "test-fleet", ["localhost"], now=NOW, passphrase=None)
    return ca.add_device(folder / "fleet", "sensor-1", folder / "sensor-1", now=NOW, passphrase=None)


@pytest.fixture
def config(bundle: Path, tmp_path: Path) -> Path:
    """The device's configuration with a runtime folder of the test's own."""
    shutil.copytree(bundle, tmp_path / "etc")
    path = tmp_path / "etc" / "agent.toml"
    text = path.read_text(encoding="utf-8")
    assert "[device]\n" in text
    path.write_text(text.replace("[device]\n", '[device]\nrun_dir = "../run"\n'), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_help_is_complete(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself, every option has its words, and the exit codes are there."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "exit codes:" in out and "78" in out
    assert command == ["config"] or "example" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the one version."""
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"edge-agent {VERSION}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["status", "--jsn"],
        ["pause", "--for", "long"],
        ["pause", "--for", "0s"],
        ["pause", "--for", "366d"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments end with 2 and one line that says where to read more."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "--help" in err


def test_config_check_prints_every_setting(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The effective configuration holds what the file says and the defaults, with absolute paths."""
    assert cli.main(["config", "check", "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broker"]["host"] == "localhost"
    assert found["broker"]["cert"] == str(config.parent / "device.crt")
    assert "idle_exit" in found["trainer"]
    assert cli.main(["config", "check", "--config", str(config)]) == 0
    assert "localhost" in capsys.readouterr().out


def test_config_check_obeys_the_environment(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIELDFARE_SECTION__KEY overrides the file."""
    monkeypatch.setenv("FIELDFARE_BROKER__PORT", "8884")
    assert cli.main(["config", "check", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broker"]["port"] == 8884


def test_a_key_that_only_the_unit_can_read(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no fault of the configuration; the rest is checked as ever, and no enrolment leaves it beside a new key."""
    check = ["config", "check", "--config", str(config), "--json"]
    hidden = (config.parent / "device.key").rename(config.parent / "device.key.cred")
    assert cli.main(check) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["broker"]["key"] == str(config.parent / "device.key") and str(hidden) in told.err

    before = {file: file.read_bytes() for file in config.parent.iterdir()}
    token = str(Token("abcdefgh", b"s" * 16, b"p" * 32))
    assert cli.main(["enrol", "https://127.0.0.1:9", token, "--again", "--config", str(config)]) == 1
    assert f"mv {hidden}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in config.parent.iterdir()} == before

    (config.parent / "ca.crt").write_text("no\n")
    assert cli.main(check) == 78
    assert "ca.crt" in capsys.readouterr().err
    hidden.unlink()
    assert cli.main(check) == 78
    assert "device.key" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["config", "check"], ["run"], ["status"]])
def test_a_bad_configuration_is_78(config: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong configuration ends every command with 78 and names file and key."""
    config.write_text(config.read_text(encoding="utf-8").replace("[device]", "[device]\nnmae = 1"), encoding="utf-8")
    assert cli.main([*command, "--config", str(config)]) == 78
    err = capsys.readouterr().err
    assert str(config) in err and "device.nmae" in err and err.count("\n") == 1


def test_a_missing_configuration_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that is not there is named."""
    assert cli.main(["status", "--config", str(tmp_path / "none.toml")]) == 78
    assert str(tmp_path / "none.toml") in capsys.readouterr().err


def test_no_agent_is_5(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asking an agent that does not run ends with 5."""
    assert cli.main(["status", "--config", str(config)]) == 5
    assert "not running" in capsys.readouterr().err


def test_status_pause_and_resume_reach_the_agent(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command asks its own question over the socket and prints the answer."""
    asked: list[Request] = []

    def owner(event: ControlRequest) -> None:
        asked.append(event.request)
        event.reply({"state": "idle", "link": {"connected": True}})

    door = control.server(config.parent.parent / "run", owner)
    door.start()
    try:
        assert cli.main(["status", "--config", str(config), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"state": "idle", "link": {"connected": True}}
        assert cli.main(["pause", "--for", "2h", "--config", str(config)]) == 0
        assert cli.main(["pause", "--config", str(config)]) == 0
        assert cli.main(["resume", "--config", str(config)]) == 0
        assert cli.main(["why", "digits", "--config", str(config)]) == 0
        assert "connected  yes" in capsys.readouterr().out
    finally:
        door.stop()
    paused = [Request("pause", 7200.0), Request("pause")]
    assert asked == [Request("status"), *paused, Request("resume"), Request("why", task="digits")]


def test_status_says_what_stands_in_the_way(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each obstacle is a line of its own with measured value and setting: the reason to ask at all."""
    text = "others use the CPUs for 80 %, policy.cpu_others is 50 %"
    obstacle = {"name": "cpu", "value": 80.0, "threshold": 50.0, "text": text}
    door = control.server(config.parent.parent / "run", lambda event: event.reply({"obstacles": [obstacle]}))
    door.start()
    try:
        assert cli.main(["status", "--config", str(config)]) == 0
        assert f"blocked by  cpu: {text}" in capsys.readouterr().out.splitlines()
        assert cli.main(["status", "--config", str(config), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"obstacles": [obstacle]}
    finally:
        door.stop()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ('key = "device.key"', 'key = "ca.crt"', "ca.crt"),
        ('name = "sensor-1"', 'name = "sensor-9"', "device.name"),
        ('root = "root.msgpack"', 'root = "ca.crt"', "ca.crt"),
    ],
)
def test_config_check_refuses_what_run_refuses(
    config: Path, key: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys, certificate, name and root must fit each other, and not only be files."""
    text = config.read_text(encoding="utf-8")
    assert key in text
    config.write_text(text.replace(key, value), encoding="utf-8")
    assert cli.main(["config", "check", "--config", str(config)]) == 78
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_models_and_predict(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The models in use are listed with their folders, and answer the examples of a file, as text or as arrays."""
    where = ["--config", str(config)]
    assert cli.main(["models", *where]) == 0
    assert capsys.readouterr().err.startswith("no model yet")
    state = config.parent / "state"
    config.write_text(config.read_text().replace("[device]\n", f'[device]\nstate_dir = "{state}"\n'))
    state.mkdir()
    link, _ = publish(state, network(1))
    assert cli.main(["models", "--json", *where]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["task"], model["release"], model["path"]) == ("points", 1, str(link))
    assert cli.main(["models", *where]) == 0
    assert "points" in capsys.readouterr().out
    np.savez(tmp_path / "new.npz", x=rows(3))
    asked = ["predict", "points", str(tmp_path / "new.npz"), *where]
    assert cli.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("class,") and len(lines) == 4
    answers = tmp_path / "answers.npz"
    assert cli.main([*asked, "-o", str(answers)]) == 0
    with np.load(answers) as found:
        assert [str(label) for label in found["labels"]] == [line.split(",")[0] for line in lines[1:]]
    assert cli.main([*asked, "-o", str(answers)]) == 1 and cli.main([*asked, "-o", str(answers), "--force"]) == 0
    assert cli.main([*asked, "-o", str(tmp_path / "answers.csv")]) == 0
    assert (tmp_path / "answers.csv").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing", "new.npz"], 1, "no release of this task"),
        (["points", "absent.npz"], 1, "No such file"),
        (["points", "new.txt"], 2, ".csv and .npz"),
        (["points", "bad.npz"], 1, "has no array 'x'"),
    ],
)
def test_predictions_that_cannot_be(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """One line says what is missing or does not fit."""
    publish(tmp_path, network(1))
    np.savez(tmp_path / "bad.npz", z=rows(3))
    np.savez(tmp_path / "new.npz", x=rows(3))
    task, file = arguments
    asked = ["predict", task, str(tmp_path / file), "--models", str(tmp_path / "models"), "--config", str(config)]
    assert cli.main(asked) == code
    assert words in capsys.readouterr().err


def test_the_command_line_stays_light() -> None:
    """Help imports neither torch nor numpy nor anything of the aggregator."""
    script = """
import sys
from edge_agent import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "aggregator", "sqlalchemy", "paho", "cryptography"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
