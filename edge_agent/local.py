"""Use the models that this device has learnt, in a program of its own: needs torch, numpy and safetensors.

    from edge_agent import local
    model = local.load("/var/lib/fieldfare-agent/models/digits")
    answer = model.predict({"image": images})     # numpy arrays, the first dimension counts examples
    answer.labels                                 # int64[n] for a classifier, else None
    if model.outdated(): model = local.load(...)  # a newer release is there

The graph is data and is checked before it runs, as in training: no code of anybody else's is executed. It never talks
to the agent or the network, and an expired task predicts as well as ever.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from edge_agent import data, shelf
from edge_agent.interpreter import Interpreter
from shared import graph, tensors, wire
from shared.errors import RemoteProtocolError, TrainingError
from shared.layout import size_bytes
from shared.messages import TaskManifest

Array = npt.NDArray[Any]

BATCH = 1024
"""Examples that go through the graph at a time."""
_MANIFEST_MAX = 4 << 20
_HEADER_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answers for n examples."""

    outputs: tuple[Array, ...]
    """What the model gives, each with n as its first dimension, such as logits of float32[n, classes]."""
    labels: Array | None
    """int64[n]: the class with the largest output, where the task's target is a class."""


class LocalModel:
    """One release of a task, loaded."""

    def __init__(
        self, link: Path, about: shelf.Model, manifest: TaskManifest, eval_graph: bytes, weights: bytes
    ) -> None:
        self._link, self.about, self._contract = link, about, manifest.data
        try:
            parsed = graph.parse(eval_graph)
            graph.check(parsed, "eval", manifest.layout, manifest.data.inputs, manifest.data.target)
            loaded = tensors.load(weights, manifest.layout)
        except RemoteProtocolError as error:
            raise TrainingError("graph", f"{link}: {error}") from None
        self._graph = Interpreter(parsed)
        self._state = {name: torch.from_numpy(values) for name, values in loaded.items()}

    @property
    def inputs(self) -> dict[str, tuple[str, list[int]]]:
        """What it wants: dtype and shape of one example, by name."""
        return {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in self._contract.inputs}

    def outdated(self) -> bool:
        """Whether another release lies where this one was loaded from."""
        newest = shelf.read(self._link)
        return newest is not None and newest.digest != self.about.digest

    def predict(self, inputs: Mapping[str, Array] | Sequence[Array]) -> Prediction:
        """The answers for a batch; TrainingError("data") if it is not what the task's inputs are."""
        arrays = self._arrays(inputs)
        rows: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for start in range(0, len(arrays[0]), BATCH):
                batch = [torch.from_numpy(np.ascontiguousarray(array[start : start + BATCH])) for array in arrays]
                try:
                    rows.append(self._graph.predict(self._state, batch))
                except RemoteProtocolError as error:
                    raise TrainingError("graph", error.detail) from None
        outputs = tuple(torch.cat(each).numpy() for each in zip(*rows, strict=True))
        labels = None
        if self._contract.target.classes and outputs and outputs[0].ndim == 2:
            labels = outputs[0].argmax(1)
        return Prediction(outputs, labels)

    def _arrays(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        contract = self._contract.inputs
        if isinstance(inputs, Mapping):
            absent = [tensor.name for tensor in contract if tensor.name not in inputs]
            if absent:
                raise TrainingError("data", f"no input {', '.join(absent)}; it wants {', '.join(self.inputs)}")
            arrays = [np.asarray(inputs[tensor.name]) for tensor in contract]
        else:
            arrays = [np.asarray(each) for each in inputs]
        if len(arrays) != len(contract):
            raise TrainingError("data", f"{len(arrays)} inputs where {', '.join(self.inputs)} belong")
        for tensor, array in zip(contract, arrays, strict=True):
            if array.dtype != np.dtype(tensor.dtype) or list(array.shape[1:]) != tensor.shape or not array.ndim:
                wanted = f"{tensor.dtype}{['n', *tensor.shape]}"
                raise TrainingError("data", f"{tensor.name} is {array.dtype}{list(array.shape)}, it must be {wanted}")
            if not len(array) or len(array) != len(arrays[0]):
                raise TrainingError(
                    "data", f"{tensor.name} has {len(array)} examples, {contract[0].name} {len(arrays[0])}"
                )
        return arrays

    def read(self, path: Path, kind: Literal["npz", "csv"]) -> list[Array]:
        """The inputs that a file holds, in the task's order; a target in it is not looked at. TrainingError("data")."""
        return data.inputs(path, kind, self._contract)

    def table(self, answer: Prediction) -> str:
        """Answers as CSV: the class first where there is one, then every output's values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        flat = [output.reshape(len(output), -1) for output in answer.outputs]
        names = [f"output{number}" if len(flat) > 1 else "output" for number in range(len(flat))]
        header = [] if answer.labels is None else ["class"]
        for name, values in zip(names, flat, strict=True):
            header += [f"{name}_{column}" for column in range(values.shape[1])] if values.shape[1] != 1 else [name]
        writer.writerow(header)
        for row in range(len(flat[0])):
            label = [] if answer.labels is None else [int(answer.labels[row])]
            writer.writerow([*label, *(f"{float(value):.6g}" for values in flat for value in values[row])])
        return text.getvalue()


def archive(answer: Prediction) -> bytes:
    """Answers as an .npz file: `output0`, `output1` ..., and `labels` for a classifier."""
    arrays = {f"output{number}": output for number, output in enumerate(answer.outputs)}
    if answer.labels is not None:
        arrays["labels"] = answer.labels
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def load(link: str | os.PathLike[str]) -> LocalModel:
    """The model behind a link of the shelf; TrainingError("weights") says why there is none, or none to use."""
    path = Path(link)
    for _ in range(3):  # its folder may be replaced, and removed, just now
        folder = path.resolve()
        about = shelf.read(folder)
        try:
            manifest = wire.unpack(_read(folder / shelf.MANIFEST, _MANIFEST_MAX), TaskManifest, _MANIFEST_MAX)
            limit = sum(map(size_bytes, manifest.layout)) + _HEADER_MAX
            weights = _read(folder / shelf.WEIGHTS, limit)
            parts = _read(folder / shelf.GRAPH, graph.LIMITS.bytes), weights
        except PermissionError:
            raise TrainingError("weights", f"{path} may not be read by this user") from None
        except OSError:
            continue
        except RemoteProtocolError as error:
            raise TrainingError("weights", f"{path}: {error}") from None
        if about is not None:
            return LocalModel(path, about, manifest, *parts)
    raise TrainingError("weights", f"no model at {path}: no release of this task was accepted here yet")


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TrainingError("weights", f"{path}: over {limit} bytes")
    return content
