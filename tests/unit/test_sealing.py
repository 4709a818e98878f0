"""Sealing: opens whole, with the round's key, for its context, or not at all."""

from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from shared import sealing
from shared.errors import Reason, RemoteProtocolError
from shared.messages import PlainBody
from shared.sealing import SEGMENT, TAG

HEADER = PlainBody(examples=4, steps=2, metrics={"loss": 0.5}, holdout=1)
CONTEXT = b"the context"


@cache
def keys() -> tuple[bytes, bytes]:
    """A round's key pair."""
    return sealing.generate()


@cache
def sealed(size: int) -> tuple[bytes, bytes]:
    """(encapsulation, ciphertext) of a delta of `size` bytes."""
    encapsulation, ciphertext = sealing.seal(HEADER, bytes(range(256)) * (size // 256), keys()[1], CONTEXT)
    return encapsulation, bytes(ciphertext)


def refused(ciphertext: bytes, encapsulation: bytes = b"", context: bytes = CONTEXT, private: bytes = b"") -> None:
    """It does not open."""
    with pytest.raises(RemoteProtocolError) as caught:
        sealing.open_sealed(private or keys()[0], encapsulation or sealed(LONG)[0], ciphertext, context)
    assert caught.value.reason is Reason.SEALED_BADLY


LONG = 3 * SEGMENT


@pytest.mark.parametrize("size", [0, 256, SEGMENT - 256, SEGMENT, LONG])
def test_round_trip(size: int) -> None:
    """What was sealed comes out, at sizes around the segments' edges; its size is known beforehand."""
    encapsulation, ciphertext = sealed(size)
    header, delta = sealing.open_sealed(keys()[0], encapsulation, ciphertext, CONTEXT)
    assert header == HEADER
    assert bytes(delta) == bytes(range(256)) * (size // 256)
    assert len(ciphertext) <= sealing.sealed_size(sealing.HEADER_MAX, size)


def test_nothing_shows() -> None:
    """Two seals of the same body share no bytes worth the name, and the plaintext is not in them."""
    first, second = sealed(256)[1], bytes(sealing.seal(HEADER, bytes(range(256)), keys()[1], CONTEXT)[1])
    assert first != second
    assert bytes(range(64)) not in first


def test_only_for_its_context_and_key() -> None:
    """Another task, round or device (all in the context), or another round's key: it does not open."""
    ciphertext = sealed(LONG)[1]
    refused(ciphertext, context=b"the context of another round")
    refused(ciphertext, private=sealing.generate()[0])


def test_segments_are_in_order_and_whole() -> None:
    """Dropped, swapped, repeated, truncated, appended: caught."""
    ciphertext = sealed(LONG)[1]
    step = SEGMENT + TAG
    pieces = [ciphertext[at : at + step] for at in range(0, len(ciphertext), step)]
    assert len(pieces) == 4
    refused(b"".join(pieces[:-1]))
    refused(b"".join(pieces[1:]))
    refused(b"".join([pieces[1], pieces[0], *pieces[2:]]))
    refused(b"".join([pieces[0], pieces[0], *pieces[2:]]))
    refused(ciphertext[:-1])
    refused(ciphertext + b"\0")
    refused(b"")
    refused(ciphertext[:TAG])


def test_spliced_from_another_seal() -> None:
    """A segment of another update, sealed to the same key for the same context, does not fit in."""
    ciphertext = sealed(LONG)[1]
    other = bytes(sealing.seal(HEADER, bytes(LONG), keys()[1], CONTEXT)[1])
    refused(other[: SEGMENT + TAG] + ciphertext[SEGMENT + TAG :])
    refused(other)


@given(st.integers(min_value=0), st.integers(0, 7))
def test_any_flipped_bit(position: int, bit: int) -> None:
    """In the ciphertext or in the encapsulation."""
    encapsulation, ciphertext = sealed(256)
    spoilt = bytearray(encapsulation + ciphertext)
    spoilt[position % len(spoilt)] ^= 1 << bit
    refused(bytes(spoilt[len(encapsulation) :]), bytes(spoilt[: len(encapsulation)]))


def test_an_encapsulation_of_any_length() -> None:
    """Junk of any length is refused, not crashed on."""
    for size in (1, 32, 79, 81, 4096):
        refused(sealed(256)[1], bytes(size))


FROZEN = (
    "505cd6f7dc81bba6bf6c41bad0952025154c1626a94ca0e58131fb62b44a456b",
    "9d7dccf017440b88d05c8bf394a7fa77eabd8bea8b49326c16447b2669fc3f165e12cd455235f03e8a356c7392ebe992"
    "96d78f395cc1b083ac86f8e4861e4dff56fccce476d9b949ae5ab4ca238b0d2a",
    "1ea27d6e8f4578a47740baff68f6c7e15d0b0ebc98f69d6c630d70ce1e13be67fb14a450db98444bf167afc1d0dbdfd3"
    "c0dd83bf612cbb5ec8e2e6c902b608962245749502e40b4f3761",
)
"""A round's private key, and encapsulation and ciphertext of HEADER with the delta 0 1 2 3, for CONTEXT."""


def test_a_frozen_body_opens() -> None:
    """Protocol version 1 seals like this: a body of a device in the field opens, so no domain or binding is lost."""
    private, encapsulation, ciphertext = map(bytes.fromhex, FROZEN)
    header, delta = sealing.open_sealed(private, encapsulation, ciphertext, CONTEXT)
    assert (header, bytes(delta)) == (HEADER, bytes(range(4)))


@pytest.mark.parametrize("length", [2**32 - 1, sealing.HEADER_MAX + 1, 101])
def test_a_header_length_that_lies(length: int) -> None:
    """A header longer than its limit, or than what is there, is refused though a device sealed it so."""
    key = AESGCM.generate_key(256)
    encapsulation = sealing._SUITE.encrypt(key, X25519PublicKey.from_public_bytes(keys()[1]), sealing._INFO + CONTEXT)
    plain = length.to_bytes(4, "big") + bytes(100 if length == 101 else 20_000)
    ciphertext = AESGCM(key).encrypt(sealing._nonce(0, 1), plain, sealing._aad(CONTEXT, encapsulation))
    refused(ciphertext, encapsulation)


@pytest.mark.parametrize("examples", [1, 200, 70_000])
def test_the_delta_lies_where_numbers_should(examples: int) -> None:
    """However long the header is, and over segments: what is opened is the same, and aligned."""
    private, public = sealing.generate()
    delta = np.arange(700_000, dtype=np.float32)
    encapsulation, body = sealing.seal(PlainBody(examples, 1, {}, 0), delta.view(np.uint8).data, public, b"context")
    header, opened = sealing.open_sealed(private, encapsulation, body, b"context")
    found = np.frombuffer(opened, np.float32)
    assert header.examples == examples and np.array_equal(found, delta) and found.flags.aligned
