"""Sealing: opens whole, with the round's key, for its context, or not at all."""

from functools import cache

import pytest
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
