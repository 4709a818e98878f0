"""Weights: the safetensors form, its refusals, and the flat vector."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as their_load
from safetensors.numpy import save as their_save

from shared.errors import Reason, RemoteProtocolError
from shared.layout import dimension
from shared.messages import TensorSpec
from shared.tensors import Array, flatten, load, save, unflatten

LAYOUT = [
    TensorSpec("w", "parameter", "float32", [2, 3]),
    TensorSpec("seen", "buffer", "int64", []),
    TensorSpec("half", "buffer", "float16", [2]),
    TensorSpec("mask", "buffer", "bool", [3]),
]


def weights() -> dict[str, Array]:
    """One set of tensors of LAYOUT."""
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "seen": np.array(2**40, dtype=np.int64),
        "half": np.array([1.5, -2], dtype=np.float16),
        "mask": np.array([True, False, True]),
    }


def file(header: object, body: bytes) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(code: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": code, "shape": shape, "data_offsets": offsets}


PAIR = [TensorSpec("a", "parameter", "float32", [2])]


def refused(data: bytes, layout: list[TensorSpec] = PAIR) -> Reason:
    """Why `load` refuses these bytes."""
    with pytest.raises(RemoteProtocolError) as caught:
        load(data, layout)
    return caught.value.reason


def test_what_is_saved_is_loaded() -> None:
    """load(save(x)) = x in every dtype, and the arrays are writable copies."""
    found = load(save(LAYOUT, weights()), LAYOUT)
    for name, array in weights().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    found["w"][0, 0] = 5


def test_the_form_is_that_of_the_safetensors_library() -> None:
    """Users read our files with safetensors, and theirs are ours to read."""
    read = their_load(save(LAYOUT, weights()))
    for name, array in weights().items():
        np.testing.assert_array_equal(read[name], array)
        np.testing.assert_array_equal(load(their_save(weights()), LAYOUT)[name], array)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read() -> None:
    """A length of 2^60, or one byte too many, allocates nothing."""
    assert refused(struct.pack("<Q", 2**60) + b"{}") == Reason.WEIGHTS_INVALID
    assert refused(struct.pack("<Q", 3) + b"{}") == Reason.WEIGHTS_INVALID
    assert refused(b"short") == Reason.WEIGHTS_INVALID


def test_a_header_is_no_longer_than_the_layout_needs() -> None:
    """A megabyte of spaces in front of eight bytes of weights is refused."""
    padded = json.dumps({"a": entry()}).encode() + b" " * 1_000_000
    assert refused(file(padded, bytes(8))) == Reason.WEIGHTS_INVALID


def test_a_repeated_name_is_refused() -> None:
    """Two readers could otherwise see two different tensors."""
    one = json.dumps(entry())
    assert refused(file(f'{{"a":{one},"a":{one}}}'.encode(), bytes(8))) == Reason.WEIGHTS_INVALID


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({}, Reason.GRAPH_LAYOUT),
        ({"b": entry()}, Reason.GRAPH_LAYOUT),
        ({"a": entry(), "b": entry(shape=[0], offsets=[8, 8])}, Reason.GRAPH_LAYOUT),
        ({"a": entry("F64")}, Reason.GRAPH_LAYOUT),
        ({"a": entry(shape=[1, 2])}, Reason.GRAPH_LAYOUT),
        ({"a": entry(shape=[True, 2])}, Reason.GRAPH_LAYOUT),
        ({"a": entry(offsets=[0, 2**62])}, Reason.WEIGHTS_INVALID),
        ({"a": entry(offsets=[-8, 0])}, Reason.WEIGHTS_INVALID),
        ({"a": entry(offsets=[0, 4])}, Reason.WEIGHTS_INVALID),
        ({"a": entry(offsets=[0.0, 8.0])}, Reason.WEIGHTS_INVALID),
        ({"a": entry() | {"more": 1}}, Reason.WEIGHTS_INVALID),
        ({"a": 5}, Reason.WEIGHTS_INVALID),
        ([], Reason.WEIGHTS_INVALID),
        (b"\xff\xfe", Reason.WEIGHTS_INVALID),
        (b"[" * 400, Reason.WEIGHTS_INVALID),
    ],
)
def test_a_header_that_is_not_the_layout_s_is_refused(header: object, reason: Reason) -> None:
    """Names, dtypes, shapes and places are exactly as the layout says."""
    assert refused(file(header, bytes(8))) == reason


@pytest.mark.parametrize("metadata", [None, 1e38, [], {"a": 1}, {"a": None}, "text"])
def test_metadata_are_text_or_no_safetensors(metadata: object) -> None:
    """What the safetensors library would not open is not taken either; its own notes do no harm."""
    tensor = {"a": entry()}
    assert refused(file(tensor | {"__metadata__": metadata}, bytes(8))) is Reason.WEIGHTS_INVALID
    assert load(file(tensor | {"__metadata__": {"format": "pt"}}, bytes(8)), PAIR).keys() == {"a"}


def test_bytes_left_over_and_overlaps_are_refused() -> None:
    """Every byte of the body belongs to exactly one tensor."""
    two = [*PAIR, TensorSpec("b", "buffer", "float32", [2])]
    assert refused(file({"a": entry()}, bytes(12))) == Reason.WEIGHTS_INVALID
    assert refused(file({"a": entry(), "b": entry()}, bytes(8)), two) == Reason.WEIGHTS_INVALID
    assert refused(file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), two) == Reason.WEIGHTS_INVALID


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    """A NaN spreads to every device that averages it."""
    assert refused(file({"a": entry()}, np.array([1, bad], "<f4").tobytes())) == Reason.NOT_FINITE
    broken = weights() | {"half": np.array([bad, 0], np.float16)}
    with pytest.raises(RemoteProtocolError) as caught:
        save(LAYOUT, broken)
    assert caught.value.reason == Reason.NOT_FINITE


def test_a_truth_value_is_0_or_1() -> None:
    """Any other byte would be a bool that is neither True nor False."""
    layout = [TensorSpec("m", "buffer", "bool", [2])]
    assert refused(file({"m": entry("BOOL", offsets=[0, 2])}, b"\x00\x02"), layout) == Reason.WEIGHTS_INVALID


def test_the_flat_vector_holds_floating_tensors_in_layout_order() -> None:
    """flatten and unflatten are inverse; whole numbers come from the base unchanged."""
    flat = flatten(LAYOUT, weights())
    assert flat.dtype == np.float32
    assert flat.shape == (dimension(LAYOUT),) == (8,)
    np.testing.assert_array_equal(flat, np.append(np.arange(6, dtype=np.float32) / 7, np.array([1.5, -2], np.float32)))
    back = unflatten(LAYOUT, flat, weights())
    for name, array in weights().items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_a_vector_of_another_dimension_or_beyond_float16_is_refused() -> None:
    """Neither a short vector nor an overflow becomes weights."""
    with pytest.raises(RemoteProtocolError) as caught:
        unflatten(LAYOUT, np.zeros(7, np.float32), weights())
    assert caught.value.reason == Reason.WRONG_DIMENSION
    with pytest.raises(RemoteProtocolError) as caught:
        unflatten(LAYOUT, np.full(8, 1e5, np.float32), weights())
    assert caught.value.reason == Reason.NOT_FINITE


def test_tensors_other_than_the_layout_s_are_not_saved_or_flattened() -> None:
    """A missing, extra or reshaped tensor is an error, not a guess."""
    for wrong in (
        {},
        weights() | {"x": np.zeros(1)},
        weights() | {"w": np.zeros((3, 2), np.float32)},
        weights() | {"w": np.zeros((2, 3), np.float64)},
    ):
        with pytest.raises(RemoteProtocolError):
            flatten(LAYOUT, wrong)
        with pytest.raises(RemoteProtocolError):
            save(LAYOUT, wrong)


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes_load_or_are_refused(junk: bytes, at: int, value: int) -> None:
    """Junk, and real files with any byte changed, give tensors or a RemoteProtocolError and nothing else."""
    changed = bytearray(save(LAYOUT, weights()))
    changed[at % len(changed)] = value
    for data in (junk, bytes(changed), struct.pack("<Q", len(junk)) + junk):
        try:
            load(data, LAYOUT)
        except RemoteProtocolError:
            continue
        assert data == bytes(changed)
