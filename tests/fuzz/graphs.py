"""Hostile graphs: good ones spoilt, and rows made up from the list of operators; and, for soak, what they compute."""

from collections.abc import Sequence
from random import Random
from typing import Any, Final

from shared import graph
from shared.errors import RemoteProtocolError
from shared.graph import (
    GETITEM,
    Constant,
    DType,
    Graph,
    Kind,
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
    references,
)
from shared.messages import TensorContract, TensorSpec
from shared.opset import OPERATORS, OPSET_VERSION, Argument
from tests.fuzz.mutate import graft, odd, read_msgpack, spoil, write_msgpack
from tests.fuzz.target import Target

LAYOUT = [TensorSpec("w", "parameter", "float32", [4, 3]), TensorSpec("m", "buffer", "float32", [4])]
INPUTS = [TensorContract("x", "float32", [3])]
TARGET = TensorContract("y", "int64", [], 4)
_SLOTS = tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in LAYOUT)
_PORTS = (Port("x", "float32", [3]), Port("y", "int64", []))
_LINEAR, _LOSS = Row("aten.linear.default", (Ref(2), Ref(0))), "aten.cross_entropy_loss.default"

VALID = Graph(
    "train",
    OPSET_VERSION,
    _SLOTS,
    _PORTS,
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
EVAL = Graph(
    "eval",
    OPSET_VERSION,
    _SLOTS,
    _PORTS,
    (Constant("float32", [4], bytes(16)), Constant("bool", [2], b"\0\1")),
    (
        _LINEAR,
        Row("aten.batch_norm.default", (Ref(6), None, None, Ref(1), Ref(1), False, 0.1, 1e-5, False)),
        Row("aten.add.Tensor", (Ref(7), Ref(4))),
        Row("aten.to.dtype", (Ref(8), DType.FLOAT64)),
        Row(_LOSS, (Ref(8), Ref(3))),
    ),
    (8, 10),
)
WORLDS: Sequence[Graph] = (VALID, EVAL)
_BYTES = [encode(each) for each in WORLDS]
_TREES = [read_msgpack(data) for data in _BYTES]


def accepted(data: bytes, kind: Kind = "train") -> Graph | None:
    """The graph in these bytes if it passes every check; any error but a typed refusal is a bug."""
    try:
        found = parse(data)
        check(found, kind, LAYOUT, INPUTS, TARGET)
    except RemoteProtocolError as error:
        assert len(str(error)) < 1_000
        return None
    return found


def assert_sound(found: Graph, data: bytes) -> None:
    """What a checked graph promises to the interpreter."""
    assert encode(found) == data
    reached = {3}
    for number, row in enumerate(found.rows, found.first_row):
        assert row.op in OPERATORS or row.op == GETITEM
        assert all(0 <= ref.value < number for ref in references(row))
        if any(ref.value in reached for ref in references(row)):
            reached.add(number)
        if row.op in OPERATORS and OPERATORS[row.op].inplace:
            first = row.arguments[0]
            assert isinstance(first, Ref)
            assert first.value >= found.first_row or (first.value == 1 and found.kind == "train")
    assert after_target(found) == {number - found.first_row for number in reached if number >= found.first_row}
    assert len(found.outputs) == 1 if found.kind == "train" else len(found.outputs) > 1
    if found.kind == "eval":
        assert reached.isdisjoint(found.outputs[:-1])
    assert [slot.name for slot in found.state] == [spec.name for spec in LAYOUT]
    assert sum(len(constant.data) for constant in found.constants) <= graph.LIMITS.constants_bytes


def _make(rng: Random) -> tuple[Kind, bytes]:
    at = rng.randrange(len(WORLDS))
    kind = WORLDS[at].kind if rng.randrange(12) else ("train", "eval")[rng.randrange(2)]
    match rng.randrange(6):
        case 0:
            return kind, spoil(_BYTES[at], rng, _BYTES)
        case 1 | 2:
            return kind, write_msgpack(graft(_TREES[at], rng, _TREES), rng if rng.randrange(8) == 0 else None)
        case 3:
            tree: Any = graft(_TREES[at], rng, _TREES)
            rows = dict(tree).get("rows") if isinstance(tree, list) and all(type(x) is tuple for x in tree) else None
            if isinstance(rows, list) and rows:
                row = rows[rng.randrange(len(rows))]
                if type(row) is list and len(row) > 1 and type(row[1]) is list:
                    row[1].insert(rng.randrange(len(row[1]) + 1), odd(rng))
            return kind, write_msgpack(tree)
        case _:
            return kind, encode(made_up(WORLDS[at], rng))


def _judge(case: tuple[Kind, bytes]) -> bool:
    kind, data = case
    found = accepted(data, kind)
    if found is not None:
        assert found.kind == kind
        assert_sound(found, data)
    return found is not None


GRAPHS = Target("graphs", _make, _judge, lambda: [(each.kind, encode(each)) for each in WORLDS], examples=800)


# -- rows out of the list of operators ---------------------------------------------------------------------------

_EQUATIONS = ("ij,kj->ik", "ij->ji", "i,i->", "...i,...i->...", "ii", "ij,jk", "ab,cd,ef", "iii->i", "->", ",")


def made_up(world: Graph, rng: Random) -> Graph:
    """A graph of a linear layer, up to eight rows of any operators with arguments of the right types, and a loss."""
    constants = (Constant("float32", [4, 3], bytes(48)), Constant("int64", [3], (1).to_bytes(8, "little") * 3))
    made = structs_free(world, constants)
    sorts: list[tuple[str, ...]] = [("T",)] * made.first_row
    rows: list[Row] = [_LINEAR]
    sorts.append(("T",))
    operators = list(OPERATORS.values())
    for _ in range(rng.randrange(9)):
        several = [number for number, sort in enumerate(sorts) if len(sort) > 1 or sort == ("T[]",)]
        if several and rng.randrange(3) == 0:
            source = several[rng.randrange(len(several))]
            place = rng.randrange(3)
            rows.append(Row(GETITEM, (Ref(source), place)))
            sorts.append(
                ("T",) if sorts[source] == ("T[]",) or place >= len(sorts[source]) else (sorts[source][place],)
            )
            continue
        operator = operators[rng.randrange(len(operators))]
        arguments: list[Value] = []
        keywords: list[tuple[str, Value]] = []
        for argument in operator.arguments:
            if not argument.required and rng.randrange(2):
                if not argument.keyword:
                    break
                continue
            value = _value(argument, sorts, rng)
            if argument.keyword:
                keywords.append((argument.name, value))
            else:
                arguments.append(value)
        rows.append(Row(operator.name, tuple(arguments), tuple(sorted(keywords))))
        sorts.append(operator.returns)
    tensors = [number for number, sort in enumerate(sorts) if sort == ("T",) and number >= made.first_row]
    scores = tensors[rng.randrange(len(tensors))]
    rows.append(
        Row(_LOSS, (Ref(made.first_row), Ref(3))) if rng.randrange(2) else Row("aten.mean.default", (Ref(scores),))
    )
    last = made.first_row + len(rows) - 1
    outputs = (last,) if made.kind == "train" else (scores, last)
    return Graph(made.kind, made.opset, made.state, made.inputs, constants, tuple(rows), outputs)


def structs_free(world: Graph, constants: tuple[Constant, ...]) -> Graph:
    """The world without its rows."""
    return Graph(world.kind, world.opset, world.state, world.inputs, constants, (), ())


def _value(argument: Argument, sorts: Sequence[tuple[str, ...]], rng: Random) -> Value:
    if argument.nullable and rng.randrange(3) == 0:
        return None
    kind = argument.type
    if kind.endswith("[]"):
        inner = kind.removesuffix("[]").removesuffix("?")
        found = tuple(_atom(inner, sorts, rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))))
        return found
    return _atom(kind, sorts, rng)


def _atom(kind: str, sorts: Sequence[tuple[str, ...]], rng: Random) -> Any:
    def ref(sort: str) -> Ref | None:
        fitting = [number for number, found in enumerate(sorts) if found == (sort,)]
        return Ref(fitting[rng.randrange(len(fitting))]) if fitting else None

    match kind:
        case "T":
            return ref("T")
        case "N":
            return ref("T") if rng.randrange(2) else rng.choice((0, 1, -1, 0.5, 2, True, 1e30))
        case "S":
            return rng.choice((0, 1, 2, -1, 0.5, 1e-3, True, float("inf")))
        case "i" | "n" | "p":
            found = ref("i") if rng.randrange(4) == 0 else None
            if found is not None:
                return found
            small = rng.choice((0, 1, 1, 2, 3, 4, -1, -2, 5, 64))
            return (
                max(1, small)
                if kind == "p"
                else rng.choice((small, small, small, 2**20, -(2**40) if kind == "i" else 7))
            )
        case "f":
            return rng.choice((0.0, 0.1, 0.5, 1.0, 2, -1.0, 1e-5))
        case "b":
            return bool(rng.randrange(2))
        case "dtype":
            return list(DType)[rng.randrange(len(DType))]
        case "memory":
            return list(MemoryFormat)[rng.randrange(len(MemoryFormat))]
        case "layout":
            return Strides.STRIDED
        case "equation":
            return rng.choice(_EQUATIONS)
        case _:
            words = kind.split("|")
            return words[rng.randrange(len(words))]


# -- what an accepted graph computes -----------------------------------------------------------------------------

BATCH: Final = 5


def compute(case: tuple[Kind, bytes]) -> bool:
    """An accepted graph runs, or is refused typed, within its budget; it never changes what it may not."""
    import torch  # here, so that only this target pays for it

    from edge_agent.interpreter import Budget, Interpreter

    kind, data = case
    found = accepted(data, kind)
    if found is None:
        return False
    torch.manual_seed(0)
    state = {"w": torch.randn(4, 3, requires_grad=True), "m": torch.rand(4)}
    tensors = [torch.randn(BATCH, 3), torch.arange(BATCH) % 4]
    before = [each.detach().clone() for each in (state["w"], *tensors)]
    interpreter = Interpreter(found, Budget(tensor_bytes=1 << 20, total_bytes=4 << 20))
    try:
        outputs = interpreter.run(state, tensors)
        assert len(outputs) == len(found.outputs)
        assert outputs[-1].dim() == 0 and outputs[-1].is_floating_point()
        if kind == "train" and outputs[-1].requires_grad:
            try:
                outputs[-1].backward()
            except RuntimeError:
                return False  # which the trainer translates
            assert state["w"].grad is None or state["w"].grad.shape == state["w"].shape
        if kind == "eval":
            interpreter.predict(state, tensors[:1])
    except RemoteProtocolError:
        return False
    finally:
        after = (state["w"], *tensors)
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "a graph changed what it may not"
    return True


def _computations_make(rng: Random) -> tuple[Kind, bytes]:
    world = WORLDS[rng.randrange(len(WORLDS))]
    return world.kind, encode(made_up(world, rng))


COMPUTATIONS = Target(
    "computations",
    _computations_make,
    compute,
    lambda: [("eval", encode(EVAL))],
    seconds=20.0,
    examples=100,
    soak=200_000,
)

TARGETS = [GRAPHS, COMPUTATIONS]
