"""Certificates that the product never issues, for tests that show them refused."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregator.ca import Authority

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Forged:
    """A certificate and the key it speaks of."""

    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        """What a head carries."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        """The certificate as a file holds it."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as a file holds it."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def forge(
    authority: Authority,
    name: str,
    *,
    born: datetime | None = None,
    days: int = 30,
    common_names: list[str] | None = None,
    alternative: list[x509.GeneralName] | None = None,
    usage: list[x509.ObjectIdentifier] | None = None,
    more: list[x509.ExtensionType] | None = None,
    key: Key | None = None,
    ca: bool = False,
) -> Forged:
    """What `authority` would sign if it signed anything: by default a good client certificate for `name`.

    `alternative` and `usage` leave their extension out when they are empty lists.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    born = born or datetime.now(UTC) - timedelta(hours=1)
    alternative = [x509.DNSName(name)] if alternative is None else alternative
    usage = [CLIENT] if usage is None else usage
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text) for text in common_names or [name]])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(born)
        .not_valid_after(born + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    for extension in more or []:
        builder = builder.add_extension(extension, critical=False)
    return Forged(builder.sign(authority.key, hashes.SHA256()), key)
