"""Weights: safetensors bytes, named arrays and the flat vector, each checked against the layout.

Every length a file states is compared with the layout before anything of that size is allocated. Nothing here reads
files or runs code; a tensor the layout does not name, a repeated name, a hole or an overlap is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared.errors import Reason, RemoteProtocolError
from shared.layout import FLOATING, HEADER_ENTRY, dimension, size, size_bytes
from shared.messages import TensorSpec

Array: TypeAlias = NDArray[Any]

_CODES: Final[Mapping[str, str]] = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def save(layout: Sequence[TensorSpec], tensors: Mapping[str, Array]) -> bytes:
    """Canonical safetensors bytes of the tensors, in the layout's order; raises RemoteProtocolError if they differ."""
    _check(layout, tensors)
    header: dict[str, object] = {}
    end = 0
    for spec in layout:
        start, end = end, end + size_bytes(spec)
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [tensors[spec.name].tobytes() for spec in layout]
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def load(data: bytes | memoryview, layout: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors of a safetensors file, in the layout's order, as fresh writable arrays; raises as `verify` does."""
    return {name: array.copy() for name, array in verify(data, layout).items()}


def verify(data: bytes | memoryview, layout: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors of a safetensors file as arrays over `data` itself, which must outlive them and may be a file's map.

    Raises RemoteProtocolError: WEIGHTS_INVALID for a wrong form, GRAPH_LAYOUT for other names, shapes or dtypes,
    NOT_FINITE for a NaN or an infinity.
    """
    view = memoryview(data)
    entries, body = _header(view, layout)
    known = {spec.name for spec in layout}
    for name in entries:
        if name not in known:
            raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"tensor {name:.64} is not in the layout")
    spans: list[tuple[int, int]] = []
    found: dict[str, Array] = {}
    for spec in layout:
        start, end = _span(spec, entries.get(spec.name), len(body))
        spans.append((start, end))
        raw = body[start:end]
        if spec.dtype == "bool" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
            raise RemoteProtocolError(Reason.WEIGHTS_INVALID, f"{spec.name:.64}: a truth value is neither 0 nor 1")
        found[spec.name] = np.frombuffer(raw, _dtype(spec)).reshape(spec.shape)
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise RemoteProtocolError(Reason.WEIGHTS_INVALID, "tensors overlap or leave a hole")
        at = end
    if at != len(body):
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, f"{len(body) - at} bytes are left over")
    check_finite(found)
    return found


def check_finite(tensors: Mapping[str, Array]) -> None:
    """Raise RemoteProtocolError(NOT_FINITE) if a floating tensor holds a NaN or an infinity."""
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RemoteProtocolError(Reason.NOT_FINITE, f"tensor {name:.64} holds a NaN or an infinity")


def flatten(layout: Sequence[TensorSpec], tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    """float32[d]: the floating tensors end to end in the layout's order, float64 rounded."""
    _check(layout, tensors)
    flat = np.empty(dimension(layout), np.float32)
    at = 0
    for spec in layout:
        if spec.dtype in FLOATING:
            flat[at : at + size(spec)] = tensors[spec.name].reshape(-1)
            at += size(spec)
    return flat


def unflatten(layout: Sequence[TensorSpec], flat: NDArray[np.float32], base: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that `flat` (float32[d]) stands for; those that are not floating are copied from `base`.

    Raises RemoteProtocolError: WRONG_DIMENSION, or NOT_FINITE also for a value too large for a float16 tensor.
    """
    if flat.shape != (dimension(layout),):
        raise RemoteProtocolError(Reason.WRONG_DIMENSION, f"{flat.shape}, the layout has {dimension(layout)}")
    found: dict[str, Array] = {}
    at = 0
    for spec in layout:
        if spec.dtype in FLOATING:
            with np.errstate(over="ignore"):
                found[spec.name] = flat[at : at + size(spec)].astype(_dtype(spec)).reshape(spec.shape)
            at += size(spec)
        else:
            found[spec.name] = base[spec.name].copy()
    check_finite(found)
    return found


def _header(view: memoryview, layout: Sequence[TensorSpec]) -> tuple[dict[str, Any], memoryview]:
    if len(view) < 8:
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, "shorter than its own length field")
    length = int.from_bytes(view[:8], "little")
    most = sum(HEADER_ENTRY + 6 * len(spec.name) for spec in layout) + HEADER_ENTRY
    if length > min(most, len(view) - 8):
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, f"a header of {length} bytes")
    try:
        entries = json.loads(bytes(view[8 : 8 + length]).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, f"the header is no JSON: {error}"[:200]) from None
    if not isinstance(entries, dict):
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, "the header is no object")
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, "the header's metadata are no texts")
    return entries, view[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RemoteProtocolError(Reason.WEIGHTS_INVALID, "the header repeats a name")
    return found


def _span(spec: TensorSpec, entry: object, room: int) -> tuple[int, int]:
    """Where a tensor's bytes lie, proved to be as the layout says and inside the file."""
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(start), int(end)], **rest} if not rest:
            if code != _CODES[spec.dtype] or shape != spec.shape or any(type(n) is not int for n in shape):
                raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"{spec.name:.64} has another dtype or shape")
            whole = type(start) is int and type(end) is int
            if whole and 0 <= start <= end <= room and end - start == size_bytes(spec):
                return start, end
        case None:
            raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"{spec.name:.64} is missing")
        case _:
            pass
    raise RemoteProtocolError(Reason.WEIGHTS_INVALID, f"{spec.name:.64}: its bytes are not where they should be")


def _check(layout: Sequence[TensorSpec], tensors: Mapping[str, Array]) -> None:
    if {spec.name for spec in layout} != set(tensors) or len(layout) != len(tensors):
        raise RemoteProtocolError(Reason.GRAPH_LAYOUT, "other tensors than the layout's")
    for spec in layout:
        array = tensors[spec.name]
        if array.dtype != _dtype(spec) or list(array.shape) != spec.shape:
            raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"{spec.name:.64} is {array.dtype} {list(array.shape)}")
    check_finite(tensors)


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(spec.dtype).newbyteorder("<")
