"""Judges weights on the hold-outs of all devices together, which nobody but a demo can do: they are on one machine.

It uses the release's own eval graph and the agent's own code, so that demo and devices measure the same thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from aggregator.release import Description
from edge_agent import data
from edge_agent.data import Examples
from edge_agent.jobs import Source
from edge_agent.trainer import Model, State, load_state
from examples.digits.data import DIGITS
from examples.digits.processes import DemoError
from shared.messages import Root

RECOGNISED = 0.5
"""A digit counts as known when at least this share of its held-out images is read right."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well weights read the pooled hold-outs."""

    accuracy: float
    loss: float
    by_digit: dict[int, float]
    """Share of each digit's images that is read right."""

    @property
    def known(self) -> int:
        """How many digits are known."""
        return sum(share >= RECOGNISED for share in self.by_digit.values())


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
        self._weights = load_state(weights, manifest.layout)
        sources = [Source("npz", str(path)) for path in files]
        loaded = [data.load(source, manifest.data) for source in sources]
        self.splits = [examples.split(manifest.training.holdout) for examples in loaded]
        pooled = [np.concatenate(column) for column in zip(*(held.arrays for _, held in self.splits), strict=True)]
        self._by_digit = {digit: Examples(tuple(a[pooled[-1] == digit] for a in pooled)) for digit in range(DIGITS)}
        self.start = self._score(self._weights)

    @property
    def images(self) -> int:
        """In all hold-outs together."""
        return sum(map(len, self._by_digit.values()))

    @property
    def digits(self) -> int:
        """How many digits are in the hold-outs at all."""
        return sum(len(examples) > 0 for examples in self._by_digit.values())

    def score(self, weights: bytes) -> Score:
        """Of a release's weights."""
        return self._score(load_state(weights, self.manifest.layout))

    def alone(self, device: int, rounds: int) -> Score:
        """Of what one device reaches with its own data only: the same start, rate and number of passes."""
        fit, held = self.splits[device]
        training = self.manifest.training
        training = msgspec.structs.replace(training, epochs=training.epochs * rounds)
        trained = self._model.train(self._weights, fit, held, training, "accuracy", seed=device)
        return self._score(trained.weights)

    def _score(self, state: State) -> Score:
        shares, loss = {}, 0.0
        for digit, examples in self._by_digit.items():
            if len(examples):
                found = self._model.evaluate(state, examples, "accuracy", len(examples))
                shares[digit] = found["accuracy"]
                loss += found["loss"] * len(examples)
        right = sum(share * len(self._by_digit[digit]) for digit, share in shares.items())
        return Score(right / self.images, loss / self.images, shares)
