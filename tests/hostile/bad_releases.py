"""Releases of `main` that nobody may believe, by what is wrong with them; aggregator and agents read the same table."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import structs

from shared import signing, tensors, wire
from shared.graph import Constant, Ref, Row
from shared.messages import ReleaseMessage, Role, Signed, TaskManifest, TensorSpec, Use, VerificationKey
from tests.fuzz.mutate import Map, Raw, read_msgpack, write_msgpack
from tests.hostile import records
from tests.hostile.records import LAYOUT, MODEL, Keys, Model, edited, flip, graph_bytes

HELD, NEXT = 5, 6
"""The version of `main` that everybody has, and the one that the bad releases claim."""


def good(keys: Keys, model: Model = MODEL, **changes: Any) -> ReleaseMessage:
    """A release that would be adopted, but for `changes` of its manifest."""
    return records.release(keys, records.manifest(keys, "main", NEXT, model, **changes), model)


def signed(keys: Keys, role: Role, by: str, **changes: Any) -> ReleaseMessage:
    """A release whose manifest somebody else signed."""
    described = records.manifest(keys, "main", NEXT)
    other = signing.sign(described, role, getattr(keys, by))
    return records.release(
        keys, described, manifest=other, release=records.signed_release(other, "main", by=keys.publisher), **changes
    )


def numbered(keys: Keys, number: int, role: Role, by: str, **changes: Any) -> ReleaseMessage:
    """A release with another record beside the good manifest."""
    message = good(keys)
    key = getattr(keys, by)
    return structs.replace(
        message, release=records.signed_release(message.manifest, "main", number, key, role, **changes)
    )


def odd_manifest(keys: Keys, payload: bytes) -> ReleaseMessage:
    """A release whose manifest the publisher signed, whatever its bytes are."""
    other = records.sign_bytes(payload, TaskManifest, Role.PUBLISHER, keys.publisher)
    return structs.replace(good(keys), manifest=other)


def endless_graph() -> bytes:
    """A train graph of a million rows."""
    row = write_msgpack(["aten.relu.default", [Map([("ref", 1)])], Map()])
    rows = Raw(b"\xdd" + (1_000_000).to_bytes(4, "big") + row * 1_000_000)
    tree = read_msgpack(MODEL.train)
    assert isinstance(tree, Map)
    return write_msgpack(Map((name, rows if name == "rows" else value) for name, value in tree))


def repeated_name() -> bytes:
    """Weights whose header names a tensor twice."""
    length = int.from_bytes(MODEL.weights[:8], "little")
    header = MODEL.weights[8 : 8 + length].strip()
    text = header[:-1] + b"," + header[1:]
    return len(text).to_bytes(8, "little") + text + MODEL.weights[8 + length :]


def with_graph(train: bytes, keys: Keys, **changes: Any) -> ReleaseMessage:
    """A release whose train graph the publisher signed, whatever it is."""
    return good(keys, Model(train=train), **changes)


def with_weights(weights: bytes, keys: Keys) -> ReleaseMessage:
    """A release whose weights the publisher signed, whatever they are."""
    return good(keys, Model(weights=weights))


def tampered(message: ReleaseMessage, part: str) -> ReleaseMessage:
    """A release with one bit changed on its way."""
    assert message.graphs is not None and message.weights is not None
    match part:
        case "train":
            return structs.replace(
                message, graphs=structs.replace(message.graphs, train=flip(message.graphs.train, 40))
            )
        case "eval":
            return structs.replace(message, graphs=structs.replace(message.graphs, eval=flip(message.graphs.eval, 40)))
        case "weights":
            return structs.replace(message, weights=flip(message.weights, -1))
        case "longer":
            return structs.replace(message, weights=message.weights + b"\0")
        case "manifest":
            return structs.replace(message, manifest=_flipped(message.manifest, "payload"))
        case "signature":
            return structs.replace(message, manifest=_flipped(message.manifest, "sig"))
        case _:
            return structs.replace(message, release=_flipped(message.release, "payload"))


def _flipped(record: Signed, name: str) -> Signed:
    return structs.replace(record, **{name: flip(getattr(record, name), -3)})


def odd_weights(**changes: Any) -> bytes:
    """Weights of another layout."""
    spec = structs.replace(LAYOUT[0], **changes)
    return tensors.save([spec], {spec.name: np.zeros(spec.shape, spec.dtype)})


HUGE = Row("aten.zeros.default", ((10**12,),))
BAD: dict[str, tuple[Callable[[Keys], ReleaseMessage | bytes], str]] = {
    # who signed
    "manifest_by_the_aggregator": (lambda k: signed(k, Role.AGGREGATOR, "aggregator"), "wrong_role"),
    "manifest_by_the_root": (lambda k: signed(k, Role.ROOT, "root"), "wrong_role"),
    "manifest_by_the_root_as_publisher": (lambda k: signed(k, Role.PUBLISHER, "root"), "unknown_key"),
    "manifest_by_the_aggregator_as_publisher": (lambda k: signed(k, Role.PUBLISHER, "aggregator"), "unknown_key"),
    "manifest_by_a_stranger": (lambda k: signed(k, Role.PUBLISHER, "stranger"), "unknown_key"),
    "release_by_a_stranger": (lambda k: numbered(k, 0, Role.PUBLISHER, "stranger"), "unknown_key"),
    "release_0_by_the_aggregator": (lambda k: numbered(k, 0, Role.AGGREGATOR, "aggregator"), "wrong_role"),
    "release_3_by_the_publisher": (lambda k: numbered(k, 3, Role.PUBLISHER, "publisher"), "wrong_role"),
    "release_by_a_key_for_receipts": (lambda k: numbered(k, 3, Role.AGGREGATOR, "clerk"), "unknown_key"),
    "release_3_of_an_unknown_manifest": (lambda k: numbered(k, 3, Role.AGGREGATOR, "aggregator"), "rollback"),
    "release_of_another_task": (lambda k: numbered(k, 0, Role.PUBLISHER, "publisher", task="short"), "wrong_task"),
    "release_of_another_manifest": (
        lambda k: numbered(k, 0, Role.PUBLISHER, "publisher", manifest=bytes(32)),
        "wrong_manifest",
    ),
    "manifest_by_a_retired_publisher": (lambda k: signed(k, Role.PUBLISHER, "retired"), "expired"),
    "one_record_as_the_other": (
        lambda k: structs.replace(good(k), manifest=structs.replace(good(k).release)),
        "bad_signature",
    ),
    "manifest_for_other_aggregators": (
        lambda k: good(
            k, aggregator_keys=[VerificationKey(key=signing.public_bytes(k.stranger), uses=[Use.OFFER, Use.RELEASE])]
        ),
        "unknown_key",
    ),
    # when
    "expired": (lambda k: good(k, expires=1_700_000_000), "expired"),
    "lower_version": (lambda k: records.release(k, records.manifest(k, "main", 4)), "rollback"),
    "same_version_other_manifest": (
        lambda k: records.release(k, records.manifest(k, "main", 5, metric="loss")),
        "equivocation",
    ),
    # on its way
    **{
        f"tampered_{part}": (lambda k, part=part: tampered(good(k), part), reason)  # type: ignore[misc]
        for part, reason in {
            "train": "wrong_digest",
            "eval": "wrong_digest",
            "weights": "wrong_digest",
            "longer": "wrong_digest",
            "manifest": "bad_signature",
            "signature": "bad_signature",
            "release": "bad_signature",
        }.items()
    },
    "no_graphs": (lambda k: structs.replace(good(k), graphs=None), "missing_part"),
    "no_weights": (lambda k: structs.replace(good(k), v=2, weights=None), "missing_part"),
    "records_alone": (lambda k: structs.replace(good(k), graphs=None, weights=None), "missing_part"),
    "trailing_byte": (lambda k: wire.pack(good(k)) + b"\0", "not_msgpack"),
    "unknown_field": (lambda k: edited(wire.pack(good(k)), extra=1), "wrong_type"),
    "no_manifest": (lambda k: records.without(wire.pack(good(k)), "manifest"), "wrong_type"),
    "fields_in_another_order": (
        lambda k: edited(records.without(wire.pack(good(k)), "v"), v=1),
        "not_canonical",
    ),
    "unknown_role": (
        lambda k: wire.pack(structs.replace(good(k), manifest=structs.replace(good(k).manifest, role="king"))),
        "wrong_type",
    ),
    # the publisher signed it, and still nobody runs it
    "manifest_is_junk": (lambda k: odd_manifest(k, b"Dear fleet"), "not_msgpack"),
    "manifest_with_an_unknown_field": (
        lambda k: odd_manifest(k, edited(wire.pack(records.manifest(k, "main", NEXT)), extra=1)),
        "wrong_type",
    ),
    "manifest_of_the_next_protocol": (
        lambda k: odd_manifest(k, edited(wire.pack(records.manifest(k, "main", NEXT)), v=3)),
        "version",
    ),
    "manifest_with_a_trailing_byte": (
        lambda k: odd_manifest(k, wire.pack(records.manifest(k, "main", NEXT)) + b"\0"),
        "not_msgpack",
    ),
    "graph_is_no_graph": (lambda k: with_graph(b"import os\n", k), "not_msgpack"),
    "graph_of_another_kind": (lambda k: with_graph(MODEL.eval, k), "graph_invalid"),
    "op_off_the_list": (
        lambda k: with_graph(graph_bytes("train", [Row("aten.system.default", (Ref(1),))]), k),
        "graph_op",
    ),
    "python_as_op": (lambda k: with_graph(graph_bytes("train", [Row("os.system", ("id",))]), k), "graph_op"),
    "forward_reference": (
        lambda k: with_graph(graph_bytes("train", [Row("aten.relu.default", (Ref(9),))]), k),
        "graph_reference",
    ),
    "own_reference": (
        lambda k: with_graph(graph_bytes("train", [Row("aten.relu.default", (Ref(5),))]), k),
        "graph_reference",
    ),
    "text_as_argument": (
        lambda k: with_graph(graph_bytes("train", [Row("aten.relu.default", ("x",))]), k),
        "graph_argument",
    ),
    "huge_constant": (
        lambda k: with_graph(graph_bytes("train", (), (Constant("uint8", [200_000], bytes(200_000)),)), k),
        "graph_too_large",
    ),
    "constant_that_lies": (
        lambda k: with_graph(graph_bytes("train", (), (Constant("float32", [2**31, 2**31], bytes(8)),)), k),
        "graph_invalid",
    ),
    "huge_shape": (lambda k: with_graph(graph_bytes("train", [HUGE]), k), "graph_too_large"),
    "too_many_rows": (
        lambda k: with_graph(graph_bytes("train", [Row("aten.relu.default", (Ref(1),))] * 20_001), k),
        "graph_too_large",
    ),
    "a_million_rows": (lambda k: with_graph(endless_graph(), k), "too_large"),
    "graph_of_another_layout": (
        lambda k: good(k, layout=[TensorSpec("weight", "parameter", "float32", [3, 5])]),
        "graph_layout",
    ),
    "unknown_opset": (lambda k: good(k, opset=999), "unsupported"),
    "weights_nan": (lambda k: with_weights(records.weights(float("nan")), k), "not_finite"),
    "weights_infinite": (lambda k: with_weights(records.weights(float("inf")), k), "not_finite"),
    "weights_of_another_name": (lambda k: with_weights(odd_weights(name="wait"), k), "graph_layout"),
    "weights_of_another_shape": (lambda k: with_weights(odd_weights(shape=[4, 3]), k), "graph_layout"),
    "weights_of_another_dtype": (lambda k: with_weights(odd_weights(dtype="float64"), k), "graph_layout"),
    "weights_are_a_pickle": (lambda k: with_weights(b"\x80\x04}\x94.", k), "weights_invalid"),
    "weights_with_a_name_twice": (lambda k: with_weights(repeated_name(), k), "weights_invalid"),
    "weights_header_of_2_60_bytes": (lambda k: with_weights((1 << 60).to_bytes(8, "little"), k), "weights_invalid"),
}
"""What is wrong, and the reason with which the aggregator refuses it."""

NOT_FOR_AGENTS = frozenset(
    {
        "manifest_for_other_aggregators",
        "release_3_of_an_unknown_manifest",
        *(name for name in BAD if name.startswith("weights_")),
    }
)
"""What is right for a device that comes late or has another aggregator, and what only the trainer looks into."""
