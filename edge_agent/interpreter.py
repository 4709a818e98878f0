"""Runs a checked graph on tensors: the only way a received model ever computes anything.

Operators come from a table built once from the reviewed list, never from a received string. Before a graph runs on a
new batch size it is played through with tensors that have shapes but no memory: mismatched shapes and demands for too
much memory are refused before anything is allocated. Rows run in order, one aten overload each, under torch's own
autograd, so results, gradients and buffers are those of the module the graph was exported from.
Only the trainer imports this module, for it imports torch. It never checks what `shared.graph.check` has proved.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from shared.errors import Reason, RemoteProtocolError
from shared.graph import GETITEM, Constant, DType, Graph, MemoryFormat, Ref, Row, Strides, Value, after_target
from shared.opset import OPERATORS

DTYPES: Final[Mapping[str, torch.dtype]] = {dtype.value: getattr(torch, dtype.value) for dtype in DType}

_MEMORY_FORMATS: Final[Mapping[MemoryFormat, torch.memory_format]] = {
    memory: getattr(torch, memory.value) for memory in MemoryFormat
}

_TENSORS: Final = frozenset({"T", "N", "T[]", "T?[]"})

_PARTS_MAX: Final = 4_096
"""Tensors that one row may split a tensor into; parts share memory, so no budget of bytes bounds them."""

_INT_MAX: Final = 2**63 - 1

# What torch raises for mismatched shapes, indices out of range, overflowing sizes and unsupported dtypes; its shape
# functions, which run where tensors have no memory, assert too.
_TORCH_ERRORS: Final = (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError, MemoryError)


def _whole(compute: Callable[..., int]) -> Callable[..., int]:
    def bounded(*arguments: int) -> int:
        result = compute(*arguments)
        if not -_INT_MAX <= result <= _INT_MAX:
            raise OverflowError("a size is beyond 63 bits")
        return result

    return bounded


def _overload(name: str) -> Callable[..., Any]:
    _, packet, overload = name.split(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


_INTEGERS: Final[Mapping[str, Callable[..., Any]]] = {
    "int.add": _whole(operator.add),
    "int.sub": _whole(operator.sub),
    "int.mul": _whole(operator.mul),
    "int.floordiv": _whole(operator.floordiv),
    "int.mod": _whole(operator.mod),
    "int.neg": _whole(operator.neg),
    "aten.sym_size.int": torch.Tensor.size,
    "aten.sym_numel.default": torch.Tensor.numel,
    GETITEM: operator.getitem,
}

CALLS: Final[Mapping[str, Callable[..., Any]]] = {
    **{name: _overload(name) for name in OPERATORS if name not in _INTEGERS},
    **_INTEGERS,
}
"""What each operator of the reviewed list calls."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a run may ask for: by one tensor, and by all rows of one run together (without the backward pass)."""

    tensor_bytes: int = 1 << 30
    total_bytes: int = 4 << 30


@dataclass(slots=True)
class _Step:
    """One row made ready: constant arguments in place, and where values go."""

    number: int
    op: str
    call: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    refs: list[tuple[int, int]] = field(default_factory=list)
    lists: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    keyword_refs: list[tuple[str, int]] = field(default_factory=list)
    dies: list[int] = field(default_factory=list)
    """Values that no later row uses."""

    def filled(self, values: Sequence[Any]) -> list[Any]:
        arguments = self.arguments.copy()
        for position, value in self.refs:
            arguments[position] = values[value]
        for position, items in self.lists:
            entries = arguments[position].copy()
            for index, value in items:
                entries[index] = values[value]
            arguments[position] = entries
        return arguments

    def run(self, values: Sequence[Any]) -> Any:
        if self.keyword_refs:
            keywords = self.keywords | {name: values[value] for name, value in self.keyword_refs}
            return self.call(*self.filled(values), **keywords)
        return self.call(*self.filled(values), **self.keywords)

    def without_memory(self) -> "_Step":
        """The same on tensors without memory: what makes a tensor of numbers must be told so."""
        known = OPERATORS.get(self.op)
        if known is None or known.returns == ("i",) or any(a.type in _TENSORS for a in known.arguments):
            return self
        return replace(self, keywords={**self.keywords, "device": "meta"})


class Interpreter:
    """A checked graph, ready to run; the same object serves any number of steps and batch sizes."""

    def __init__(self, graph: Graph, budget: Budget = Budget()) -> None:
        self._graph = graph
        self._budget = budget
        self._constants = [_constant(constant) for constant in graph.constants]
        rows = range(len(graph.rows))
        self._steps = _steps(graph, rows, graph.outputs)
        later = after_target(graph)
        self._predicting = _steps(graph, [row for row in rows if row not in later], graph.outputs[:-1])
        self._tried: set[tuple[bool, int]] = set()

    def run(self, state: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs and target in, outputs out: the loss of a train graph, the outputs and the loss of an eval graph.

        `state` holds every tensor of the layout; a train graph updates its buffers in place, and gradients flow to
        those that require them. Torch picks kernels by that, even under no_grad: for eager's very bits, parameters
        require gradients here as they do there. Raises RemoteProtocolError; `state` is unchanged if the graph does not
        fit it.
        """
        self._try(state, tensors, predict=False)
        return self._execute(self._steps, self._graph.outputs, self._values(state, tensors), None)

    def predict(self, state: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of an eval graph from its inputs alone."""
        if self._graph.kind != "eval":
            raise RemoteProtocolError(Reason.GRAPH_INVALID, "a train graph cannot predict")
        self._try(state, inputs, predict=True)
        return self._execute(self._predicting, self._graph.outputs[:-1], self._values(state, inputs), None)

    def _values(self, state: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[Any]:
        graph = self._graph
        absent: list[Any] = [None] * (len(graph.inputs) - len(tensors))
        room: list[Any] = [None] * len(graph.rows)
        return [*(state[slot.name] for slot in graph.state), *tensors, *absent, *self._constants, *room]

    def _try(self, state: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor], predict: bool) -> None:
        """Check the given tensors, and play the graph through once for each batch size, without memory."""
        graph = self._graph
        for slot in graph.state:
            tensor = state.get(slot.name)
            if tensor is None or tensor.dtype != DTYPES[slot.dtype] or list(tensor.shape) != slot.shape:
                raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"state {slot.name:.64} is missing or of another shape")
        batch = _batch(graph, tensors, len(graph.inputs) - predict)
        if (predict, batch) in self._tried:
            return
        shapes = [torch.empty_like(state[slot.name], device="meta") for slot in graph.state]
        given = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        values: list[Any] = [*shapes, *given, *([None] if predict else [])]
        values += [constant.to("meta") for constant in self._constants] + [None] * len(graph.rows)
        steps = [step.without_memory() for step in (self._predicting if predict else self._steps)]
        outputs = graph.outputs[:-1] if predict else graph.outputs
        with torch.no_grad():
            results = self._execute(steps, outputs, values, _Meter(self._budget))
        loss = results[-1]
        if not predict and (loss.dim() != 0 or not loss.is_floating_point()):
            raise RemoteProtocolError(Reason.GRAPH_INVALID, f"the loss has shape {list(loss.shape)}, not one number")
        self._tried.add((predict, batch))

    def _execute(
        self, steps: Sequence[_Step], outputs: Sequence[int], values: list[Any], meter: "_Meter | None"
    ) -> list[torch.Tensor]:
        first = self._graph.first_row
        for step in steps:
            try:
                if meter is not None:
                    meter.before(step, values)
                result = step.run(values)
            except _TORCH_ERRORS as error:
                said = str(error).strip().split("\n", 1)[0]
                raise RemoteProtocolError(
                    Reason.GRAPH_TOO_LARGE if _is_size(error, said) else Reason.GRAPH_ARGUMENT,
                    f"row {step.number}, {step.op}: {said:.200}",
                ) from None
            values[first + step.number] = result
            if meter is not None:
                meter.after(step, result)
                continue  # all are kept alive, so that no storage is counted twice or mistaken for another
            for value in step.dies:
                values[value] = None
        return [values[output] for output in outputs]


class _Meter:
    """Adds up what a run on tensors without memory would have allocated."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._seen: set[int] = set()
        self._total = 0

    def before(self, step: _Step, values: Sequence[Any]) -> None:
        """Refuse what the operator alone would do: split without end, and normalise a single value (eager raises)."""
        if step.op not in _LOOKED_AT:
            return
        arguments = step.filled(values)
        tensor = arguments[0]
        match step.op:
            case "aten.batch_norm.default":
                self._normalising(tensor, arguments[5], tensor.shape[1])
            case "aten.instance_norm.default":
                self._normalising(tensor, arguments[5], tensor.shape[0] * tensor.shape[1])
            case "aten.unbind.int":
                self._splitting(step, tensor.shape[_dim(step, arguments, 1)])
            case "aten.chunk.default":
                self._splitting(step, min(arguments[1], tensor.shape[_dim(step, arguments, 2)]))
            case "aten.split.Tensor":
                self._splitting(step, tensor.shape[_dim(step, arguments, 2)] // max(arguments[1], 1))
            case _:
                raise AssertionError(step.op)

    def _normalising(self, tensor: torch.Tensor, training: bool, channels: int) -> None:
        if training and tensor.numel() <= channels:
            raise ValueError("normalisation in training needs more than one value for each channel: a larger batch")

    def _splitting(self, step: _Step, parts: int) -> None:
        if parts > _PARTS_MAX:
            self._refuse(step, f"gives {parts} tensors, the limit is {_PARTS_MAX}")

    def after(self, step: _Step, result: Any) -> None:
        """Count the storages that a row added."""
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if size > self._budget.tensor_bytes:
                self._refuse(step, f"asks for {size} bytes, the limit is {self._budget.tensor_bytes}")
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self._total += size
        if self._total > self._budget.total_bytes:
            self._refuse(step, f"brings the run to {self._total} bytes, the limit is {self._budget.total_bytes}")

    def _refuse(self, step: _Step, what: str) -> None:
        raise RemoteProtocolError(Reason.GRAPH_TOO_LARGE, f"row {step.number}, {step.op}: {what}")


_LOOKED_AT: Final = frozenset(
    {
        "aten.batch_norm.default",
        "aten.instance_norm.default",
        "aten.unbind.int",
        "aten.chunk.default",
        "aten.split.Tensor",
    }
)


def _dim(step: _Step, arguments: Sequence[Any], position: int) -> int:
    found: int = arguments[position] if len(arguments) > position else step.keywords.get("dim", 0)
    return found


def _batch(graph: Graph, tensors: Sequence[torch.Tensor], count: int) -> int:
    if len(tensors) != count:
        raise RemoteProtocolError(Reason.GRAPH_LAYOUT, f"{len(tensors)} tensors given, the graph takes {count}")
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    for port, tensor in zip(graph.inputs, tensors, strict=False):
        if tensor.dtype != DTYPES[port.dtype] or list(tensor.shape) != [batch, *port.shape]:
            raise RemoteProtocolError(
                Reason.GRAPH_LAYOUT,
                f"input {port.name:.64} is {tensor.dtype} {list(tensor.shape)}, not {port.dtype} [{batch}, ...]",
            )
    return batch


def _is_size(error: Exception, said: str) -> bool:
    return isinstance(error, (OverflowError, MemoryError)) or "allocate" in said or "overflow" in said


def _constant(constant: Constant) -> torch.Tensor:
    dtype = DTYPES[constant.dtype]
    if not constant.data:
        return torch.zeros(constant.shape, dtype=dtype)
    return torch.frombuffer(bytearray(constant.data), dtype=dtype).reshape(constant.shape)


def _steps(graph: Graph, rows: Collection[int], outputs: Collection[int]) -> list[_Step]:
    steps = [_step(number, graph.rows[number]) for number in rows]
    used = set(outputs)
    for step in reversed(steps):
        uses = {value for _, value in step.refs} | {value for _, value in step.keyword_refs}
        uses |= {value for _, items in step.lists for _, value in items}
        own = graph.first_row + step.number
        if own not in used:
            step.dies.append(own)
            used.add(own)
        step.dies += sorted(uses - used)
        used |= uses
    return steps


def _step(number: int, row: Row) -> _Step:
    keywords = {name: _argument(value) for name, value in row.keywords}
    step = _Step(number, row.op, CALLS[row.op], [_argument(value) for value in row.arguments], keywords)
    for position, value in enumerate(row.arguments):
        if isinstance(value, Ref):
            step.refs.append((position, value.value))
        elif isinstance(value, tuple):
            items = [(index, item.value) for index, item in enumerate(value) if isinstance(item, Ref)]
            if items:
                step.lists.append((position, items))
    for name, value in row.keywords:
        if isinstance(value, Ref):
            step.keyword_refs.append((name, value.value))
    return step


def _argument(value: Value) -> Any:
    match value:
        case tuple():
            return [_argument(item) for item in value]
        case Ref():
            return None
        case DType():
            return DTYPES[value.value]
        case MemoryFormat():
            return _MEMORY_FORMATS[value]
        case Strides():
            return torch.strided
        case _:
            return value
