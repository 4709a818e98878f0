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
from edge_agent.config import AgentConfig, Broker
from shared import config as settings

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
        "token: {}",
        "joined with token {}1",
        "the password is {}7 now",
        "--token={}",
        "--token {} --verbose",
        "ExecStart={{ path=/bin/x ; argv[]=/bin/x --password {} --port 1 ; ignore_errors=no }}",
        "AWS_SECRET_ACCESS_KEY={}",
        '"AWS_SECRET_ACCESS_KEY": "{}"',
        "access-key = '{}'",
        "apiToken={}",
        "DBPASS={}",
        "OAUTH: {}",
        "PSK={}",
        "wpa_psk: {}",
        "Authorization: Bearer {}",
        "authorization: {} and the rest",
        "curl -H 'Authorization: Basic {}' https://example.org",
        "Cookie: a=1; session={}",
        "Password: correct horse {}",
        "sent Bearer {}==",
        "curl -u me:{} https://example.org",
        "curl --user=me:{} https://example.org",
        "GET /blob?x=1&sig={}",
        "https://example.org/?X-Amz-Signature={}&y=1",
        "https://user:{}@host/x",
        "https://user:p@{}@host/x",
        'password="ab\\"{}"',
        '{{"text": "password=\\"{}\\""}}',
        'PASSWORD=a"{}',
        "eyJhbGciOiJIUzI1NiJ9.{}.x",
    ],
)
def test_secrets_by_their_names(text: str) -> None:
    """What is called a secret is taken out, however its name is joined to it."""
    secret = "hunter-Two"
    found = bugreport.redacted(f"before\n{text.format(secret)}\nafter")
    assert secret not in found, found
    assert "[redacted]" in found and found.startswith("before\n") and found.endswith("\nafter")


@pytest.mark.parametrize(
    "secret",
    [
        base64.urlsafe_b64encode(bytes(range(200, 232))).decode(),
        base64.b64encode(bytes(range(0, 248, 8))).decode(),
        base64.b64encode(bytes([255, 250, *range(0, 248, 8)])).decode(),  # which begins as a path does
        base64.b32encode(bytes(range(30))).decode(),
        bytes(range(32)).hex(),
    ],
    ids=["url", "usual", "slash", "base32", "hex"],
)
def test_secrets_without_a_name(secret: str) -> None:
    """A long text in base64, or a long number, may be one."""
    assert secret[:20] not in bugreport.redacted(f"got {secret} from there")


@pytest.mark.parametrize(
    "text",
    [
        '"key": "/etc/fieldfare/device.key"',
        "MESSAGE_ID=53e83570d1329ed4ec52b8e7dbab18c7",
        "policy.memory_free asks for 805306368 bytes of memory available",
        "/var/lib/fieldfare-agent/tasks/digits/state",
        "/home/Press/Measurements/Line3/2026/November/Morning/x",
        "2026-11-28T09:49:42+00:00 pump edge-agent[412]: Link up: BROKER=broker.example.org:8883 SESSION=false",
        "2026-11-28T09:49:42+00:00 pump edge-agent[412]: Training failed: TASK=digits REASON=out_of_memory DETAIL=room",
        "2026-11-28T09:49:42+00:00 pump edge-agent[412]: Update answered: OUTCOME=rejected REASON=bad_signature",
        "enrolment was refused: token_used: this token has let a device in already",
        "bad_signature: no publisher's signature fits",
        "the broker refuses the certificate: Not authorized",
        "edge-agent.service: Main process exited, code=exited, status=243/CREDENTIALS",
        "the token is for another device; a password was not asked for",
        "KillSignal=15\nRestartKillSignal=15\nRootHashSignature=\nPassEnvironment=LANG\nInvocationID=53e83570d1329ed4ec52b8",
        "After=network-online.target sysinit.target systemd-journald.socket time-sync.target -.slice basic.target",
        "journalctl -u edge-agent EVENT=renewal.failed says why",
        "BOOT_IMAGE=/boot/vmlinuz-6.1.0-28-amd64 root=UUID=2f5c3b1e-8d43-4b0c-9c55-0a1b2c3d4e5f ro quiet",
        'File "/usr/lib/fieldfare-agent/lib/python3.11/site-packages/edge_agent/service.py", line 9, in check',
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """A report from which everything was taken helps nobody."""
    assert bugreport.redacted(text) == text


def test_versions_and_settings_stay() -> None:
    """Nothing that these parts usually hold looks like a secret."""
    versions = bugreport._json(bugreport._versions())
    assert bugreport.redacted(versions) == versions
    usual = bugreport._json(settings.effective(AgentConfig(broker=Broker(host="broker.example.org"))))
    assert bugreport.redacted(usual) == usual


@pytest.mark.parametrize(
    "text",
    [
        "Environment=A={0}",
        "  Environment = A={0}",
        "Environment=A=1 \\\n    B={0}",
        "Environment=A=1 \\\n    B=2 \\\n# a comment\n    C={0}",
        "SetCredential=x:{0}",
        "SetCredentialEncrypted=x: \\\n        {0} \\\n        {0}",
        "LoadCredential=x:/{0}",
    ],
)
def test_environment_and_credentials_of_the_unit(planted: Path, tmp_path: Path, text: str) -> None:
    """All lines of these settings are hidden, by whatever name, and nothing behind them."""
    (tmp_path / "unit").write_text(f"[Service]\n{text.format('hunter-Two')}\nRestart=on-failure\n")
    found = bugreport._unit()
    assert "hunter" not in found and "[redacted]" in found
    assert found.count("[Service]") == found.count("Restart=on-failure") == 2


def test_a_log_that_is_too_long_is_cut_at_its_beginning() -> None:
    """The newest lines matter."""
    found = bugreport.redacted("a\n" * (bugreport.TEXT_MAX // 2) + "the end")
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
