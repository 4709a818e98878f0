"""The strict codec: msgpack maps to frozen structs and back, one canonical form, explicit limits.

`unpack` accepts exactly the bytes that `pack` would write: wrong types, unknown or repeated keys, extension types,
left-over bytes and any other encoding of the same value are refused. Nothing is allocated beyond the size of the input.
"""

from typing import TypeVar

import msgpack
import msgspec

from shared.errors import Reason, RemoteProtocolError

MESSAGE_MAX = 64 << 20
"""Bytes of one message that are decoded at all, unless the caller says less."""

_COLLECTION_MAX = 100_000
_VALUES_MAX = 1_000_000
"""Values in all containers of a message together: an empty map of one byte takes 64 once it is decoded."""
_STR_MAX = 65_536

T = TypeVar("T")


def pack(message: object) -> bytes:
    """The canonical bytes of a message struct."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes | bytearray | memoryview, kind: type[T], limit: int = MESSAGE_MAX) -> T:
    """Decode `data` as `kind`; raises RemoteProtocolError and never anything else."""
    if not data:
        raise RemoteProtocolError(Reason.EMPTY, f"no bytes where a {_name(kind)} belongs")
    if len(data) > limit:
        raise RemoteProtocolError(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {limit}")
    plain = _builtins(data)
    try:
        message = msgspec.convert(plain, kind, strict=True)
    except msgspec.ValidationError as error:
        if isinstance(plain, dict) and "v" in plain and "`$.v`" in str(error):
            raise RemoteProtocolError(Reason.VERSION, f"{_name(kind)} of protocol version {plain['v']!r:.20}") from None
        raise RemoteProtocolError(Reason.WRONG_TYPE, f"{_name(kind)}: {error}"[:300]) from None
    if pack(message) != data:
        raise RemoteProtocolError(Reason.NOT_CANONICAL, f"a {_name(kind)} in another than its canonical form")
    return message


def _builtins(data: bytes | bytearray | memoryview) -> object:
    size = len(data)
    # A container's declared length is bounded by the input, so a short message cannot ask for a large allocation.
    bound = min(size, _COLLECTION_MAX)
    budget = _Budget()
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            max_str_len=min(size, _STR_MAX),
            max_bin_len=size,
            max_array_len=bound,
            max_map_len=bound,
            max_ext_len=0,
            list_hook=budget.items,
            object_pairs_hook=budget.pairs,
        )
    except RemoteProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(Reason.NOT_MSGPACK, f"{type(error).__name__}: {error}"[:200]) from None


class _Budget:
    """Counts the values of one message while it is decoded."""

    def __init__(self) -> None:
        self._left = _VALUES_MAX

    def items(self, items: list[object]) -> list[object]:
        self._spend(len(items))
        return items

    def pairs(self, pairs: list[tuple[object, object]]) -> dict[object, object]:
        self._spend(len(pairs))
        try:
            found = dict(pairs)
        except TypeError:
            raise RemoteProtocolError(Reason.NOT_MSGPACK, "a map's key is not a plain value") from None
        if len(found) != len(pairs):
            raise RemoteProtocolError(Reason.NOT_CANONICAL, "a map repeats a key")
        return found

    def _spend(self, values: int) -> None:
        self._left -= 1 + values
        if self._left < 0:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"more than {_VALUES_MAX} values in one message")


def _name(kind: object) -> str:
    return getattr(kind, "__name__", str(kind))
