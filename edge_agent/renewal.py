"""Which certificate this device shows, and how it gets the next one in time.

    waiting --due--> asking (a thread) --Renewed--> kept on disk, then used --> waiting
                         `--RenewalFailed--> waiting, longer each time

The newest of the configured identity and the renewed one (one file in the state directory, replaced as a whole) is the
device's, as long as it has not expired. The thread does nothing but ask, and posts what came of it; the owner does the
rest. An identity that has expired still asks: the registrar takes the old key's word. It never logs a key.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_agent.config import AgentConfig, Enrol
from shared import identity
from shared.enrolment import BACKDATED
from shared.errors import ConfigError, EnrolmentError, FieldfareError, LinkError, Refused, StorageError
from shared.events import Event
from shared.files import write_durably
from shared.logs import tell
from shared.machine import Instant

FILE = "identity.pem"
_SPREAD = 0.05
"""Of a certificate's life: devices that enrolled together do not renew together."""
_HOPELESS = {Refused.DENIED, Refused.REVOKED, Refused.TOO_LATE, Refused.BAD_CERTIFICATE, Refused.BAD_SIGNATURE}
_DAY = 86_400.0
_WARNING = 30 * _DAY
"""Seconds of a certificate's life that are left when its owner is warned; a third of it, if that is less."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The registrar gave a certificate (DER) for `key`."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes


@dataclass(frozen=True, slots=True)
class RenewalFailed:
    """It did not: `reason` is a word of Refused or `unreachable`; `hopeless` if only the operator can change that."""

    reason: str
    detail: str
    hopeless: bool


RenewalEvent = Renewed | RenewalFailed


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key, and the files of both."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    cert_file: Path
    key_file: Path
    source: Literal["configured", "renewed"]

    @property
    def der(self) -> bytes:
        """What the head of an update carries."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def name(self) -> str:
        """The device."""
        return identity.common_name(self.certificate)

    @property
    def begins(self) -> float:
        """Seconds since 1970."""
        return self.certificate.not_valid_before_utc.timestamp()

    @property
    def ends(self) -> float:
        """Seconds since 1970."""
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def life(self) -> float:
        """Seconds from when it was made to its end."""
        whole = self.ends - self.begins
        return whole - BACKDATED if whole > BACKDATED else whole

    def expiring(self, now: float) -> bool:
        """Whether somebody should see to it: where a registrar answers, it would have been renewed by now."""
        return self.ends - now < min(_WARNING, self.life / 3)


def choose(config: AgentConfig, now: float) -> Identity:
    """The identity that the device shows at `now`; ConfigError if the configured one cannot be read."""
    cert_file, key_file = config.broker.cert, config.broker.key
    configured = Identity(
        identity.load_certificate(cert_file), identity.load_key(key_file), cert_file, key_file, "configured"
    )
    renewed = _renewed(config.device.state_dir / FILE, configured)
    if renewed is None:
        return configured
    return max(renewed, configured, key=lambda each: (now < each.ends, each.begins))


def _renewed(file: Path, configured: Identity) -> Identity | None:
    """The renewed identity, if it is whole and of the same device and CA as the configured one."""
    if not file.exists():
        return None
    try:
        found = Identity(identity.load_certificate(file), identity.load_key(file), file, file, "renewed")
        if found.key.public_key() != found.certificate.public_key():
            raise ConfigError(str(file), "", "holds a certificate of another key")
    except ConfigError as error:
        tell(Event.RENEWAL_FAILED, reason="damaged", detail=str(error))
        return None
    same = found.certificate.issuer == configured.certificate.issuer and found.name == configured.name
    return found if same else None  # else the device was enrolled anew since


class Renewal:
    """Keeps the identity valid; used by the owner thread. `random` is uniform in [0, 1)."""

    def __init__(
        self,
        config: AgentConfig,
        current: Identity,
        now: Instant,
        post: Callable[[RenewalEvent], None],
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.current = current
        self._settings: Enrol = config.enrol
        self._ca, self._file = config.broker.ca, config.device.state_dir / FILE
        self._post, self._clock, self._random = post, clock, random
        self._next: ec.EllipticCurvePrivateKey | None = None
        """The key that is asked for, the same until it is certified: then a lost answer costs nothing."""
        self._got: Renewed | None = None
        self._asking, self._failures = False, 0
        self._due = self._planned()
        self._storage_failed = False
        self._retry_at = now.mono

    def _planned(self) -> float:
        return self.current.ends - self.current.life * (1 - self._settings.renew_at + _SPREAD * self._random())

    @property
    def due(self) -> float | None:
        """When the next certificate is asked for (UTC seconds); None where there is no registrar."""
        return self._due if self._settings.url else None

    def deadline(self, now: Instant) -> float | None:
        """Monotonic seconds at which `turn` has something to do."""
        if not self._settings.url or self._asking:
            return None
        return max(self._retry_at, now.mono + self._due - now.utc)

    def turn(self, now: Instant) -> bool:
        """Ask if it is time to; whether `current` has changed."""
        if self._got is not None:
            return self._adopt(self._got, now)
        deadline = self.deadline(now)
        if deadline is None or deadline > now.mono:
            return False
        self._next = self._next or ec.generate_private_key(ec.SECP256R1())
        self._asking = True
        threading.Thread(target=self._ask, args=(self.current, self._next), name="renewal", daemon=True).start()
        return False

    def take(self, event: RenewalEvent, now: Instant) -> None:
        """Note what came of asking; `turn` makes use of it."""
        self._asking = False
        if isinstance(event, Renewed):
            self._got, self._failures = event, 0
            return
        longest = _DAY if event.hopeless else self._settings.retry_max
        retry = longest if event.hopeless else min(longest, self._settings.retry * 2.0**self._failures)
        retry = min(retry, max(1.0, self.current.life / 20)) * (0.75 + 0.5 * self._random())
        self._failures = min(self._failures + 1, 30)
        self._retry_at = now.mono + retry
        left = round((self.current.ends - now.utc) / _DAY, 1)
        tell(Event.RENEWAL_FAILED, reason=event.reason, detail=event.detail, retry=round(retry), days=left)

    def _adopt(self, got: Renewed, now: Instant) -> bool:
        """Keep the new identity, then use it: a certificate whose key is lost would be of no use."""
        key = got.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        certificate = x509.load_der_x509_certificate(got.certificate)
        try:
            write_durably(self._file, key + certificate.public_bytes(Encoding.PEM))
        except OSError as error:
            if not self._storage_failed:
                failed = StorageError.of(self._file, error)
                tell(Event.STORAGE_FAILED, path=failed.path, detail=failed.detail)
            self._storage_failed = True  # it is tried again at the next turn
            return False
        self._storage_failed, self._got, self._next = False, None, None
        self.current = Identity(certificate, got.key, self._file, self._file, "renewed")
        self._due, self._retry_at = self._planned(), now.mono
        expires = datetime.fromtimestamp(self.current.ends, UTC).isoformat()
        tell(Event.CERTIFICATE_RENEWED, device=self.current.name, expires=expires)
        return True

    def _ask(self, current: Identity, key: ec.EllipticCurvePrivateKey) -> None:
        from edge_agent import enrol  # an HTTP client is 2 MB of memory, of use once a month

        event: RenewalEvent
        try:
            where = enrol.place(self._settings.url, self._clock, self._settings.timeout)
            ca = identity.load_certificates(self._ca)[0].public_bytes(Encoding.DER)
            event = Renewed(key, enrol.renew(where, ca, current.name, current.der, current.key, key))
        except EnrolmentError as error:
            event = RenewalFailed(error.reason.value, error.detail, error.reason in _HOPELESS)
        except LinkError as error:
            event = RenewalFailed("unreachable", str(error), False)
        except (FieldfareError, ValueError) as error:
            event = RenewalFailed("failed", str(error), False)
        self._post(event)
