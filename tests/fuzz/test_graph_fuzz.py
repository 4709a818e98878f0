"""Hostile graphs: any bytes, and valid graphs changed at random, are refused with a typed error or are well-typed."""

import copy
from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import RemoteProtocolError
from shared.graph import GETITEM, Graph, Port, Ref, Row, StateSlot, check, encode, parse, references
from shared.messages import TensorContract, TensorSpec
from shared.opset import OPERATORS, OPSET_VERSION

LAYOUT = [TensorSpec("w", "parameter", "float32", [4, 3]), TensorSpec("m", "buffer", "float32", [4])]
INPUTS = [TensorContract("x", "float32", [3])]
TARGET = TensorContract("y", "int64", [], 4)
VALID = Graph(
    "train",
    OPSET_VERSION,
    tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in LAYOUT),
    (Port("x", "float32", [3]), Port("y", "int64", [])),
    (),
    (
        Row("aten.sym_size.int", (Ref(2), 0)),
        Row("aten.linear.default", (Ref(2), Ref(0), Ref(1))),
        Row("int.mul", (Ref(4), 4)),
        Row("aten.view.default", (Ref(5), (Ref(6),))),
        Row("aten.max.dim", (Ref(5), 1)),
        Row(GETITEM, (Ref(8), 0)),
        Row("aten.zeros.default", ((Ref(4), 4),)),
        Row("aten.add_.Tensor", (Ref(1), 1)),
        Row("aten.cat.default", ((Ref(5), Ref(10)),)),
        Row("aten.dropout.default", (Ref(12), 0.5, True)),
        Row("aten.mean.default", (Ref(13),)),
    ),
    (14,),
)

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
ARGUMENT = st.recursive(
    PLAIN | st.integers(0, 16).map(lambda value: {"ref": value}) | st.sampled_from([{"dtype": "int64"}, {"memory": 1}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=6,
)
OPS = st.sampled_from([*OPERATORS, GETITEM, "aten.from_file.default", "os.system"])


def accepted(data: bytes) -> Graph | None:
    """The graph in these bytes if it passes every check; any error but a typed refusal fails the test."""
    try:
        graph = parse(data)
        check(graph, "train", LAYOUT, INPUTS, TARGET)
    except RemoteProtocolError:
        return None
    return graph


def assert_sound(graph: Graph, data: bytes) -> None:
    """What a checked graph promises to the interpreter."""
    assert encode(graph) == data
    for number, row in enumerate(graph.rows, graph.first_row):
        assert row.op in OPERATORS or row.op == GETITEM
        assert all(0 <= ref.value < number for ref in references(row))
        if row.op in OPERATORS and OPERATORS[row.op].inplace:
            first = row.arguments[0]
            assert isinstance(first, Ref)
            assert first.value == 1 or first.value >= graph.first_row
    assert len(graph.outputs) == 1


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No bytes raise anything but RemoteProtocolError."""
    accepted(data)


@given(st.data())
@settings(max_examples=300)
def test_a_valid_graph_with_changed_bytes_is_refused_or_sound(data: st.DataObject) -> None:
    """One byte changed, removed or added."""
    changed = bytearray(encode(VALID))
    at = data.draw(st.integers(0, len(changed) - 1))
    piece = data.draw(st.binary(max_size=3))
    changed[at : at + data.draw(st.integers(0, 3))] = piece
    graph = accepted(bytes(changed))
    if graph is not None:
        assert_sound(graph, bytes(changed))


@given(st.data())
@settings(max_examples=600)
def test_a_valid_graph_with_changed_rows_is_refused_or_sound(data: st.DataObject) -> None:
    """Operators, arguments, keywords and outputs replaced by others, well-formed or not."""
    plain: Any = copy.deepcopy(msgpack.unpackb(encode(VALID)))
    for _ in range(data.draw(st.integers(1, 3))):
        row = plain["rows"][data.draw(st.integers(0, len(plain["rows"]) - 1))]
        match data.draw(st.sampled_from(["op", "argument", "append", "drop", "keyword", "output", "insert"])):
            case "op":
                row[0] = data.draw(OPS)
            case "argument" if row[1]:
                row[1][data.draw(st.integers(0, len(row[1]) - 1))] = data.draw(ARGUMENT)
            case "append":
                row[1].append(data.draw(ARGUMENT))
            case "drop" if row[1]:
                del row[1][-1]
            case "keyword":
                row[2][data.draw(st.sampled_from(["dtype", "dim", "self", "out", "keepdim"]))] = data.draw(ARGUMENT)
            case "output":
                plain["outputs"] = data.draw(st.lists(st.integers(-1, 20), max_size=3))
            case _:
                row[:] = [data.draw(OPS), data.draw(st.lists(ARGUMENT, max_size=4)), {}]
    packed = msgpack.packb(plain)
    graph = accepted(packed)
    if graph is not None:
        assert_sound(graph, packed)


def test_the_valid_graph_is_valid() -> None:
    """The fuzzers start from a graph that is accepted, so what they refuse is refused for the change."""
    found = accepted(encode(VALID))
    assert found == VALID
    assert_sound(VALID, encode(VALID))
