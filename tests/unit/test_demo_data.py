"""How the demo deals its digits out."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from edge_agent import data as agents_data
from edge_agent.jobs import Source
from examples.digits import data
from shared.messages import DataContract, TensorContract

COUNTS = (1, 2, 3, 4, 5, 8, 10, 13, 60)


def test_eight_devices_hold_the_digits_of_the_reference_figures() -> None:
    """Device d of 8 holds floor(1.25 d) and the next two, around from 9 to 0."""
    for device in range(8):
        first = int(1.25 * device)
        assert data.digits_of(device, 8) == tuple((first + step) % 10 for step in range(3))


@pytest.mark.parametrize("devices", COUNTS)
def test_no_device_holds_more_than_three_digits(devices: int) -> None:
    """Whatever the number of devices, each holds three digits, and four devices or more hold all ten."""
    held = [data.digits_of(device, devices) for device in range(devices)]
    assert all(len(set(digits)) == data.KNOWN for digits in held)
    assert len(set(itertools.chain(*held))) == min(10, 3 * devices)


@pytest.mark.parametrize("devices", COUNTS)
def test_every_image_has_one_holder_who_may_hold_it(devices: int) -> None:
    """The images of all held digits are dealt out, none twice, to holders of their digit and in even shares."""
    _, labels = data.load()
    dealt = data.deal(labels, devices)
    everyone = np.concatenate(dealt)
    held = [data.digits_of(device, devices) for device in range(devices)]
    assert len(np.unique(everyone)) == len(everyone)
    assert set(everyone) == set(np.flatnonzero(np.isin(labels, list(itertools.chain(*held)))))
    for digit in range(10):
        shares = [np.sum(labels[rows] == digit) for rows, digits in zip(dealt, held, strict=True) if digit in digits]
        assert not shares or max(shares) - min(shares) <= 1
    for rows, digits in zip(dealt, held, strict=True):
        assert set(labels[rows]) == set(digits)


def test_dealing_is_the_same_every_time() -> None:
    """Two demos deal alike, so that their figures compare."""
    _, labels = data.load()
    for first, second in zip(data.deal(labels, 8), data.deal(labels, 8), strict=True):
        assert np.array_equal(first, second)


def test_the_agent_takes_what_is_written(tmp_path: Path) -> None:
    """A device's file keeps the contract of the example's task, and about a fifth of it is held out."""
    contract = DataContract(
        dataset="digits",
        inputs=[TensorContract(name="x", dtype="float32", shape=[64])],
        target=TensorContract(name="y", dtype="int64", shape=[], classes=10),
        min_examples=20,
    )
    pixels, labels = data.load()
    rows = data.deal(labels, 8)[3]
    data.write(tmp_path / "digits.npz", pixels[rows], labels[rows])
    examples = agents_data.load(Source("npz", str(tmp_path / "digits.npz")), contract)
    fit, held = examples.split(0.2)
    assert len(examples) == len(rows) == len(fit) + len(held)
    assert 0.1 < len(held) / len(rows) < 0.3
    assert float(examples.arrays[0].max()) == 1.0
