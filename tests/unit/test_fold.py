"""The running sum: exact where it can be, the same bit for bit when made again, one accumulator for any fleet."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import fold
from aggregator.fold import Fold, Vector
from shared.errors import LocalProtocolError

BLOCK = fold._BLOCK
LENGTHS = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]


def deltas(count: int, dimension: int, seed: int = 1) -> list[Vector]:
    """Deltas of many magnitudes."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.integers(-6, 3, (count, dimension))
    return list((random.normal(size=(count, dimension)) * scale).astype(np.float32))


def folded(parts: list[Vector], weights: list[float]) -> Fold:
    """A fold that these were added to in this order."""
    made = Fold(len(parts[0]))
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        made.add(bytes([number]) * 32, part, weight)
    return made


@pytest.mark.parametrize("dimension", LENGTHS)
def test_one_hot(dimension: int) -> None:
    """Device i contributes e_i: each cell of the sum is exactly 0 or 1, across every border of a block."""
    devices = sorted({0, dimension - 1, dimension // 2, min(BLOCK, dimension - 1), min(BLOCK - 1, dimension - 1)})
    made = Fold(dimension)
    for device in devices:
        unit = np.zeros(dimension, np.float32)
        unit[device] = 1.0
        made.add(b"%d" % device, unit, 1.0)
    total = made.mean() * np.float32(len(devices))
    if len(devices) in (1, 2, 4):  # a division that rounds nothing
        assert np.count_nonzero(total == 1.0) == len(devices)
    assert np.flatnonzero(made.mean()).tolist() == devices
    assert set(np.unique(made._sum)) <= {np.float32(0.0), np.float32(1.0)}


@pytest.mark.parametrize("dimension", LENGTHS)
def test_weighted_mean(dimension: int) -> None:
    """The mean is that of float64 arithmetic but for float32 rounding."""
    parts, weights = deltas(9, dimension), [1.0, 40.0, 10_000.0, 3.0, 17.0, 1.0, 2.5, 400.0, 9.0]
    exact = np.average(np.stack(parts).astype(np.float64), axis=0, weights=weights)
    size = np.average(np.abs(np.stack(parts)).astype(np.float64), axis=0, weights=weights)
    mean = folded(parts, weights).mean()
    assert mean.dtype == np.float32
    assert np.all(np.abs(mean - exact) <= 12 * np.finfo(np.float32).eps * size)


def test_made_again_bit_for_bit() -> None:
    """The same rows in the same order give the same bits, as after a restart."""
    parts, weights = deltas(20, BLOCK + 77), [float(1 + number % 5) for number in range(20)]
    first, again = folded(parts, weights), folded([part.copy() for part in parts], weights)
    assert first.mean().tobytes() == again.mean().tobytes()
    assert (first.heads, first.weight) == (again.heads, again.weight)


def test_interrupted_or_not() -> None:
    """A mean taken in the middle changes nothing of what follows, and is the caller's own."""
    parts, weights = deltas(6, 100), [1.0] * 6
    made = folded(parts[:3], weights[:3])
    made.mean().fill(7.0)
    for number in range(3, 6):
        made.add(bytes([number]) * 32, parts[number], 1.0)
    assert made.mean().tobytes() == folded(parts, weights).mean().tobytes()


def test_order_matters_only_to_the_last_bits() -> None:
    """Any order of the same updates gives the same mean but for rounding."""
    parts = deltas(5, 64)
    size = np.abs(np.stack(parts)).max(axis=0)
    first = folded(parts, [1.0] * 5).mean()
    for order in permutations(range(5)):
        other = folded([parts[number] for number in order], [1.0] * 5).mean()
        assert np.all(np.abs(other - first) <= 8 * np.finfo(np.float32).eps * size)


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 100)), min_size=1, max_size=30))
def test_whole_numbers_are_exact(pairs: list[tuple[int, int]]) -> None:
    """Sums that float32 can hold are held exactly."""
    made = folded([np.array([value], np.float32) for value, _ in pairs], [float(weight) for _, weight in pairs])
    total = sum(value * weight for value, weight in pairs)
    assert made.weight == sum(weight for _, weight in pairs)
    assert made.mean()[0] == np.float32(total) / np.float32(made.weight)


@pytest.mark.parametrize("shape", [(5,), (7,), (0,), (6, 1), (1, 6)])
def test_another_dimension(shape: tuple[int, ...]) -> None:
    """A delta of another shape is our own mistake, and the sum is as before."""
    made = folded([np.ones(6, np.float32)], [1.0])
    with pytest.raises(LocalProtocolError):
        made.add(b"x", np.ones(shape, np.float32), 1.0)
    assert (made.heads, made.weight) == ([bytes(32)], 1.0)
    assert made.mean().tolist() == [1.0] * 6


def test_mean_of_nothing() -> None:
    """No update has no mean, and neither have updates without weight."""
    with pytest.raises(LocalProtocolError):
        Fold(3).mean()
    with pytest.raises(LocalProtocolError):
        folded([np.ones(3, np.float32)], [0.0]).mean()


def test_the_delta_is_left_alone() -> None:
    """What is added is read, neither changed nor kept."""
    delta = np.ones(4, np.float32)
    made = folded([delta], [3.0])
    assert delta.tolist() == [1.0] * 4
    delta.fill(9.0)
    assert made.mean().tolist() == [1.0] * 4


def test_memory_is_flat() -> None:
    """A hundred devices take no more than ten: no delta stays."""
    dimension = 500_000
    made, delta = Fold(dimension), np.ones(dimension, np.float32)
    tracemalloc.start()
    try:
        for _ in range(10):
            made.add(bytes(32), delta, 1.0)
        tracemalloc.reset_peak()
        few = tracemalloc.get_traced_memory()[0]
        for _ in range(90):
            made.add(bytes(32), delta, 1.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - few < 64_000 < delta.nbytes
