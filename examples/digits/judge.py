"""Judges weights on the hold-outs of all devices together, which nobody but a demo can do: they are on one machine.

It runs the release's own eval graph in the agent's own interpreter and splits the data as the agents do, so that demo
and devices measure the same thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from aggregator.release import Description
from edge_agent import data
from edge_agent.checkpoint import State
from edge_agent.interpreter import Interpreter
from edge_agent.jobs import Source
from edge_agent.trainer import Model, load_state
from examples.digits.data import DIGITS
from examples.digits.processes import DemoError
from shared import graph
from shared.messages import Root


@dataclass(frozen=True, slots=True)
class Score:
    """How well weights read the pooled hold-outs."""

    accuracy: float
    loss: float
    by_digit: dict[int, float]
    """Share of each digit's images that is read right."""
    known: tuple[int, ...]
    """The digits whose images are read as that digit more often than as any other."""


class Judge:
    """The task's model and every device's examples, split as its agent splits them."""

    def __init__(self, first: Description, root: Root, files: Sequence[Path]) -> None:
        """From release 0, with its parts, the fleet's root and the devices' data files."""
        torch.set_num_threads(1)
        self.first, self.root = first, root
        self.manifest = manifest = first.manifest
        graphs, weights = first.message.graphs, first.message.weights
        if graphs is None or weights is None:
            raise DemoError("the release file has no graphs or weights")
        self._model = Model(graphs.train, graphs.eval, manifest.layout, manifest.data)
        self._eval = Interpreter(graph.parse(graphs.eval))
        self._weights = load_state(weights, manifest.layout)
        loaded = [data.load(Source("npz", str(path)), manifest.data) for path in files]
        self.splits = [examples.split(manifest.training.holdout) for examples in loaded]
        columns = zip(*(held.arrays for _, held in self.splits), strict=True)
        self._images, self._labels = (torch.from_numpy(np.concatenate(column)) for column in columns)
        self.start = self._score(self._weights)

    @property
    def images(self) -> int:
        """In all hold-outs together."""
        return len(self._labels)

    @property
    def digits(self) -> int:
        """How many digits are in the hold-outs at all."""
        return len(self._labels.unique())

    def score(self, weights: bytes) -> Score:
        """Of a release's weights."""
        return self._score(load_state(weights, self.manifest.layout))

    def alone(self, device: int, rounds: int) -> Score:
        """Of what one device reaches with its own data only: the same start, rate and number of passes."""
        fit, held = self.splits[device]
        training = self.manifest.training
        training = msgspec.structs.replace(training, epochs=training.epochs * rounds)
        return self._score(self._model.train(self._weights, fit, held, training, "accuracy", seed=device).weights)

    def _score(self, state: State) -> Score:
        with torch.no_grad():
            outputs, loss = self._eval.run(state, [self._images, self._labels])
        answers = outputs.argmax(1)
        table = torch.zeros(DIGITS, DIGITS, dtype=torch.int64)
        table.index_put_((self._labels, answers), torch.tensor(1), accumulate=True)
        seen = [digit for digit in range(DIGITS) if table[digit].sum()]
        return Score(
            accuracy=float((answers == self._labels).double().mean()),
            loss=float(loss),
            by_digit={digit: float(table[digit, digit] / table[digit].sum()) for digit in seen},
            known=tuple(digit for digit in seen if table[digit].argmax() == digit),
        )
