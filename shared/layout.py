"""Arithmetic on a task's tensor layout: which tensors make the flat vector and how large things are.

Pure and without numpy, because the resident agent needs the dimension too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from shared.messages import TensorSpec

ITEM_BYTES: Final[Mapping[str, int]] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by dtype: every dtype that travels as data."""

FLOATING: Final = frozenset({"float32", "float64", "float16"})
"""The dtypes whose tensors are in the flat vector; others are carried from release to release unchanged."""

HEADER_ENTRY: Final = 512
"""Bytes of a safetensors header allowed for one tensor, beyond its name."""


def size(spec: TensorSpec) -> int:
    """Elements of one tensor."""
    return math.prod(spec.shape)


def size_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor."""
    return size(spec) * ITEM_BYTES[spec.dtype]


def weights_max(layout: Sequence[TensorSpec]) -> int:
    """Bytes that the weights of this layout take at the most, as safetensors with a header of reasonable length."""
    header = HEADER_ENTRY + sum(HEADER_ENTRY + 6 * len(spec.name) for spec in layout)
    return 8 + header + sum(size_bytes(spec) for spec in layout)


def dimension(layout: Sequence[TensorSpec]) -> int:
    """Length d of the flat vector: the elements of all floating tensors, parameters and buffers alike."""
    return sum(size(spec) for spec in layout if spec.dtype in FLOATING)
