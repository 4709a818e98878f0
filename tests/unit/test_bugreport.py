"""edge_agent.bugreport: what is asked for is inside, and no secret is."""

import base64
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator import ca
from edge_agent import bugreport, cli

PEM = (
    ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1())
    .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    .decode()
    .strip()
)
BODY = PEM.splitlines()[1:-1]
SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
TOKEN = f"ff1.dGVzdGlk.{SECRET}.cGlucGluCg"


@pytest.mark.parametrize(
    "text",
    [
        f"before\n{PEM}\nafter",
        json.dumps({"key": PEM}),
        "\n".join(f"2026-01-01T00:00:00 host edge-agent[1]: {line}" for line in PEM.splitlines()),
        "\n".join(PEM.splitlines()[1:]),
        "\n".join(PEM.splitlines()[:-1]),
        f"enrolled with {TOKEN} just now",
        f"TOKEN={TOKEN}",
        f"https://user:{SECRET}@example.org/x",
        f'password = "{SECRET} and more"',
        f'"api_key": "{SECRET}"',
        f"Passphrase: {SECRET}",
        f"body {base64.b64encode(bytes(range(60))).decode()}",
    ],
    ids=range(12),
)
def test_secrets_are_taken_out(text: str) -> None:
    """In whatever form a log, a unit or a configuration may hold them."""
    found = bugreport.redacted(text)
    assert "[redacted]" in found
    assert not any(line in found for line in [*BODY, SECRET])


@pytest.mark.parametrize(
    "text",
    [
        '"key": "/etc/fieldfare/device.key"',
        "MESSAGE_ID=53e83570d1329ed4ec52b8e7dbab18c7",
        "policy.memory_free asks for 805306368 bytes of memory available",
        "/var/lib/fieldfare-agent/tasks/digits/state",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """A report from which everything was taken helps nobody."""
    assert bugreport.redacted(text) == text


def test_a_log_that_is_too_long_is_cut_at_its_beginning() -> None:
    """The newest lines matter."""
    found = bugreport.redacted("a\n" * bugreport.TEXT_MAX + "the end")
    assert len(found) == bugreport.TEXT_MAX and found.endswith("the end")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device whose log, unit and environment hold secrets, as these programs would print them."""
    ca.init_fleet(tmp_path / "fleet", "test", ["localhost"], now=1_795_000_000.0, passphrase=None)
    ca.add_device(tmp_path / "fleet", "sensor-1", tmp_path / "etc", now=1_795_000_000.0, passphrase=None)
    config = tmp_path / "etc" / "agent.toml"
    config.write_text(
        config.read_text().replace("[device]\n", '[device]\nrun_dir = "../run"\nstate_dir = "../state"\n')
    )
    monkeypatch.setenv("FIELDFARE_TRAINER__PYTHON", "/nowhere/bin/python")  # trying torch is the doctor's own test
    (programs := tmp_path / "bin").mkdir()
    (tmp_path / "log").write_text(f"edge-agent[1]: Daemon started\n{PEM}\njoined by {TOKEN}\n")
    (tmp_path / "unit").write_text(f"Id=edge-agent.service\nEnvironment=FIELDFARE_X={SECRET}\nNRestarts=3\n")
    for name, file in (("journalctl", "log"), ("systemctl", "unit")):
        (programs / name).write_text(f'#!/bin/sh\n[ "$2" = is-active ] && exit 3\nexec cat {tmp_path / file}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return config


def test_the_archive_has_everything_but_secrets(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part is there and named to its owner, closed to others, and a search for what was planted finds nothing."""
    target = tmp_path / "report.tar.gz"
    assert cli.main(["bugreport", "-o", str(target), "--config", str(planted)]) == 0
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        members = {each.name: archive.extractfile(each) for each in archive.getmembers()}
        parts = {name: file.read().decode() for name, file in members.items() if file is not None}
    names = {f"report/{name}" for name in capsys.readouterr().out.split() if name.endswith((".json", ".txt"))}
    assert set(parts) == names and len(names) == 8
    everything = "\n".join(parts.values())
    keys = [path for path in planted.parent.rglob("*") if path.suffix in (".key", ".crt")]
    assert len(keys) >= 3
    planted_lines = [
        *BODY,
        SECRET,
        *(line for file in keys for line in file.read_text().splitlines() if len(line) > 30),
    ]
    assert not [line for line in planted_lines if line in everything]
    assert "Daemon started" in parts["report/log.txt"] and "NRestarts=3" in parts["report/unit.txt"]
    assert json.loads(parts["report/config.json"])["broker"]["key"] == str(planted.parent / "device.key")
    assert "not running" in parts["report/status.json"]
    assert {each["name"] for each in json.loads(parts["report/doctor.json"])["checks"]} > {
        "key",
        "certificate",
        "clock",
    }
    assert "avg10" in parts["report/kernel.txt"] or not Path("/proc/pressure/cpu").exists()
    assert cli.main(["bugreport", "-o", str(target), "--config", str(planted)]) == 1


def test_the_same_parts_give_the_same_archive() -> None:
    """No time, no user, no machine is in it that is not in a part."""
    packed = bugreport.pack({"a.txt": "x"}, Path("r.tar.gz"))
    assert packed == bugreport.pack({"a.txt": "x"}, Path("r.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        (member,) = archive.getmembers()
    assert (member.name, member.uid, member.mtime) == ("r/a.txt", 0, 0)


def test_a_device_without_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: Path) -> None:
    """What cannot be asked is told, and the rest is there."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "journalctl" in bugreport.collect(planted, os.environ)["log.txt"]
    assert shutil.which("journalctl") is None
