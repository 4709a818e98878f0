"""The registrar as a process, against devices and strangers: each bad input is one typed refusal, and it lives on."""

import asyncio
import base64
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
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from starlette.requests import Request

from aggregator import ca, cli, registrar
from shared import enrolment, identity
from shared.enrolment import BODY_MAX, CA_PATH, ENROL_PATH, RENEW_PATH, Enrolment, Refusal, Token
from shared.errors import EnrolmentError, Refused
from tests.hostile.daemon import until
from tests.registrar import HOST, Site, certificate_of, new_key
from tests.registrar import site as make_site

DAY = 86_400.0
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A registrar for the tests of this module; it must outlive them all."""
    folder = tmp_path_factory.mktemp("site")
    generous = {"LIMITS__ADDRESS_BURST": "100000", "LIMITS__ADDRESS_CONNECTIONS": "24"}
    with make_site(folder, LIMITS__SECONDS="3", LIMITS__CONNECTIONS="24", **generous) as made:
        yield made
        assert made.process is not None and made.process.poll() is None
        assert made.stop() == 0
        assert made.events("daemon.stopped")


def reason(answer: Enrolment | Refusal) -> Refused:
    """Why it was refused."""
    assert isinstance(answer, Refusal), answer
    return answer.error


# -- enrolling -------------------------------------------------------------------------------------------------------


def test_a_device_enrols(site: Site) -> None:
    """CA by the pin, then a certificate for the new key that the fleet accepts, the root and the broker."""
    token, key = site.token("line3-*", labels=["site=graz"]), new_key()
    status, pem = site.call("GET", CA_PATH)
    authority = enrolment.pinned_ca(pem, token.pin)
    before = int(time.time())
    answer = site.enrol(token, key, "line3-a")
    assert status == 200 and isinstance(answer, Enrolment)
    der = certificate_of(answer).public_bytes(Encoding.DER)
    found = identity.verify_device(der, [authority], time.time())
    assert (found.name, found.public_key) == ("line3-a", key.public_key())
    assert before <= answer.now <= time.time()
    assert 29.9 * DAY < found.not_after - before < 30.1 * DAY and 19.9 * DAY < answer.renew_at - before < 20.1 * DAY
    assert answer.root == (site.fleet / "root" / "root.msgpack").read_bytes()
    assert (answer.broker.host, answer.broker.port, answer.broker.prefix) == (HOST, 18_883, "fl")
    assert answer.ca.encode() == pem
    shown = site.ask(verb="device show", name="line3-a")
    assert (shown["labels"], shown["how"], len(shown["certificates"])) == ({"site": "graz"}, "token", 1)
    told = site.events("device.enrolled")[-1]
    assert (told["device"], told["token"]) == ("line3-a", token.id)


def test_a_lost_answer_is_given_again(site: Site) -> None:
    """The same token and key: the same certificate. Another key: the token is used."""
    token, key = site.token(), new_key()
    first = certificate_of(site.enrol(token, key, "twice"))
    assert certificate_of(site.enrol(token, key, "twice")) == first
    assert reason(site.enrol(token, new_key(), "twice")) is Refused.TOKEN_USED
    assert reason(site.enrol(token, new_key(), "thrice")) is Refused.TOKEN_USED


def test_a_token_that_is_no_good(site: Site) -> None:
    """Unknown, wrong secret, expired, taken back: each says so, and the log has the reason."""
    key = new_key()
    good = site.token()
    assert reason(site.enrol(Token("a" * 12, good.secret, good.pin), key, "bad-1")) is Refused.BAD_TOKEN
    assert reason(site.enrol(Token(good.id, bytes(32), good.pin), key, "bad-1")) is Refused.BAD_TOKEN
    site.ask(verb="token revoke", name=good.id)
    assert reason(site.enrol(good, key, "bad-1")) is Refused.TOKEN_REVOKED
    short = site.token(seconds=1)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        time.sleep(0.05)
    assert reason(site.enrol(short, key, "bad-1")) is Refused.TOKEN_EXPIRED
    states = {each["id"]: each["state"] for each in site.ask(verb="token list")["tokens"]}
    assert (states[good.id], states[short.id]) == ("revoked", "expired")
    assert [each["reason"] for each in site.events("enrolment.refused")][-4:] == [
        "bad_token",
        "bad_token",
        "token_revoked",
        "token_expired",
    ]
    assert base64.b64encode(good.secret).decode() not in site.log.read_text()


@pytest.mark.parametrize("name", ["_operator", "_agg-0", "a/b", "dev-1/cmd", "+", "#", "A", "", "x" * 64, "a\x00", "ä"])
def test_a_name_that_is_none(site: Site, name: str) -> None:
    """Neither a service's nor one with a topic's letters, asked for or in the request."""
    token, key = site.token(), new_key()
    assert reason(site.enrol(token, key, name)) is Refused.BAD_NAME
    if name:
        assert reason(site.enrol(token, key, None, csr=enrolment.make_csr(key, name))) is Refused.BAD_NAME
    assert isinstance(site.enrol(token, key, f"after-{token.id}"), Enrolment)


def test_a_name_of_another(site: Site) -> None:
    """Outside the token, taken, or a bundle's: refused, unless the token replaces this very device."""
    assert reason(site.enrol(site.token("mine-*"), new_key(), "yours-1")) is Refused.WRONG_NAME
    assert reason(site.enrol(site.token(), new_key(), "dev-b")) is Refused.NAME_TAKEN
    key = new_key()
    first = certificate_of(site.enrol(site.token("mine-1"), key))
    assert reason(site.enrol(site.token(), new_key(), "mine-1")) is Refused.NAME_TAKEN
    again = site.token("mine-1", again=True)
    assert certificate_of(site.enrol(again, new_key())) != first
    old = first.public_bytes(Encoding.PEM).decode()
    assert reason(site.renew(old, key, new_key())) is Refused.REVOKED
    assert first.serial_number in crl(site)


def test_a_request_without_the_key(site: Site) -> None:
    """A forged signature, RSA, junk: BAD_CSR, and the token is still good."""
    token, key = site.token(), new_key()
    der = bytearray(x509.load_pem_x509_csr(enrolment.make_csr(key).encode()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    large = rsa.generate_private_key(65_537, 4096)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    rsa_csr = builder.sign(large, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    for csr in (forged, rsa_csr, "junk", forged.replace("MI", "\x00I"), "-----BEGIN CERTIFICATE REQUEST-----"):
        assert reason(site.enrol(token, key, "forged", csr=csr)) is Refused.BAD_CSR
    assert isinstance(site.enrol(token, key, "forged"), Enrolment)


# -- renewing --------------------------------------------------------------------------------------------------------


def test_a_device_renews_and_a_replay_changes_nothing(site: Site) -> None:
    """A new certificate of the same name for the new key; the same request gets the same one."""
    old, new = new_key(), new_key()
    first = site.enrol(site.token(), old, "renews")
    assert isinstance(first, Enrolment)
    second = certificate_of(site.renew(first.certificate, old, new))
    assert identity.common_name(second) == "renews" and second.public_key() == new.public_key()
    assert certificate_of(site.renew(first.certificate, old, new)) == second
    assert len(site.ask(verb="device show", name="renews")["certificates"]) == 2


@pytest.mark.parametrize(("days", "good"), [(1, True), (179, True), (181, False)])
def test_an_expired_certificate(site: Site, days: int, good: bool) -> None:
    """180 days after its end, and not longer."""
    old = new_key()
    answer = site.renew(site.issued(f"old-{days}", old, days * DAY), old, new_key())
    assert isinstance(answer, Enrolment) if good else reason(answer) is Refused.TOO_LATE


def test_a_bundle_renews(site: Site) -> None:
    """A certificate of `device add` is as good as an enrolled one."""
    folder = site.fleet.parent / "dev-b"
    pem = (folder / "device.crt").read_text()
    answer = site.renew(pem, identity.load_key(folder / "device.key"), new_key())
    assert identity.common_name(certificate_of(answer)) == "dev-b"


def test_a_renewal_of_another(site: Site, tmp_path: Path) -> None:
    """Another CA of the same name, a service, RSA, a foreign key, another name: each is refused."""
    ca.init_fleet(tmp_path / "fleet", "test-fleet", [HOST], now=time.time(), passphrase=None)
    key, new = new_key(), new_key()
    false = ca.open_authority(tmp_path / "fleet", None)
    assert reason(site.renew(site.issued("dev-1", key, -DAY, false), key, new)) is Refused.BAD_CERTIFICATE
    assert reason(site.renew(site.issued("_operator", key, -DAY), key, new)) is Refused.BAD_CERTIFICATE
    server = (site.fleet / "broker" / "server.crt").read_text()
    assert reason(site.renew(server, key, new)) is Refused.BAD_CERTIFICATE
    assert reason(site.renew((site.home / "ca.crt").read_text(), key, new)) is Refused.BAD_CERTIFICATE
    assert reason(site.renew(rsa_certificate(site), key, new)) is Refused.BAD_CERTIFICATE
    assert reason(site.renew("junk", key, new)) is Refused.BAD_CERTIFICATE
    good = site.issued("dev-1", key, -DAY)
    assert reason(site.renew(good, new_key(), new)) is Refused.BAD_SIGNATURE
    csr = enrolment.make_csr(new, "dev-2")
    signature = enrolment.sign_renewal(key, csr)
    assert reason(site.renew(good, key, new, csr=csr, signature=signature)) is Refused.WRONG_NAME
    assert reason(site.renew(good, key, new, csr="junk")) is Refused.BAD_CSR


def rsa_certificate(site: Site) -> str:
    """As our CA would never issue one: for an RSA key."""
    authority, name = site.authority, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dev-rsa")])
    ours = x509.load_pem_x509_certificate(site.issued("dev-rsa", new_key(), -DAY).encode())
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority.certificate.subject)
    builder = builder.public_key(rsa.generate_private_key(65_537, 2048).public_key()).serial_number(7)
    builder = builder.not_valid_before(ours.not_valid_before_utc).not_valid_after(ours.not_valid_after_utc)
    for each in ours.extensions:
        builder = builder.add_extension(each.value, each.critical)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def crl(site: Site) -> list[int]:
    """The serial numbers on the broker's list, whose signature is good."""
    found = x509.load_pem_x509_crl((site.state / "ca.crl").read_bytes())
    assert found.is_signature_valid(site.authority.key.public_key())
    assert found.next_update_utc == site.authority.certificate.not_valid_after_utc
    return [each.serial_number for each in found]


def test_a_revoked_device_is_out_at_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """`device revoke` denies it: it neither renews nor enrols, and its certificates stay on the list for ever."""
    key = new_key()
    first = site.enrol(site.token(), key, "stolen")
    serial = certificate_of(first).serial_number
    assert isinstance(first, Enrolment) and serial not in crl(site)
    assert cli.main(["device", "revoke", "stolen", "--config", str(site.home / "registrar.toml"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["denied"], said["known"]) == (True, True)
    assert "stolen" in (site.home / "deny.txt").read_text().split()
    assert reason(site.renew(first.certificate, key, new_key())) is Refused.DENIED
    assert reason(site.enrol(site.token(), new_key(), "stolen")) is Refused.DENIED
    assert serial in crl(site)
    assert site.ask(verb="device show", name="stolen")["denied"]
    assert site.events("device.revoked")[-1]["device"] == "stolen"
    (site.home / "deny.txt").write_text("")
    assert reason(site.renew(first.certificate, key, new_key())) is Refused.REVOKED
    assert serial in crl(site)


# -- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b"[" * 10_000, b"\xff\x00", b'{"v":2}', b"\0" * BODY_MAX])
@pytest.mark.parametrize("path", [ENROL_PATH, RENEW_PATH])
def test_junk(site: Site, path: str, body: bytes) -> None:
    """What is no request is one typed refusal."""
    assert reason(site.post(path, body)) is Refused.BAD_REQUEST


def test_other_places_and_methods(site: Site) -> None:
    """There is nothing else here, and it says so in JSON."""
    for method, path in (
        ("GET", "/"),
        ("GET", ENROL_PATH),
        ("PUT", CA_PATH),
        ("GET", "/v1/ca/../enrol"),
        ("GET", "//"),
        ("GET", f"{CA_PATH}/"),
        ("POST", f"{ENROL_PATH}/"),
    ):
        status, body = site.call(method, path)
        assert status in (404, 405) and msgspec.json.decode(body, type=Refusal).error is Refused.NOT_FOUND


def test_a_large_body_is_not_taken(site: Site) -> None:
    """One that says its size is not read, one that does not is thrown away; both are refused."""
    for size in (BODY_MAX + 1, 300_000):
        status, body = site.call("POST", ENROL_PATH, bytes(size))
        assert (status, msgspec.json.decode(body, type=Refusal).error) == (413, Refused.TOO_LARGE)
        chunked = iter([bytes(1000)] * (size // 1000 + 1))
        status, body = site.call("POST", ENROL_PATH, chunked)
        assert (status, msgspec.json.decode(body, type=Refusal).error) == (413, Refused.TOO_LARGE)


def test_an_endless_body_is_cut_off(site: Site) -> None:
    """Whoever goes on sending loses the connection, and the registrar no memory."""
    before = memory(site)
    with site.tls().wrap_socket(site.connect(), server_hostname=HOST) as stranger:
        stranger.sendall(f"POST {ENROL_PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with pytest.raises(OSError):  # whatever the kernel calls it
            for _ in range(200):
                stranger.sendall(piece)
    with site.tls().wrap_socket(site.connect(), server_hostname=HOST) as stranger:
        stranger.sendall(f"POST {ENROL_PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n".encode())
        assert b"413" in stranger.recv(100)
    assert memory(site) - before < 16 << 20


def test_a_body_is_kept_within_bounds() -> None:
    """Of a body that is too large no more is kept than one that is not, however it comes."""
    import tracemalloc

    sent = 0

    async def receive() -> dict[str, object]:
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": bytes(1 << 16), "more_body": True}

    scope = {"type": "http", "method": "POST", "path": ENROL_PATH, "headers": [], "query_string": b""}
    tracemalloc.start()
    try:
        with pytest.raises(EnrolmentError) as caught:
            asyncio.run(registrar.read_body(Request(scope, receive)))
        assert caught.value.reason is Refused.TOO_LARGE
        assert sent < 20 and tracemalloc.get_traced_memory()[1] < 512 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("head", [b"\x16\x03\x01 junk\r\n\r\n", b"A" * 40_000, b"GET / HTTP/9\r\n\r\n", b"\r\n" * 50])
def test_what_is_no_http(site: Site, head: bytes) -> None:
    """A refusal in JSON, or silence; then it is cut off."""
    with site.tls().wrap_socket(site.connect(), server_hostname=HOST) as stranger:
        stranger.sendall(head)
        answer = b""
        try:
            while piece := stranger.recv(4096):
                answer += piece
        except OSError:
            pass
    assert not answer or (b" 400 " in answer and b'"error":"bad_request"' in answer)


def test_what_is_no_tls(site: Site) -> None:
    """Plain HTTP, noise, and a version of TLS that is too old are let go."""
    for first in (b"GET /v1/ca HTTP/1.1\r\nhost: x\r\n\r\n", os.urandom(500), b"\x16\x03\x01\xff\xff" + bytes(100)):
        with site.connect() as stranger:
            stranger.sendall(first)
            assert ended(stranger)
    old = site.tls()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with site.connect() as stranger, pytest.raises(ssl.SSLError):
        old.wrap_socket(stranger, server_hostname=HOST)


def test_slow_strangers_keep_nobody_out(site: Site) -> None:
    """Connections that say nothing, before or after TLS, or a byte at a time, end in time; then devices get in."""
    silent = [site.connect() for _ in range(12)]
    slow = [site.tls().wrap_socket(site.connect(), server_hostname=HOST) for _ in range(12)]
    beyond = site.connect()
    assert ended(beyond)
    beyond.close()
    begun = time.monotonic()
    left: list[socket.socket] = list(slow)
    while left and time.monotonic() < begun + 20:
        for talker in list(left):
            try:
                talker.sendall(b"P")
            except OSError:
                left.remove(talker)
        time.sleep(0.2)
    assert not left and time.monotonic() - begun < 10
    assert all(ended(each) for each in silent)
    for stranger in (*silent, *slow):
        stranger.close()
    assert isinstance(site.enrol(site.token(), new_key(), "patient"), Enrolment)


def test_many_strangers_at_a_time(site: Site) -> None:
    """Thousands of connections that are dropped leave no descriptor, and after the first thousand no memory."""
    flood(site)
    before = memory(site)
    for _ in range(3):
        flood(site)
    assert memory(site) - before < 12 << 20

    def served() -> bool | None:
        try:
            return site.call("GET", CA_PATH)[0] == 200 or None
        except OSError:
            return None  # the last of them are still being seen off

    until(served, "an answer")


def flood(site: Site) -> None:
    """A thousand connections that say nothing and go; return when the registrar has seen them all off."""
    assert site.process is not None
    for _ in range(1000):
        site.connect().close()
    end = time.monotonic() + 20
    folder = Path(f"/proc/{site.process.pid}/fd")
    while len(list(folder.iterdir())) > 20 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(list(folder.iterdir())) <= 20


def ended(connection: socket.socket) -> bool:
    """Whether the other side ends a connection before our patience does."""
    connection.settimeout(10)
    try:
        while connection.recv(4096):
            continue
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def memory(site: Site) -> int:
    """Bytes that the registrar has in memory."""
    assert site.process is not None
    text = Path(f"/proc/{site.process.pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the process -------------------------------------------------------------------------------------------------------


def test_who_comes_too_often_is_told_so(tmp_path: Path) -> None:
    """Beyond its burst an address is answered "too many", and after as many again it is dropped."""
    limits = {"LIMITS__ADDRESS_BURST": "5", "LIMITS__ADDRESS_RATE": "0.001"}
    with make_site(tmp_path, **limits) as site:
        statuses = [site.call("GET", CA_PATH)[0] for _ in range(10)]
        assert statuses == [200] * 5 + [429] * 5
        with pytest.raises((OSError, http.client.HTTPException)):
            site.call("GET", CA_PATH)
        assert [each["reason"] for each in site.events("enrolment.refused")] == ["too_many"] * 5


def test_kill_loses_nothing(tmp_path: Path) -> None:
    """After kill -9 tokens, uses and certificates are as answered."""
    with make_site(tmp_path) as site:
        token, key = site.token(), new_key()
        first = certificate_of(site.enrol(token, key, "survivor"))
        other = site.token("later")
        site.stop(signal.SIGKILL)
        site.start()
        assert certificate_of(site.enrol(token, key, "survivor")) == first
        assert reason(site.enrol(token, new_key(), "thief")) is Refused.TOKEN_USED
        assert isinstance(site.enrol(other, new_key()), Enrolment)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("CA__KEY", "registrar.key", "is not the key of"),
        ("LISTEN__CERT", "ca.crt", "does not fit"),
        ("TRUST__ROOT", "ca.crt", "root record"),
        ("TRUST__BUNDLES", "registrar.crt", "did not issue"),
        ("LISTEN__ADDRESS", "192.0.2.1", "cannot be listened on"),
        ("STATE__DIRECTORY", "/proc/none", "state.directory"),
        ("CERTIFICATES__LIFETIME", "0", "certificates.lifetime"),
    ],
)
def test_a_wrong_configuration_ends_with_78(site: Site, setting: str, value: str, words: str) -> None:
    """systemd must not start it again; the line says what is wrong."""
    command = [sys.executable, "-m", "aggregator.cli", "registrar", "run", "--config", f"{site.home}/registrar.toml"]
    port = {"FIELDFARE_LISTEN__PORT": str(site.port + 1), "FIELDFARE_STATE__DIRECTORY": str(site.home / "other")}
    environ = os.environ | port | {f"FIELDFARE_{setting}": value}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (78, ""), ended.stderr
    assert words in ended.stderr


def test_a_second_one_on_the_same_registry_is_refused(site: Site) -> None:
    """Two would both think that a token is open."""
    command = [sys.executable, "-m", "aggregator.cli", "registrar", "run", "--config", f"{site.home}/registrar.toml"]
    environ = os.environ | {"FIELDFARE_LISTEN__PORT": str(site.port + 1)}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 78 and "another registrar" in ended.stderr


def test_a_deny_list_that_cannot_be_read_ends_it(tmp_path: Path) -> None:
    """Nobody may be let in whom it might deny."""
    with make_site(tmp_path) as site:
        (site.home / "deny.txt").write_bytes(b"\xff\xfe")
        # It looks by itself too, and may be gone already.
        with contextlib.suppress(OSError):
            assert reason(site.enrol(Token("a" * 12, bytes(32), bytes(32)), new_key(), "x")) is Refused.UNAVAILABLE
        assert site.process is not None and site.process.wait(20) == 78
        site.process = None


def test_the_operators_commands(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens and devices by the command line, with the documented exit codes."""
    config = ["--config", str(site.home / "registrar.toml")]
    assert cli.main(["token", "create", "--name", "cli-1", "--for", "2h", "--label", "a=b", *config]) == 0
    token = Token.parse(capsys.readouterr().out)
    assert isinstance(site.enrol(token, new_key()), Enrolment)
    assert cli.main(["token", "list", "--json", *config]) == 0
    listed = {each["id"]: each for each in json.loads(capsys.readouterr().out)["tokens"]}
    assert (listed[token.id]["state"], listed[token.id]["device"]) == ("used", "cli-1")
    assert cli.main(["token", "revoke", token.id, *config]) == 3
    assert "device revoke cli-1" in capsys.readouterr().err
    assert cli.main(["token", "create", "--name", "cli-1", *config]) == 3
    assert "--again" in capsys.readouterr().err
    assert cli.main(["token", "create", "--name", "_agg-0", *config]) == 3
    assert cli.main(["token", "create", "--label", "bad", *config]) == 2
    assert cli.main(["device", "label", "cli-1", "a=", "site=graz", *config]) == 0
    capsys.readouterr()
    assert cli.main(["device", "show", "cli-1", *config]) == 0
    assert "graz" in capsys.readouterr().out
    assert cli.main(["device", "list", *config]) == 0
    out = capsys.readouterr().out
    assert "dev-b" in out and "site=graz" in out and "bundle" in out
    assert cli.main(["device", "show", "nobody", *config]) == 3
    assert cli.main(["device", "show", "No", *config]) == 2


def test_lists_of_many(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """More than fit into one answer come in pages."""
    made = {site.token(seconds=5).id for _ in range(205)}
    assert site.ask(verb="token list")["more"]
    assert cli.main(["token", "list", "--json", "--config", str(site.home / "registrar.toml")]) == 0
    listed = [each["id"] for each in json.loads(capsys.readouterr().out)["tokens"]]
    assert made <= set(listed) and len(set(listed)) == len(listed)


def test_revoking_without_a_registrar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The deny list is written all the same, and the registrar makes up for the rest when it starts."""
    with make_site(tmp_path) as site:
        serial = certificate_of(site.enrol(site.token(), new_key(), "away")).serial_number
        assert site.stop() == 0
        assert cli.main(["device", "revoke", "away", "--config", str(site.home / "registrar.toml")]) == 4
        assert "deny list" in capsys.readouterr().err
        site.start()
        assert serial in crl(site)
