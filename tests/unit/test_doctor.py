"""edge_agent.doctor: each check finds what it is for, and says what to do; without an agent or a broker."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from aggregator import ca
from edge_agent import config as settings
from edge_agent import doctor
from edge_agent.config import AgentConfig, Data
from edge_agent.doctor import Check, Eyes
from edge_agent.eligibility import Policy
from edge_agent.store import Store, held
from shared import signing
from shared.trust import Position
from tests.records import Records

NOW = 1_795_000_000.0


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fleets with one device each."""
    folder = tmp_path_factory.mktemp("fleets")
    for name in ("one", "two"):
        ca.init_fleet(folder / name, name, ["localhost"], now=NOW, passphrase=None)
        ca.add_device(folder / name, "sensor-1", folder / f"{name}-bundle", now=NOW, passphrase=None)
    return folder


@pytest.fixture
def config(fleets: Path, tmp_path: Path) -> AgentConfig:
    """The device of the first fleet, with a state directory."""
    shutil.copytree(fleets / "one-bundle", tmp_path / "etc")
    (tmp_path / "state").mkdir(mode=0o700)
    found = settings.load(tmp_path / "etc" / "agent.toml", {})
    device = structs.replace(found.device, state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    return structs.replace(found, device=device)


def only(checks: list[Check], result: str) -> Check:
    """The one check with this result, which must say what to do."""
    (found,) = [each for each in checks if each.result == result]
    assert found.advice or result == "ok"
    return found


def test_a_sound_identity(config: AgentConfig) -> None:
    """Key and certificate are of one pair and of the fleet."""
    mine, checks = doctor.keys(config, NOW + 86_400)
    assert mine is not None and [each.result for each in checks] == ["ok", "ok"]
    assert doctor.root(config).result == "ok"


def test_a_key_that_others_may_read(config: AgentConfig) -> None:
    """Whoever has it is the device."""
    config.broker.key.chmod(0o644)
    assert "0644" in only(doctor.keys(config, NOW)[1], "failed").text


def test_a_key_of_another_certificate(config: AgentConfig, fleets: Path) -> None:
    """Nobody would let it in."""
    shutil.copy(fleets / "two-bundle" / "device.key", config.broker.key)
    config.broker.key.chmod(0o600)
    assert "is not the key of" in only(doctor.keys(config, NOW)[1], "failed").text


def test_a_certificate_of_another_fleet(config: AgentConfig, fleets: Path) -> None:
    """By the CA's signature, not its name."""
    shutil.copy(fleets / "two-bundle" / "ca.crt", config.broker.ca)
    assert "not a device's of the CA" in only(doctor.keys(config, NOW)[1], "failed").text


def test_a_certificate_that_has_expired_or_will(config: AgentConfig) -> None:
    """With the day, and whether anything renews it."""
    mine, _ = doctor.keys(config, NOW)
    assert mine is not None
    assert "nothing renews it" in only(doctor.keys(config, mine.ends + 1)[1], "failed").text
    assert "10 days" in only(doctor.keys(config, mine.ends - 10 * 86_400)[1], "warning").text


def test_files_that_are_missing_or_wrong(config: AgentConfig) -> None:
    """A broken identity or root record is named."""
    config.trust.root.write_bytes(b"no")
    only([doctor.root(config)], "failed")
    config.broker.cert.unlink()
    mine, checks = doctor.keys(config, NOW)
    assert mine is None and str(config.broker.cert) in only(checks, "failed").text


def test_a_key_that_only_the_unit_can_read(config: AgentConfig) -> None:
    """Nobody is told to throw a good identity away: the running agent says how it is, and it alone can."""
    hidden = config.broker.key.rename(config.broker.key.with_name("device.key.cred"))
    mine, checks = doctor.keys(config, NOW)
    assert mine is None and [each.result for each in checks] == ["skipped", "skipped"]
    assert str(hidden) in checks[0].text and not any("enrol" in each.advice for each in checks)
    told = {"device": "sensor-1", "certificate": {"expires": "2027-01-31T00:00:00+00:00", "days": 64.2}}
    for expiring, result in ((False, "ok"), (True, "warning")):
        told["certificate"] |= {"expiring": expiring}  # type: ignore[operator]
        _, (_, certificate) = doctor.keys(config, NOW, told)
        assert certificate.result == result and "sensor-1 until 2027-01-31, 64 days" in certificate.text
    shutil.copy(config.broker.cert, config.broker.key)
    hidden.unlink()
    assert only(doctor.keys(config, NOW)[1], "failed").name == "identity"


def test_a_key_both_ways(config: AgentConfig) -> None:
    """Of an encrypted key beside a plain one nobody knows which the unit loads."""
    shutil.copy(config.broker.key, config.broker.key.with_name("device.key.cred"))
    assert "device.key.cred" in only(doctor.keys(config, NOW)[1], "warning").text


def test_the_clock(config: AgentConfig) -> None:
    """Behind the certificate, not set by anything, or right."""
    mine, _ = doctor.keys(config, NOW)
    assert "is behind" in only(doctor.clock(mine, True, 0.0), "warning").text
    assert "nothing sets it" in only(doctor.clock(mine, False, NOW + 1), "warning").text
    only(doctor.clock(mine, True, NOW + 1), "ok")


def test_the_state_directory(config: AgentConfig) -> None:
    """Open to others, missing, or too full."""
    assert [each.result for each in doctor.state(config)] == ["ok", "ok"]
    config.device.state_dir.chmod(0o755)
    assert "0755" in only(doctor.state(config), "failed").text
    config.device.state_dir.chmod(0o700)
    full = structs.replace(config, policy=Policy(disk_free=2**62))
    assert "policy.disk_free" in only(doctor.state(full), "failed").text
    config.device.state_dir.rmdir()
    (gone,) = doctor.state(config)
    assert gone.result == "skipped"


def test_memory_and_pressure(config: AgentConfig, tmp_path: Path) -> None:
    """As the kernel says, here a kernel of files."""
    (proc := tmp_path / "proc" / "pressure").mkdir(parents=True)
    fake = structs.replace(config, device=structs.replace(config.device, proc_root=proc.parent))
    assert doctor.memory(fake).result == "warning"
    (proc.parent / "meminfo").write_text("MemAvailable: 1024 kB\n")
    assert "1 MiB" in only([doctor.memory(fake)], "warning").text
    assert "cpu" in only([doctor.pressure(fake)], "warning").text
    for name in ("cpu", "memory", "io"):
        (proc / name).write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    only([doctor.pressure(fake)], "ok")
    assert "not a pressure file" in only([doctor.triggers(fake, None)], "warning").text


def test_what_only_the_agent_knows(config: AgentConfig) -> None:
    """Triggers and control groups are its user's, so its word counts."""
    told: dict[str, Any] = {"sensing": "by pressure triggers", "sandbox": {"delegated": True, "missing": {}}}
    only([doctor.triggers(config, told)], "ok")
    only([doctor.delegation(told)], "ok")
    told = {"sensing": "by the clock: EPERM", "sandbox": {"delegated": True, "missing": {"cpu.idle": "no file"}}}
    assert "EPERM" in only([doctor.triggers(config, told)], "warning").text
    assert "cpu.idle (no file)" in only([doctor.delegation(told)], "warning").text
    only([doctor.delegation({"sandbox": {"delegated": False}})], "warning")
    assert doctor.delegation(None).result == "skipped"


def test_a_folder_of_models_that_is_closed_to_the_agent() -> None:
    """What the unit lets it write is not what root may, so the agent's word counts."""
    assert doctor.shelf({"models": {"folder": "/srv/models", "closed": None}}) == doctor.shelf(None) == []
    told = {"models": {"folder": "/srv/models", "closed": "/srv/models is closed"}}
    assert "/srv/models" in only(doctor.shelf(told), "failed").text


def test_windows_without_a_zone(config: AgentConfig, tmp_path: Path) -> None:
    """Nobody lives in UTC."""
    nights = settings.load(tmp_path / "etc" / "agent.toml", {"FIELDFARE_POLICY__WINDOWS": '["22:00-06:00"]'})
    only([doctor.zone(nights, tmp_path / "none")], "warning")
    assert doctor.zone(config, tmp_path / "none").result == "ok"


def test_without_an_agent_it_says_so_and_nothing_is_taken_over(config: AgentConfig) -> None:
    """An agent that may run and cannot be asked keeps its session."""
    told, running = doctor.daemon(config)
    assert told is None and running.result == "warning"
    unclear = Check("agent", "skipped", "no permission", "sudo")
    (skipped,) = doctor.broker(config, doctor.keys(config, NOW)[0], None, unclear)
    assert skipped.result == "skipped" and skipped.advice == "sudo"


def test_a_configuration_that_is_wrong_is_all_that_is_said(tmp_path: Path) -> None:
    """Nothing else can be judged without one."""
    (tmp_path / "agent.toml").write_text("[broker]\nhots = 1\n")
    (check,) = doctor.examine(tmp_path / "agent.toml", {})
    assert check["result"] == "failed" and "broker.hots" in check["text"] and "mend that line" in check["advice"]


@pytest.mark.parametrize("text", [None, "# nothing but what the package brings\n"])
def test_a_device_that_never_enrolled(tmp_path: Path, text: str | None) -> None:
    """Without a configuration, or with none of its fleet, there is no line to mend."""
    if text is not None:
        (tmp_path / "agent.toml").write_text(text)
    (check,) = doctor.examine(tmp_path / "agent.toml", {})
    assert check["result"] == "failed" and "edge-agent enrol" in check["advice"] and "mend" not in check["advice"]


@pytest.fixture
def holding(config: AgentConfig) -> AgentConfig:
    """The device holds the task `points`."""
    records = Records()
    message = records.message()
    position = Position((1, 0), signing.digest(message.release))
    Store(config.device.state_dir).keep_release("points", message, Position((1,), bytes(32)), position)
    return config


def test_the_tasks_that_are_held(holding: AgentConfig) -> None:
    """Read without changing anything; one whose data set nobody configured is told."""
    before = sorted(holding.device.state_dir.rglob("*"))
    found, check = doctor.tasks(holding)
    assert [each.task for each in found] == ["points"] and "[data.points]" in check.advice
    assert sorted(holding.device.state_dir.rglob("*")) == before
    assert held(holding.device.state_dir / "nowhere") == []


@pytest.mark.parametrize(
    ("write", "result", "words"),
    [
        (lambda path: np.savez(path, x=np.zeros((5, 3), np.float32), y=np.zeros(5, np.int64)), "ok", "5 examples"),
        (lambda path: np.savez(path, x=np.zeros((5, 2), np.float32), y=np.zeros(5, np.int64)), "failed", "points"),
        (lambda path: None, "failed", "is not there"),
    ],
)
def test_pytorch_and_the_data_in_the_child(
    holding: AgentConfig, tmp_path: Path, write: Callable[[Path], None], result: str, words: str
) -> None:
    """The real child tries the real torch, and reads the set as the task wants it."""
    write(tmp_path / "points.npz")
    config = structs.replace(holding, data={"points": Data(tmp_path / "points.npz")})
    found, contracts = doctor.tasks(config)
    assert contracts.result == "ok"
    trainer, data = doctor.training(config, found, Eyes())
    assert (trainer.name, trainer.result) == ("trainer", "ok"), trainer.text
    assert (data.name, data.result) == ("data points", result) and words in data.text


def test_a_trainer_that_cannot_work(config: AgentConfig) -> None:
    """Not installed, not startable, or not in the memory that it may have."""

    def tried(**changes: Any) -> Check:
        return doctor.training(structs.replace(config, trainer=structs.replace(config.trainer, **changes)), [], Eyes())[
            0
        ]

    assert "does not work" in tried(memory_max=64 << 20).text
    assert "No such file" in tried(python=Path("/nowhere/bin/python")).text


def test_root_looks_with_the_agents_eyes(config: AgentConfig, tmp_path: Path) -> None:
    """What root can read proves nothing, nor what lies where the running agent's unit does not look."""
    assert doctor.eyes(config, None) == Eyes() and Eyes().see(tmp_path)
    if os.geteuid() != 0:
        return
    os.chown(config.device.state_dir, 65534, 65534)
    assert doctor.eyes(config, None).user["user"] == 65534
    sleeper = subprocess.Popen(["sleep", "60"], user=65534, group=65534, extra_groups=[4, 5])
    try:
        found = doctor.eyes(config, {"pid": sleeper.pid})
        become = ("setpriv", "--reuid=65534", "--regid=65534", "--groups=4,5")
        assert found == Eyes(
            ("nsenter", f"--target={sleeper.pid}", "--mount", *become), {}, Path(f"/proc/{sleeper.pid}/root")
        )
        assert found.see(tmp_path) and not found.see(tmp_path / "nowhere")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert doctor.eyes(config, {"pid": os.getpid()}).user["user"] == 65534  # an agent that is root sees as we do
