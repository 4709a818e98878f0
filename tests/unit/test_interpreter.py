"""The interpreter against eager torch, bit for bit, and what it refuses before anything is allocated."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from aggregator.export import export
from edge_agent.interpreter import CALLS, Budget, Interpreter
from shared.errors import Reason, RemoteProtocolError
from shared.graph import GETITEM, Graph, Port, Ref, Row, StateSlot, Value, check, parse
from shared.messages import TensorContract, TensorSpec
from shared.opset import OPERATORS, OPSET_VERSION

torch.set_num_threads(1)

CLASSES = 5
TARGET = TensorContract("y", "int64", [], CLASSES)


def mlp() -> nn.Module:
    """Two layers and a dropout."""
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))


def cnn() -> nn.Module:
    """Convolutions, batch normalisation, pooling and both dropouts."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.3), nn.Linear(8, CLASSES)),
    )


class Block(nn.Module):
    """Two grouped convolutions with a shortcut, in-place activations and an in-place sum."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, groups=2, bias=False)
        self.last = nn.BatchNorm2d(outer)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inner, outer, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.second(self.relu(self.norm(self.first(x)))))
        y += self.short(x)
        return self.relu(y)


class Residual(nn.Module):
    """A residual net with grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent net over seven steps, read at its last."""

    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x)[0][:, -1])


class Transformer(nn.Module):
    """Embedded tokens, learnt positions and an encoder of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(7, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x) + self.positions).mean(1))


class Attention(nn.Module):
    """Masked attention that returns its weights, group and layer normalisation, einsum and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, 0.1, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.group = nn.GroupNorm(1, 7)
        self.mix = nn.Parameter(torch.randn(6, CLASSES))
        self.register_buffer("scale", torch.full((6,), 0.5), persistent=False)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls[1:].add_(x.detach().mean())
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        y, weights = self.attention(x, x, x, attn_mask=mask)
        y = self.group(self.norm(y) * self.scale) + weights.sum(-1, keepdim=True)
        return torch.einsum("bsi,io->bo", y, self.mix) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def images(channels: int) -> Callable[[int], torch.Tensor]:
    """Batches of images of 8 x 8."""
    return lambda batch: torch.randn(batch, channels, 8, 8)


def sequences(batch: int) -> torch.Tensor:
    """Seven steps of six numbers."""
    return torch.randn(batch, 7, 6)


def tokens(batch: int) -> torch.Tensor:
    """Seven tokens out of twenty."""
    return torch.randint(0, 20, (batch, 7))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (mlp, lambda batch: torch.randn(batch, 12)),
    "cnn": (cnn, images(1)),
    "residual": (Residual, images(3)),
    "lstm": (lambda: Recurrent(nn.LSTM(6, 8, 2, batch_first=True, dropout=0.3), 8), sequences),
    "gru": (lambda: Recurrent(nn.GRU(6, 8, 2, batch_first=True, bidirectional=True), 16), sequences),
    "transformer": (Transformer, tokens),
    "attention": (Attention, sequences),
}


class Pair:
    """The same model twice: eager, and as exported graphs with a state of tensors."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        build, self.batch = ARCHITECTURES[name]
        self.module = build()
        example = self.batch(2)
        dtype: Literal["float32", "int64"] = "float32" if example.is_floating_point() else "int64"
        inputs = [TensorContract("x", dtype, list(example.shape[1:]))]
        before = copy.deepcopy(self.module.state_dict())
        exported = export(self.module, "cross_entropy", inputs, TARGET)
        assert all(torch.equal(tensor, self.module.state_dict()[key]) for key, tensor in before.items())
        train, evaluate = parse(exported.train), parse(exported.eval)
        check(train, "train", exported.layout, inputs, TARGET)
        check(evaluate, "eval", exported.layout, inputs, TARGET)
        self.train, self.eval = Interpreter(train), Interpreter(evaluate)
        self.state = {key: tensor.detach().clone() for key, tensor in self.module.state_dict().items()}
        names = [spec.name for spec in exported.layout if spec.kind == "parameter"]
        self.parameters = {key: self.state[key].requires_grad_() for key in names}

    def equal(self) -> bool:
        """Whether every parameter and buffer has the same bits on both sides."""
        return all(torch.equal(tensor, self.state[key]) for key, tensor in self.module.state_dict().items())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """One architecture, exported once."""
    return Pair(request.param)


def test_training_is_bit_identical_to_eager(pair: Pair) -> None:
    """Loss, gradients, weights and buffers equal eager torch's over steps and batch sizes, dropout included."""
    pair.module.train()
    eager = torch.optim.SGD(pair.module.parameters(), 0.05, momentum=0.9)
    ours = torch.optim.SGD(pair.parameters.values(), 0.05, momentum=0.9)
    for step, batch in enumerate((4, 4, 2, 17, 1, 7)):
        x, y = pair.batch(batch), torch.randint(0, CLASSES, (batch,))
        eager.zero_grad()
        ours.zero_grad()
        torch.manual_seed(step)
        expected = functional.cross_entropy(pair.module(x), y)
        expected.backward()
        after = torch.get_rng_state()
        torch.manual_seed(step)
        (loss,) = pair.train.run(pair.state, [x, y])
        loss.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(torch.get_rng_state(), after)
        for name, parameter in pair.module.named_parameters():
            assert torch.equal(pair.parameters[name].grad, parameter.grad), name  # type: ignore[arg-type]
        eager.step()
        ours.step()
        assert pair.equal()


def test_evaluation_is_bit_identical_to_eager(pair: Pair) -> None:
    """Outputs and eval-mode loss equal eager torch's, with the target and without; the state does not change."""
    pair.module.eval()
    for batch in (1, 3, 8):
        x, y = pair.batch(batch), torch.randint(0, CLASSES, (batch,))
        with torch.no_grad():
            # The fused transformer layer of eager inference rounds differently; gradients never use it.
            torch.backends.mha.set_fastpath_enabled(False)
            expected = pair.module(x)
            torch.backends.mha.set_fastpath_enabled(True)
            output, loss = pair.eval.run(pair.state, [x, y])
            (predicted,) = pair.eval.predict(pair.state, [x])
            fused = pair.module(x)
        assert torch.equal(output, expected)
        assert torch.equal(predicted, expected)
        assert torch.equal(loss, functional.cross_entropy(expected, y))
        assert torch.allclose(fused, expected, atol=1e-5)
    assert pair.equal()


# -- graphs made by hand -----------------------------------------------------------------------------------------

LAYOUT = [TensorSpec("w", "parameter", "float32", [3, 3]), TensorSpec("m", "buffer", "float32", [3])]
INPUTS = [TensorContract("x", "float32", [3])]
W, M, X, Y, ROW = range(5)


def by_hand(*rows: Row, outputs: tuple[int, ...] = (), layout: list[TensorSpec] | None = None) -> Graph:
    """A checked train graph over LAYOUT whose last row is the loss."""
    specs = layout or LAYOUT
    graph = Graph(
        "train",
        OPSET_VERSION,
        tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in specs),
        (Port("x", "float32", [3]), Port("y", "int64", [])),
        (),
        rows,
        outputs or (ROW + len(rows) - 1,),
    )
    check(graph, "train", specs, INPUTS, TARGET)
    return graph


def state() -> dict[str, torch.Tensor]:
    """Tensors of LAYOUT."""
    return {"w": torch.eye(3), "m": torch.zeros(3)}


def run(graph: Graph, batch: int = 2, budget: Budget | None = None) -> torch.Tensor:
    """The loss of a graph on a batch of ones."""
    interpreter = Interpreter(graph) if budget is None else Interpreter(graph, budget)
    (loss,) = interpreter.run(state(), [torch.ones(batch, 3), torch.zeros(batch, dtype=torch.int64)])
    return loss


def refused(graph: Graph, batch: int = 2, budget: Budget | None = None) -> RemoteProtocolError:
    """Why a well-typed graph is refused when it meets tensors."""
    with pytest.raises(RemoteProtocolError) as caught:
        run(graph, batch, budget)
    return caught.value


def row(op: str, *arguments: Value, **keywords: Value) -> Row:
    """A row with sorted keywords."""
    return Row(op, arguments, tuple(sorted(keywords.items())))


SIZE = row("aten.sym_size.int", Ref(X), 0)


def test_every_listed_operator_has_a_call() -> None:
    """The table is built from the reviewed list, and holds nothing else."""
    assert set(CALLS) == set(OPERATORS) | {GETITEM}


def test_a_computed_size_is_bounded_before_allocation() -> None:
    """zeros([b * 1e6, b * 1e6]), a size that only the batch decides, is refused by arithmetic, not by the allocator."""
    graph = by_hand(
        SIZE,
        row("int.mul", Ref(ROW), 10**6),
        row("aten.zeros.default", (Ref(ROW + 1), Ref(ROW + 1))),
        row("aten.sum.default", Ref(ROW + 2)),
    )
    error = refused(graph)
    assert error.reason == Reason.GRAPH_TOO_LARGE
    assert error.detail.startswith("row 2, aten.zeros.default: asks for 16000000000000 bytes")


def test_growth_without_literals_is_bounded() -> None:
    """Outer products square a size row by row; the first tensor over the budget is refused."""
    rows = [row("aten.view.default", Ref(X), (-1,))]
    for step in range(6):
        rows.append(row("aten.outer.default", Ref(ROW + 2 * step), Ref(ROW + 2 * step)))
        rows.append(row("aten.view.default", Ref(ROW + 2 * step + 1), (-1,)))
    rows.append(row("aten.sum.default", Ref(ROW + 12)))
    error = refused(by_hand(*rows))
    assert error.reason == Reason.GRAPH_TOO_LARGE
    assert "aten.outer.default: asks for" in error.detail


def test_all_rows_together_are_bounded() -> None:
    """Many tensors under the limit of one are refused by the limit of all."""
    rows = [row("aten.zeros.default", (1000,)) for _ in range(20)]
    graph = by_hand(*rows, row("aten.sum.default", Ref(ROW)))
    assert run(graph, budget=Budget(4_000, 100_000)).item() == 0
    assert refused(graph, budget=Budget(4_000, 50_000)).reason == Reason.GRAPH_TOO_LARGE
    assert refused(graph, budget=Budget(3_999, 100_000)).reason == Reason.GRAPH_TOO_LARGE


def test_views_are_counted_once() -> None:
    """A chain of views costs no memory, so it costs no budget."""
    views = [row("aten.view.default", Ref(X), (3, -1)) for _ in range(50)]
    graph = by_hand(*views, row("aten.sum.default", Ref(ROW)))
    assert run(graph, budget=Budget(1_000, 1_000)).item() == 6


@pytest.mark.parametrize(
    "split",
    [
        row("aten.unbind.int", Ref(ROW)),
        row("aten.chunk.default", Ref(ROW), 10**6, dim=0),
        row("aten.split.Tensor", Ref(ROW), 1, 0),
    ],
)
def test_a_split_into_endless_parts_is_refused(split: Row) -> None:
    """A million views of one number cost no bytes of tensors, and a gigabyte of objects."""
    expand = row("aten.expand.default", Ref(M), (10**6, 3))
    graph = by_hand(expand, split, row(GETITEM, Ref(ROW + 1), 0), row("aten.sum.default", Ref(ROW + 2)))
    assert refused(graph).reason == Reason.GRAPH_TOO_LARGE


def test_numbers_raised_to_a_tensor_run_without_memory_too() -> None:
    """A row whose only tensor may also be a number is no row that creates a tensor."""
    graph = by_hand(row("aten.pow.Scalar", 2, Ref(X)), row("aten.sum.default", Ref(ROW)))
    assert run(graph).item() == 12


def test_whole_numbers_do_not_grow_without_bound() -> None:
    """Squaring a size again and again ends at 63 bits, not in numbers that fill the memory."""
    rows = [SIZE] + [row("int.mul", Ref(ROW + n), Ref(ROW + n)) for n in range(40)]
    graph = by_hand(*rows, row("aten.mean.default", Ref(X)))
    assert refused(graph, batch=3).reason == Reason.GRAPH_TOO_LARGE


@pytest.mark.parametrize(
    "rows",
    [
        (row("aten.mm.default", Ref(X), Ref(M)), row("aten.sum.default", Ref(ROW))),
        (row("aten.view.default", Ref(X), (7,)), row("aten.sum.default", Ref(ROW))),
        (row("aten.chunk.default", Ref(X), 2), row(GETITEM, Ref(ROW), 5), row("aten.sum.default", Ref(ROW + 1))),
        (SIZE, row("int.floordiv", Ref(ROW), 0), row("aten.mean.default", Ref(X))),
        (row("aten.bitwise_not.default", Ref(X)), row("aten.mean.default", Ref(ROW))),
    ],
    ids=["shapes", "view", "item", "zero", "dtype"],
)
def test_what_torch_refuses_is_a_typed_refusal(rows: tuple[Row, ...]) -> None:
    """Mismatched shapes, items, dtypes and a division by zero name their row and change nothing."""
    error = refused(by_hand(*rows))
    assert error.reason == Reason.GRAPH_ARGUMENT
    assert error.detail.startswith("row ")


def test_a_shape_that_depends_on_values_is_refused() -> None:
    """A boolean index has a size that only the data know."""
    graph = by_hand(
        row("aten.gt.Scalar", Ref(X), 0), row("aten.index.Tensor", Ref(X), (Ref(ROW),)), row("aten.sum.default", Ref(4))
    )
    assert refused(dataclasses.replace(graph)).reason == Reason.GRAPH_ARGUMENT


def test_a_loss_is_one_floating_number() -> None:
    """A vector or a whole number is refused before the first step."""
    assert refused(by_hand(row("aten.relu.default", Ref(X)))).reason == Reason.GRAPH_INVALID
    assert refused(by_hand(row("aten.argmax.default", Ref(X)))).reason == Reason.GRAPH_INVALID


def test_a_batch_of_one_value_a_channel_is_refused_as_in_eager() -> None:
    """Eager torch raises for a batch of one in BatchNorm1d; the bare operator would give a NaN variance."""
    layout = [TensorSpec("w", "buffer", "float32", [3]), TensorSpec("m", "buffer", "float32", [3])]
    graph = by_hand(
        row("aten.batch_norm.default", Ref(X), None, None, Ref(W), Ref(M), True, 0.1, 1e-5, False),
        row("aten.mean.default", Ref(ROW)),
        layout=layout,
    )
    interpreter = Interpreter(graph)
    buffers = {"w": torch.zeros(3), "m": torch.ones(3)}
    interpreter.run(buffers, [torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)])
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    for batch in (1, 0):
        with pytest.raises(RemoteProtocolError) as caught:
            interpreter.run(buffers, [torch.randn(batch, 3), torch.zeros(batch, dtype=torch.int64)])
        assert caught.value.reason == Reason.GRAPH_ARGUMENT
        assert "a larger batch" in caught.value.detail
        assert all(torch.equal(buffers[name], kept[name]) for name in kept)


def test_state_and_inputs_are_those_the_graph_was_made_for() -> None:
    """A missing tensor, another shape or dtype, or two batch sizes at once are refused."""
    interpreter = Interpreter(by_hand(row("aten.mean.default", Ref(X))))
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for tensors in ([x], [x, y, y], [x.double(), y], [x[:, :2], y], [x, y[:1]], [torch.tensor(1.0), y]):
        with pytest.raises(RemoteProtocolError) as caught:
            interpreter.run(state(), tensors)
        assert caught.value.reason == Reason.GRAPH_LAYOUT
    for wrong in ({"w": torch.eye(3)}, state() | {"m": torch.zeros(4)}, state() | {"m": torch.zeros(3).double()}):
        with pytest.raises(RemoteProtocolError) as caught:
            interpreter.run(wrong, [x, y])
        assert caught.value.reason == Reason.GRAPH_LAYOUT


def test_labels_out_of_range_are_a_typed_refusal() -> None:
    """Values that only the data show wrong end in the same typed error, not in a crash."""
    graph = by_hand(row("aten.cross_entropy_loss.default", Ref(X), Ref(Y)))
    interpreter = Interpreter(graph)
    with pytest.raises(RemoteProtocolError) as caught:
        interpreter.run(state(), [torch.ones(2, 3), torch.tensor([0, 9])])
    assert caught.value.reason == Reason.GRAPH_ARGUMENT


def test_a_train_graph_does_not_predict() -> None:
    """Prediction without a target is for eval graphs."""
    with pytest.raises(RemoteProtocolError):
        Interpreter(by_hand(row("aten.mean.default", Ref(X)))).predict(state(), [torch.ones(2, 3)])
