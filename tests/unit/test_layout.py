"""Arithmetic on the layout."""

import pytest

from shared.layout import FLOATING, ITEM_BYTES, dimension, size, size_bytes
from shared.messages import TensorSpec


@pytest.mark.parametrize(
    ("dtype", "shape", "elements", "length"),
    [("float32", [2, 3], 6, 24), ("float16", [5], 5, 10), ("int64", [], 1, 8), ("bool", [3, 0], 0, 0)],
)
def test_sizes_of_one_tensor(dtype: str, shape: list[int], elements: int, length: int) -> None:
    """Elements are the product of the shape, one for a scalar; bytes follow the dtype."""
    spec = TensorSpec("t", "buffer", dtype, shape)  # type: ignore[arg-type]
    assert (size(spec), size_bytes(spec)) == (elements, length)


def test_the_dimension_counts_floating_tensors_only() -> None:
    """Counters and masks are not learnt, so they are not in the flat vector."""
    layout = [
        TensorSpec("w", "parameter", "float32", [2, 3]),
        TensorSpec("n", "buffer", "int64", []),
        TensorSpec("h", "buffer", "float16", [4]),
        TensorSpec("m", "buffer", "bool", [9]),
    ]
    assert dimension(layout) == 10
    assert set(ITEM_BYTES) >= FLOATING
