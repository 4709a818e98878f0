"""shared.codec: what is encoded comes back, and nothing else does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared import codec
from shared.errors import LocalProtocolError, Reason, RemoteProtocolError

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, st.integers(0, 50), elements=FINITE))
def test_round_trip(delta: np.ndarray) -> None:
    """decode(encode(x)) is x bit for bit, denormals and negative zero included."""
    encoded = codec.encode("fp32", delta, [len(delta)])
    assert codec.decode("fp32", encoded, [len(delta)]).tobytes() == delta.tobytes()
    assert len(encoded) == codec.size_max("fp32", [len(delta)])


@given(st.binary(max_size=40))
def test_any_bytes(data: bytes) -> None:
    """Any bytes decode to finite values of the right number, or are refused."""
    try:
        delta = codec.decode("fp32", data, [2, 3])
    except RemoteProtocolError as error:
        assert error.reason in {Reason.WRONG_DIMENSION, Reason.NOT_FINITE}
    else:
        assert delta.shape == (5,) and np.isfinite(delta).all()


def test_order_of_bytes() -> None:
    """fp32 is little-endian, one value after the other."""
    assert bytes(codec.encode("fp32", np.array([1.0, -2.0], np.float32), [1, 1])) == bytes.fromhex("0000803f000000c0")


@pytest.mark.parametrize("length", [0, 4, 7, 9, 12])
def test_wrong_dimension(length: int) -> None:
    """Bytes of another length than the layout's are refused."""
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode("fp32", bytes(length), [1, 1])
    assert caught.value.reason is Reason.WRONG_DIMENSION


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_not_finite(value: float, position: int) -> None:
    """A NaN or an infinity anywhere is refused, on either side."""
    delta = np.ones(3, np.float32)
    delta[position] = value
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode("fp32", delta.tobytes(), [3])
    assert caught.value.reason is Reason.NOT_FINITE
    with pytest.raises(LocalProtocolError):
        codec.encode("fp32", delta, [3])


def test_decoded_is_read_only() -> None:
    """What was received cannot be changed by accident: it shares memory with the message."""
    delta = codec.decode("fp32", memoryview(bytearray(8)), [2])
    with pytest.raises(ValueError, match="read-only"):
        delta[0] = 1


@pytest.mark.parametrize("delta", [np.zeros(2, np.float32), np.zeros(3), np.zeros((3, 1), np.float32)])
def test_encode_is_strict(delta: np.ndarray) -> None:
    """A delta of another dimension or dtype is our own bug."""
    with pytest.raises(LocalProtocolError):
        codec.encode("fp32", delta, [3])
