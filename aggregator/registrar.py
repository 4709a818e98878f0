"""The registrar's shell: HTTPS in, the rules of aggregator.registry, rows and certificates out.

One owner: the event loop's thread. A request is read whole, within bounds, before the owner looks at it; then it is
decided, written and answered without another request in between. Each connection has one request, one task, and a
deadline for all of it, TLS included. It alone holds the CA's key, and it never connects to anything.

    accept -> admission -> TLS -> one request -> decide -> commit -> answer -> close
"""

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from aggregator import ca, control, registry, registry_store
from aggregator.admission import Admission, Pace, network_of
from aggregator.config import RegistrarConfig, RegistrarLimits
from aggregator.control import RegistrarControl, RegistrarRequest
from aggregator.deny import DenyList
from aggregator.registry import Issue, Repeat, Shown, StoredCertificate, StoredDevice, StoredToken, Times
from aggregator.registry_store import RegistryStore
from shared import enrolment, identity, logs, systemd
from shared.driver import read_clock
from shared.enrolment import BODY_MAX, BrokerPlace, Enrolment, EnrolRequest, Refusal, RenewRequest, Token
from shared.errors import ConfigError, EnrolmentError, LocalProtocolError, Refused, RemoteProtocolError, StorageError
from shared.events import Event
from shared.files import hold, write_durably
from shared.logs import tell
from shared.version import VERSION

PAGE = 200
"""Tokens or devices in one answer of a list."""
_BEAT = 5.0
"""Seconds between two looks at the deny list; the watchdog may ask for less. Each request looks for itself."""
_DAY = 86_400.0
_DRIFT = 3600.0
_EXPIRES_SOON = 30
_LITTER = 64
"""Ended connections after which memory is swept: each leaves a ring of objects with buffers of a quarter of a megabyte,
which Python by itself counts as a few small ones and lets lie by the hundred."""
_DRAINED = 1 << 20
"""Bytes of a body that is too large which are thrown away, so that its sender hears why."""
_HEADER_MAX = 16 << 10
_DETAIL_MAX = 300
_JSON, _PEM = "application/json", "application/x-pem-file"

_STATUS: Mapping[Refused, int] = {
    Refused.BAD_REQUEST: 400,
    Refused.NOT_FOUND: 404,
    Refused.TOO_LARGE: 413,
    Refused.TOO_MANY: 429,
    Refused.UNAVAILABLE: 503,
}
"""403 for all others."""


class Registrar:
    """Decides, issues and remembers. Only for the owner; every call takes the time in seconds since 1970."""

    def __init__(self, config: RegistrarConfig, now: float) -> None:
        """Open everything; ConfigError where something is missing or does not fit together."""
        self._config = config
        self._authority = ca.load_authority(config.ca.cert, config.ca.key)
        self._ca_end = self._authority.certificate.not_valid_after_utc.timestamp()
        if now >= self._ca_end:
            raise ConfigError(str(config.ca.cert), "", "has expired: make a new fleet")
        self.ca_pem = self._authority.certificate.public_bytes(Encoding.PEM)
        identity.load_root(config.trust.root)
        self._root = config.trust.root.read_bytes()
        broker = config.broker
        self._place = BrokerPlace(
            host=broker.host, port=broker.port, prefix=broker.prefix, message_max=broker.message_max
        )
        self._times = Times(config.certificates.lifetime, config.certificates.renewable)
        self._deny = DenyList(config.trust.deny)
        state = config.state.directory
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = hold(state / "lock")
        except OSError as error:
            raise ConfigError(str(state), "state.directory", f"cannot be used: {error.strerror}") from None
        if self._lock is None:
            raise ConfigError(str(state), "state.directory", "another registrar runs on this directory")
        self._store = RegistryStore(state / registry_store.FILE)
        self._crl_due = True
        self._looked: frozenset[str] = frozenset()
        """Names on the deny list whose certificates are revoked; they get no others."""
        try:
            self._take_bundles()
            self.look(now)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the registry go."""
        self._store.close()
        if self._lock is not None:
            self._lock.close()

    # -- devices -------------------------------------------------------------------------------------------------

    def enrol(self, body: bytes, now: float) -> bytes:
        """Answer POST /v1/enrol; raises EnrolmentError, StorageError and ConfigError, and has changed nothing then."""
        request = enrolment.decode(body, EnrolRequest)
        denied = self._deny.names()
        with self._store.transaction():
            decision = registry.enrol(self._store, self._times, request, denied, now)
            if isinstance(decision, Issue):
                token, known = decision.token, self._store.device(decision.name)
                if token is None:
                    raise LocalProtocolError("an enrolment without a token")
                replaced = 0 if known is None else self._store.revoke_certificates(decision.name, now)
                self._store.put_device(
                    StoredDevice(name=decision.name, labels=token.labels, enrolled=int(now), how="token")
                )
                issued = self._issue(decision, now)
                self._store.use_token(token.id, decision.name, issued.key, now)
        if isinstance(decision, Repeat):
            return self._answer(decision.certificate, now)
        tell(Event.DEVICE_ENROLLED, device=decision.name, token=request.token, serial=f"{issued.serial:x}")
        if replaced:
            tell(Event.DEVICE_REVOKED, device=decision.name, certificates=replaced, cause="replaced")
            self._crl_due = True
            self._write_crl(now)
        return self._answer(issued, now)

    def renew(self, body: bytes, now: float) -> bytes:
        """Answer POST /v1/renew; raises likewise."""
        request = enrolment.decode(body, RenewRequest)
        old, shown = self._shown(request.certificate, now)
        csr = enrolment.read_csr(request.csr)
        denied = self._deny.names()
        with self._store.transaction():
            decision = registry.renew(self._store, self._times, shown, csr, request.signature, denied, now)
            if isinstance(decision, Issue):
                if self._store.certificate(shown.serial) is None:
                    self._remember(old, shown)  # of a bundle: it may have to be revoked one day
                issued = self._issue(decision, now)
        if isinstance(decision, Repeat):
            return self._answer(decision.certificate, now)
        tell(
            Event.DEVICE_RENEWED,
            device=decision.name,
            serial=f"{issued.serial:x}",
            days_left=int((shown.not_after - now) // _DAY),
        )
        return self._answer(issued, now)

    def _shown(self, pem: str, now: float) -> tuple[x509.Certificate, Shown]:
        """The certificate of a renewal, verified as of when it was valid: how old it may be is for the rules to say."""
        certificate = enrolment.read_certificate(pem)
        try:
            begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
            der = certificate.public_bytes(Encoding.DER)
            found = identity.verify_device(der, [self._authority.certificate], min(max(now, begin), end))
        except (RemoteProtocolError, ValueError, OverflowError) as error:
            detail = error.detail if isinstance(error, RemoteProtocolError) else str(error)
            raise EnrolmentError(Refused.BAD_CERTIFICATE, detail[:_DETAIL_MAX]) from None
        return certificate, Shown(found.name, found.public_key, found.serial, found.not_after)

    def _issue(self, decision: Issue, now: float) -> StoredCertificate:
        life = timedelta(seconds=registry.end_of(self._times, self._ca_end, now) - now)
        born = datetime.fromtimestamp(now, UTC)
        made = ca.issue_client(self._authority, decision.name, decision.key, born, life)
        stored = StoredCertificate(
            serial=made.serial_number,
            device=decision.name,
            key=registry.key_id(decision.key),
            issued=int(now),
            not_after=int(made.not_valid_after_utc.timestamp()),
            pem=made.public_bytes(Encoding.PEM).decode(),
        )
        self._store.add_certificate(stored)
        self._looked -= {decision.name}  # it was taken off the list, and may be put on it again before the next look
        return stored

    def _remember(self, certificate: x509.Certificate, shown: Shown) -> None:
        """A certificate that was not issued here, but with the same CA's key."""
        issued = int(certificate.not_valid_before_utc.timestamp())
        if self._store.device(shown.name) is None:
            self._store.put_device(StoredDevice(name=shown.name, labels={}, enrolled=issued, how="bundle"))
        self._store.add_certificate(
            StoredCertificate(
                serial=shown.serial,
                device=shown.name,
                key=registry.key_id(shown.public_key),
                issued=issued,
                not_after=int(shown.not_after),
                pem=certificate.public_bytes(Encoding.PEM).decode(),
            )
        )

    def _answer(self, certificate: StoredCertificate, now: float) -> bytes:
        return enrolment.encode(
            Enrolment(
                v=1,
                certificate=certificate.pem,
                ca=self.ca_pem.decode(),
                root=self._root,
                broker=self._place,
                now=int(now),
                renew_at=registry.renew_at(certificate.issued, certificate.not_after),
            )
        )

    def _take_bundles(self) -> None:
        """Make the devices that have bundles known: their names are taken, and they can be revoked."""
        path = self._config.trust.bundles
        if path is None or not path.stat().st_size:
            return
        with self._store.transaction():
            for each in identity.load_certificates(path):
                try:
                    certificate, shown = self._shown(each.public_bytes(Encoding.PEM).decode(), 0.0)
                except EnrolmentError as error:
                    advice = f"holds one that this CA did not issue to a device ({error.detail}): take it out"
                    raise ConfigError(str(path), "trust.bundles", advice) from None
                if self._store.certificate(shown.serial) is None:
                    self._remember(certificate, shown)

    # -- time, the deny list and the broker's ---------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Revoke what devices have that came onto the deny list, and keep the broker's list in step with it.

        ConfigError if the deny list cannot be read. What a disk refuses is told, and tried again in the next call.
        """
        denied = self._deny.names()
        try:
            with self._store.transaction():
                revoked = {name: self._store.revoke_certificates(name, now) for name in sorted(denied - self._looked)}
        except StorageError as error:
            tell(Event.STORAGE_FAILED, detail=str(error))
            return
        self._looked = denied
        for name, count in revoked.items():
            if count:
                tell(Event.DEVICE_REVOKED, device=name, certificates=count, cause="denied")
                self._crl_due = True
        self._write_crl(now)

    def warn(self, now: float) -> None:
        """Tell of certificates of ours that end soon."""
        for path in (self._config.ca.cert, self._config.listen.cert):
            days = int((identity.load_certificates(path)[0].not_valid_after_utc.timestamp() - now) // _DAY)
            if days < _EXPIRES_SOON:
                tell(Event.CERTIFICATE_EXPIRING, path=str(path), days=days)

    def forget(self, now: float) -> None:
        """Let go of certificates that nobody can renew any more."""
        with contextlib.suppress(StorageError), self._store.transaction():
            self._store.forget(now - self._times.renewable - _DAY)

    def _write_crl(self, now: float) -> None:
        if not self._crl_due:
            return
        try:
            with self._store.transaction():
                revoked = self._store.revoked(now)
            write_durably(self._config.crl, ca.issue_crl(self._authority, revoked, now))
        except (OSError, StorageError) as error:
            tell(Event.STORAGE_FAILED, detail=f"{self._config.crl}: {error}")
            return
        self._crl_due = False

    # -- the operator ----------------------------------------------------------------------------------------------

    def command(self, request: RegistrarRequest, now: float) -> Mapping[str, object]:
        """What the operator asked by the control socket; {"error": text} says no."""
        try:
            with self._store.transaction():
                answer = self._command(request, now)
        except (StorageError, ValueError) as error:
            return {"error": str(error)}
        if request.verb == "denied":
            self.look(now)
        elif "error" not in answer and request.verb == "token create":
            tell(Event.TOKEN_CREATED, token=answer["id"], name=request.name or None, seconds=request.seconds)
        elif "error" not in answer and request.verb == "token revoke":
            tell(Event.TOKEN_REVOKED, token=request.name)
        return answer

    def _command(self, request: RegistrarRequest, now: float) -> Mapping[str, object]:
        store, name = self._store, request.name
        match request.verb:
            case "token create":
                return self._create(request, now)
            case "token list":
                tokens = store.tokens(name, PAGE)
                return {"tokens": [_token_facts(each, now) for each in tokens], "more": len(tokens) == PAGE}
            case "token revoke":
                token = store.token(name)
                if token is None:
                    return {"error": f"there is no token {name}; `aggregator token list` names them"}
                if token.state(now) == "used":
                    return {"error": f"{token.device} has used it: `aggregator device revoke {token.device}`"}
                store.revoke_token(name, now)
                return {"token": name, "revoked": True}
            case "device list":
                devices = store.devices(name, PAGE)
                return {"devices": [self._device_facts(each) for each in devices], "more": len(devices) == PAGE}
            case "denied":
                return {"device": name, "known": store.device(name) is not None, "crl": str(self._config.crl)}
            case "device show" | "device label":
                device = store.device(name)
                if device is None:
                    return {"error": f"there is no device {name}; `aggregator device list` names them"}
                if request.verb == "device show":
                    found = store.certificates(name, 32)
                    return self._device_facts(device) | {"certificates": [_certificate_facts(each) for each in found]}
                labels = dict(device.labels) | registry.labels_of(request.labels)
                kept = {key: value for key, value in labels.items() if value}
                if len(kept) > registry.LABELS_MAX:
                    return {"error": f"more than {registry.LABELS_MAX} labels"}
                store.label(name, kept)
                return {"device": name, "labels": kept}

    def _create(self, request: RegistrarRequest, now: float) -> Mapping[str, object]:
        name = request.name or None
        labels = {key: value for key, value in registry.labels_of(request.labels).items() if value}
        if name is not None and not registry.is_pattern(name):
            return {"error": f"{name!r:.80} can name no device: a-z 0-9 and -, with * for any characters"}
        if name is not None and "*" not in name:
            if self._deny.has(name):
                return {"error": f"{name} is on the deny list {self._config.trust.deny}: take it off first"}
            if self._store.device(name) is not None and not request.again:
                return {"error": f"there is a device {name}: --again makes a token that replaces it"}
        elif request.again:
            return {"error": "--again needs the --name of one device"}
        token = Token(_token_id(), secrets.token_bytes(32), enrolment.pin_of(self._authority.certificate))
        stored = StoredToken(
            id=token.id,
            digest=enrolment.secret_digest(token.secret),
            name=name,
            again=request.again,
            labels=labels,
            created=int(now),
            expires=int(now) + request.seconds,
        )
        self._store.add_token(stored)
        return _token_facts(stored, now) | {"token": str(token)}

    def _device_facts(self, device: StoredDevice) -> dict[str, object]:
        newest = next(iter(self._store.certificates(device.name, 1)), None)
        return {
            "device": device.name,
            "labels": dict(device.labels),
            "how": device.how,
            "enrolled": device.enrolled,
            "expires": None if newest is None else newest.not_after,
            "denied": self._deny.has(device.name),
        }


# -- HTTP ----------------------------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """uvicorn's, which also says when its connection is gone, and answers what is no HTTP in JSON."""

    def __init__(self, config: uvicorn.Config, server: ServerState, state: dict[str, Any]) -> None:
        super().__init__(config=config, server_state=server, app_state=state)
        self.gone = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()

    def send_400_response(self, msg: str) -> None:
        body = _refusal(Refused.BAD_REQUEST, msg).body
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: {_JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        )
        self.transport.write(head.encode() + b"\r\n" + bytes(body))
        self.transport.close()


class Service:
    """The daemon: connections, the control socket, signals and the service manager."""

    def __init__(self, config: RegistrarConfig) -> None:
        """Bind and open everything; ConfigError where that fails."""
        self._config = config
        self._tls = _tls(config)
        self._listener = _listen(config.listen.address, config.listen.port)
        try:
            self._registrar = Registrar(config, read_clock().utc)
        except BaseException:
            self._listener.close()
            raise
        limits = config.limits
        self._admission = _admission(limits)
        self._lines, self._unsaid = Pace(1.0, 60), 0
        self._ended = 0
        self._manager = systemd.ServiceManager(os.environ)
        self._failure: ConfigError | None = None
        self._http, self._http_state = (
            uvicorn.Config(
                self._app(),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                h11_max_incomplete_event_size=_HEADER_MAX,
            ),
            ServerState(),
        )
        self._http.load()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError if what was configured stops working."""
        loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._stop.set)
        door = control.registrar_server(
            self._config.state.directory, lambda asked: _post(loop, partial(self._commanded, asked))
        )
        door.start()
        work = [loop.create_task(self._accept()), loop.create_task(self._beat())]
        self._connections: set[asyncio.Task[None]] = set()
        address, port = self._listener.getsockname()[:2]
        gc.freeze()  # what is here now stays: sweeping looks at connections alone
        self._manager.ready()
        self._manager.status(f"serving on port {port}")
        tell(Event.DAEMON_STARTED, version=VERSION, address=address, port=port)
        self._registrar.warn(read_clock().utc)
        stopped = loop.create_task(self._stop.wait())
        try:
            await asyncio.wait([stopped, *work], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._manager.stopping()
            self._listener.close()
            for task in (stopped, *work, *self._connections):
                task.cancel()
            ended = await asyncio.gather(stopped, *work, *self._connections, return_exceptions=True)
            await asyncio.to_thread(door.stop)  # its thread may wait for this one
            self._registrar.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error
        if self._failure is not None:
            raise self._failure
        tell(Event.DAEMON_STOPPED)

    # -- connections -------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(0.1)  # no descriptors left, or it was gone before we looked
                continue
            network = network_of(address[0])
            verdict = self._admission.came(network, loop.time())
            if verdict == "drop":
                connection.close()
                continue
            task = loop.create_task(self._converse(connection, address[0], verdict == "answer"))
            self._connections.add(task)
            task.add_done_callback(partial(self._left, network))

    def _left(self, network: str, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._admission.left(network)
        self._ended += 1
        if self._ended % _LITTER == 0:
            gc.collect()

    async def _converse(self, connection: socket.socket, address: str, often: bool) -> None:
        """One connection from TLS to its end; whatever is not done in time is cut off."""
        loop = asyncio.get_running_loop()
        state = {"address": address, "often": often}
        made: list[asyncio.Transport] = []
        try:
            connection.setblocking(False)
            async with asyncio.timeout(self._config.limits.seconds):
                transport, protocol = await loop.connect_accepted_socket(
                    lambda: _Protocol(self._http, self._http_state, state), connection, ssl=self._tls
                )
                made.append(transport)
                await protocol.gone.wait()
        except (TimeoutError, OSError):
            pass  # junk, an impatient client, or one that does not believe our certificate
        finally:
            for each in made:
                each.abort()
            connection.close()

    def _app(self) -> Starlette:
        async def authority(request: Request) -> Response:
            return Response(self._registrar.ca_pem, media_type=_PEM)

        async def enrol(request: Request) -> Response:
            body = await read_body(request)
            return Response(self._registrar.enrol(body, read_clock().utc), media_type=_JSON)

        async def renew(request: Request) -> Response:
            body = await read_body(request)
            return Response(self._registrar.renew(body, read_clock().utc), media_type=_JSON)

        async def unknown(request: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 404
            return _refusal(Refused.NOT_FOUND, "there is nothing here", status)

        async def failed(request: Request, error: Exception) -> Response:
            return _refusal(Refused.UNAVAILABLE, "try again later")

        routes = [
            Route(enrolment.CA_PATH, self._guarded(authority), methods=["GET"]),
            Route(enrolment.ENROL_PATH, self._guarded(enrol), methods=["POST"]),
            Route(enrolment.RENEW_PATH, self._guarded(renew), methods=["POST"]),
        ]
        application = Starlette(routes=routes, exception_handlers={HTTPException: unknown, Exception: failed})
        # It would send a client on to whatever host the client had named.
        application.router.redirect_slashes = False
        return application

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An answer whose every error is a typed refusal."""

        async def guarded(request: Request) -> Response:
            try:
                if request.state.often:
                    raise EnrolmentError(Refused.TOO_MANY, "wait a minute")
                found = await answer(request)
            except EnrolmentError as error:
                self._refused(request, error)
                return _refusal(error.reason, error.detail)
            except StorageError as error:
                tell(Event.STORAGE_FAILED, detail=str(error))
                return _refusal(Refused.UNAVAILABLE, "try again later")
            except ConfigError as error:
                self._fail(error)
                return _refusal(Refused.UNAVAILABLE, "try again later")
            except ClientDisconnect:
                return Response(status_code=400)
            # One request a connection: its deadline is the request's.
            found.headers["connection"] = "close"
            return found

        return guarded

    def _refused(self, request: Request, error: EnrolmentError) -> None:
        """Tell of a refusal, but do not let strangers fill the disk with lines."""
        if not self._lines.allows(read_clock().mono):
            self._unsaid += 1
            return
        address, path = request.state.address, request.url.path
        unsaid = self._unsaid or None
        tell(
            Event.ENROLMENT_REFUSED,
            reason=error.reason,
            detail=error.detail,
            address=address,
            path=path,
            unsaid=unsaid,
        )
        self._unsaid = 0

    # -- the rest ------------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Feed the watchdog and look at the deny list; once a day at what has become old."""
        loop = asyncio.get_running_loop()
        wait = min(_BEAT, self._manager.watchdog or _BEAT)
        due, before = loop.time() + _DAY, read_clock()
        while not self._stop.is_set():
            self._manager.alive()
            now = read_clock()
            try:
                self._registrar.look(now.utc)
                if now.mono >= due:
                    self._registrar.warn(now.utc)
                    # A clock that was set today deletes nothing.
                    if abs((now.utc - before.utc) - (now.mono - before.mono)) <= _DRIFT:
                        self._registrar.forget(now.utc)
                    due, before = now.mono + _DAY, now
            except ConfigError as error:
                self._fail(error)
            await asyncio.sleep(wait)

    def _commanded(self, asked: RegistrarControl) -> None:
        if asked.begin():
            try:
                asked.reply(self._registrar.command(asked.request, read_clock().utc))
            except ConfigError as error:
                asked.reply({"error": str(error)})
                self._fail(error)

    def _fail(self, error: ConfigError) -> None:
        self._failure = error
        self._stop.set()


def run(config: RegistrarConfig) -> None:
    """`aggregator registrar run`: until SIGTERM or SIGINT."""
    logs.configure(config.log.level, config.log.format, environ=os.environ, identifier="registrar")
    asyncio.run(Service(config).run())


def _admission(limits: RegistrarLimits) -> Admission:
    return Admission(
        rate=limits.address_rate,
        burst=limits.address_burst,
        total=limits.connections,
        each=limits.address_connections,
    )


def _tls(config: RegistrarConfig) -> ssl.SSLContext:
    """TLS 1.3 alone; what proves a device's identity is in its request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(config.listen.cert, config.listen.key)
    except (ssl.SSLError, OSError) as error:
        advice = f"does not fit to {config.listen.key} ({error.args[-1]})"
        raise ConfigError(str(config.listen.cert), "listen.cert", advice) from None
    return context


def _listen(address: str, port: int) -> socket.socket:
    try:
        if address or not socket.has_dualstack_ipv6():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = socket.create_server((address, port), family=family, backlog=128)
        else:
            made = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    except OSError as error:
        where = f"{address or '*'}:{port}"
        raise ConfigError("registrar", "listen", f"{where} cannot be listened on: {error.strerror}") from None
    made.setblocking(False)
    return made


async def read_body(request: Request) -> bytes:
    """The body of a request; EnrolmentError(TOO_LARGE) for one above BODY_MAX bytes, which is never kept.

    One that says that it is far too large is not even read.
    """
    told = request.headers.get("content-length", "0")
    found, size = bytearray(), 0
    if told.isdecimal() and len(told) <= 10 and int(told) <= _DRAINED:
        async for piece in request.stream():
            size += len(piece)
            if size <= BODY_MAX:
                found += piece
            elif size > _DRAINED:
                break
    else:
        size = BODY_MAX + 1
    if size > BODY_MAX:
        raise EnrolmentError(Refused.TOO_LARGE, f"the limit is {BODY_MAX} bytes")
    return bytes(found)


def _refusal(reason: Refused, detail: str, status: int | None = None) -> Response:
    body = enrolment.encode(Refusal(v=1, error=reason, detail=detail[:_DETAIL_MAX]))
    return Response(
        body, status_code=status or _STATUS.get(reason, 403), media_type=_JSON, headers={"connection": "close"}
    )


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended: the asker is told so by a closed socket
        loop.call_soon_threadsafe(call)


def _token_id() -> str:
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(12))


def _token_facts(token: StoredToken, now: float) -> dict[str, object]:
    return {
        "id": token.id,
        "state": token.state(now),
        "name": token.name,
        "again": token.again,
        "labels": dict(token.labels),
        "created": token.created,
        "expires": token.expires,
        "device": token.device,
    }


def _certificate_facts(certificate: StoredCertificate) -> dict[str, object]:
    return {
        "serial": f"{certificate.serial:x}",
        "issued": certificate.issued,
        "expires": certificate.not_after,
        "revoked": certificate.revoked_at,
    }
