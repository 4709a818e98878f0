"""Whether an opened update may be added: dimension, finite numbers, norm within the clip, sane metrics. Pure."""

import math
from collections.abc import Sequence

import numpy as np

from aggregator.fold import Vector
from shared import codec
from shared.codec import Codec
from shared.errors import Reason, RemoteProtocolError
from shared.messages import Metrics, PlainBody

_SLACK = 1e-3
"""A device clips in its own arithmetic; this much above the bound is rounding, more is not."""

_METRIC_MAX = 1e100
"""Far above what a model that still learns reports, and far below what overflows when a fleet's metrics are pooled."""


def delta(name: Codec, data: memoryview, sizes: Sequence[int], clip: float) -> Vector:
    """The decoded delta, float32[sum(sizes)], L2 norm at most `clip`; RemoteProtocolError says what is wrong."""
    found = codec.decode(name, data, sizes)
    with np.errstate(over="ignore", under="ignore"):
        norm = math.sqrt(float(np.dot(found, found)))
    if not norm <= clip * (1 + _SLACK):
        raise RemoteProtocolError(Reason.NORM, f"norm {norm:.6g}, the round's clip is {clip:.6g}")
    return found


def report(body: PlainBody, metric: str) -> None:
    """Refuse metrics that the task does not have, that cannot be pooled or that no example stands behind.

    Other names would pile up in the release's record, which has a limit, until no device could read it.
    """
    for name, value in body.metrics.items():
        if name not in ("loss", metric):
            raise RemoteProtocolError(Reason.METRICS, f"{name:.64} is none of this task")
        if not abs(value) <= _METRIC_MAX:
            raise RemoteProtocolError(Reason.METRICS, f"{name} is {value}")
    if body.metrics and body.holdout == 0:
        raise RemoteProtocolError(Reason.METRICS, "metrics of no example")


def pooled(reports: Sequence[tuple[Metrics, int]]) -> Metrics:
    """The mean of each metric over the examples behind it; a metric that nobody reports is absent."""
    sums: dict[str, tuple[float, int]] = {}
    for metrics, count in reports:
        for name, value in metrics.items():
            total, examples = sums.get(name, (0.0, 0))
            sums[name] = (total + value * count, examples + count)
    return {name: total / examples for name, (total, examples) in sorted(sums.items()) if examples}
