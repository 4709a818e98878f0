"""Export: what becomes a release, what is refused, and whether the message says what, where and the remedy."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from aggregator.export import LOSSES, Exported, export
from edge_agent.interpreter import Interpreter
from shared.errors import ExportError
from shared.graph import parse
from shared.messages import TensorContract
from shared.tensors import load

torch.set_num_threads(1)

X = TensorContract("x", "float32", [4, 6])
LABEL = TensorContract("y", "int64", [], 3)
VALUES = TensorContract("y", "float32", [3])
EMPTY: dict[str, torch.Tensor] = {}


class Model(nn.Module):
    """A linear layer on the flattened input, then whatever `then` makes of it and the input."""

    def __init__(self, then: Callable[["Model", torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 3)
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.zeros(3))
        self.plain = torch.ones(20_000)
        self.then = then

    def forward(self, x: torch.Tensor) -> object:
        return self.then(self, self.linear(x.flatten(1)), x)


def same(model: Model, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The linear layer's output as it is."""
    return y


def ops(data: bytes) -> list[str]:
    """The operators of an encoded graph."""
    return [row.op for row in parse(data).rows]


def run(exported: Exported, model: nn.Module, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The loss of the exported train graph on the model's own weights."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    (loss,) = Interpreter(parse(exported.train)).run(state, tensors)
    return loss


def refused(module: nn.Module, loss: str | nn.Module | None = "cross_entropy", target: TensorContract = LABEL) -> str:
    """What a publisher reads when a module cannot become a release."""
    with pytest.raises(ExportError) as caught:
        export(module, loss, [X], target)
    return str(caught.value)


# -- what cannot export ------------------------------------------------------------------------------------------


def without_gradient(model: Model, y: torch.Tensor, x: torch.Tensor) -> object:
    """Forward switches gradients off."""
    with torch.no_grad():
        shift = x.sum((1, 2), keepdim=True)[:, 0]
    return y + shift


def assigning(model: Model, y: torch.Tensor, x: torch.Tensor) -> object:
    """Forward replaces a buffer."""
    model.offset = model.offset + 1
    return y + model.offset


def branching(model: Model, y: torch.Tensor, x: torch.Tensor) -> object:
    """Forward looks at a value."""
    return y if x.sum() > 0 else -y


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (without_gradient, [r"torch\.no_grad\(\)", r"\.detach\(\)", r"test_export\.py:\d+"]),
        (assigning, ["buffer offset", "in place"]),
        (branching, ["depends on the values of a tensor", r"test_export\.py:\d+", "torch.where"]),
        (lambda m, y, x: y + torch.fft.fft(x).real.sum(), [r"aten\.fft_fft\.default", "list", r"test_export\.py:\d+"]),
        (lambda m, y, x: y * x.sum().item(), [r"aten\.item\.default", r"test_export\.py:\d+"]),
        (lambda m, y, x: y + torch.empty(3), [r"aten\.empty\.memory_format"]),
        (lambda m, y, x: y + x[x > 0].sum(), ["depends on values", "boolean index"]),
        (lambda m, y, x: y + torch.from_numpy(x.numpy()).sum(), ["numpy"]),
        (lambda m, y, x: y.reshape(3, 3), ["batches of every size", "any batch size"]),
        (lambda m, y, x: y + m.linear(x), ["RuntimeError", r"test_export\.py:\d+", "data contract"]),
        (lambda m, y, x: y + EMPTY["key"], ["KeyError", r"test_export\.py:\d+"]),
        (lambda m, y, x: m.linear(x.mul_(2).flatten(1)), ["changes an input in place", r"test_export\.py:\d+"]),
        (lambda m, y, x: y * m.linear.weight.detach().mul_(2).sum(), ["changes a parameter in place"]),
        (lambda m, y, x: y + m.plain.sum(), ["plain has 80000 bytes", "register_buffer"]),
        (lambda m, y, x: (y, x), ["returns a tuple", "one tensor"]),
        (lambda m, y, x: 5, ["returns a int"]),
    ],
)
def test_what_cannot_export_says_what_where_and_the_remedy(
    then: Callable[[Model, torch.Tensor, torch.Tensor], object], words: list[str]
) -> None:
    """Each construct that devices could not run is named when the release is built."""
    said = refused(Model(then))
    for word in words:
        assert re.search(word, said), said


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.b = nn.Linear(24, 24)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.flatten(1)))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Tied(), ["b.weight and a.weight share memory", "register the tensor once"]),
        (Model(same).to(torch.bfloat16), ["offset is bfloat16", "float32"]),
        (Model(same).requires_grad_(False), ["nothing to train"]),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), ["1.weight has no shape yet"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(24, 3, device="meta")), ["meta", "CPU"]),
    ],
)
def test_a_state_that_cannot_travel_is_refused(module: nn.Module, words: list[str]) -> None:
    """Tied, untyped, shapeless or absent weights are named."""
    said = refused(module)
    assert all(word in said for word in words), said


def test_weights_that_are_not_finite_are_refused() -> None:
    """A release with a NaN would be refused by every device."""
    model = Model(same)
    with torch.no_grad():
        model.linear.bias[1] = torch.nan
    assert "linear.bias" in refused(model)


# -- losses ------------------------------------------------------------------------------------------------------

REFERENCE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "smooth_l1": functional.smooth_l1_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_named_loss_is_torch_s(name: str) -> None:
    """The loss in the graph equals torch's function of that name, bit for bit."""
    model = Model(same)
    x = torch.randn(5, 4, 6)
    y = torch.randint(0, 3, (5,)) if name == "cross_entropy" else torch.rand(5, 3)
    exported = export(model, name, [X], LABEL if name == "cross_entropy" else VALUES)
    assert torch.equal(run(exported, model, [x, y]), REFERENCE[name](model(x), y))


def test_whole_number_targets_become_what_the_loss_takes() -> None:
    """Labels stored in one byte work for cross-entropy, and whole numbers for an element-wise loss."""
    model = Model(same)
    x, y = torch.randn(5, 4, 6), torch.tensor([0, 1, 2, 1, 0], dtype=torch.uint8)
    exported = export(model, "cross_entropy", [X], TensorContract("y", "uint8", [], 3))
    assert torch.equal(run(exported, model, [x, y]), functional.cross_entropy(model(x), y.long()))
    flags = torch.randint(0, 2, (5, 3))
    exported = export(model, "bce_with_logits", [X], TensorContract("y", "int64", [3], 2))
    expected = functional.binary_cross_entropy_with_logits(model(x), flags.float())
    assert torch.equal(run(exported, model, [x, flags]), expected)


def test_a_loss_module_brings_its_buffers_as_constants() -> None:
    """Class weights ride in the graph; the layout stays the model's own."""
    model = Model(same)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    exported = export(model, loss, [X], LABEL)
    assert [spec.name for spec in exported.layout] == list(model.state_dict())
    x, y = torch.randn(5, 4, 6), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(run(exported, model, [x, y]), loss(model(x), y))


class OwnLoss(nn.Module):
    """A module that computes its loss itself when it is given the target."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.linear(x.flatten(1))
        return logits if y is None else functional.cross_entropy(logits, y) + self.linear.weight.square().mean()


def test_a_module_may_compute_its_own_loss() -> None:
    """With no loss given, forward(inputs, target) is the loss and forward(inputs) the output."""
    model = OwnLoss()
    exported = export(model, None, [X], LABEL)
    x, y = torch.randn(5, 4, 6), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(run(exported, model, [x, y]), model(x, y))
    (output,) = Interpreter(parse(exported.eval)).predict(dict(model.state_dict()), [x])
    assert torch.equal(output, model(x))


class DemandingLoss(OwnLoss):
    """One that cannot do without the target."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, y)


def test_a_module_that_cannot_do_without_the_target_is_told_so() -> None:
    """The eval graph has outputs and no target."""
    with pytest.raises(ExportError, match=r"forward\(self, x, target=None\)"):
        export(DemandingLoss(), None, [X], LABEL)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, target) * self.scale


@pytest.mark.parametrize(
    ("loss", "target", "words"),
    [
        ("perplexity", LABEL, ["'perplexity'", "cross_entropy"]),
        (Scaled(), LABEL, ["parameter, scale"]),
        (nn.CrossEntropyLoss(reduction="none"), LABEL, ["not one floating-point number", ".mean()"]),
        ("mse", TensorContract("y", "float32", [1]), ["[batch, 3]", "[batch, 1]", "same shape"]),
        (None, LABEL, ["TypeError", "target=None"]),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(
    loss: str | nn.Module | None, target: TensorContract, words: list[str]
) -> None:
    """Unknown names, losses with parameters, losses that are no number, and silent broadcasting are refused."""
    said = refused(Model(same), loss, target)
    assert all(word in said for word in words), said


# -- what a release carries --------------------------------------------------------------------------------------


def test_layout_and_weights_are_the_state_dict() -> None:
    """Names, order, dtypes, shapes and values are those of state_dict; buffers of whole numbers come along."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 3), nn.BatchNorm1d(3))
    exported = export(model, "cross_entropy", [X], LABEL)
    state = model.state_dict()
    assert [spec.name for spec in exported.layout] == list(state)
    kinds = {spec.name: spec.kind for spec in exported.layout}
    assert kinds["1.weight"] == kinds["2.bias"] == "parameter"
    assert kinds["2.running_mean"] == kinds["2.num_batches_tracked"] == "buffer"
    for name, array in load(exported.weights, exported.layout).items():
        np.testing.assert_array_equal(array, state[name].numpy())


def test_a_frozen_parameter_travels_as_a_buffer() -> None:
    """What is not trained in eager torch is not trained on devices."""
    model = Model(same)
    model.linear.bias.requires_grad_(False)
    exported = export(model, "cross_entropy", [X], LABEL)
    assert {spec.name: spec.kind for spec in exported.layout}["linear.bias"] == "buffer"


def test_export_leaves_the_module_as_it_was() -> None:
    """Modes, weights, gradients and torch's own switches are untouched, whether export succeeds or not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 3), nn.BatchNorm1d(3).eval(), nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    export(model, "cross_entropy", [X], LABEL)
    refused(model, "mse", TensorContract("y", "float32", [1]))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_export_is_deterministic() -> None:
    """The same module gives the same bytes, so a manifest's digests can be reproduced."""
    first, second = (export(Model(same), "cross_entropy", [X], LABEL) for _ in range(2))
    assert (first.train, first.eval, first.layout) == (second.train, second.eval, second.layout)


def test_rows_that_nothing_needs_are_left_out() -> None:
    """Assertions and unused results are not sent; a random draw is, for it moves the generator."""

    def idle(model: Model, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x.double().exp()
        torch.rand(3)
        return y

    found = ops(export(Model(idle), "cross_entropy", [X], LABEL).train)
    assert "aten.exp.default" not in found
    assert "aten.rand.default" in found


def test_changes_in_place_are_never_left_out() -> None:
    """A change whose own result nothing uses still changes what is read later, by whatever operator it is made."""

    def writing(model: Model, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        z = y.clone()
        z[:, 0] = 0
        z[:, 1:] += x[:, 0, :2]
        z[z > 2] = 2
        return z

    model = Model(writing)
    exported = export(model, "cross_entropy", [X], LABEL)
    x, y = torch.randn(5, 4, 6) * 5, torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(run(exported, model, [x, y]), functional.cross_entropy(model(x), y))
    off_the_list = refused(Model(lambda m, y, x: (z := y.clone(), z[:, 0].erfinv_(), z)[-1]))
    assert "aten.erfinv_.default" in off_the_list


def test_several_inputs_and_outputs() -> None:
    """A module may take several inputs and return a structure, if its loss module takes what it returns."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 3)

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.linear(x.flatten(1))
            return {"logits": y + z.float().unsqueeze(1), "size": y.square().sum(1)}

    class Both(nn.Module):
        def forward(self, outputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(outputs["logits"], target) + outputs["size"].mean()

    model = Two()
    exported = export(model, Both(), [X, TensorContract("z", "int32", [])], LABEL)
    x, z, y = torch.randn(5, 4, 6), torch.arange(5, dtype=torch.int32), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(run(exported, model, [x, z, y]), Both()(model(x, z), y))
    logits, size, loss = Interpreter(parse(exported.eval)).run(dict(model.state_dict()), [x, z, y])
    assert torch.equal(logits, model(x, z)["logits"])
    assert torch.equal(size, model(x, z)["size"])
    assert torch.equal(loss, Both()(model(x, z), y))
