"""The parsers of what comes from a peer, one target each: wire, frames, topics, weights, updates, certificates."""

import io
import itertools
import json
import struct
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

import aggregator.control
import edge_agent.control
from aggregator import ca
from aggregator.ca import Authority
from edge_agent import jobs
from edge_agent.store import TaskState
from shared import chunks, codec, control, identity, sealing, tensors, topics, wire
from shared.errors import Reason, RemoteProtocolError
from shared.messages import BlobRef, DataContract, PlainBody, Sgd, TensorContract, TensorSpec, Training, Wire
from shared.topics import Topics, Upload
from tests.forgery import SERVER, forge
from tests.fuzz.mutate import (
    NUMBERS,
    Map,
    Tree,
    graft,
    odd,
    read_json,
    read_msgpack,
    spoil,
    write_json,
    write_msgpack,
)
from tests.fuzz.target import Target
from tests.vectors.make import VECTORS

# -- wire --------------------------------------------------------------------------------------------------------

_JOB = jobs.Job(
    id="points-1",
    task="points",
    opset=1,
    layout=[TensorSpec("weight", "parameter", "float32", [2, 3])],
    train_graph="/a/train",
    eval_graph="/a/eval",
    weights="/a/weights",
    training=Training(Sgd(lr=0.1), batch_size=4, epochs=1),
    data=DataContract("points", [TensorContract("x", "float32", [3])], TensorContract("y", "int64", [], 2)),
    source=jobs.Source("npz", "/data/points.npz"),
    metric="loss",
    seed=7,
    clip=10.0,
    codec="fp32",
    hpke_key=bytes(range(32)),
    context=b"context",
    output="/a/out",
)
_SAID: list[jobs.Progress | jobs.Done | jobs.Failed] = [
    jobs.Progress("points-1", "training", 1, 2, 3, 4, 0.5),
    jobs.Done("points-1", bytes(80), 100, bytes(32), 10, 5, 2, {"loss": 0.5}, 0.25, 1.0, 2.0, 3.0, 1 << 20),
    jobs.Failed("points-1", "data", "no such file"),
]
_MESSAGES: list[tuple[type[Any], bytes]] = [
    *((type(message), wire.pack(message)) for message in (make() for make in VECTORS.values())),
    (TaskState, wire.pack(TaskState(v=1))),
    (jobs.Order, wire.pack(jobs.Order(_JOB))),
    (jobs.Order, wire.pack(jobs.Order(jobs.Cancel("points-1")))),
    *((jobs.Said, wire.pack(jobs.Said(said))) for said in _SAID),
]
_BYTES = [data for _, data in _MESSAGES]
_TREES = [read_msgpack(data) for data in _BYTES]


def _nested(tree: Tree, rng: Random) -> Tree:
    """Spoil what lies packed inside a message, such as a record's payload or a head's context."""
    if isinstance(tree, Map):
        for at, (key, value) in enumerate(tree):
            if isinstance(value, bytes) and key in ("payload", "head", "context") and value and rng.randrange(2):
                try:
                    inner = read_msgpack(value)
                except (ValueError, msgpack.exceptions.UnpackException):
                    continue
                tree[at] = (key, write_msgpack(graft(inner, rng, _TREES)))
    return tree


def _wire_make(rng: Random) -> tuple[type[Any], bytes]:
    at = rng.randrange(len(_MESSAGES))
    kind, data = _MESSAGES[at]
    if rng.randrange(20) == 0:
        kind = _MESSAGES[rng.randrange(len(_MESSAGES))][0]
    how = rng.randrange(8)
    if how < 2:
        return kind, spoil(data, rng, _BYTES)
    data = write_msgpack(_nested(graft(_TREES[at], rng, _TREES), rng), rng if how == 2 else None)
    return kind, spoil(data, rng, _BYTES) if how == 3 else data


def wire_judge(case: tuple[type[Any], bytes]) -> bool:
    """What is taken is of its kind, is the only reading of its bytes, and has nothing that its kind does not allow."""
    kind, data = case
    try:
        message = wire.unpack(data, kind)
    except RemoteProtocolError as error:
        assert len(str(error)) < 1_000, "a refusal as long as the message"
        return False
    assert type(message) is kind
    assert wire.pack(message) == data
    # Another decoder reads the same in it (compared as bytes, for a NaN is not itself).
    assert wire.pack(msgspec.msgpack.decode(data, type=kind, strict=True)) == data
    assert msgpack.packb(msgpack.unpackb(data)) == data
    return True


WIRE = Target("wire", _wire_make, wire_judge, lambda: list(_MESSAGES), examples=1000)


# -- frames of the trainer's pipe --------------------------------------------------------------------------------


def _frames_make(rng: Random) -> tuple[bool, bytes]:
    order = bool(rng.randrange(2))
    kind = jobs.Order if order else jobs.Said
    good = [data for made, data in _MESSAGES if made is kind]
    frames = b""
    for _ in range(1 + rng.randrange(3)):
        body = good[rng.randrange(len(good))]
        body = write_msgpack(graft(read_msgpack(body), rng, _TREES)) if rng.randrange(2) else body
        size = len(body) if rng.randrange(3) else rng.choice(NUMBERS) % 2**32
        frames += struct.pack("<I", size) + body
    return order, spoil(frames, rng) if rng.randrange(2) else frames


def _frames_judge(case: tuple[bool, bytes]) -> bool:
    order, data = case
    stream, taken = io.BytesIO(data), 0
    try:
        while True:
            start = stream.tell()
            message: Any = jobs.read_order(stream) if order else jobs.read_said(stream)
            if message is None:
                assert stream.tell() == len(data)
                return taken > 0
            again = jobs.frame(jobs.Order(message) if order else jobs.Said(message))
            assert data[start : stream.tell()] == again
            taken += 1
    except RemoteProtocolError:
        return False


def _frames_good() -> list[tuple[bool, bytes]]:
    found = [(True, jobs.frame(jobs.Order(_JOB)) + jobs.frame(jobs.Order(jobs.Cancel("points-1"))))]
    return [*found, (False, b"".join(jobs.frame(jobs.Said(said)) for said in _SAID))]


FRAMES = Target("frames", _frames_make, _frames_judge, _frames_good, examples=400)


# -- topics and names --------------------------------------------------------------------------------------------

_HEX = "0123456789abcdef"
_PREFIXES = ("fl", "site/fleet-7", "a")
_NAME_START, _NAME_REST = set("abcdefghijklmnopqrstuvwxyz0123456789"), set("abcdefghijklmnopqrstuvwxyz0123456789-")
_PARTS = (
    *(
        "",
        "+",
        "#",
        ".",
        "..",
        "head",
        "status",
        "cmd",
        "receipt",
        "missing",
        "_agg-0",
        "$share",
        "-",
        "é",
        "٣",
        "²",
        "0x1",
    ),
    *(
        "00",
        "-1",
        "+1",
        "1_0",
        " 1",
        "1 ",
        "1\n",
        "999999999",
        "9999999999",
        "18446744073709551616",
        "A",
        "x" * 63,
        "x" * 64,
    ),
    *("sensor-1\0", "sensor-1\n", "İ", "ﬁ", "release", "round", "models"),
)


def _topics_make(rng: Random) -> tuple[str, str]:
    prefix = _PREFIXES[rng.randrange(len(_PREFIXES))]
    made, digest = Topics(prefix), "".join(rng.choice(_HEX) for _ in range(64))
    good = (
        made.head(rng.randrange(70_000), "sensor-1", digest[:32]),
        made.upload_chunk(0, "sensor-1", digest[:32], rng.randrange(10**10)),
        made.chunk(digest, rng.randrange(10**10)),
        made.root(rng.randrange(1, 99)),
        made.device_status("sensor-1"),
        made.command("sensor-1", "receipt"),
        made.aggregator_status(0),
        topics.task_release("points"),
        topics.task_round("points"),
        topics.RELEASE,
    )
    topic = good[rng.randrange(len(good))]
    parts = topic.split("/")
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts[at] = rng.choice(_PARTS)
            case 1:
                parts.insert(at, rng.choice(_PARTS))
            case 2 if len(parts) > 1:
                del parts[at]
            case 3:
                parts[at] += rng.choice(("\n", " ", "\0", "x", "0", "é"))
            case 4:
                parts[at] = parts[at].upper()
            case _:
                parts[at] = parts[at][:-1]
    return prefix, "/".join(parts)


def is_named(text: str) -> bool:
    """The rule for names, without a pattern."""
    return 1 <= len(text) <= 63 and text[0] in _NAME_START and set(text) <= _NAME_REST


def _rewritten_chunk(made: Topics, topic: str) -> str:
    blob, index = made.parse_chunk(topic)
    return made.chunk(blob.hex(), index)


def _topics_judge(case: tuple[str, str]) -> bool:
    """What is read back is written the same, and every part is what the protocol says."""
    prefix, topic = case
    made, taken = Topics(prefix), False
    for part in topic.split("/"):
        assert topics.is_name(part) == is_named(part)
    try:
        match made.parse_upload(topic):
            case Upload(shard, device, update, None):
                assert made.head(shard, device, update) == topic or topic.startswith(f"{prefix}/up/0")
            case Upload(shard, device, update, int(number)):
                assert 0 <= number < 10**9
                assert made.upload_chunk(shard, device, update, number) == topic or topic.startswith(f"{prefix}/up/0")
        assert is_named(device) and len(update) == 32 and set(update) <= set(_HEX)
        taken = True
    except RemoteProtocolError as error:
        assert error.reason is Reason.TOPIC
    readers: list[Callable[[], str]] = [
        lambda: _rewritten_chunk(made, topic),
        lambda: made.device_status(made.parse_device_status(topic)),
        lambda: topics.task_release(topics.parse_task(topic, "release")),
        lambda: topics.task_round(topics.parse_task(topic, "round")),
    ]
    for read in readers:
        try:
            assert read() == topic
        except RemoteProtocolError as error:
            assert error.reason is Reason.TOPIC and len(str(error)) < 300
        else:
            taken = True
    return taken


TOPICS = Target(
    "topics",
    _topics_make,
    _topics_judge,
    lambda: [("fl", Topics().head(0, "sensor-1", "0" * 32)), ("a/b", Topics("a/b").chunk("0" * 64, 12))],
    examples=400,
)


# -- references to blobs, and their arithmetic -------------------------------------------------------------------


def _blobs_make(rng: Random) -> tuple[int, int, int, int]:
    size, chunk = (abs(rng.choice(NUMBERS)) if rng.randrange(3) else rng.randrange(2_000) for _ in range(2))
    count = -(-size // chunk) if chunk else 0
    count = count + rng.choice((0, 0, 0, 1, -1)) if count < 3_000 else rng.randrange(4)
    return size, chunk, max(count, 0), rng.choice((*NUMBERS, 0, 1, count - 1, count))


def _blobs_judge(case: tuple[int, int, int, int]) -> bool:
    """A reference that is read has as many hashes as chunks, and these cover the blob without hole or overlap."""
    size, chunk, count, index = case
    plain = {"sha256": bytes(32), "size": size, "chunk_size": chunk, "chunks": [bytes(32)] * count, "urls": []}
    try:
        blob = wire.unpack(wire.pack(plain), BlobRef) if max(size, chunk) < 2**64 else None
    except RemoteProtocolError:
        blob = None
    if blob is None:
        return False
    assert len(blob.chunks) == count == (chunks.count(size, chunk) if chunk else 0)
    if chunk:
        spans = [chunks.span(size, chunk, number) for number in range(count)]
        assert sum(end - start for start, end in spans) == size
        assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(spans))
        try:
            start, end = chunks.span(size, chunk, index)
            assert 0 <= start < end <= size and end - start <= chunk and 0 <= index < count
        except RemoteProtocolError as error:
            assert error.reason is Reason.BAD_CHUNK and not 0 <= index < count
    return True


BLOBS = Target("blobs", _blobs_make, _blobs_judge, lambda: [(10, 3, 4, 1), (0, 0, 0, 0), (0, 5, 0, 0)], examples=400)


# -- weights -----------------------------------------------------------------------------------------------------

LAYOUT = [
    TensorSpec("w", "parameter", "float32", [2, 3]),
    TensorSpec("seen", "buffer", "int64", []),
    TensorSpec("half", "buffer", "float16", [2]),
    TensorSpec("mask", "buffer", "bool", [3]),
    TensorSpec("none", "buffer", "uint8", [0, 4]),
]


@cache
def _weights() -> tuple[bytes, bytes, Tree]:
    """(file, body, header) of good weights."""
    rng = np.random.default_rng(1)
    arrays = {
        spec.name: rng.integers(0, 2, spec.shape).astype(tensors._dtype(spec)) / tensors._dtype(spec).type(1)
        for spec in LAYOUT
    }
    data = tensors.save(LAYOUT, {spec.name: arrays[spec.name].astype(spec.dtype) for spec in LAYOUT})
    length = int.from_bytes(data[:8], "little")
    return data, data[8 + length :], read_json(data[8 : 8 + length])


def _shifted(rng: Random, header: Tree, body: bytes) -> bytes:
    """The same tensors in other places: over each other, with holes, or merely in another order."""
    assert isinstance(header, Map)
    entries: list[tuple[object, object]] = []
    for name, entry in header:
        fields: dict[Any, Any] = dict(entry)  # type: ignore[call-overload]
        start, end = fields["data_offsets"]
        if rng.randrange(3) == 0:
            to = rng.choice((0, start, end, start - 8, start + 8, 24, 27))
            fields["data_offsets"] = [to, to + end - start]
        entries.append((name, Map(fields.items())))
    rng.shuffle(entries)
    text = write_json(Map(entries))
    return struct.pack("<Q", len(text)) + text + (body if rng.randrange(3) else body[: rng.randrange(len(body))])


def _weights_make(rng: Random) -> bytes:
    data, body, header = _weights()
    how = rng.randrange(6)
    if how == 0:
        return spoil(data, rng)
    if how == 1:
        body = spoil(body, rng)
    if how == 2:
        return _shifted(rng, header, body)
    text = write_json(graft(header, rng, [header], write_json) if how != 1 else header, rng)
    if rng.randrange(8) == 0:
        text = text[:-1] + b',"__metadata__":' + write_json(odd(rng, write_json)) + b"}"
    text += b" " * rng.choice((0, -len(text) % 8, 1))
    length = len(text) if rng.randrange(8) else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", length) + text + body


def _weights_judge(data: bytes) -> bool:
    """What is taken is what the safetensors library reads, in the layout's names, shapes and dtypes, and finite."""
    try:
        found = tensors.load(data, LAYOUT)
    except RemoteProtocolError:
        return False
    theirs = safetensors.numpy.load(data)
    assert found.keys() == theirs.keys() == {spec.name for spec in LAYOUT}
    for spec in LAYOUT:
        ours, other = found[spec.name], theirs[spec.name]
        assert (ours.dtype, list(ours.shape)) == (np.dtype(spec.dtype), spec.shape)
        assert ours.tobytes() == other.tobytes()
        assert ours.flags.writeable and ours.flags.owndata
        assert np.isfinite(ours).all()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + sum(each.nbytes for each in found.values())
    return True


WEIGHTS = Target("weights", _weights_make, _weights_judge, lambda: [_weights()[0]], examples=800)


# -- deltas ------------------------------------------------------------------------------------------------------

_PATTERNS = [struct.pack("<f", value) for value in (0.0, -0.0, 1.0, 1e38, -3e38, 1e-45, 1e-38)] + [
    b"\0\0\x80\x7f",  # infinity
    b"\0\0\x80\xff",
    b"\0\0\xc0\x7f",  # NaN
    b"\1\0\x80\x7f",  # a NaN that signals
    b"\xff" * 4,
]


def _deltas_make(rng: Random) -> tuple[list[int], bytes]:
    sizes = [rng.randrange(5) for _ in range(rng.randrange(4))]
    if rng.randrange(10) == 0:
        sizes.append(rng.choice((2**20, 2**40, 2**62)))
    total = sum(sizes) if sum(sizes) < 100 else rng.randrange(8)
    data = b"".join(rng.choice(_PATTERNS) for _ in range(total + rng.choice((0, 0, 0, 0, 1, -1))))
    return sizes, spoil(data, rng) if rng.randrange(4) == 0 else data


def _deltas_judge(case: tuple[list[int], bytes]) -> bool:
    """What is taken is finite, read-only, of the right length, and encodes to the same bytes."""
    sizes, data = case
    try:
        delta = codec.decode("fp32", data, sizes)
    except RemoteProtocolError as error:
        assert error.reason in (Reason.WRONG_DIMENSION, Reason.NOT_FINITE)
        return False
    assert delta.shape == (sum(sizes),) and delta.dtype == np.float32 and not delta.flags.writeable
    assert all(value - value == 0 for value in delta.tolist())
    assert bytes(codec.encode("fp32", delta, sizes)) == data
    assert len(data) <= codec.size_max("fp32", sizes)
    return True


DELTAS = Target("deltas", _deltas_make, _deltas_judge, lambda: [([2, 0, 1], bytes(12)), ([], b"")], examples=400)


# -- sealed bodies -----------------------------------------------------------------------------------------------

_PRIVATE, _PUBLIC = sealing.generate()
_OTHER = sealing.generate()[1]
_BODY = PlainBody(examples=40, steps=10, metrics={"accuracy": 0.5, "loss": 1.25}, holdout=10)
_CONTEXT = b"the context that the body was sealed for"
_SEALED = [
    (_CONTEXT, *(bytes(part) for part in sealing.seal(_BODY, bytes(size), _PUBLIC, _CONTEXT))) for size in (0, 24, 999)
]


def seal_any(
    plain: bytes, context: bytes = _CONTEXT, key_size: int = 32, public: bytes = _PUBLIC
) -> tuple[bytes, bytes]:
    """(encapsulation, ciphertext) of bytes that need not be a body: what a hostile device can make."""
    key = AESGCM.generate_key(256)
    wrapped = key if key_size == 32 else bytes(key_size)
    encapsulation = sealing._SUITE.encrypt(wrapped, X25519PublicKey.from_public_bytes(public), sealing._INFO + context)
    count, aad = max(sealing._segments(len(plain)), 1), sealing._aad(context, encapsulation)
    pieces = (plain[at * sealing.SEGMENT : (at + 1) * sealing.SEGMENT] for at in range(count))
    return encapsulation, b"".join(
        AESGCM(key).encrypt(sealing._nonce(at, count), piece, aad) for at, piece in enumerate(pieces)
    )


@cache
def _long() -> tuple[bytes, bytes, bytes]:
    """A body of three segments, two of them whole."""
    encapsulation, body = sealing.seal(_BODY, bytes(2 * sealing.SEGMENT + 99), _PUBLIC, _CONTEXT)
    return _CONTEXT, encapsulation, bytes(body)


def _resegmented(rng: Random) -> "Sealed":
    """Whole segments in another order, twice, or not at all."""
    context, encapsulation, body = _long()
    size = sealing.SEGMENT + sealing.TAG
    order = [rng.randrange(3) for _ in range(rng.randrange(4))] if rng.randrange(3) else [0, 1, 2]
    found = b"".join(body[at * size : (at + 1) * size] for at in order)
    return context, encapsulation, found, b"" if found == body else None


Sealed = tuple[bytes, bytes, bytes, bytes | None]
"""Context, encapsulation, ciphertext, and what was honestly sealed, or None if that was tampered with."""


def _sealed_make(rng: Random) -> Sealed:
    if rng.randrange(60) == 0:
        return _resegmented(rng)
    if rng.randrange(2):
        context, encapsulation, body = _SEALED[rng.randrange(len(_SEALED))]
        match rng.randrange(5):
            case 0:
                context = spoil(context, rng)
            case 1:
                encapsulation = spoil(encapsulation, rng, [other for _, other, _ in _SEALED])
            case 2:
                body = _SEALED[rng.randrange(len(_SEALED))][2]
            case _:
                body = spoil(body, rng, [other for _, _, other in _SEALED])
        whole = (context, encapsulation, body) in _SEALED
        return context, encapsulation, body, b"" if whole else None
    header = wire.pack(_BODY)
    header = write_msgpack(graft(read_msgpack(header), rng, _TREES), rng) if rng.randrange(3) else spoil(header, rng)
    length = len(header) if rng.randrange(4) else rng.choice(NUMBERS) % 2**32
    plain = struct.pack(">I", length) + header + rng.randbytes(rng.randrange(12))
    plain = plain[: rng.randrange(8)] if rng.randrange(10) == 0 else plain
    encapsulation, body = seal_any(plain, key_size=rng.choice((0, 16, 31, 33)) if rng.randrange(20) == 0 else 32)
    return _CONTEXT, encapsulation, body, plain


def _sealed_judge(case: Sealed) -> bool:
    """Only what was sealed whole, to this key, for this context opens, and to what was sealed."""
    context, encapsulation, body, plain = case
    try:
        header, delta = sealing.open_sealed(_PRIVATE, encapsulation, body, context)
    except RemoteProtocolError:
        return False
    assert plain is not None, "what was tampered with has opened"
    if plain:
        packed = wire.pack(header)
        assert plain == struct.pack(">I", len(packed)) + packed + bytes(delta)
    else:
        assert header == _BODY
    assert 1 <= header.examples <= 10**9 and len(header.metrics) <= 64
    return True


SEALED = Target(
    "sealed", _sealed_make, _sealed_judge, lambda: [(*made, b"") for made in (*_SEALED, _long())], examples=400
)


# -- requests at the operator's doors ------------------------------------------------------------------------------

_DOORS: list[tuple[type[Wire], control.Door, list[bytes]]] = [
    (
        edge_agent.control.Request,
        edge_agent.control.DOOR,
        [b'{"verb":"status"}', b'{"verb":"pause","seconds":60}', b'{"verb":"resume","seconds":null}'],
    ),
    (
        aggregator.control.Request,
        aggregator.control.DOOR,
        [b'{"verb":"rollback","task":"points","to":3}', b'{"verb":"stop","task":"points"}'],
    ),
]


def _doors_make(rng: Random) -> tuple[int, bytes]:
    door = rng.randrange(len(_DOORS))
    good = _DOORS[door][2]
    line = good[rng.randrange(len(good))]
    if rng.randrange(3):
        return door, write_json(graft(read_json(line), rng, [read_json(other) for other in good], write_json), rng)
    return door, spoil(line, rng, good)


def _doors_judge(case: tuple[int, bytes]) -> bool:
    """A line is a request, which reads as it was written, or an answer says that it is none; the door stays open."""
    door, line = case
    kind, name, _ = _DOORS[door]
    posted: list[Wire] = []

    def post(event: control.ControlRequest[Wire]) -> None:
        posted.append(event.request)
        event.reply({"taken": True})

    answer = control.ControlServer(Path(), kind, name, post)._answer(line[: control.REQUEST_MAX])
    json.dumps(answer)
    if not posted:
        assert set(answer) == {"error"} and len(str(answer["error"])) < 2 * control.REQUEST_MAX
        return False
    (request,) = posted
    assert answer == {"taken": True} and type(request) is kind
    assert msgspec.json.decode(msgspec.json.encode(request), type=kind) == request
    return True


DOORS = Target(
    "doors",
    _doors_make,
    _doors_judge,
    lambda: [(door, line) for door, (_, _, lines) in enumerate(_DOORS) for line in lines],
    examples=400,
)


# -- certificates and signatures over heads ----------------------------------------------------------------------

_AT = datetime.now(UTC).replace(microsecond=0)


@cache
def _authority() -> Authority:
    with tempfile.TemporaryDirectory() as folder:
        ca.init_fleet(Path(folder) / "fleet", "fuzz", ["localhost"], now=_AT.timestamp(), passphrase=None)
        return ca.open_authority(Path(folder) / "fleet", None)


@cache
def _device() -> Any:
    return forge(_authority(), "sensor-1")


@cache
def _twin() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(forge(Authority(_authority().certificate, key), "ca", key=key, ca=True).certificate, key)


_NAMES = ("sensor-1", "", "A", "_agg-0", "a+b", "#", "a/b", "a\n", "é", "x" * 63, "x" * 64)
_ALTERNATIVES: tuple[list[x509.GeneralName], ...] = (
    [x509.DNSName("sensor-1")],
    [x509.DNSName("sensor-2")],
    [x509.RFC822Name("a@example.org")],
    [x509.DNSName("sensor-1"), x509.DNSName("b")],
    [x509.UniformResourceIdentifier("https://example.org")],
    [],
)
_RSA, _P384 = rsa.generate_private_key(65_537, 2048), ec.generate_private_key(ec.SECP384R1())
_MORE: tuple[x509.ExtensionType, ...] = (
    x509.KeyUsage(True, False, False, False, False, False, False, False, False),
    x509.KeyUsage(False, False, False, False, False, True, False, False, False),
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"junk"),
    x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.30"), b"junk"),
    x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.32"), b"\x30\0"),
    x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.36"), b"\x30\x03\x80\x01\xff"),
)


def _certificates_make(rng: Random) -> tuple[bytes, str | None]:
    """(DER, the name that the CA really gave to a device with it)."""
    good = _device().der
    if rng.randrange(3) == 0:
        data = spoil(good, rng, [_authority().certificate.public_bytes(Encoding.DER)])
        return data, "sensor-1" if data == good else None

    strange = {rng.randrange(7) for _ in range(rng.randrange(3))}

    def seldom(which: int, *others: Any) -> Any:
        return others[rng.randrange(len(others))] if which in strange else None

    name = seldom(0, *_NAMES) or "sensor-1"
    try:
        made = forge(
            seldom(1, _twin()) or _authority(),
            name,
            born=_AT + timedelta(days=seldom(2, -400, -31, -30, 1, 4_000) or -1),
            days=seldom(2, 1, 900) or 30,
            common_names=seldom(3, [name, name], ["sensor-1"], ["sensor-1", ""]),
            alternative=seldom(3, *_ALTERNATIVES),
            usage=seldom(4, [], [SERVER], [SERVER, ExtendedKeyUsageOID.CLIENT_AUTH]),
            more=seldom(5, *([each] for each in _MORE)),
            key=seldom(6, _RSA, _P384) or _device().key,
            ca=seldom(5, True, False) or False,
        )
    except ValueError:
        return b"", None
    return made.der, "?"


def _certificates_judge(case: tuple[bytes, str | None]) -> bool:
    """A name comes out only of what the fleet's CA signed for one client of a lawful name, now."""
    data, given = case
    try:
        found = identity.verify_device(data, [_authority().certificate], _AT.timestamp())
    except RemoteProtocolError as error:
        assert error.reason is Reason.BAD_CERTIFICATE and len(str(error)) < 300
        return False
    assert given is not None, "a certificate that nobody signed"
    leaf = x509.load_der_x509_certificate(data)
    leaf.verify_directly_issued_by(_authority().certificate)
    assert leaf.not_valid_before_utc <= _AT <= leaf.not_valid_after_utc
    assert is_named(found.name) and f"CN={found.name}" == leaf.subject.rfc4514_string()
    assert leaf.public_key() == found.public_key and found.public_key.curve.name == "secp256r1"
    usages = [found.value for found in leaf.extensions if isinstance(found.value, x509.ExtendedKeyUsage)]
    assert [list(usage) for usage in usages] == [[ExtendedKeyUsageOID.CLIENT_AUTH]]
    return True


CERTIFICATES = Target(
    "certificates", _certificates_make, _certificates_judge, lambda: [(_device().der, "sensor-1")], examples=200
)

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256."""
_HEADS = [b"the bytes of a head", b"the bytes of another head"]


@cache
def _signatures() -> list[bytes]:
    return [identity.sign_head(_device().key, head) for head in _HEADS]


def _heads_make(rng: Random) -> tuple[bytes, bytes]:
    at = rng.randrange(2)
    head, signature = _HEADS[at], _signatures()[at]
    match rng.randrange(5):
        case 0:
            head = spoil(head, rng)
        case 1:
            r, s = decode_dss_signature(signature)
            pairs = ((r, 0), (0, s), (r, _ORDER - s), (s, r), (r + _ORDER, s), (abs(rng.choice(NUMBERS)), s))
            signature = encode_dss_signature(*pairs[rng.randrange(len(pairs))])
        case 2:
            signature = _signatures()[1 - at]
        case _:
            signature = spoil(signature, rng, _signatures())
    return head, signature


def _heads_judge(case: tuple[bytes, bytes]) -> bool:
    head, signature = case
    try:
        identity.verify_head(_device().key.public_key(), head, signature)
    except RemoteProtocolError as error:
        assert error.reason is Reason.BAD_SIGNATURE
        return False
    assert head in _HEADS
    # (r, -s) is a signature too wherever (r, s) is one: what is signed is the head, not the signature.
    (r, s), (known_r, known_s) = map(decode_dss_signature, (signature, _signatures()[_HEADS.index(head)]))
    assert r == known_r and s in (known_s, _ORDER - known_s)
    return True


HEADS = Target("heads", _heads_make, _heads_judge, lambda: list(zip(_HEADS, _signatures(), strict=True)), examples=300)

TARGETS = [WIRE, FRAMES, TOPICS, BLOBS, WEIGHTS, DELTAS, SEALED, DOORS, CERTIFICATES, HEADS]
