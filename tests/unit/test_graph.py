"""The graph as data: its encoding, and each way a graph is refused."""

import dataclasses
import math

import msgpack
import pytest

from shared.errors import Reason, RemoteProtocolError
from shared.graph import (
    LIMITS,
    Constant,
    DType,
    Graph,
    Kind,
    Limits,
    MemoryFormat,
    Port,
    Ref,
    Row,
    StateSlot,
    Strides,
    Value,
    after_target,
    check,
    encode,
    parse,
)
from shared.messages import TensorContract, TensorSpec
from shared.opset import OPSET_VERSION

LAYOUT = [
    TensorSpec("weight", "parameter", "float32", [2, 3]),
    TensorSpec("mean", "buffer", "float32", [2]),
    TensorSpec("var", "buffer", "float32", [2]),
]
INPUTS = [TensorContract("x", "float32", [3])]
TARGET = TensorContract("y", "int64", [], 2)
WEIGHT, MEAN, VAR, X, Y, CONSTANT, ROW = range(7)
"""The numbers of the values in every graph here; rows begin at ROW."""

LINEAR = Row("aten.linear.default", (Ref(X), Ref(WEIGHT)))
LOSS = Row("aten.cross_entropy_loss.default", (Ref(ROW), Ref(Y)))


def graph(rows: tuple[Row, ...], outputs: tuple[int, ...] = (), kind: Kind = "train") -> Graph:
    """A graph over LAYOUT that gives its last row's value unless told otherwise."""
    return Graph(
        kind,
        OPSET_VERSION,
        tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in LAYOUT),
        (Port("x", "float32", [3]), Port("y", "int64", [])),
        (Constant("float32", [2], bytes(8)),),
        rows,
        outputs or (ROW + len(rows) - 1,),
    )


GOOD = graph((LINEAR, LOSS))
EVAL = graph((LINEAR, LOSS), (ROW, ROW + 1), "eval")


def verify(found: Graph, limits: Limits = LIMITS) -> None:
    """What a device does with a graph's bytes."""
    check(parse(encode(found), limits), found.kind, LAYOUT, INPUTS, TARGET, limits)


def refused(found: Graph, limits: Limits = LIMITS) -> RemoteProtocolError:
    """Why a device refuses a graph."""
    with pytest.raises(RemoteProtocolError) as caught:
        verify(found, limits)
    return caught.value


def row_refused(op: str, *arguments: Value, kind: Kind = "train", **keywords: Value) -> Reason:
    """Why a device refuses a good graph with one more row, which follows the linear layer."""
    added = Row(op, arguments, tuple(sorted(keywords.items())))
    outputs = (ROW, ROW + 2) if kind == "eval" else ()
    return refused(graph((LINEAR, added, LOSS), outputs, kind)).reason


def row_accepted(op: str, *arguments: Value, kind: Kind = "train", **keywords: Value) -> None:
    """A good graph with one more row is good."""
    outputs = (ROW, ROW + 2) if kind == "eval" else ()
    verify(graph((LINEAR, Row(op, arguments, tuple(sorted(keywords.items()))), LOSS), outputs, kind))


def edited(**fields: object) -> bytes:
    """The bytes of a good graph with some top-level fields replaced or added."""
    packed: bytes = msgpack.packb(msgpack.unpackb(encode(GOOD)) | fields)
    return packed


def parse_refused(data: bytes, limits: Limits = LIMITS) -> Reason:
    """Why bytes are no graph."""
    with pytest.raises(RemoteProtocolError) as caught:
        parse(data, limits)
    return caught.value.reason


def test_what_is_encoded_is_parsed() -> None:
    """parse(encode(g)) = g, with every type of argument."""
    atoms = (None, True, -7, 2.5, -math.inf, "sum", Ref(3), DType.INT64, MemoryFormat.PRESERVE, Strides.STRIDED)
    odd = graph((Row("any.op.here", (*atoms, atoms), (("a", 1), ("b", (Ref(0), None)))),))
    assert parse(encode(odd)) == odd
    verify(GOOD)
    verify(EVAL)


def test_bytes_that_are_no_graph_are_refused() -> None:
    """Trailing bytes, unknown and missing fields, other versions and other encodings are refused."""
    assert parse_refused(b"") == Reason.EMPTY
    assert parse_refused(encode(GOOD) + b"\x00") == Reason.NOT_MSGPACK
    assert parse_refused(encode(GOOD)[:-1]) == Reason.NOT_MSGPACK
    assert parse_refused(edited(extra=1)) == Reason.WRONG_TYPE
    assert parse_refused(edited(v=2)) == Reason.VERSION
    assert parse_refused(edited(opset=OPSET_VERSION + 1)) == Reason.UNSUPPORTED
    assert parse_refused(edited(kind="test")) == Reason.WRONG_TYPE
    assert parse_refused(edited(rows=[["op", []]])) == Reason.WRONG_TYPE
    assert parse_refused(edited(rows=[["op", [], {}, 1]])) == Reason.WRONG_TYPE
    assert parse_refused(edited(rows=[["op", [], {"b": 1, "a": 2}]])) == Reason.NOT_CANONICAL
    assert parse_refused(edited(outputs=[])) == Reason.WRONG_TYPE


@pytest.mark.parametrize(
    "argument",
    [
        math.nan,
        2**63,
        "x" * 300,
        b"bytes",
        {},
        {"ref": -1},
        {"ref": True},
        {"ref": 1, "dtype": "float32"},
        {"dtype": "complex64"},
        {"memory": "float32"},
        {"layout": "sparse_coo"},
        {"device": "cuda"},
        {1: 2},
        [[1]],
        [{"ref": []}],
    ],
)
def test_an_argument_of_no_known_form_is_refused(argument: object) -> None:
    """Arguments are references, plain values, three enums and flat lists of these; nothing else parses."""
    assert parse_refused(edited(rows=[["aten.relu.default", [argument], {}]])) == Reason.GRAPH_ARGUMENT


def test_size_limits_hold_before_anything_is_built() -> None:
    """Bytes, rows, list entries and tensors are bounded."""
    assert parse_refused(encode(GOOD), Limits(bytes=100)) == Reason.TOO_LARGE
    many = [["aten.relu.default", [{"ref": X}], {}]] * 20_001
    assert parse_refused(edited(rows=many)) == Reason.GRAPH_TOO_LARGE
    assert parse_refused(edited(rows=[["aten.sum.default", [[0] * 4_097], {}]])) == Reason.GRAPH_TOO_LARGE
    assert parse_refused(encode(GOOD), Limits(state=2)) == Reason.GRAPH_TOO_LARGE


def test_constants_are_small_and_fit_their_shape() -> None:
    """A constant larger than the limit, or with bytes that its shape does not explain, is refused."""
    assert parse_refused(edited(constants=[["uint8", [65_537], bytes(65_537)]])) == Reason.GRAPH_TOO_LARGE
    assert parse_refused(edited(constants=[["uint8", [60_000], bytes(60_000)]] * 5)) == Reason.GRAPH_TOO_LARGE
    assert parse_refused(edited(constants=[["float32", [3], bytes(8)]])) == Reason.GRAPH_INVALID
    assert parse_refused(edited(constants=[["object", [1], bytes(8)]])) == Reason.GRAPH_INVALID
    assert parse_refused(edited(constants=[["bool", [1], b"\x02"]])) == Reason.GRAPH_INVALID


@pytest.mark.parametrize(
    "op",
    ["aten.from_file.default", "aten.resize_.default", "os.system", "mylib.attack.default", "aten.linear", "relu", ""],
)
def test_an_operator_off_the_list_is_refused(op: str) -> None:
    """Only names on the reviewed list run."""
    if op:
        assert row_refused(op, Ref(X)) == Reason.GRAPH_OP
    else:
        assert parse_refused(edited(rows=[[op, [], {}]])) == Reason.WRONG_TYPE


def test_references_go_backwards_only() -> None:
    """A row cannot use itself or a later row, nor an output a row that is not there."""
    assert row_refused("aten.relu.default", Ref(ROW + 1)) == Reason.GRAPH_REFERENCE
    assert row_refused("aten.relu.default", Ref(ROW + 2)) == Reason.GRAPH_REFERENCE
    assert row_refused("aten.cat.default", (Ref(X), Ref(10**9))) == Reason.GRAPH_REFERENCE
    assert refused(dataclasses.replace(GOOD, outputs=(ROW + 2,))).reason == Reason.GRAPH_REFERENCE


def test_arguments_are_of_the_operator_s_types() -> None:
    """Numbers, flags, strings and lists go only where the list says so."""
    row_accepted("aten.dropout.default", Ref(ROW), 0.5, True)
    row_accepted("aten.add.Tensor", Ref(ROW), 1)
    row_accepted("aten.softmax.int", Ref(ROW), -1, DType.FLOAT64)
    row_accepted("aten.index.Tensor", Ref(ROW), (None, Ref(Y)))
    row_accepted("aten.gelu.default", Ref(ROW), approximate="tanh")
    row_accepted("aten.einsum.default", "bi, bi -> b", (Ref(ROW), Ref(ROW)))
    row_accepted("aten.einsum.default", "...i->i...", (Ref(ROW),))
    wrong: list[tuple[str, tuple[Value, ...]]] = [
        ("aten.dropout.default", (Ref(ROW), 0.5, 1)),
        ("aten.dropout.default", (Ref(ROW), "0.5", True)),
        ("aten.dropout.default", (0.5, 0.5, True)),
        ("aten.softmax.int", (Ref(ROW), 1.0)),
        ("aten.softmax.int", (Ref(ROW), True)),
        ("aten.softmax.int", (Ref(ROW), 1, MemoryFormat.PRESERVE)),
        ("aten.relu.default", (None,)),
        ("aten.relu.default", ((Ref(ROW),),)),
        ("aten.cat.default", (Ref(ROW),)),
        ("aten.cat.default", ((Ref(ROW), None),)),
        ("aten.mean.dim", (Ref(ROW), 1)),
        ("aten.einsum.default", ("i->j->k", (Ref(ROW),))),
        ("aten.einsum.default", ("i;j", (Ref(ROW),))),
        ("aten.conv2d.default", (Ref(ROW), Ref(WEIGHT), None, (0, 0))),
        ("aten.chunk.default", (Ref(ROW), 0)),
    ]
    for op, arguments in wrong:
        assert row_refused(op, *arguments) == Reason.GRAPH_ARGUMENT, (op, arguments)
    assert row_refused("aten.gelu.default", Ref(ROW), approximate="__import__") == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.zeros.default", (2,), layout=DType.INT64) == Reason.GRAPH_ARGUMENT


def test_arguments_are_complete_and_known() -> None:
    """Too many, missing, unknown and doubly given arguments are refused; keyword-only ones stay so."""
    assert row_refused("aten.relu.default", Ref(ROW), 1) == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.relu.default") == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.relu.default", Ref(ROW), out=Ref(ROW)) == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.relu.default", Ref(ROW), self=Ref(ROW)) == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.add.Tensor", Ref(ROW), Ref(ROW), 2) == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.zeros.default", (2,), device="cuda") == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.cat.default", tensors=(Ref(ROW), Ref(ROW))) == Reason.GRAPH_ARGUMENT
    row_accepted("aten.linear.default", Ref(ROW), weight=Ref(ROW))


def test_whole_numbers_and_tensors_are_told_apart() -> None:
    """A size is no tensor, a tensor no size, and a list of tensors neither until one is taken out."""
    size = Row("aten.sym_size.int", (Ref(X), 0))
    pair = Row("aten.max.dim", (Ref(ROW), 1))
    parts = Row("aten.chunk.default", (Ref(ROW), 2))
    for row, wrong in [
        (size, Row("aten.relu.default", (Ref(ROW + 1),))),
        (size, Row("int.mul", (Ref(ROW), Ref(ROW + 1)))),
        (pair, Row("aten.relu.default", (Ref(ROW + 1),))),
        (parts, Row("aten.cat.default", (Ref(ROW + 1),))),
        (parts, Row("aten.relu.default", (Ref(ROW + 1),))),
    ]:
        found = refused(graph((LINEAR, row, wrong, LOSS))).reason
        assert found in (Reason.GRAPH_REFERENCE, Reason.GRAPH_ARGUMENT), (row, wrong)
    for row, right in [
        (size, Row("aten.view.default", (Ref(ROW), (Ref(ROW + 1), 2)))),
        (size, Row("aten.div.Tensor", (Ref(ROW), Ref(ROW + 1)))),
        (size, Row("int.mul", (2, Ref(ROW + 1)))),
        (pair, Row("getitem", (Ref(ROW + 1), 1))),
        (parts, Row("getitem", (Ref(ROW + 1), 0))),
    ]:
        verify(graph((LINEAR, row, right, LOSS)))


def test_items_are_taken_only_where_there_are_several() -> None:
    """getitem needs a row with several tensors and a position that exists."""
    pair = Row("aten.max.dim", (Ref(ROW), 1))
    for arguments in [(Ref(ROW + 1), 2), (Ref(ROW + 1), -1), (Ref(ROW + 1), True), (Ref(ROW), 0), (Ref(ROW + 1),)]:
        assert refused(graph((LINEAR, pair, Row("getitem", arguments), LOSS))).reason == Reason.GRAPH_ARGUMENT


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("aten.zeros.default", ((10**12,),)),
        ("aten.zeros.default", ((2**20, 2**20),)),
        ("aten.full.default", ((10**12,), 1.0)),
        ("aten.arange.default", (10**12,)),
        ("aten.arange.start", (-(10**12), 0)),
        ("aten.linspace.default", (0, 1, 10**12)),
        ("aten.eye.default", (10**12,)),
        ("aten.expand.default", (Ref(ROW), (10**6, 10**6, 2))),
        ("aten.repeat.default", (Ref(ROW), (10**12, 1))),
        ("aten.pad.default", (Ref(ROW), (10**12, 0))),
        ("aten.constant_pad_nd.default", (Ref(ROW), (0, 2**29))),
        ("aten.adaptive_avg_pool2d.default", (Ref(ROW), (2**20, 2**20))),
        ("aten.conv2d.default", (Ref(ROW), Ref(WEIGHT), None, (1, 1), (2**29, 0))),
        ("aten.one_hot.default", (Ref(Y), 2**40)),
        ("aten.upsample_nearest2d.vec", (Ref(X), None, (1e6, 1e6))),
    ],
)
def test_a_huge_literal_size_is_refused(op: str, arguments: tuple[Value, ...]) -> None:
    """zeros([1e12]) and all its relatives are refused before a tensor exists."""
    assert row_refused(op, *arguments) == Reason.GRAPH_TOO_LARGE


def test_parameters_inputs_and_constants_are_never_changed() -> None:
    """In-place operators change intermediate values and, in training, buffers; also through views."""
    row_accepted("aten.relu_.default", Ref(ROW))
    row_accepted("aten.add_.Tensor", Ref(MEAN), 1)
    for value in (WEIGHT, X, Y, CONSTANT):
        assert row_refused("aten.zero_.default", Ref(value)) == Reason.GRAPH_ARGUMENT
    view = Row("aten.select.int", (Ref(WEIGHT), 0, 0))
    assert refused(graph((LINEAR, view, Row("aten.zero_.default", (Ref(ROW + 1),)), LOSS))).reason == (
        Reason.GRAPH_ARGUMENT
    )
    assert row_refused("aten.zero_.default", self=Ref(ROW)) == Reason.GRAPH_ARGUMENT


def test_an_eval_graph_changes_no_buffer_and_no_output() -> None:
    """Evaluating leaves the model as it is, in place or by running statistics, and the loss leaves outputs alone."""
    norm = (Ref(ROW), None, None, Ref(MEAN), Ref(VAR))
    row_accepted("aten.batch_norm.default", *norm, True, 0.1, 1e-5, False)
    row_accepted("aten.batch_norm.default", *norm, False, 0.1, 1e-5, False, kind="eval")
    assert row_refused("aten.batch_norm.default", *norm, True, 0.1, 1e-5, False, kind="eval") == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.add_.Tensor", Ref(MEAN), 1, kind="eval") == Reason.GRAPH_ARGUMENT
    assert row_refused("aten.sub_.Tensor", Ref(ROW), Ref(Y), kind="eval") == Reason.GRAPH_ARGUMENT


def test_running_statistics_are_buffers() -> None:
    """Normalisation in training cannot overwrite a parameter, an input or a constant."""
    for value in (WEIGHT, X, CONSTANT):
        norm = (Ref(ROW), None, None, Ref(value), Ref(VAR), True, 0.1, 1e-5, False)
        assert row_refused("aten.batch_norm.default", *norm) == Reason.GRAPH_ARGUMENT


def test_a_train_graph_gives_the_loss_alone() -> None:
    """No output, two outputs, or an output that is no tensor is no loss."""
    assert refused(graph((LINEAR, LOSS), (ROW, ROW + 1))).reason == Reason.GRAPH_INVALID
    size = Row("aten.sym_size.int", (Ref(X), 0))
    assert refused(graph((LINEAR, LOSS, size))).reason == Reason.GRAPH_REFERENCE


def test_an_eval_graph_gives_outputs_that_need_no_target_then_the_loss() -> None:
    """Local prediction has no target, so no output may depend on one."""
    assert refused(graph((LINEAR, LOSS), (ROW + 1,), "eval")).reason == Reason.GRAPH_INVALID
    assert refused(graph((LINEAR, LOSS), (ROW + 1, ROW + 1), "eval")).reason == Reason.GRAPH_INVALID
    assert after_target(EVAL) == {1}


def test_a_graph_is_used_as_what_it_is() -> None:
    """A train graph in the place of an eval graph is refused."""
    with pytest.raises(RemoteProtocolError) as caught:
        check(GOOD, "eval", LAYOUT, INPUTS, TARGET)
    assert caught.value.reason == Reason.GRAPH_INVALID


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT[:-1],
        [*LAYOUT, TensorSpec("more", "buffer", "float32", [])],
        [LAYOUT[0], LAYOUT[2], LAYOUT[1]],
        [TensorSpec("weight", "parameter", "float32", [3, 2]), *LAYOUT[1:]],
        [TensorSpec("weight", "parameter", "float64", [2, 3]), *LAYOUT[1:]],
        [TensorSpec("weight", "buffer", "float32", [2, 3]), *LAYOUT[1:]],
    ],
)
def test_the_state_is_the_manifest_s_layout(layout: list[TensorSpec]) -> None:
    """Names, kinds, dtypes, shapes and order are those of the layout."""
    with pytest.raises(RemoteProtocolError) as caught:
        check(GOOD, "train", layout, INPUTS, TARGET)
    assert caught.value.reason == Reason.GRAPH_LAYOUT


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        ([], TARGET),
        ([*INPUTS, *INPUTS], TARGET),
        ([TensorContract("x", "float32", [4])], TARGET),
        ([TensorContract("x", "float64", [3])], TARGET),
        (INPUTS, TensorContract("y", "int64", [1], 2)),
        (INPUTS, TensorContract("z", "int64", [], 2)),
    ],
)
def test_the_inputs_are_the_data_contract_s(inputs: list[TensorContract], target: TensorContract) -> None:
    """What the graph reads is exactly what devices have data for."""
    with pytest.raises(RemoteProtocolError) as caught:
        check(GOOD, "train", LAYOUT, inputs, target)
    assert caught.value.reason == Reason.GRAPH_LAYOUT
