"""The strict codec: one form for each message, and a typed refusal for everything else."""

from collections.abc import Callable
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import messages, wire
from shared.errors import Reason, RemoteProtocolError
from shared.messages import AggregatorStatus, DeviceStatus, Receipt, Signed, Training
from tests.records import Records, repacked, wire_builtins
from tests.vectors.make import VECTORS

STATUS = AggregatorStatus(v=1, session=b"12345678", online=True, version="0.1.0")
KINDS = (
    messages.Signed,
    messages.Root,
    messages.RootMessage,
    messages.TaskManifest,
    messages.Release,
    messages.RoundOffer,
    messages.ReleaseMessage,
    messages.UpdateContext,
    messages.UpdateHead,
    messages.UpdateMessage,
    messages.PlainBody,
    messages.Receipt,
    messages.DeviceStatus,
    messages.AggregatorStatus,
    messages.Missing,
)


def refused(data: bytes, kind: type[object] = AggregatorStatus, limit: int = wire.MESSAGE_MAX) -> Reason:
    """Why bytes are not a message."""
    with pytest.raises(RemoteProtocolError) as caught:
        wire.unpack(data, kind, limit)
    return caught.value.reason


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_frozen_vectors(name: str) -> None:
    """A protocol version is these bytes: a change that alters them breaks every fleet in the field."""
    message = VECTORS[name]()
    frozen = bytes.fromhex((Path(__file__).parent.parent / "vectors" / f"{name}.hex").read_text())
    assert wire.pack(message) == frozen
    assert wire.unpack(frozen, type(message)) == message


@pytest.mark.parametrize("name", sorted(name for name in VECTORS if name.startswith("v2-")))
def test_versions_are_not_mixed(name: str) -> None:
    """What came with protocol 2 is not taken as protocol 1, nor a later version than this program knows."""
    message = VECTORS[name]()
    if not isinstance(message, DeviceStatus):  # whose version is all that it says anew
        assert refused(repacked(message, v=1), type(message)) in (Reason.WRONG_TYPE, Reason.VERSION)
    assert refused(repacked(message, v=3), type(message)) is Reason.VERSION


@pytest.mark.parametrize("condition", ["idle_user", "unmetered"])
def test_a_condition_that_came_later_is_true_or_absent(condition: str) -> None:
    """So that a manifest has one form, and one that asks for nothing new is of protocol 1, byte for byte."""
    manifest = VECTORS["v1-manifest"]()
    assert isinstance(manifest, messages.TaskManifest)
    plain = wire_builtins(manifest.conditions)
    assert condition not in plain
    assert refused(repacked(manifest, v=2, conditions={**plain, condition: False}), messages.TaskManifest)
    assert refused(repacked(manifest, v=1, conditions={**plain, condition: True}), messages.TaskManifest)
    newer = repacked(manifest, v=2, conditions={**plain, condition: True})
    assert wire.unpack(newer, messages.TaskManifest).conditions.grown


@pytest.mark.parametrize("chunks", [[], [1, 1], [2, 1], [-1], list(range(65))])
def test_requests_are_bounded_and_rise(chunks: list[int]) -> None:
    """A device never looks for a chunk twice, nor for more than 64 at once."""
    request = VECTORS["v2-missing"]()
    assert refused(repacked(request, chunks=chunks), messages.Missing) is Reason.WRONG_TYPE


@pytest.mark.parametrize("change", [{"chunks": []}, {"size": 245_760}, {"chunk_size": 1}, {"chunk_size": 0}])
def test_chunks_cover_their_blob(change: dict[str, object]) -> None:
    """As many hashes as the size and the chunk size ask for."""
    release = VECTORS["v2-release"]()
    assert isinstance(release, messages.Release)
    plain = {**wire_builtins(release.weights), **change}
    assert refused(repacked(release, weights=plain), messages.Release) is Reason.WRONG_TYPE


def test_every_message_has_a_vector() -> None:
    """No message crosses the wire whose form is not frozen."""
    assert {type(make()) for make in VECTORS.values()} == set(KINDS)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"", Reason.EMPTY),
        (lambda data: data + b"\0", Reason.NOT_MSGPACK),
        (lambda data: data[:-1], Reason.NOT_MSGPACK),
        (lambda data: b"\xc1", Reason.NOT_MSGPACK),
        (lambda data: b"hello, world", Reason.NOT_MSGPACK),
        (lambda data: b"\x91" * 100_000, Reason.NOT_MSGPACK),
        (lambda data: b"\xdf\xff\xff\xff\xff", Reason.NOT_MSGPACK),
        (lambda data: b"\xdd\xff\xff\xff\xff", Reason.NOT_MSGPACK),
        (lambda data: b"\xc6\xff\xff\xff\xff", Reason.NOT_MSGPACK),
        (lambda data: msgpack.packb(msgpack.ExtType(5, b"x")), Reason.NOT_MSGPACK),
        (lambda data: b"\x81\x90\x01", Reason.NOT_MSGPACK),
        (lambda data: b"\x82\xa1v\x01\xa1v\x01", Reason.NOT_CANONICAL),
        (lambda data: repacked(STATUS, v=2), Reason.VERSION),
        (lambda data: repacked(STATUS, v="1"), Reason.VERSION),
        (lambda data: repacked(STATUS, extra=1), Reason.WRONG_TYPE),
        (lambda data: repacked(STATUS, online=1), Reason.WRONG_TYPE),
        (lambda data: repacked(STATUS, session="12345678"), Reason.WRONG_TYPE),
        (lambda data: repacked(STATUS, version=""), Reason.WRONG_TYPE),
        (lambda data: msgpack.packb([1, 2, 3]), Reason.WRONG_TYPE),
        (lambda data: msgpack.packb(dict(reversed(msgpack.unpackb(data).items()))), Reason.NOT_CANONICAL),
        (lambda data: data.replace(b"\xa6online", b"\xd9\x06online"), Reason.NOT_CANONICAL),
    ],
)
def test_everything_else_is_refused(spoil: Callable[[bytes], bytes], reason: Reason) -> None:
    """Wrong type, unknown or repeated field, left-over bytes, lying lengths, another form: one typed error each."""
    assert refused(spoil(wire.pack(STATUS))) is reason


def test_a_bomb_of_empty_maps_is_defused() -> None:
    """Values that cost far more decoded than as bytes are counted while they are decoded, nested ones too."""
    inner = b"\xdd" + (90_000).to_bytes(4, "big") + b"\x80" * 90_000
    assert refused(b"\x9c" + inner * 12) is Reason.TOO_LARGE


def test_collections_and_texts_are_bounded() -> None:
    """A long list, map or text is refused for its length, before anything is made of it."""
    assert refused(msgpack.packb([0] * 100_001)) is Reason.NOT_MSGPACK
    assert refused(msgpack.packb(dict.fromkeys(range(100_001), 0))) is Reason.NOT_MSGPACK
    assert refused(msgpack.packb("x" * 65_537)) is Reason.NOT_MSGPACK


def test_size_is_looked_at_first() -> None:
    """What is above the limit is not decoded at all."""
    data = wire.pack(STATUS)
    assert wire.unpack(data, AggregatorStatus, len(data)) == STATUS
    assert refused(data, limit=len(data) - 1) is Reason.TOO_LARGE


def test_a_missing_field_with_a_default_is_not_canonical() -> None:
    """Defaults are written out, so that two encodings of one message cannot differ."""
    training = Training(messages.Sgd(lr=0.1), batch_size=4, epochs=1)
    plain = msgpack.unpackb(wire.pack(training))
    del plain["steps"]
    assert refused(msgpack.packb(plain), Training) is Reason.NOT_CANONICAL


def test_numbers_are_bounded() -> None:
    """NaN, negative and oversized numbers are no sizes, rates or counts."""
    manifest = Records().manifest()
    for lr in (0.0, -1.0, float("nan"), float("inf"), 1e13):
        training = {"optimizer": {"kind": "sgd", "lr": lr, "momentum": 0.0, "weight_decay": 0.0}}
        whole = msgspec.to_builtins(manifest.training) | training
        assert refused(wire.pack(whole), Training) is Reason.WRONG_TYPE
    assert refused(repacked(manifest, version=0), messages.TaskManifest) is Reason.WRONG_TYPE
    assert refused(repacked(manifest, version=2**63), messages.TaskManifest) is Reason.WRONG_TYPE


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    """No input raises anything but RemoteProtocolError, and what decodes is in its one form."""
    for kind in KINDS:
        try:
            message = wire.unpack(data, kind)
        except RemoteProtocolError:
            continue
        assert wire.pack(message) == data


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(-5, 5), inner),
        max_leaves=20,
    )
)
def test_any_value_decodes_or_is_refused(value: object) -> None:
    """Whatever msgpack can say, of any shape."""
    data = msgpack.packb(value)
    for kind in (Signed, Receipt, AggregatorStatus):
        try:
            wire.unpack(data, kind)
        except RemoteProtocolError:
            continue
        raise AssertionError("a random value is no message")


@pytest.mark.parametrize("name", sorted(VECTORS))
@given(st.data())
def test_flipped_bits(name: str, data: st.DataObject) -> None:
    """A message with a bit flipped is another message in its one form, or refused."""
    message = VECTORS[name]()
    spoilt = bytearray(wire.pack(message))
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = wire.unpack(bytes(spoilt), type(message))
    except RemoteProtocolError:
        return
    assert wire.pack(found) == bytes(spoilt)
