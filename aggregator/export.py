"""Turns a publisher's module and loss into what a release carries: two graphs, the layout and the weights.

`torch.export` traces the module twice, in train mode with its loss and in eval mode, for a batch of any size of two or
more; each trace becomes rows of the reviewed operators (shared.graph). What cannot become that raises ExportError with
what, where and the remedy. Only publishing imports this module, for it imports torch; the daemons never do. The
publisher's module is left as it was.
"""

import contextlib
import io
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from shared.errors import ExportError, RemoteProtocolError
from shared.graph import (
    GETITEM,
    LIMITS,
    Atom,
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
    check,
    encode,
    parse,
)
from shared.layout import ITEM_BYTES
from shared.messages import TensorContract, TensorSpec
from shared.opset import OPERATORS, OPSET_VERSION
from shared.tensors import save

_BATCH: Final = 3
"""Examples in the traced batch: two or more, so that no row is specialised to a batch of one."""

_TORCH: Final[Mapping[str, torch.dtype]] = {dtype.value: getattr(torch, dtype.value) for dtype in DType}
_DTYPES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in _TORCH.items()}

_MEMORY_FORMATS: Final[Mapping[torch.memory_format, MemoryFormat]] = {
    getattr(torch, memory.value): memory for memory in MemoryFormat
}

_INTEGERS: Final[Mapping[object, str]] = {
    operator.add: "int.add",
    operator.sub: "int.sub",
    operator.mul: "int.mul",
    operator.floordiv: "int.floordiv",
    operator.mod: "int.mod",
    operator.neg: "int.neg",
}

_ASSERTIONS: Final = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten._assert_async.msg",
        "aten._assert_async.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
"""Rows that check and compute nothing; the interpreter's own checks stand in for them."""

_REMEDIES: Final[Mapping[str, str]] = {
    "wrap_with_set_grad_enabled": "torch.no_grad() inside forward: use .detach() on the tensors instead",
    "wrap_with_autocast": "autocast inside forward: remove it",
    "cond": "torch.cond: use torch.where",
    "while_loop": "torch.while_loop: use a loop with a fixed number of turns",
    "scan": "torch.scan: use a loop with a fixed number of turns",
    "map_impl": "torch map: use a batched operator",
    "flex_attention": "flex_attention: use scaled_dot_product_attention",
}

# What tracing may raise: torch's own errors are RuntimeErrors, and the publisher's code may raise any of the others.
_TRACING_ERRORS: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NameError,
    ImportError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What a release carries of a model: both graphs and the weights as bytes, and the layout that ties them."""

    train: bytes
    eval: bytes
    layout: list[TensorSpec]
    weights: bytes


# -- losses ------------------------------------------------------------------------------------------------------


def _cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wanted = target if target.is_floating_point() else target.to(torch.int64)
    return nn.functional.cross_entropy(output, wanted)


def _elementwise(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def of_equal_shapes(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # Torch would broadcast [b, 1] against [b] to [b, b] and learn nonsense.
        if output.shape[1:] != target.shape[1:]:
            raise ExportError(
                f"the loss compares outputs of shape [batch, {_sizes(output)}] with a target of shape "
                f"[batch, {_sizes(target)}]: give both the same shape, in the module or in the data contract"
            )
        return loss(output, target.to(output.dtype))

    return of_equal_shapes


LOSSES: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "bce_with_logits": _elementwise(nn.functional.binary_cross_entropy_with_logits),
    "mse": _elementwise(nn.functional.mse_loss),
    "l1": _elementwise(nn.functional.l1_loss),
    "huber": _elementwise(nn.functional.huber_loss),
    "smooth_l1": _elementwise(nn.functional.smooth_l1_loss),
}
"""Losses with a name: of the module's one output and the target, the mean over the batch."""


class _Training(nn.Module):
    """inputs, target -> loss."""

    def __init__(self, module: nn.Module, loss: Callable[..., Any] | None) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        buffers = dict(self.named_buffers())
        if self.loss is None:
            loss = self.module(*tensors)
        else:
            loss = _apply(self.loss, self.module(*tensors[:-1]), tensors[-1])
        for name, buffer in self.named_buffers():
            # Torch traces an assignment as nothing at all: the buffer would silently stay what it was.
            if buffers.get(name) is not buffer:
                raise ExportError(
                    f"forward assigns a new tensor to the buffer {name.removeprefix('module.')}: "
                    "change it in place, for example with .add_() or .copy_()"
                )
        return _scalar(loss)


class _Evaluating(_Training):
    """inputs, target -> outputs, loss."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        outputs = self.module(*tensors[:-1])
        # Aliases, because the trace would name an output by what the loss makes of it where both are one object.
        kept = [torch.ops.aten.alias.default(output) for output in _tensors(outputs)]
        loss = self.module(*tensors) if self.loss is None else _apply(self.loss, outputs, tensors[-1])
        return (*kept, _scalar(loss))


def _apply(loss: Callable[..., Any], outputs: Any, target: torch.Tensor) -> Any:
    if not isinstance(loss, nn.Module) and not isinstance(outputs, torch.Tensor):
        raise ExportError(
            f"the module returns a {type(outputs).__name__}, and a loss given by name takes one tensor: "
            "return one tensor, or give a loss module of your own that takes (outputs, target)"
        )
    return loss(outputs, target)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if leaf is not None]
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise ExportError("in eval mode the module returns something that is no tensor: return tensors only")
    return leaves


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        found = f"a tensor of shape [{_sizes(loss, 0)}]" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ExportError(f"the loss is {found}, not one floating-point number: reduce it, for example with .mean()")
    return loss


def _sizes(tensor: torch.Tensor, skip: int = 1) -> str:
    return ", ".join(str(size) for size in tensor.shape[skip:])


# -- export ------------------------------------------------------------------------------------------------------


def export(
    module: nn.Module,
    loss: str | nn.Module | None,
    inputs: Sequence[TensorContract],
    target: TensorContract,
    limits: Limits = LIMITS,
) -> Exported:
    """Both graphs, the layout and the weights of a module; raises ExportError.

    `loss` is a name out of LOSSES; or a module called with (what the module returns, target) that returns one number,
    whose buffers become constants and which has no parameters; or None if the module computes its loss itself:
    forward(*inputs, target) returns it, and forward(*inputs), in eval mode, the outputs.
    Shapes are those of one example; the graphs take batches of any size.
    """
    named = _loss(loss)
    layout, tensors = _layout(module)
    with _undisturbed(module, loss):
        train = _convert("train", _Training(module, named), layout, inputs, target, limits)
        evaluate = _convert("eval", _Evaluating(module, named), layout, inputs, target, limits)
    try:
        weights = save(layout, {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()})
    except RemoteProtocolError as error:
        raise ExportError(f"the weights cannot be released: {error.detail}") from None
    return Exported(train, evaluate, layout, weights)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules that are made inside draw the same initial weights for the same `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def module(found: object, spec: str) -> nn.Module:
    """`found`, which the publisher named as `spec`, if it is a module; else ExportError."""
    if not isinstance(found, nn.Module):
        raise ExportError(f"{spec} is a {type(found).__name__}; name an nn.Module or a function that returns one")
    return found


def _loss(loss: str | nn.Module | None) -> Callable[..., Any] | None:
    if not isinstance(loss, str):
        parameters = [] if loss is None else [name for name, _ in loss.named_parameters()]
        if parameters:
            raise ExportError(
                f"the loss module has a parameter, {parameters[0]}: a parameter belongs to the model; "
                "make it a buffer if it is fixed, or move it into the module"
            )
        return loss
    if loss not in LOSSES:
        raise ExportError(f"no loss is called {loss!r}: use one of {', '.join(LOSSES)}, or a module of your own")
    return LOSSES[loss]


def _layout(module: nn.Module) -> tuple[list[TensorSpec], dict[str, torch.Tensor]]:
    """The layout in the order of state_dict. A parameter that is not trained travels as a buffer."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    layout: list[TensorSpec] = []
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise ExportError(f"{name} in the module's state is a {type(tensor).__name__}: it must be a tensor")
        if nn.parameter.is_lazy(tensor):
            raise ExportError(f"{name} has no shape yet: call the module once on an example before the release")
        dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
        if dtype not in ITEM_BYTES:
            raise ExportError(f"{name} is {dtype}: convert it to one of {', '.join(ITEM_BYTES)}")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ExportError(f"{name} lies on {tensor.device} as {tensor.layout}: make it a dense tensor on the CPU")
        if tensor.numel():
            owner = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
            if owner != name:
                raise ExportError(
                    f"{name} and {owner} share memory (tied weights), which a release cannot express: "
                    "register the tensor once and use it from there in forward"
                )
        if len(name) > 128 or len(tensor.shape) > 8:
            raise ExportError(f"{name}: a name has at most 128 characters and a tensor at most 8 dimensions")
        kind: Any = "parameter" if name in trained else "buffer"
        layout.append(TensorSpec(name, kind, dtype, list(tensor.shape)))  # type: ignore[arg-type]
        tensors[name] = tensor
    if not trained:
        raise ExportError("the module has no parameter that requires a gradient: there is nothing to train")
    return layout, tensors


@contextlib.contextmanager
def _undisturbed(module: nn.Module, loss: str | nn.Module | None) -> Iterator[None]:
    """Trace with gradients on and without the fused transformer layer, and put every mode back as it was."""
    modules = [*module.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
    modes = [part.training for part in modules]
    fused = torch.backends.mha.get_fastpath_enabled()
    silenced = logging.root.manager.disable
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        logging.disable(logging.CRITICAL)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode


def _convert(
    kind: Kind,
    wrapped: _Training,
    layout: Sequence[TensorSpec],
    inputs: Sequence[TensorContract],
    target: TensorContract,
    limits: Limits,
) -> bytes:
    """One graph's bytes, after the same checks that a device makes."""
    wrapped.train(kind == "train")
    ports = [*inputs, target]
    conversion = _Conversion(kind, _trace(kind, wrapped, ports), layout, ports)
    data = encode(conversion.graph())
    try:
        check(parse(data, limits), kind, layout, inputs, target, limits)
    except RemoteProtocolError as error:
        row = re.match(r"row (\d+), ", error.detail)
        where = conversion.origins[int(row[1])] if row else ""
        raise ExportError(f"devices would refuse the {kind} graph: {error.detail}{where}") from None
    return data


def _trace(kind: Kind, wrapped: _Training, ports: Sequence[TensorContract]) -> torch.export.ExportedProgram:
    examples = tuple(torch.zeros([_BATCH, *port.shape], dtype=_TORCH[port.dtype]) for port in ports)
    batch = torch.export.Dim("batch")
    try:
        # Torch prints whole graphs to stderr where it fails; ExportError says it in one line.
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(wrapped, examples, dynamic_shapes=(tuple({0: batch} for _ in ports),))
    except ExportError as error:
        raise ExportError(f"{error} ({kind} mode)") from None
    except _TRACING_ERRORS as error:
        raise ExportError(_explain(error, kind)) from error


class _Conversion:
    """One exported program on its way to rows."""

    def __init__(
        self,
        kind: Kind,
        program: torch.export.ExportedProgram,
        layout: Sequence[TensorSpec],
        ports: Sequence[TensorContract],
    ) -> None:
        self._kind: Kind = kind
        self._program = program
        self._layout = layout
        self._ports = ports
        self._numbers: dict[str, int] = {}
        self._constants: list[Constant] = []
        self._rows: list[Row] = []
        self.origins: list[str] = []
        """Where each row comes from, as text to add to a message."""

    def graph(self) -> Graph:
        """Number the values, then convert every node that matters."""
        self._number_inputs()
        nodes = self._program.graph.nodes
        needed = _needed(nodes)
        first = len(self._layout) + len(self._ports) + len(self._constants)
        for node in nodes:
            if node.op == "call_function" and node.name in needed:
                row = self._row(node)
                self._numbers[node.name] = first + len(self._rows)
                self._rows.append(row)
                self.origins.append(_where(node))
        return Graph(
            self._kind,
            OPSET_VERSION,
            tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in self._layout),
            tuple(Port(port.name, port.dtype, port.shape) for port in self._ports),
            tuple(self._constants),
            tuple(self._rows),
            self._outputs(),
        )

    def _number_inputs(self) -> None:
        places = {f"module.{spec.name}": number for number, spec in enumerate(self._layout)}
        port = len(self._layout)
        for spec in self._program.graph_signature.input_specs:
            name = spec.arg.name
            if spec.kind == InputKind.USER_INPUT:
                self._numbers[name] = port
                port += 1
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in places:
                self._numbers[name] = places[spec.target]
            elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None:
                self._numbers[name] = self._constant(spec.target)
            else:
                raise ExportError(f"{spec.target or name} is an input of kind {spec.kind.name}: only tensors can be")

    def _constant(self, target: str) -> int:
        """A buffer outside the state, or a tensor that forward makes of numbers, becomes part of the graph."""
        tensor = self._program.constants.get(target)
        if tensor is None:
            tensor = self._program.state_dict[target]
        name = target.removeprefix("module.")
        if not isinstance(tensor, torch.Tensor) or _DTYPES.get(tensor.dtype) not in ITEM_BYTES:
            raise ExportError(f"{name} cannot be part of a graph: it is no tensor of a common dtype")
        size = tensor.numel() * tensor.element_size()
        if size > LIMITS.constant_bytes:
            raise ExportError(
                f"{name} has {size} bytes and is no part of the module's state; a constant has at most "
                f"{LIMITS.constant_bytes}: register it with register_buffer (persistent)"
            )
        data = tensor.detach().cpu().contiguous().numpy().tobytes()
        self._constants.append(Constant(_DTYPES[tensor.dtype], list(tensor.shape), data))
        return len(self._layout) + len(self._ports) + len(self._constants) - 1

    def _outputs(self) -> tuple[int, ...]:
        found: list[int] = []
        for spec in self._program.graph_signature.output_specs:
            number = self._numbers.get(getattr(spec.arg, "name", ""))
            if spec.kind != OutputKind.USER_OUTPUT or number is None:
                raise ExportError(
                    f"{spec.target or 'an output'} is a result of kind {spec.kind.name}, which devices do not take: "
                    "return tensors only, and change buffers in place"
                )
            found.append(number)
        return tuple(found)

    def _row(self, node: torch.fx.Node) -> Row:
        name = self._operator(node)
        arguments = list(node.args)
        keywords = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
        if name == "aten.to.device":
            # The same with the device left out: devices train where they are.
            name = "aten.to.dtype"
            del arguments[1:2]
        if name == "aten.sym_size.int" and arguments[1] == 0 and self._is_port(arguments[0]):
            # The batch size, which torch may take from any input that has it, the target too: take the first input's.
            return Row(name, (Ref(len(self._layout)), 0))
        if free_unbacked_symbols(_sample(node)):
            raise ExportError(
                f"the shape of a result of {name} depends on values of a tensor{_where(node)}: "
                "keep shapes fixed, for example with torch.where instead of a boolean index"
            )
        return Row(
            name,
            tuple(self._value(node, value) for value in arguments),
            tuple((key, self._value(node, keywords[key])) for key in sorted(keywords)),
        )

    def _is_port(self, node: Any) -> bool:
        return 0 <= self._numbers[node.name] - len(self._layout) < len(self._ports)

    def _operator(self, node: torch.fx.Node) -> str:
        target = node.target
        if target is operator.getitem:
            return GETITEM
        if target in _INTEGERS:
            return _INTEGERS[target]
        name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
        if name in OPERATORS or name == "aten.to.device":
            return name
        known = next((remedy for key, remedy in _REMEDIES.items() if key in name), None)
        if known is not None:
            raise ExportError(f"{known}{_where(node)}")
        raise ExportError(
            f"the operator {name} is not on the list of what devices run{_where(node)}: express it with others; "
            "the list is shared/opset.py"
        )

    def _value(self, node: torch.fx.Node, value: Any) -> Value:
        if isinstance(value, (list, tuple)):
            return tuple(self._atom(node, item) for item in value)
        return self._atom(node, value)

    def _atom(self, node: torch.fx.Node, value: Any) -> Atom:
        match value:
            case torch.fx.Node():
                return Ref(self._numbers[value.name])
            case None | bool() | int() | float() | str():
                return value
            case torch.dtype() if value in _DTYPES:
                return DType(_DTYPES[value])
            case torch.memory_format():
                return _MEMORY_FORMATS[value]
            case torch.layout() if value == torch.strided:
                return Strides.STRIDED
            case _:
                raise ExportError(f"{node.target} takes {value!r:.80}, which a graph cannot carry{_where(node)}")


def _needed(nodes: Any) -> set[str]:
    """Names of the nodes that an output depends on, or that have an effect: change a tensor, draw random numbers."""
    needed: set[str] = set()
    for node in reversed(nodes):
        name = str(node.target)
        if name in _ASSERTIONS:
            continue
        effect = node.op == "output" or (node.op == "call_function" and _has_effect(node))
        if effect or node.name in needed:
            needed.add(node.name)
            needed.update(source.name for source in node.all_input_nodes)
    return needed


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether a node does more than give a result. One of an unknown kind is taken to, so that it is refused."""
    known = OPERATORS.get(str(node.target))
    if known is not None:
        return known.inplace or known.random or known.stats
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.target is not operator.getitem and not _is_arithmetic(node.target)


def _is_arithmetic(target: Any) -> bool:
    """Whether a target computes with sizes alone: Python's operators and torch's symbolic functions."""
    return getattr(target, "__module__", "") in ("_operator", "math", "torch")


def _sample(node: torch.fx.Node) -> Any:
    value = node.meta.get("val")
    return value if isinstance(value, (torch.Tensor, list, tuple)) else ()


# -- saying where ------------------------------------------------------------------------------------------------


def _where(node: torch.fx.Node) -> str:
    """' in MODULE, FILE:LINE' of the publisher's code, as far as the trace knows."""
    parts = []
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path.startswith("module.")]
    if paths:
        parts.append(f"in {paths[-1].removeprefix('module.')}")
    trace = next((inner.meta["stack_trace"] for inner in _within(node) if inner.meta.get("stack_trace")), "")
    places = [line.strip() for line in trace.splitlines() if line.strip()[:5] == "File "]
    own = [place for place in places if not _is_ours(place.split('"')[1])] or places
    if own:
        _, path, rest = own[-1].split('"', 2)
        parts.append(f"at {path}:{rest.removeprefix(', line ').split(',')[0]}")
    return f" ({', '.join(parts)})" if parts else ""


def _within(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """A node and, if it runs other graphs, theirs."""
    yield node
    for source in node.all_input_nodes:
        if source.op == "get_attr" and node.graph.owning_module is not None:
            part = getattr(node.graph.owning_module, str(source.target), None)
            if isinstance(part, torch.fx.GraphModule):
                yield from part.graph.nodes


def _explain(error: BaseException, kind: Kind) -> str:
    """What, where and the remedy of an error that tracing raised."""
    said = str(error).strip()
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not _is_ours(frame.f_code.co_filename)
    ]
    where = f" (at {frames[-1][0]}:{frames[-1][1]})" if frames else ""
    if "data-dependent" in said or "DataDependent" in type(error).__name__:
        what = f"what forward does depends on the values of a tensor: {said.splitlines()[0]:.200}"
        remedy = "no `if`, loop, .item(), int() or list() on a tensor's values; use torch.where or masks"
    elif "Constraints violated" in said or "specialized" in said:
        guards = [line.strip(" -") for line in said.splitlines() if line.strip().startswith("- ")]
        first = guards[0] if guards else said.splitlines()[0]
        what = f"the module does not take batches of every size: {first.split('. If you')[0]:.300}"
        remedy = "write it for any batch size: no fixed first dimension, no assumption on x.shape[0]"
    elif isinstance(error, TypeError) and "positional argument" in said:
        what = f"TypeError: {said.splitlines()[0]}"
        remedy = (
            "forward takes one tensor for each input of the data contract; where the model computes its loss itself, "
            "also a target that may be left out, as in forward(self, x, target=None)"
        )
    elif ".numpy()" in said:
        what = "forward leaves torch for numpy"
        remedy = "compute with torch operators only"
    else:
        what = f"{type(error).__name__}: {said.splitlines()[0] if said else 'no message'}"
        remedy = "check that the module runs on a batch with the data contract's shapes and dtypes"
    return f"cannot export the module in {kind} mode: {what}{where}: {remedy}"


def _is_ours(path: str) -> bool:
    """Whether a file is torch's or this module, and so no place to look for the publisher's mistake."""
    return path.startswith(("<", str(Path(torch.__file__).parent))) or path in (__file__, contextlib.__file__)
