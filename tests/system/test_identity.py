"""A device's certificate on a real machine: enrolled by the registrar's unit, renewed, slept past its end, revoked.

One machine with systemd as PID 1, real mosquitto under the units that `aggregator broker render` writes, and both
packages. The registrar gives certificates that live for half a minute. What needs no such machine is in
tests/system/test_enrolment.py.
"""

import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.hostile.daemon import until
from tests.system.conftest import Packages
from tests.system.machine import Machine
from tests.system.plant import AGENT, FAKETIME, status

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LIFETIME = 30
RENEWED = "/var/lib/fieldfare-agent/identity.pem"
ENDED = "/root/ended.pem"
SETTINGS = f"""
[state]
directory = "/var/lib/fieldfare-registrar"
[certificates]
lifetime = {LIFETIME}
[limits]
address_burst = 10000
"""


class Gate:
    """The machine, and what comes and goes through the registrar."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def token(self, *options: str) -> str:
        """A new token."""
        made = self.machine.run("aggregator", "token", "create", "--json", *options).stdout
        return str(json.loads(made)["token"])

    def refused(self, token: str, *options: str) -> str:
        """What `edge-agent enrol` says of a token that does not let it in; it must have left nothing."""
        ran = self.machine.run(
            AGENT, "enrol", "https://localhost:8443", token, "--config", "/root/other/agent.toml", *options, check=False
        )
        assert ran.returncode == 3 and ran.stderr.count("\n") == 1 and token.split(".")[-1] not in ran.stderr, ran
        assert not self.machine.exists("/root/other/device.crt")
        return ran.stderr

    def enrol(self, token: str) -> None:
        """The device gets its identity, though its clock says 1970, to OpenSSL as well."""
        clock = f"LD_PRELOAD={FAKETIME} FAKETIME={300 - time.time():.0f}"
        enrol = f"{clock} {AGENT} enrol https://localhost:8443 - <<<'{token}'"
        assert "pump-1" in self.machine.shell(enrol)

    def admitted(self, name: str) -> bool:
        """Whether the broker lets in who shows this file's certificate and key."""
        topic = ["-t", "fl/v1/devices/pump-1/status", "-m", "", "-i", "pump-1"]
        where = ["-V", "5", "-h", "localhost", "-p", "8883", "--cafile", "/etc/fieldfare/ca.crt", "-q", "1"]
        shown = ["--cert", name, "--key", name]
        return self.machine.run("mosquitto_pub", *where, *shown, *topic, check=False).returncode == 0

    def certificate(self) -> dict[str, Any]:
        """What `edge-agent status` shows of it."""
        found: dict[str, Any] = status(self.machine)["certificate"]
        return found

    def connected(self) -> None:
        """Wait until the agent has its link."""

        def up() -> bool | None:
            ran = self.machine.run(AGENT, "status", "--json", check=False)
            return True if ran.returncode == 0 and json.loads(ran.stdout)["link"]["connected"] else None

        until(up, "the link", 90.0)

    def count(self, event: str) -> int:
        """Lines of an event in the agent's journal so far."""
        return len(self.machine.journal(AGENT, EVENT=event))


@pytest.fixture(scope="module")
def gate(machines: Callable[..., Machine], packages: Packages) -> Gate:
    """Broker and registrar as docs/howto/enrol.md and `broker render` set them up, and a device without identity."""
    machine = machines("gate")
    packages.install(machine)
    machine.write("/etc/fieldfare/registrar.toml.d/site.toml", SETTINGS)
    machine.write("/etc/fieldfare/agent.toml.d/site.toml", "[enrol]\nretry = 1.0\n")
    machine.shell(
        """
        cd /root
        aggregator fleet init fleet --name gates --host localhost --no-passphrase
        aggregator registrar init --fleet fleet --host localhost -o registrar
        install -m 644 -t /etc/fieldfare registrar/{registrar.toml,registrar.crt,ca.crt,root.msgpack,bundles.pem,ca.crl}
        install -m 600 -t /etc/fieldfare registrar/{registrar.key,ca.key}
        systemctl enable --quiet --now registrar
        aggregator broker render --fleet fleet -o broker --crl /var/lib/fieldfare-registrar/ca.crl
        install -d -m 700 -o mosquitto -g mosquitto /etc/mosquitto/fieldfare
        install -m 600 -o mosquitto -g mosquitto broker/{mosquitto.conf,acl,*.crt,*.key} /etc/mosquitto/fieldfare/
        cp -r broker/systemd/. /etc/systemd/system/
        systemctl daemon-reload
        systemctl enable --quiet --now fieldfare-crl.path mosquitto
        """
    )
    return Gate(machine)


def test_tokens_that_let_nobody_in(gate: Gate) -> None:
    """Expired, taken back, for another name, of another fleet, made up: each is refused with its reason."""
    brief = gate.token("--name", "pump-2", "--for", "1s")
    back = gate.token("--name", "pump-3")
    (found,) = [
        each
        for each in json.loads(gate.machine.run("aggregator", "token", "list", "--json").stdout)["tokens"]
        if each["name"] == "pump-3"
    ]
    gate.machine.run("aggregator", "token", "revoke", found["id"])
    assert "token_revoked" in gate.refused(back)
    other = gate.token("--name", "pump-4")
    assert "wrong_name" in gate.refused(other, "--name", "pump-5")
    head, _, _ = other.rpartition(".")
    assert "wrong_pin" in gate.refused(f"{head}.{'A' * 43}")
    time.sleep(1.0)
    assert "token_expired" in gate.refused(brief)
    events = [line["REASON"] for line in gate.machine.journal("registrar", EVENT="enrolment.refused")]
    assert sorted(events) == ["token_expired", "token_revoked", "wrong_name"]  # the pin was the device's to refuse


def test_enrolled_once(gate: Gate) -> None:
    """A token is for one device; with its certificate the agent starts, and the broker lets it in."""
    token = gate.token("--name", "pump-1")
    gate.enrol(token)
    assert "token_used" in gate.refused(token)
    gate.machine.run("systemctl", "enable", "--quiet", "--now", AGENT)
    gate.connected()
    assert gate.count("certificate.expiring") == 0


def test_renewed_before_its_end(gate: Gate) -> None:
    """While it runs the agent gets the next certificate in time, again and again, and connects with it."""
    first = gate.machine.wait_journal(AGENT, 60.0, EVENT="certificate.renewed")
    second = until(
        lambda: line if (line := gate.machine.journal(AGENT, EVENT="certificate.renewed")[-1]) != first else None,
        "the next certificate",
        60.0,
    )
    assert second["DEVICE"] == "pump-1" and gate.count("renewal.failed") == 0
    gate.connected()
    assert gate.certificate()["source"] == "renewed"
    assert gate.machine.show(AGENT, "NRestarts") == "0"
    assert gate.machine.run("stat", "-c", "%a %U", RENEWED).stdout.split() == ["600", "fieldfare-agent"]
    assert gate.admitted(RENEWED)


def test_renewed_after_its_end(gate: Gate) -> None:
    """A machine that was off when its certificate ended asks with the old key when it is on again, and is back."""
    before = gate.count("certificate.renewed")
    gate.machine.run("systemctl", "stop", AGENT)
    gate.machine.run("cp", RENEWED, ENDED)
    assert gate.admitted(ENDED)
    said = gate.machine.run("openssl", "x509", "-noout", "-enddate", "-in", ENDED).stdout.strip()
    ends = datetime.strptime(said, "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC).timestamp()
    gate.machine.power_off()
    time.sleep(max(0.0, ends + 1.0 - time.time()))
    gate.machine.boot()
    until(lambda: gate.count("certificate.renewed") > before or None, "a new certificate", 60.0)
    gate.connected()
    assert not gate.admitted(ENDED)
    (late,) = gate.machine.journal("registrar", EVENT="device.renewed", DAYS_LEFT=-1)
    assert late["DEVICE"] == "pump-1"


def test_doctor_and_bugreport(gate: Gate) -> None:
    """On the installed package the doctor finds all that was set up well, and a report holds no secret."""
    gate.connected()
    ran = gate.machine.run(AGENT, "doctor", "--json", check=False)
    checks = {each["name"]: each for each in json.loads(ran.stdout)["checks"]}
    assert ran.returncode == 1
    assert [name for name, each in checks.items() if each["result"] == "failed"] == ["trainer"], checks
    assert checks["trainer"]["advice"] == "sudo edge-agent trainer install"
    good = {"configuration", "key", "certificate", "root record", "disk", "agent", "broker", "permission"}
    assert {checks[name]["result"] for name in good} == {"ok"}, checks

    gate.machine.run(AGENT, "bugreport", "-o", "/root/report.tar.gz")
    report = gate.machine.run("tar", "--extract", "--to-stdout", "--gzip", "--file=/root/report.tar.gz").stdout
    secrets = gate.machine.shell("cat /etc/fieldfare/device.key; cat /var/lib/fieldfare-agent/identity.pem || true")
    assert "Link up: " in report and "WatchdogSec=" in report and "PRIVATE" not in report
    assert not [line for line in secrets.splitlines() if len(line) > 30 and line in report]


def test_registrar_hangs(gate: Gate) -> None:
    """A registrar that does nothing any more is ended by its watchdog and restarted; it has forgotten nothing."""
    gate.machine.drop_in("registrar.service", "watchdog", "[Service]\nWatchdogSec=4s\nRestartSec=100ms\n")
    gate.machine.run("systemctl", "restart", "registrar")
    known = gate.machine.run("aggregator", "token", "list", "--json").stdout
    time.sleep(6.0)
    assert gate.machine.show("registrar", "NRestarts") == "0"  # it is fed as long as it works
    gate.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "registrar")
    until(lambda: gate.machine.show("registrar", "NRestarts") == "1" or None, "a restart")
    until(lambda: gate.machine.show("registrar", "ActiveState") == "active" or None, "the registrar")
    said = [str(line["MESSAGE"]) for line in gate.machine.journal("registrar", _PID=1)]
    assert any("Watchdog timeout (limit 4s)" in line for line in said), said
    assert gate.machine.run("aggregator", "token", "list", "--json").stdout == known


@pytest.mark.parametrize("unit", ["registrar", "aggregator", AGENT])
def test_shut_in(gate: Gate, unit: str) -> None:
    """What the installed unit can do to the machine, by systemd's own count."""
    said = gate.machine.run("systemd-analyze", "security", "--no-pager", f"{unit}.service").stdout
    exposure = re.search(r"exposure level for \S+: (\d+\.\d+)", said)
    assert exposure is not None and float(exposure[1]) <= 1.6, said[-400:]


def test_revoked_is_turned_away(gate: Gate) -> None:
    """A revoked device gets no further certificate, and the broker lets none of those in that it has."""
    gate.connected()
    gate.machine.wait_journal(AGENT, 60.0, EVENT="certificate.renewed")
    gate.machine.run("cp", RENEWED, ENDED)
    gate.machine.run("systemctl", "stop", AGENT)
    assert gate.admitted(ENDED)
    gate.machine.run("aggregator", "device", "revoke", "pump-1")
    until(lambda: None if gate.admitted(ENDED) else True, "the broker's refusal", 10.0)
    gate.machine.run("systemctl", "start", AGENT)
    gate.machine.wait_journal(AGENT, 60.0, EVENT="renewal.failed", REASON="denied")
    shown = status(gate.machine)
    assert not shown["link"]["connected"] and gate.machine.show(AGENT, "NRestarts") == "0"
    assert "it is revoked" in shown["link"]["cause"]
    assert gate.machine.journal(
        "fieldfare-crl.service", MESSAGE_ID="39f53479d3a045ac8e11786248231fbf"
    )  # it was started
    (listed,) = json.loads(gate.machine.run("aggregator", "device", "list", "--json").stdout)["devices"]
    assert (listed["device"], listed["denied"]) == ("pump-1", True)
