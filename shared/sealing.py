"""Sealing an update's body to a round's public key, and opening it.

HPKE (RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM) seals a fresh 32-byte content key with
info = domain + context. The body is AES-256-GCM in segments of 1 MiB (the STREAM construction: nonce = 7 zero bytes,
32-bit counter, last-segment flag; AAD = sha256(context + encapsulation)).

Guarantee: only the holder of the round's private key reads the body, and a body opens under exactly the context it was
sealed for; loss, repetition, reordering, truncation and splicing of segments are caught. HPKE and the content key draw
randomness from the operating system; everything else here is a function of its arguments.
"""

import hashlib
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from shared import wire
from shared.errors import Reason, RemoteProtocolError
from shared.messages import PlainBody

SEGMENT = 1 << 20
TAG = 16
HEADER_MAX = 16_384
_ALIGNMENT = 16
"""Bytes; a delta that was opened begins at a multiple of it."""
_LENGTH = struct.Struct(">I")
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_INFO = b"fieldfare/v1/update\0"


def generate() -> tuple[bytes, bytes]:
    """A round's key pair as raw (private, public) bytes, 32 each."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def sealed_size(header: int, delta: int) -> int:
    """Bytes of ciphertext for a header and a delta of these sizes."""
    plain = _LENGTH.size + header + delta
    return plain + TAG * _segments(plain)


def seal(header: PlainBody, delta: bytes | memoryview, public_key: bytes, context: bytes) -> tuple[bytes, bytearray]:
    """(encapsulation, ciphertext) of a body; `delta` is read, not kept. RemoteProtocolError for a key that is none."""
    packed = wire.pack(header)
    plain = bytearray(_LENGTH.size + len(packed) + len(delta))
    _LENGTH.pack_into(plain, 0, len(packed))
    plain[_LENGTH.size : _LENGTH.size + len(packed)] = packed
    plain[_LENGTH.size + len(packed) :] = delta
    key = AESGCM.generate_key(256)
    try:
        encapsulation = _SUITE.encrypt(key, X25519PublicKey.from_public_bytes(public_key), _INFO + context)
    except ValueError:
        # Of another length, or a point of low order, to which everybody would know the secret.
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, "the round's public key is no X25519 key") from None
    cipher, aad = AESGCM(key), _aad(context, encapsulation)
    count = _segments(len(plain))
    source, sealed = memoryview(plain), bytearray(len(plain) + TAG * count)
    target = memoryview(sealed)
    for index in range(count):
        piece = source[index * SEGMENT : (index + 1) * SEGMENT]
        start = index * (SEGMENT + TAG)
        cipher.encrypt_into(_nonce(index, count), piece, aad, target[start : start + len(piece) + TAG])
    return encapsulation, sealed


def open_sealed(
    private_key: bytes, encapsulation: bytes, ciphertext: bytes | bytearray | memoryview, context: bytes
) -> tuple[PlainBody, memoryview]:
    """(header, delta) of a body; RemoteProtocolError if it was not sealed whole, to this key, for this context.

    The delta is memory of its own, aligned for whatever numbers it holds.
    """
    try:
        key = _SUITE.decrypt(encapsulation, X25519PrivateKey.from_private_bytes(private_key), _INFO + context)
    except (InvalidTag, ValueError):
        raise RemoteProtocolError(Reason.SEALED_BADLY, "the encapsulation does not open with the round's key") from None
    if len(key) != 32:
        raise RemoteProtocolError(Reason.SEALED_BADLY, "the content key has not 32 bytes")
    cipher, aad = AESGCM(key), _aad(context, encapsulation)
    source = memoryview(ciphertext)
    count = -(-len(source) // (SEGMENT + TAG))
    size = len(source) - TAG * count
    if size < _LENGTH.size:
        raise RemoteProtocolError(Reason.SEALED_BADLY, f"{len(source)} bytes are too few for a body")
    plain = memoryview(bytearray(size + _ALIGNMENT))
    start, length = 0, 0
    for index in range(count):
        piece = source[index * (SEGMENT + TAG) : (index + 1) * (SEGMENT + TAG)]
        if len(piece) < TAG:
            raise RemoteProtocolError(Reason.SEALED_BADLY, f"segment {index} is cut short")
        at = start + index * SEGMENT
        end = at + len(piece) - TAG
        try:
            cipher.decrypt_into(_nonce(index, count), piece, aad, plain[at:end])
        except InvalidTag:
            raise RemoteProtocolError(Reason.SEALED_BADLY, f"segment {index} of {count} does not open") from None
        if index == 0:
            (length,) = _LENGTH.unpack_from(plain)
            if length > min(HEADER_MAX, size - _LENGTH.size):
                raise RemoteProtocolError(Reason.SEALED_BADLY, f"the header claims {length} bytes")
            # Whoever computes with the delta is spared copies of it if its numbers lie where numbers should.
            start = -(_LENGTH.size + length) % _ALIGNMENT
            plain[start : start + end] = plain[:end]
    begin = start + _LENGTH.size + length
    header = wire.unpack(bytes(plain[begin - length : begin]), PlainBody)
    return header, plain[begin : start + size]


def _segments(plain: int) -> int:
    return -(-plain // SEGMENT)


def _nonce(index: int, count: int) -> bytes:
    return bytes(7) + index.to_bytes(4, "big") + (b"\1" if index == count - 1 else b"\0")


def _aad(context: bytes, encapsulation: bytes) -> bytes:
    return hashlib.sha256(context + encapsulation).digest()
