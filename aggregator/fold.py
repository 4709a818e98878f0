"""The running sum of a round: one accumulator however many devices. numpy; pure.

The sum is float32 and depends on the order of `add`, which is the order of the contribution rows: a fold rebuilt from
the rows is the same bit for bit.
"""

import numpy as np
import numpy.typing as npt

from shared.errors import LocalProtocolError

Vector = npt.NDArray[np.float32]

_BLOCK = 65_536
"""Elements at a time: product and sum stay in the cache (measured 10.6 GB/s, whole vectors 6.6)."""


class Fold:
    """A weighted sum of deltas, float32[dimension], and the heads it holds."""

    def __init__(self, dimension: int) -> None:
        self._sum = np.zeros(dimension, np.float32)
        self._product = np.empty(min(dimension, _BLOCK), np.float32)
        self.weight = 0.0
        self.heads: list[bytes] = []

    def add(self, head: bytes, delta: Vector, weight: float) -> None:
        """Accumulate weight * delta, float32[dimension]; `delta` is read, not kept."""
        if delta.shape != self._sum.shape:
            raise LocalProtocolError(f"a delta of {delta.shape} for a fold of {self._sum.shape}")
        factor = np.float32(weight)
        for start in range(0, len(delta), _BLOCK):
            piece = delta[start : start + _BLOCK]
            product = self._product[: len(piece)]
            np.multiply(piece, factor, out=product)
            self._sum[start : start + _BLOCK] += product
        self.weight += weight
        self.heads.append(head)

    def mean(self) -> Vector:
        """The weighted mean, a new float32[dimension]."""
        if not self.heads or self.weight <= 0.0:
            raise LocalProtocolError("the mean of no update")
        return self._sum / np.float32(self.weight)
