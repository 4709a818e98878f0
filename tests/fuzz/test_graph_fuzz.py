"""Hostile graphs: any bytes, and valid graphs changed at random, are refused with a typed error or are well-typed."""

import copy
from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.graph import GETITEM, encode
from shared.opset import OPERATORS
from tests.fuzz.graphs import VALID, accepted, assert_sound

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


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No bytes raise anything but RemoteProtocolError."""
    accepted(data)


@given(st.data())
@settings(max_examples=300)
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
