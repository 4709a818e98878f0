"""What an opened update must be before it is added: finite, of the right size, within the clip, with sane metrics."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import validate
from shared.errors import Reason, RemoteProtocolError
from shared.messages import Metrics, PlainBody

SIZES = [2, 3]


def packed(*values: float) -> memoryview:
    """Values as the codec writes them."""
    return memoryview(struct.pack(f"<{len(values)}f", *values))


def refusal(data: memoryview, clip: float = 10.0) -> Reason:
    """Why a delta is not added."""
    with pytest.raises(RemoteProtocolError) as caught:
        validate.delta("fp32", data, SIZES, clip)
    return caught.value.reason


def body(holdout: int = 5, **metrics: float) -> PlainBody:
    """An update's report."""
    return PlainBody(examples=10, steps=3, metrics=metrics, holdout=holdout)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float, place: int) -> None:
    """One NaN or infinity anywhere spoils the whole update."""
    values = [0.1] * 5
    values[place] = value
    assert refusal(packed(*values)) is Reason.NOT_FINITE


@pytest.mark.parametrize("values", [(), (1.0,) * 4, (1.0,) * 6, (1.0,) * 10])
def test_wrong_dimension(values: tuple[float, ...]) -> None:
    """Neither fewer nor more numbers than the layout has."""
    assert refusal(packed(*values)) is Reason.WRONG_DIMENSION


def test_a_cut_number() -> None:
    """Bytes that are no whole number of values."""
    assert refusal(memoryview(packed(*[0.1] * 5).tobytes()[:-1])) is Reason.WRONG_DIMENSION


def test_norm() -> None:
    """The clip bounds the norm; a device's own rounding is forgiven, more is not."""
    assert validate.delta("fp32", packed(6.0, 8.0, 0.0, 0.0, 0.0), SIZES, 10.0).tolist() == [6.0, 8.0, 0.0, 0.0, 0.0]
    validate.delta("fp32", packed(10.005, 0.0, 0.0, 0.0, 0.0), SIZES, 10.0)
    assert refusal(packed(10.02, 0.0, 0.0, 0.0, 0.0)) is Reason.NORM
    assert refusal(packed(*[4.6] * 5)) is Reason.NORM


@pytest.mark.parametrize("value", [1e38, -1e38, 3e38])
def test_a_norm_that_overflows(value: float) -> None:
    """Finite numbers whose squares are not are too long all the same, and nothing warns."""
    assert refusal(packed(*[value] * 5)) is Reason.NORM


def test_tiny_numbers() -> None:
    """Numbers whose squares vanish are within any clip."""
    assert validate.delta("fp32", packed(*[1e-40] * 5), SIZES, 1e-6).shape == (5,)


@given(st.binary(max_size=32))
def test_any_bytes(data: bytes) -> None:
    """Any bytes are a finite delta within the clip, or refused."""
    try:
        found = validate.delta("fp32", memoryview(data), SIZES, 1.0)
    except RemoteProtocolError:
        return
    assert found.shape == (5,)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found.astype(np.float64)) <= 1.0 + 2e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.1e100, -1.1e100])
def test_metrics_that_cannot_be_pooled(value: float) -> None:
    """A metric that is no number, or so large that a fleet's mean would not be one."""
    with pytest.raises(RemoteProtocolError) as caught:
        validate.report(body(loss=value), "accuracy")
    assert caught.value.reason is Reason.METRICS


def test_metrics_of_no_example() -> None:
    """Metrics need a hold-out behind them; a device without one reports none."""
    with pytest.raises(RemoteProtocolError) as caught:
        validate.report(body(holdout=0, loss=1.0), "accuracy")
    assert caught.value.reason is Reason.METRICS
    validate.report(body(holdout=0), "accuracy")
    validate.report(body(loss=1.0, accuracy=0.5), "accuracy")


def test_metrics_of_no_task() -> None:
    """A device cannot add names of its own to a release's record."""
    with pytest.raises(RemoteProtocolError) as caught:
        validate.report(body(loss=1.0, rmse=0.5), "accuracy")
    assert caught.value.reason is Reason.METRICS


def test_pooled() -> None:
    """The mean over examples, of those who report a metric; what nobody reports is absent."""
    reports: list[tuple[Metrics, int]] = [({"loss": 1.0, "accuracy": 0.5}, 10), ({"loss": 4.0}, 30), ({}, 0)]
    assert validate.pooled(reports) == {"accuracy": 0.5, "loss": 3.25}
    assert validate.pooled([]) == {}
    assert validate.pooled([({}, 0), ({}, 5)]) == {}


@given(st.lists(st.tuples(st.floats(-1e100, 1e100), st.integers(1, 10**9)), min_size=1, max_size=20))
def test_pooled_stays_finite(pairs: list[tuple[float, int]]) -> None:
    """Whatever `report` lets pass can be pooled, and the mean lies between the least and the greatest."""
    values = [value for value, _ in pairs]
    mean = validate.pooled([({"loss": value}, count) for value, count in pairs])["loss"]
    slack = 1e-12 * max(abs(value) for value in values)
    assert min(values) - slack <= mean <= max(values) + slack
