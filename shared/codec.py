"""How a delta becomes the bytes of an update, and back. numpy, no torch; pure.

A codec is named by the manifest and by every update's context. `sizes` are the elements of the delta's tensors in flat
order, because a codec finer than fp32 scales every tensor by itself. What `decode` returns is finite and has exactly
sum(sizes) values, or it raises; nothing is allocated beyond the size of its input.

fp32: float32, little-endian, one after the other, and nothing else.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from shared.errors import LocalProtocolError, Reason, RemoteProtocolError

Codec = Literal["fp32"]
Delta = npt.NDArray[np.float32]

_FP32 = np.dtype("<f4")


def size_max(codec: Codec, sizes: Sequence[int]) -> int:
    """The most bytes that an encoded delta can have; check it before opening or decoding one."""
    match codec:
        case "fp32":
            return _FP32.itemsize * sum(sizes)
    assert_never(codec)


def encode(codec: Codec, delta: Delta, sizes: Sequence[int]) -> memoryview:
    """The bytes of a finite `delta`, float32[sum(sizes)]; they may share its memory. Else LocalProtocolError."""
    if delta.dtype != np.float32 or delta.shape != (sum(sizes),):
        raise LocalProtocolError(f"a delta of {delta.dtype}{list(delta.shape)} where float32[{sum(sizes)}] belongs")
    if not _finite(delta):
        raise LocalProtocolError("a delta that is not finite")
    match codec:
        case "fp32":
            return np.ascontiguousarray(delta, _FP32).view(np.uint8).data
    assert_never(codec)


def decode(codec: Codec, data: bytes | memoryview, sizes: Sequence[int]) -> Delta:
    """The delta, float32[sum(sizes)], read-only; it may share `data`'s memory. RemoteProtocolError if it is none."""
    match codec:
        case "fp32":
            if len(data) != size_max(codec, sizes):
                raise RemoteProtocolError(
                    Reason.WRONG_DIMENSION, f"{len(data)} bytes where {sum(sizes)} float32 values belong"
                )
            delta = np.frombuffer(data, _FP32).astype(np.float32, copy=False)
        case _:
            assert_never(codec)
    if not _finite(delta):
        raise RemoteProtocolError(Reason.NOT_FINITE, "a delta with NaN or infinity")
    delta.flags.writeable = False
    return delta


def _finite(values: Delta) -> bool:
    # Minimum and maximum hand NaN on, and need no array of booleans as isfinite() does.
    return values.size == 0 or bool(np.isfinite(values.min()) and np.isfinite(values.max()))
