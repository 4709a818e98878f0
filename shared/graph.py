"""A model as data: the list of operators that a device interprets, its strict encoding and every check before it runs.

A graph is rows of `operator, arguments`; row k gives one value. Values are numbered: first the state (the parameters
and buffers of the layout, in flat order), then the inputs and the target, then the constants, then the rows. A train
graph gives one value, the loss; an eval graph gives the model's outputs and, last, the loss in eval mode, on which the
outputs do not depend.

`parse` decodes bytes and bounds everything; `check` proves that a parsed graph uses only allowed operators with
arguments of the right type, refers only backwards and fits the manifest. What passes both can be interpreted: it may
still ask for too much memory or mismatch shapes, which the interpreter finds out before it allocates.
This module imports no torch and no numpy, and never runs anything.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import Annotated, Any, Final, Literal, TypeAlias

from msgspec import Meta

from shared.errors import Reason, RemoteProtocolError
from shared.layout import ITEM_BYTES
from shared.messages import First, Label, Positive, Shape, TensorContract, TensorSpec, Wire
from shared.opset import OPERATORS, OPSET_VERSION, Argument, Operator
from shared.wire import pack, unpack

GETITEM: Final = "getitem"
"""The row that takes one tensor out of a row with several; its arguments are the row and the position."""

Kind: TypeAlias = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a graph may ask for at most; each is checked before anything of that size exists."""

    bytes: int = 1 << 20
    rows: int = 20_000
    state: int = 10_000
    items: int = 4_096
    """Entries of one list argument."""
    constant_bytes: int = 64 << 10
    constants_bytes: int = 256 << 10
    elements: int = 1 << 28
    """A literal size, or the product of the literal sizes of one argument."""


LIMITS: Final = Limits()
"""The limits of publishers and devices alike, unless their configuration says otherwise."""


class DType(Enum):
    """Element types a graph may name, called as in torch."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"


class MemoryFormat(Enum):
    """Memory formats a graph may name, called as in torch."""

    CONTIGUOUS = "contiguous_format"
    PRESERVE = "preserve_format"
    CHANNELS_LAST = "channels_last"
    CHANNELS_LAST_3D = "channels_last_3d"


class Strides(Enum):
    """Tensor layouts a graph may name: dense only."""

    STRIDED = "strided"


@dataclass(frozen=True, slots=True)
class Ref:
    """The value with this number."""

    value: int


Atom: TypeAlias = bool | int | float | str | Ref | DType | MemoryFormat | Strides | None
Value: TypeAlias = Atom | tuple[Atom, ...]


class StateSlot(Wire, frozen=True, array_like=True):
    """One tensor of the layout, as the graph was exported for it."""

    name: Label
    kind: Literal["parameter", "buffer"]
    dtype: Label
    shape: Shape


class Port(Wire, frozen=True, array_like=True):
    """One input or the target; the shape is of one example, a batch dimension of any size stands before it."""

    name: Label
    dtype: Label
    shape: Shape


class Constant(Wire, frozen=True, array_like=True):
    """A small tensor that is part of the graph: little-endian, row-major bytes."""

    dtype: Label
    shape: Shape
    data: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One operator applied to literals and earlier values; `keywords` is sorted by name."""

    op: str
    arguments: tuple[Value, ...]
    keywords: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A decoded graph; trustworthy only after `check`."""

    kind: Kind
    opset: int
    state: tuple[StateSlot, ...]
    inputs: tuple[Port, ...]
    """The model's inputs in order, then the target."""
    constants: tuple[Constant, ...]
    rows: tuple[Row, ...]
    outputs: tuple[int, ...]

    @property
    def first_row(self) -> int:
        """The number of the first row's value."""
        return len(self.state) + len(self.inputs) + len(self.constants)


class _RowRecord(Wire, frozen=True, array_like=True):
    op: Annotated[str, Meta(min_length=1, max_length=64)]
    arguments: Annotated[list[Any], Meta(max_length=32)]
    keywords: Annotated[dict[Annotated[str, Meta(max_length=32)], Any], Meta(max_length=32)]


class _GraphRecord(Wire, frozen=True):
    v: First
    kind: Kind
    opset: Positive
    state: list[StateSlot]
    inputs: Annotated[list[Port], Meta(min_length=2, max_length=17)]
    constants: list[Constant]
    rows: list[_RowRecord]
    outputs: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 32)]], Meta(min_length=1, max_length=64)]


_ENUMS: Final[Mapping[str, type[DType] | type[MemoryFormat] | type[Strides]]] = {
    "dtype": DType,
    "memory": MemoryFormat,
    "layout": Strides,
}
_INT_MAX: Final = 2**63 - 1
_STRING_MAX: Final = 256
_SCALE_MAX: Final = 1_024
_EQUATION: Final = re.compile(
    r"[A-Za-z ]*(\.\.\.[A-Za-z ]*)?(,[A-Za-z ]*(\.\.\.[A-Za-z ]*)?)*(->[A-Za-z ]*(\.\.\.[A-Za-z ]*)?)?"
)


# -- bytes to graph and back -------------------------------------------------------------------------------------


def encode(graph: Graph) -> bytes:
    """The canonical bytes of a graph."""
    rows = [
        _RowRecord(row.op, [_plain(value) for value in row.arguments], {k: _plain(v) for k, v in row.keywords})
        for row in graph.rows
    ]
    return pack(
        _GraphRecord(
            1,
            graph.kind,
            graph.opset,
            list(graph.state),
            list(graph.inputs),
            list(graph.constants),
            rows,
            list(graph.outputs),
        )
    )


def parse(data: bytes, limits: Limits = LIMITS) -> Graph:
    """Decode a graph and bound it; raises RemoteProtocolError for anything but the canonical bytes of one."""
    record = unpack(data, _GraphRecord, limits.bytes)
    if record.opset != OPSET_VERSION:
        raise _error(Reason.UNSUPPORTED, f"operator set {record.opset}, this program knows {OPSET_VERSION}")
    if len(record.rows) > limits.rows:
        raise _error(Reason.GRAPH_TOO_LARGE, f"{len(record.rows)} rows, the limit is {limits.rows}")
    if len(record.state) > limits.state:
        raise _error(Reason.GRAPH_TOO_LARGE, f"{len(record.state)} tensors, the limit is {limits.state}")
    _bound_constants(record.constants, limits)
    return Graph(
        record.kind,
        record.opset,
        tuple(record.state),
        tuple(record.inputs),
        tuple(record.constants),
        tuple(_row(number, row, limits) for number, row in enumerate(record.rows)),
        tuple(record.outputs),
    )


def _bound_constants(constants: Sequence[Constant], limits: Limits) -> None:
    if sum(len(constant.data) for constant in constants) > limits.constants_bytes:
        raise _error(Reason.GRAPH_TOO_LARGE, f"constants of over {limits.constants_bytes} bytes together")
    for number, constant in enumerate(constants):
        if len(constant.data) > limits.constant_bytes:
            raise _error(Reason.GRAPH_TOO_LARGE, f"constant {number} is over {limits.constant_bytes} bytes")
        item = ITEM_BYTES.get(constant.dtype)
        if item is None:
            raise _error(Reason.GRAPH_INVALID, f"constant {number} has dtype {constant.dtype!r:.40}")
        if math.prod(constant.shape) * item != len(constant.data):
            raise _error(Reason.GRAPH_INVALID, f"constant {number}'s bytes do not fit its shape")
        if constant.dtype == "bool" and not set(constant.data) <= {0, 1}:
            raise _error(Reason.GRAPH_INVALID, f"constant {number} has a truth value that is neither 0 nor 1")


def _row(number: int, record: _RowRecord, limits: Limits) -> Row:
    names = list(record.keywords)
    if names != sorted(names):
        raise _error(Reason.NOT_CANONICAL, f"row {number}: keywords are not sorted")
    return Row(
        record.op,
        tuple(_value(number, plain, limits) for plain in record.arguments),
        tuple((name, _value(number, plain, limits)) for name, plain in record.keywords.items()),
    )


def _value(row: int, plain: object, limits: Limits) -> Value:
    if type(plain) is list:
        if len(plain) > limits.items:
            raise _error(Reason.GRAPH_TOO_LARGE, f"row {row}: a list of over {limits.items} entries")
        return tuple(_atom(row, item) for item in plain)
    return _atom(row, plain)


def _atom(row: int, plain: object) -> Atom:
    match plain:
        case None | bool():
            return plain
        case int() if -_INT_MAX - 1 <= plain <= _INT_MAX:
            return plain
        case float() if not math.isnan(plain):
            return plain
        case str() if len(plain) <= _STRING_MAX:
            return plain
        case dict() if len(plain) == 1:
            ((tag, content),) = plain.items()
            if tag == "ref" and type(content) is int and content >= 0:
                return Ref(content)
            if type(tag) is str and tag in _ENUMS and type(content) is str:
                try:
                    return _ENUMS[tag](content)
                except ValueError:
                    pass
    raise _error(Reason.GRAPH_ARGUMENT, f"row {row}: {plain!r:.60} is no argument")


def _plain(value: Value) -> object:
    match value:
        case tuple():
            return [_plain(item) for item in value]
        case Ref():
            return {"ref": value.value}
        case DType():
            return {"dtype": value.value}
        case MemoryFormat():
            return {"memory": value.value}
        case Strides():
            return {"layout": value.value}
        case _:
            return value


# -- the proof ---------------------------------------------------------------------------------------------------


class _Trace(IntFlag):
    """What a value may share memory with, and whether it depends on the target."""

    NOTHING = 0
    PARAMETER = 1
    BUFFER = 2
    INPUT = 4
    CONSTANT = 8
    TARGET = 16


_MEMORY: Final = _Trace.PARAMETER | _Trace.BUFFER | _Trace.INPUT | _Trace.CONSTANT
_NAMES: Final = {_Trace.PARAMETER: "a parameter", _Trace.INPUT: "an input", _Trace.CONSTANT: "a constant"}


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a value: its sorts (T or i; several when a row gives several) and its trace."""

    sorts: tuple[str, ...]
    trace: _Trace


def check(
    graph: Graph,
    kind: Kind,
    layout: Sequence[TensorSpec],
    inputs: Sequence[TensorContract],
    target: TensorContract,
    limits: Limits = LIMITS,
) -> None:
    """Prove that a parsed graph is of this kind, fits layout and data contract, and is well-typed throughout.

    Raises RemoteProtocolError with what is wrong and in which row.
    """
    if graph.kind != kind:
        raise _error(Reason.GRAPH_INVALID, f"a graph for {graph.kind} where one for {kind} belongs")
    _check_layout(graph, layout)
    _check_ports(graph, inputs, target)
    values = _sources(graph)
    for number, row in enumerate(graph.rows):
        try:
            values.append(_check_row(graph, row, values, limits))
        except RemoteProtocolError as error:
            raise _error(error.reason, f"row {number}, {row.op:.64}: {error.detail}") from None
    _check_outputs(graph, values)


def after_target(graph: Graph) -> frozenset[int]:
    """Numbers of the rows that use the target, directly or not: what prediction leaves out."""
    found: set[int] = {len(graph.state) + len(graph.inputs) - 1}
    for value, row in enumerate(graph.rows, graph.first_row):
        if any(ref.value in found for ref in references(row)):
            found.add(value)
    return frozenset(value - graph.first_row for value in found if value >= graph.first_row)


def references(row: Row) -> Iterator[Ref]:
    """Every value a row uses, repeated ones repeatedly."""
    for value in (*row.arguments, *(value for _, value in row.keywords)):
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from (item for item in value if isinstance(item, Ref))


def _check_layout(graph: Graph, layout: Sequence[TensorSpec]) -> None:
    if len(graph.state) != len(layout):
        raise _error(Reason.GRAPH_LAYOUT, f"{len(graph.state)} tensors, the layout has {len(layout)}")
    for number, (slot, spec) in enumerate(zip(graph.state, layout, strict=True)):
        if (slot.name, slot.kind, slot.dtype, slot.shape) != (spec.name, spec.kind, spec.dtype, spec.shape):
            raise _error(Reason.GRAPH_LAYOUT, f"tensor {number}, {slot.name:.64}, is not the layout's {spec.name:.64}")


def _check_ports(graph: Graph, inputs: Sequence[TensorContract], target: TensorContract) -> None:
    asked = [*inputs, target]
    if len(graph.inputs) != len(asked):
        raise _error(Reason.GRAPH_LAYOUT, f"{len(graph.inputs)} inputs with the target, the contract has {len(asked)}")
    for port, contract in zip(graph.inputs, asked, strict=True):
        if (port.name, port.dtype, port.shape) != (contract.name, contract.dtype, contract.shape):
            raise _error(Reason.GRAPH_LAYOUT, f"input {port.name:.64} is not as the contract's {contract.name:.64}")


def _sources(graph: Graph) -> list[_Known]:
    traces = [_Trace.PARAMETER if slot.kind == "parameter" else _Trace.BUFFER for slot in graph.state]
    traces += [_Trace.INPUT] * (len(graph.inputs) - 1) + [_Trace.INPUT | _Trace.TARGET]
    traces += [_Trace.CONSTANT] * len(graph.constants)
    return [_Known(("T",), trace) for trace in traces]


def _check_row(graph: Graph, row: Row, values: Sequence[_Known], limits: Limits) -> _Known:
    for ref in references(row):
        if ref.value >= len(values):
            raise _error(Reason.GRAPH_REFERENCE, f"refers to value {ref.value}, which is not computed before it")
    if row.op == GETITEM:
        return _check_getitem(row, values)
    operator = OPERATORS.get(row.op)
    if operator is None:
        raise _error(Reason.GRAPH_OP, "not on the list of allowed operators")
    bound = _bind(operator, row)
    for argument in operator.arguments:
        if argument.name in bound:
            _check_argument(argument, bound[argument.name], values, limits)
    used = [values[ref.value].trace for ref in references(row)]
    target = _Trace.TARGET if any(_Trace.TARGET in trace for trace in used) else _Trace.NOTHING
    memory = _Trace.NOTHING
    if operator.inplace:
        _check_change(graph, values[_changed(row).value].trace, target)
    elif operator.view:
        for trace in used:
            memory |= trace & _MEMORY
    if operator.stats:
        _check_stats(graph, operator, bound, values)
    return _Known(operator.returns, memory | target)


def _check_getitem(row: Row, values: Sequence[_Known]) -> _Known:
    match row:
        case Row(arguments=(Ref(source), int(position)), keywords=()) if type(position) is int and position >= 0:
            known = values[source]
            if known.sorts == ("T[]",):
                return _Known(("T",), known.trace)
            if len(known.sorts) > 1 and position < len(known.sorts):
                return _Known((known.sorts[position],), known.trace)
        case _:
            pass
    raise _error(Reason.GRAPH_ARGUMENT, "takes a row with several tensors and a position in it")


def _bind(operator: Operator, row: Row) -> dict[str, Value]:
    positional = [argument.name for argument in operator.arguments if not argument.keyword]
    if len(row.arguments) > len(positional):
        raise _error(Reason.GRAPH_ARGUMENT, f"{len(row.arguments)} arguments, it takes {len(positional)}")
    bound = dict(zip(positional, row.arguments, strict=False))
    known = {argument.name for argument in operator.arguments}
    for name, value in row.keywords:
        if name not in known or name in bound:
            raise _error(Reason.GRAPH_ARGUMENT, f"argument {name:.32} is unknown or given twice")
        if isinstance(value, tuple) and any(isinstance(item, Ref) for item in value):
            raise _error(Reason.GRAPH_ARGUMENT, f"argument {name:.32}: a list of values must go by position")
        bound[name] = value
    missing = [argument.name for argument in operator.arguments if argument.required and argument.name not in bound]
    if missing:
        raise _error(Reason.GRAPH_ARGUMENT, f"argument {missing[0]} is missing")
    return bound


def _check_argument(argument: Argument, value: Value, values: Sequence[_Known], limits: Limits) -> None:
    if value is None and argument.nullable:
        return
    kind = argument.type
    if isinstance(value, tuple) != kind.endswith("[]"):
        raise _wrong(argument, value)
    if isinstance(value, tuple):
        for item in value:
            if item is None and kind == "T?[]":
                continue
            _check_atom(argument, kind.removesuffix("[]").removesuffix("?"), item, values, limits)
        if kind == "n[]" and math.prod(abs(n) for n in value if type(n) is int) > limits.elements:
            raise _error(Reason.GRAPH_TOO_LARGE, f"{argument.name} asks for more than {limits.elements} elements")
        if kind == "f[]" and any(type(f) in (int, float) and abs(f) > _SCALE_MAX for f in value):  # type: ignore[arg-type]
            raise _error(Reason.GRAPH_TOO_LARGE, f"{argument.name} is over {_SCALE_MAX}")
    else:
        _check_atom(argument, kind, value, values, limits)


def _check_atom(argument: Argument, kind: str, value: Atom, values: Sequence[_Known], limits: Limits) -> None:
    if isinstance(value, Ref):
        sort = values[value.value].sorts
        if (sort == ("T",) and kind in ("T", "N")) or (sort == ("i",) and kind in ("i", "n", "p", "S", "N")):
            return
        raise _error(Reason.GRAPH_REFERENCE, f"{argument.name} refers to value {value.value}, which is of another sort")
    match kind:
        case "N" | "S":
            fits = type(value) in (bool, int, float)
        case "i":
            fits = type(value) is int
        case "n" | "p":
            if type(value) is int and abs(value) > limits.elements:
                raise _error(Reason.GRAPH_TOO_LARGE, f"{argument.name} is {value}, the limit is {limits.elements}")
            fits = type(value) is int and (kind == "n" or value > 0)
        case "f":
            fits = type(value) in (int, float)
        case "b":
            fits = type(value) is bool
        case "dtype" | "memory" | "layout":
            fits = isinstance(value, _ENUMS[kind])
        case "equation":
            fits = type(value) is str and _EQUATION.fullmatch(value) is not None
        case "T":
            fits = False
        case _:
            fits = type(value) is str and value in kind.split("|")
    if not fits:
        raise _wrong(argument, value)


def _check_change(graph: Graph, changed: _Trace, target: _Trace) -> None:
    for flag, name in _NAMES.items():
        if flag in changed:
            raise _error(Reason.GRAPH_ARGUMENT, f"changes {name} in place")
    if graph.kind == "eval" and _Trace.BUFFER in changed:
        raise _error(Reason.GRAPH_ARGUMENT, "changes a buffer in place in an eval graph")
    if graph.kind == "eval" and target and _Trace.TARGET not in changed:
        raise _error(Reason.GRAPH_ARGUMENT, "the loss changes an output of the model in place")


def _check_stats(graph: Graph, operator: Operator, bound: Mapping[str, Value], values: Sequence[_Known]) -> None:
    flag = next(argument.name for argument in operator.arguments if argument.type == "b")
    for name in ("running_mean", "running_var"):
        value = bound[name]
        if bound[flag] is True and isinstance(value, Ref):
            trace = values[value.value].trace
            _check_change(graph, trace, trace & _Trace.TARGET)


def _check_outputs(graph: Graph, values: Sequence[_Known]) -> None:
    for output in graph.outputs:
        if output >= len(values):
            raise _error(Reason.GRAPH_REFERENCE, f"an output is value {output}, which does not exist")
        if values[output].sorts != ("T",):
            raise _error(Reason.GRAPH_REFERENCE, f"an output is value {output}, which is no tensor")
    if graph.kind == "train" and len(graph.outputs) != 1:
        raise _error(Reason.GRAPH_INVALID, f"a train graph gives the loss alone, not {len(graph.outputs)} values")
    if graph.kind == "eval":
        if len(graph.outputs) < 2:
            raise _error(Reason.GRAPH_INVALID, "an eval graph gives at least one output, then the loss")
        if any(_Trace.TARGET in values[output].trace for output in graph.outputs[:-1]):
            raise _error(Reason.GRAPH_INVALID, "an output of the eval graph depends on the target")


def _changed(row: Row) -> Ref:
    match row.arguments:
        case (Ref() as ref, *_):
            return ref
        case _:
            pass
    raise _error(Reason.GRAPH_ARGUMENT, "what it changes must be its first argument")


def _wrong(argument: Argument, value: Value) -> RemoteProtocolError:
    return _error(Reason.GRAPH_ARGUMENT, f"{argument.name} is of type {argument.type}, not {value!r:.60}")


def _error(reason: Reason, detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, detail)
