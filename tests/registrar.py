"""A fleet with a registrar as a process of its own, and what a device says to it, for tests of either side."""

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator import ca, control
from aggregator.broker import free_port
from aggregator.control import RegistrarRequest
from shared import enrolment
from shared.enrolment import Enrolment, EnrolRequest, Refusal, RenewRequest, Token

HOST = "localhost"
AGE = 400 * 86_400.0
START_SECONDS = 30.0


@dataclass
class Site:
    """The folders of a fleet and of its registrar, and that process while it runs."""

    fleet: Path
    home: Path
    port: int
    environ: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the registrar says: JSON lines."""
        return self.home / "log"

    @property
    def state(self) -> Path:
        """Its state directory."""
        return self.home / "state"

    @property
    def authority(self) -> ca.Authority:
        """The fleet's CA."""
        return ca.open_authority(self.fleet, None)

    def start(self) -> None:
        """Return when it serves."""
        command = [sys.executable, "-m", "aggregator.cli", "registrar", "run"]
        with self.log.open("ab") as log:
            before = log.tell()
            self.process = subprocess.Popen(
                [*command, "--config", str(self.home / "registrar.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environ,
            )
        end = time.monotonic() + START_SECONDS
        while b"daemon.started" not in self.log.read_bytes()[before:]:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def stop(self, by: int = signal.SIGTERM) -> int:
        """End it; its exit status."""
        assert self.process is not None
        self.process.send_signal(by)
        code = self.process.wait(20)
        self.process = None
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it told of one kind."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line["event"] == name]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask by the control socket."""
        return control.ask_registrar(self.state, RegistrarRequest(**request))

    def token(self, name: str = "", **request: Any) -> Token:
        """A new token."""
        return Token.parse(self.ask(verb="token create", name=name, **request)["token"])

    # -- what a device does --

    def tls(self) -> ssl.SSLContext:
        """As a device trusts, once it knows the CA."""
        return ssl.create_default_context(cafile=str(self.home / "ca.crt"))

    def call(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of one request."""
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=20, context=self.tls())
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()

    def post(self, path: str, request: msgspec.Struct | bytes) -> Enrolment | Refusal:
        """The answer to a request."""
        body = request if isinstance(request, bytes) else msgspec.json.encode(request)
        status, answer = self.call("POST", path, body)
        if status == 200:
            return msgspec.json.decode(answer, type=Enrolment)
        return msgspec.json.decode(answer, type=Refusal)

    def enrol(
        self, token: Token, key: ec.EllipticCurvePrivateKey, name: str | None = None, **changes: Any
    ) -> Enrolment | Refusal:
        """Enrol with a token."""
        plain: dict[str, Any] = {
            "v": 1,
            "token": token.id,
            "secret": token.secret,
            "name": name,
            "csr": enrolment.make_csr(key),
        }
        return self.post(enrolment.ENROL_PATH, EnrolRequest(**(plain | changes)))

    def renew(
        self, certificate: str, old: ec.EllipticCurvePrivateKey, new: ec.EllipticCurvePrivateKey, **changes: Any
    ) -> Enrolment | Refusal:
        """Renew with the old key."""
        csr = enrolment.make_csr(new)
        plain: dict[str, Any] = {
            "v": 1,
            "certificate": certificate,
            "csr": csr,
            "signature": enrolment.sign_renewal(old, csr),
        }
        return self.post(enrolment.RENEW_PATH, RenewRequest(**(plain | changes)))

    def issued(
        self, name: str, key: ec.EllipticCurvePrivateKey, ended: float, authority: ca.Authority | None = None
    ) -> str:
        """A certificate (PEM) of the fleet's CA, or of another, that ended so many seconds ago."""
        born = datetime.fromtimestamp(time.time() - ended, UTC) - timedelta(days=30)
        made = ca.issue_client(authority or self.authority, name, key.public_key(), born, timedelta(days=30))
        return made.public_bytes(Encoding.PEM).decode()

    def connect(self) -> socket.socket:
        """A TCP connection and nothing more."""
        return socket.create_connection((HOST, self.port), timeout=20)


def new_key() -> ec.EllipticCurvePrivateKey:
    """As a device makes it."""
    return ec.generate_private_key(ec.SECP256R1())


def certificate_of(answer: Enrolment | Refusal) -> x509.Certificate:
    """What a registrar issued."""
    assert isinstance(answer, Enrolment), answer
    return x509.load_pem_x509_certificate(answer.certificate.encode())


@contextlib.contextmanager
def site(folder: Path, broker_port: int = 18_883, ahead: float = 0.0, /, **environ: str) -> Iterator[Site]:
    """A registrar that serves, with settings such as LIMITS__SECONDS="2"; the fleet has one bundle, dev-b.

    Its own certificate begins so many seconds ahead of this machine's clock.
    """
    port = free_port()
    fleet = folder / "fleet"
    # Long ago: certificates that ended 181 days ago were issued by this CA.
    ca.init_fleet(
        fleet, "test-fleet", [HOST], now=time.time() - AGE, passphrase=None, port=broker_port, bind="127.0.0.1"
    )
    ca.add_device(fleet, "dev-b", folder / "dev-b", now=time.time(), passphrase=None)
    home = ca.init_registrar(
        fleet, [HOST], folder / "registrar", now=time.time() + ahead, passphrase=None, port=port, bind="127.0.0.1"
    )
    made = Site(fleet, home, port, {f"FIELDFARE_{name}": value for name, value in environ.items()})
    made.start()
    try:
        yield made
    finally:
        if made.process is not None:
            made.process.kill()
            made.process.wait()
