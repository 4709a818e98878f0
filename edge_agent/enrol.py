"""How this device gets its identity from the registrar: `edge-agent enrol`, and the request for a renewal.

Nothing is told to anybody who has not proved to be the fleet's: the CA's certificate is fetched from whoever answers
and must be the one that the token pins; everything else goes over TLS that this CA vouches for. Dates are judged by the
time that the caller believes, since a clock may stand in 1970.

The files of an identity are written all or not at all. The new key is on disk before the registrar hears of it, so that
after a lost answer or a power cut the same command, repeated, gets the same certificate.
"""

import contextlib
import http.client
import json
import os
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_agent.config import beside
from shared import enrolment, identity, wire
from shared.cli import Exit, Failure
from shared.enrolment import BODY_MAX, PORT, Enrolment, EnrolRequest, Refusal, RenewRequest, Token
from shared.errors import ConfigError, EnrolmentError, LinkError, Reason, RemoteProtocolError
from shared.files import sync_folder
from shared.messages import Signed, Wire
from shared.trust import open_root
from shared.version import VERSION

KEY, CERTIFICATE, CA, ROOT = "device.key", "device.crt", "ca.crt", "root.msgpack"
DROP_IN = "10-enrolment.toml"

_URL = re.compile(r"https://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?/?")
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, for which Python's ssl has no name."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registrar listens; at the time that `clock` tells (UTC seconds) its certificate must not have expired."""

    host: str
    port: int
    clock: Callable[[], float]
    timeout: float = 20.0
    """Seconds for each step of a connection."""


def place(url: str, clock: Callable[[], float], timeout: float = 20.0) -> Place:
    """The registrar at `url`; ValueError with advice."""
    found = _URL.fullmatch(url)
    port = int(found[2] or PORT) if found else 0
    if found is None or not 1 <= port <= 65_535:
        raise ValueError(f"{url!r:.100} is no registrar's address: https://HOST or https://HOST:PORT")
    return Place(found[1].strip("[]"), port, clock, timeout)


# -- asking ------------------------------------------------------------------------------------------------------


def fetch_ca(where: Place, pin: bytes) -> bytes:
    """The fleet's CA (DER), once it is the one that the pin names; EnrolmentError(WRONG_PIN) otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent, and the pin decides
    status, found = _exchange(where, context, "GET", enrolment.CA_PATH, None)
    if status != 200:
        raise LinkError(f"what listens at {where.host}:{where.port} is no registrar (status {status})")
    return enrolment.pinned_ca(found, pin).public_bytes(Encoding.DER)


def ask(where: Place, ca: bytes, path: str, message: Wire) -> Enrolment:
    """The registrar's answer; LinkError if it cannot be had, EnrolmentError if it is no."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    context.verify_flags |= _NO_CHECK_TIME
    status, body = _exchange(where, context, "POST", path, enrolment.encode(message))
    try:
        if status == 200:
            return enrolment.decode(body, Enrolment)
        refusal = enrolment.decode(body, Refusal)
    except EnrolmentError as error:
        raise LinkError(f"the registrar's answer (status {status}) cannot be read: {error.detail}") from None
    raise EnrolmentError(refusal.error, refusal.detail)


def renew(
    where: Place,
    ca: bytes,
    name: str,
    certificate: bytes,
    old: ec.EllipticCurvePrivateKey,
    new: ec.EllipticCurvePrivateKey,
) -> bytes:
    """A certificate (DER) of `new` for whoever proves to hold `old`; checked to be that. See `ask`."""
    csr = enrolment.make_csr(new, name)
    proof = enrolment.sign_renewal(old, csr)
    request = RenewRequest(v=1, certificate=_pem(certificate).decode(), csr=csr, signature=proof)
    found = _der(ask(where, ca, enrolment.RENEW_PATH, request))
    check(found, ca, name, new)
    return found


def _der(found: Enrolment) -> bytes:
    return enrolment.read_certificate(found.certificate).public_bytes(Encoding.DER)


def check(certificate: bytes, ca: bytes, name: str, key: ec.EllipticCurvePrivateKey) -> str:
    """The device that a new certificate of `ca` and `key` names: `name`, if that is given. RemoteProtocolError."""
    try:
        ends = x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()
        authority = x509.load_der_x509_certificate(ca)
    except ValueError as error:
        raise RemoteProtocolError(Reason.BAD_CERTIFICATE, str(error)[:200]) from None
    found = identity.verify_device(certificate, [authority], ends)
    if found.public_key != key.public_key():
        raise RemoteProtocolError(Reason.BAD_CERTIFICATE, "the new certificate is of another key")
    if name and found.name != name:
        raise RemoteProtocolError(Reason.WRONG_DEVICE, f"a certificate for {found.name} came, not for {name}")
    return found.name


def _exchange(where: Place, context: ssl.SSLContext, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    address = f"{where.host}:{where.port}"
    connection = http.client.HTTPSConnection(where.host, where.port, timeout=where.timeout, context=context)
    try:
        connection.connect()
        peer = connection.sock.getpeercert() if context.verify_mode is not ssl.CERT_NONE else None
        # One that begins later than now proves that the clock is behind, and nothing else.
        if peer and where.clock() > ssl.cert_time_to_seconds(str(peer["notAfter"])):
            raise LinkError(f"the certificate of {address} has expired, or this machine's clock is wrong")
        headers = {"Content-Type": "application/json", "User-Agent": f"fieldfare/{VERSION}", "Connection": "close"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found = answer.read(BODY_MAX + 1)
    except ssl.SSLCertVerificationError as error:
        raise LinkError(f"{address} does not prove to be this fleet's registrar: {error.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LinkError(f"no answer of a registrar at {address}: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()
    if len(found) > BODY_MAX:
        raise LinkError(f"the answer of {address} is longer than {BODY_MAX} bytes")
    return answer.status, found


# -- enrolling ---------------------------------------------------------------------------------------------------


def enrol(config: Path, url: str, token: Token, name: str, *, again: bool, clock: Callable[[], float]) -> str:
    """Become a device of the token's fleet: the files beside `config` and its drop-in; returns the device's name.

    Raises Failure where there is an identity already and `again` is not given, ConfigError where the files cannot be
    written, and what `fetch_ca` and `ask` raise; then the identity is as it was.
    """
    where, folder = place(url, clock), config.absolute().parent
    if (hidden := beside(folder / KEY)).exists():
        # The unit goes on loading it, so it would show the new certificate with the old key.
        advice = f"move it away (mv {hidden} {hidden}.old), enrol, and encrypt the new key as the old one was"
        raise Failure(Exit.FAILED, f"{hidden} is the key of this device, and the unit loads that: {advice}")
    if not again and any((folder / each).exists() for each in (KEY, CERTIFICATE)):
        raise Failure(Exit.FAILED, f"{folder} holds a device's identity already; --again replaces it")
    pending = folder / f".{KEY}.enrolling"
    key = _pending_key(pending)
    ca = fetch_ca(where, token.pin)
    csr = enrolment.make_csr(key, name or None)
    request = EnrolRequest(v=1, token=token.id, secret=token.secret, name=name or None, csr=csr)
    found = ask(where, ca, enrolment.ENROL_PATH, request)
    certificate = _der(found)
    device = check(certificate, ca, name, key)
    open_root(wire.unpack(found.root, Signed, 1 << 20))
    files = [
        (folder / CA, _pem(ca), 0o644),
        (folder / ROOT, found.root, 0o644),
        (folder / f"{config.name}.d" / DROP_IN, _drop_in(found, url).encode(), 0o644),
        (folder / CERTIFICATE, _pem(certificate), 0o644),
        # The last: where it is, all of it is.
        (folder / KEY, pem(key), 0o600),
    ]
    if not config.exists():
        files.insert(0, (config, _CONFIG.encode(), 0o644))
    _put(files)
    with contextlib.suppress(OSError):
        pending.unlink()
    return device


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as it lies on disk."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _pending_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key of an enrolment that did not come to its end, else a fresh one that lies at `path` before it is used."""
    with contextlib.suppress(ConfigError):
        return identity.load_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    _put([(path, pem(key), 0o600)])
    return key


def _put(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Write them all, durably, or leave everything as it was; ConfigError."""
    before: list[tuple[Path, bytes | None]] = []
    fresh: list[tuple[Path, Path]] = []
    try:
        for path, data, mode in files:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            temporary = path.with_name(f".{path.name}.new")
            temporary.unlink(missing_ok=True)
            fresh.append((temporary, path))
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in fresh:
            before.append((path, path.read_bytes() if path.exists() else None))
            os.replace(temporary, path)
        for folder in {path.parent for path, _, _ in files}:
            sync_folder(folder)
    except OSError as error:
        for path, earlier in before:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True) if earlier is None else path.write_bytes(earlier)
        for temporary, _ in fresh:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        where = error.filename or files[0][0]
        raise ConfigError(str(where), "", f"cannot be written: {error.strerror}; nothing was changed") from None


def _pem(certificate: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)


def _drop_in(found: Enrolment, url: str) -> str:
    quoted = json.dumps  # for what the messages let through, JSON's strings are TOML's
    return f"""\
# Written by `edge-agent enrol`; another enrolment writes it anew. Settings of your own belong into another file.

[broker]
host = {quoted(found.broker.host)}
port = {found.broker.port}
prefix = {quoted(found.broker.prefix)}
message_max = {found.broker.message_max}
ca = "{CA}"
cert = "{CERTIFICATE}"
key = "{KEY}"

[trust]
root = "{ROOT}"

[enrol]
url = {quoted(url)}
"""


_CONFIG = """\
# The edge agent of this device. What `edge-agent enrol` learnt of its fleet is in the drop-in beside this file.
# `edge-agent config check` prints every setting and says what is wrong.

# SET THIS: what the device may train on. The name after `data.` is the `dataset` of a task's data contract.
#[data.digits]
#path = "/srv/fieldfare/digits.npz"
"""
