"""aggregator.publish over a real broker: what reaches it, what the fleet answers, and the plain client's way."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

from aggregator import cli, release
from aggregator.broker import Broker
from edge_agent import cli as edge_agent_cli
from shared import signing, topics, wire
from shared.messages import AggregatorStatus, ReleaseMessage, Role
from tests.broker.broker import HOST, Fleet, Peer
from tests.hostile.daemon import Daemon, until

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
TOPIC = topics.task_release("digits")
STATUS = topics.Topics("fl").aggregator_status(0)


@pytest.fixture(scope="module")
def built(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's release, signed by the fleet's publisher."""
    file = tmp_path_factory.mktemp("release") / "release.msgpack"
    build = ["release", "build", f"{DIGITS / 'model.py'}:Digits", "--loss", "cross_entropy"]
    common = ["--task", str(DIGITS / "task.toml"), "-o", str(file), "--fleet", str(fleet.folder)]
    assert cli.main([*build, *common]) == 0
    return file


@pytest.fixture(autouse=True)
def _clean(broker: Broker, fleet: Fleet) -> Iterator[None]:
    """No release and no aggregator is left behind for the next test."""
    yield
    with Peer(fleet, fleet.operator) as peer:
        peer.publish(topics.RELEASE, b"", retain=True)
    with Peer(fleet, fleet.aggregator) as peer:
        peer.publish(TOPIC, b"", retain=True)
        peer.publish(STATUS, b"", retain=True)


def _publish(fleet: Fleet, file: Path, wait: str, *options: str) -> int:
    return cli.main(["release", "publish", str(file), "--wait", wait, "--fleet", str(fleet.folder), *options])


def _retained(fleet: Fleet, topic: str) -> list[tuple[str, bytes]]:
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.subscribe(topic) < 128
        return peer.fence()


def _other_version(fleet: Fleet, data: bytes, **changes: object) -> bytes:
    """The same release under a changed manifest, signed by the fleet's publisher."""
    keys = release.fleet_keys(fleet.folder, lambda path: None)
    found = release.read(data, keys.root)
    manifest = signing.sign(msgspec.structs.replace(found.manifest, **changes), Role.PUBLISHER, keys.publisher)
    record = msgspec.structs.replace(found.release, manifest=signing.digest(manifest))
    signed = signing.sign(record, Role.PUBLISHER, keys.publisher)
    return wire.pack(msgspec.structs.replace(found.message, manifest=manifest, release=signed))


def test_without_an_aggregator_the_release_waits(fleet: Fleet, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The broker keeps the exact bytes; the command says that nobody took them and ends with 4."""
    assert _publish(fleet, built, "0.3", "--json") == 4
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["published"] is True and told["taken"] is False
    assert "published and retained; no aggregator has taken it within 0.3 s" in err
    assert _retained(fleet, topics.RELEASE) == [(topics.RELEASE, built.read_bytes())]


def test_not_waiting_is_no_failure(fleet: Fleet, built: Path) -> None:
    """With --wait 0 the broker's word is enough."""
    assert _publish(fleet, built, "0") == 0
    assert len(_retained(fleet, topics.RELEASE)) == 1


@pytest.mark.parametrize(("online", "said"), [(True, "its log says why"), (False, "offline")])
def test_the_aggregators_presence_is_told(
    fleet: Fleet, built: Path, online: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether an aggregator is there at all is part of the answer."""
    status = AggregatorStatus(v=1, session=bytes(8), online=online, version="0")
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.publish(STATUS, wire.pack(status), retain=True) < 128
    assert _publish(fleet, built, "0.3") == 4
    assert said in capsys.readouterr().err


def test_publishing_ends_when_the_fleet_follows(fleet: Fleet, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 0 at the first verified announcement of its own manifest, whatever came before it."""
    data = built.read_bytes()
    junk = (b"", b"junk", b"\x80", data[:-1])
    stranger = wire.unpack(data, ReleaseMessage)
    forged = msgspec.structs.replace(stranger.release, sig=bytes(64))
    answers = [*junk, wire.pack(msgspec.structs.replace(stranger, release=forged)), data]
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.subscribe(topics.RELEASE) < 128
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(_publish(fleet, built, "30", "--json")))
        thread.start()
        while not peer.fence():
            pass
        for answer in answers:
            assert peer.publish(TOPIC, answer) < 128
        thread.join(30)
    assert results == [0]
    told = json.loads(capsys.readouterr().out)
    assert (told["taken"], told["number"], told["version"]) == (True, 0, 1)
    assert told["digest"] == signing.digest(stranger.release).hex()


def test_publishing_twice_is_the_same(fleet: Fleet, built: Path) -> None:
    """A release that the fleet follows already is taken at once."""
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.publish(TOPIC, built.read_bytes(), retain=True) < 128
    assert _publish(fleet, built, "30") == 0


@pytest.mark.parametrize("changes", [{"version": 2}, {"expires": 2_000_000_000}])
def test_a_fleet_that_follows_another_version_refuses(
    fleet: Fleet, built: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A newer version, or a different one of the same number, ends the wait with 3 and the remedy."""
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.publish(TOPIC, _other_version(fleet, built.read_bytes(), **changes), retain=True) < 128
    assert _publish(fleet, built, "30") == 3
    assert "raise `version`" in capsys.readouterr().err


def test_an_older_version_does_not_end_the_wait(fleet: Fleet, built: Path, tmp_path: Path) -> None:
    """What the fleet followed before is not taken for an answer."""
    newer = tmp_path / "newer.msgpack"
    newer.write_bytes(_other_version(fleet, built.read_bytes(), version=2))
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.publish(TOPIC, built.read_bytes(), retain=True) < 128
    assert _publish(fleet, newer, "0.3") == 4


def test_a_broker_that_is_down_is_5(fleet: Fleet, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broker that is down gives one line and 5, and works again once it is up."""
    fleet.broker.stop()
    try:
        assert _publish(fleet, built, "0") == 5
        err = capsys.readouterr().err
        assert f"{HOST}:{fleet.port}" in err and err.count("\n") == 1
    finally:
        fleet.broker.start()
    assert _publish(fleet, built, "0") == 0


def test_a_stranger_cannot_publish(
    fleet: Fleet, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operator of another fleet does not get past the broker's door."""
    other = tmp_path / "other"
    assert cli.main(["fleet", "init", str(other), "--host", HOST, "--no-passphrase", "--port", str(fleet.port)]) == 0
    shutil.copytree(fleet.folder / "root", other / "root", dirs_exist_ok=True)
    shutil.copy(fleet.authority, other / "operator" / "ca.crt")
    assert cli.main(["release", "publish", str(built), "--wait", "0", "--fleet", str(other)]) == 5
    err = capsys.readouterr().err
    assert "operator.crt" in err and err.count("\n") == 1
    assert _retained(fleet, topics.RELEASE) == []


def test_a_device_cannot_publish(fleet: Fleet, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device's certificate in the operator's place is refused by the broker's rules: exit code 3, nothing kept."""
    copy = tmp_path / "fleet"
    shutil.copytree(fleet.folder, copy, ignore=shutil.ignore_patterns("data", "*.log"))
    identity = fleet.device("intruder")
    shutil.copy(identity.certificate, copy / "operator" / "operator.crt")
    shutil.copy(identity.key, copy / "operator" / "operator.key")
    assert cli.main(["release", "publish", str(built), "--wait", "0", "--fleet", str(copy)]) == 3
    assert "refuses the release" in capsys.readouterr().err
    assert _retained(fleet, topics.RELEASE) == []


def test_a_release_over_the_brokers_limit_is_refused(
    fleet: Fleet, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release that the broker would not take is refused before it is sent, with size, limit and remedy."""
    conf = fleet.folder / "broker" / "mosquitto.conf"
    before = conf.read_text(encoding="utf-8")
    lines = [line for line in before.splitlines() if not line.startswith(("max_packet_size", "message_size_limit"))]
    fleet.broker.stop()
    try:
        conf.write_text("\n".join([*lines, "max_packet_size 20000", ""]), encoding="utf-8")
        fleet.broker.start()
        assert _publish(fleet, built, "0") == 3
        err = capsys.readouterr().err
        assert "20000" in err and "max_packet_size" in err
        fleet.broker.stop()
    finally:
        conf.write_text(before, encoding="utf-8")
        fleet.broker.start()
    assert _retained(fleet, topics.RELEASE) == []


def test_a_plain_client_delivers_the_same_bytes(fleet: Fleet, built: Path) -> None:
    """mosquitto_pub, with MQTT 5 and 3.1.1, publishes a release file as the product does."""
    program = shutil.which("mosquitto_pub")
    if program is None:
        pytest.skip("needs mosquitto_pub: sudo apt-get install mosquitto-clients")
    operator = fleet.operator
    for protocol in ("5", "311"):
        with Peer(fleet, fleet.operator) as peer:
            peer.publish(topics.RELEASE, b"", retain=True)
        command = [program, "-V", protocol, "-h", HOST, "-p", str(fleet.port), "--cafile", str(fleet.authority)]
        command += ["--cert", str(operator.certificate), "--key", str(operator.key)]
        command += ["-r", "-q", "1", "-t", "models/release", "-f", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        assert _retained(fleet, topics.RELEASE) == [(topics.RELEASE, built.read_bytes())]


def test_export_takes_the_newest_release_from_the_broker(
    fleet: Fleet, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The retained release of the task is verified and written as safetensors."""
    with Peer(fleet, fleet.aggregator) as peer:
        assert peer.publish(TOPIC, built.read_bytes(), retain=True) < 128
    out = tmp_path / "digits.safetensors"
    assert cli.main(["model", "export", "digits", "-o", str(out), "--fleet", str(fleet.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["number"] == 0
    with safe_open(out, framework="numpy") as opened:
        assert sorted(opened.keys()) == ["hidden.bias", "hidden.weight", "scores.bias", "scores.weight"]


def test_export_of_an_unknown_task_is_4(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task that the broker does not know gives one line and writes nothing."""
    out = tmp_path / "x.safetensors"
    export = ["model", "export", "nothing", "-o", str(out), "--wait", "0.3", "--fleet", str(fleet.folder)]
    assert cli.main(export) == 4
    assert "'nothing'" in capsys.readouterr().err and not out.exists()


def test_export_refuses_what_does_not_verify(fleet: Fleet, built: Path, tmp_path: Path) -> None:
    """A spoilt retained release, or junk in its place, ends with 3 and writes nothing."""
    out = tmp_path / "x.safetensors"
    data = built.read_bytes()
    for payload in (b"junk", data[:-1] + bytes([data[-1] ^ 1])):
        with Peer(fleet, fleet.aggregator) as peer:
            assert peer.publish(TOPIC, payload, retain=True) < 128
        assert cli.main(["model", "export", "digits", "-o", str(out), "--fleet", str(fleet.folder)]) == 3
        assert not out.exists()


@pytest.fixture
def aggregator(fleet: Fleet, tmp_path: Path) -> Iterator[list[str]]:
    """A running aggregator with a state of its own; the option that names its configuration. It must end cleanly."""
    copy = tmp_path / "aggregator"
    shutil.copytree(fleet.folder / "aggregator", copy, ignore=shutil.ignore_patterns("state", "*.log"))
    config = copy / "aggregator.toml"
    with Daemon("aggregator", config) as daemon:
        daemon.start()
        # Before that a signal ends it, rightly, without a word.
        daemon.wait("link.up")
        yield ["--config", str(config)]
        assert daemon.stop() == 0
        assert daemon.read()[-1]["event"] == "daemon.stopped"
    assert cli.main(["status", "--config", str(config)]) == 5


def test_the_real_aggregator_takes_a_release(
    fleet: Fleet, aggregator: list[str], built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Publish, status, task list and export work together with a running aggregator."""
    assert _publish(fleet, built, "60", "--json") == 0
    assert json.loads(capsys.readouterr().out)["number"] == 0
    assert cli.main(["task", "list", *aggregator, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [(task["task"], task["release"]) for task in tasks] == [("digits", 0)]
    out = tmp_path / "digits.safetensors"
    assert cli.main(["model", "export", "digits", "-o", str(out), "--fleet", str(fleet.folder)]) == 0
    until(lambda: cli.main(["status", *aggregator, "--json"]) == 0 or None, "a status file")


def test_the_real_aggregator_takes_a_large_release(
    fleet: Fleet, aggregator: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks first, then the message: the aggregator collects them, gives them out, and export brings them home."""
    (tmp_path / "wide.py").write_text(
        "from torch import nn\nclass Wide(nn.Sequential):\n    def __init__(self):\n        "
        "super().__init__(nn.Linear(64, 9000), nn.Linear(9000, 10))\n"
    )
    task, file = tmp_path / "task.toml", tmp_path / "wide.msgpack"
    task.write_text((DIGITS / "task.toml").read_text(encoding="utf-8").replace('"digits"', '"wide"', 1))
    build = ["release", "build", f"{tmp_path / 'wide.py'}:Wide", "--loss", "cross_entropy", "--task", str(task)]
    common = ["--fleet", str(fleet.folder), "--force"]
    assert cli.main([*build, "-o", str(file), *common]) == 0
    capsys.readouterr()
    assert _publish(fleet, file, "60", "--json") == 0
    assert json.loads(capsys.readouterr().out)["number"] == 0
    message = wire.unpack(_retained(fleet, topics.RELEASE)[0][1], ReleaseMessage)
    assert (message.v, message.weights) == (2, None)
    out = tmp_path / "wide.safetensors"
    assert cli.main(["model", "export", "wide", "-o", str(out), "--fleet", str(fleet.folder)]) == 0
    weights = release.read(release.open_file(file)).weights
    assert weights is not None and out.read_bytes() == weights
    assert not out.with_name(f".{out.name}.part").exists()

    # The next version starts from there; a copy of the file would do as well.
    task.write_text(task.read_text().replace("version = 1 ", "version = 2 ", 1))
    newest = [*build, "-o", str(tmp_path / "next.msgpack"), "--continue", "newest", *common]
    assert cli.main(newest) == 0
    again = release.read(release.open_file(tmp_path / "next.msgpack"))
    assert again.weights == weights and again.manifest.version == 2

    assert cli.main(["task", "pause", "wide", *aggregator]) == 0
    capsys.readouterr()
    assert cli.main(["task", "show", "wide", *aggregator, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["wanted"], [each["number"] for each in facts["releases"]]) == ("paused", [0])
    assert cli.main(["task", "rollback", "wide", *aggregator]) == 3


def test_chunks_above_the_brokers_limit_are_refused(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice is a chunk size that fits, and with it the release goes out."""
    conf = fleet.folder / "broker" / "mosquitto.conf"
    before = conf.read_text(encoding="utf-8")
    lines = [line for line in before.splitlines() if not line.startswith(("max_packet_size", "message_size_limit"))]
    (tmp_path / "wide.py").write_text(
        "from torch import nn\nclass Wide(nn.Sequential):\n    def __init__(self):\n        "
        "super().__init__(nn.Linear(64, 900), nn.Linear(900, 10))\n"
    )
    file = tmp_path / "wide.msgpack"
    build = ["release", "build", f"{tmp_path / 'wide.py'}:Wide", "--loss", "cross_entropy", "--force"]
    build += ["--task", str(DIGITS / "task.toml"), "-o", str(file), "--fleet", str(fleet.folder)]
    assert cli.main(build) == 0
    fleet.broker.stop()
    try:
        conf.write_text("\n".join([*lines, "max_packet_size 50000", ""]), encoding="utf-8")
        fleet.broker.start()
        assert _publish(fleet, file, "0") == 3
        assert "--chunk-size 48976" in capsys.readouterr().err
        assert cli.main([*build, "--chunk-size", "48976"]) == 0
        assert _publish(fleet, file, "0") == 0
        fleet.broker.stop()
    finally:
        conf.write_text(before, encoding="utf-8")
        fleet.broker.start()


@pytest.mark.usefixtures("aggregator")
def test_the_examples_readme_works(fleet: Fleet, tmp_path: Path) -> None:
    """The shell blocks for a fleet of one's own run as they stand, in order."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "fleet").symlink_to(fleet.folder)
    (site / "examples").symlink_to(ROOT / "examples")
    text = (DIGITS / "README.md").read_text(encoding="utf-8")
    demo, *blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert all(line.startswith("make demo") for line in demo.splitlines())  # tests/system/test_demo.py runs it
    assert len(blocks) == 2
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        done = subprocess.run(
            ["sh", "-eu", "-c", block],
            cwd=site,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "All keys matched" in done.stdout


def test_the_examples_configuration_loads(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The TOML that the example's README adds to a device's configuration is valid there."""
    text = (DIGITS / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    bundle = tmp_path / "bundle"
    shutil.copytree(fleet.bundle("reader"), bundle)
    with (bundle / "agent.toml").open("a", encoding="utf-8") as file:
        file.write(block)
    assert edge_agent_cli.main(["config", "check", "--config", str(bundle / "agent.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["digits"]["path"] == "/srv/digits.npz"
