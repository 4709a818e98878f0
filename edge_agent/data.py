"""Reads a device's examples and holds them against the task's contract. numpy, no torch.

Sizes are checked before anything is allocated, nothing is unpickled, and every refusal names file and row but never a
value: the text of an error leaves this process.
"""

import csv
import hashlib
import math
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from edge_agent.jobs import Source
from shared.errors import TrainingError
from shared.messages import DataContract, TensorContract

Array = npt.NDArray[np.generic]

BYTES_MAX = 4 << 30
"""Of a data set in memory, and of one .csv file on disk."""

_HOLDOUT = b"fieldfare/v1/holdout\0"
_HEADER_MAX = 10_000
_WHOLE_MAX = 2.0**53


@dataclass(frozen=True, slots=True)
class Examples:
    """A data set: the inputs in the contract's order, then the target; the first dimension counts examples."""

    arrays: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def split(self, holdout: float) -> tuple["Examples", "Examples"]:
        """(to train on, held out): an example always falls on the same side, wherever and however often it occurs."""
        held = held_out(self.arrays, holdout)
        return Examples(tuple(a[~held] for a in self.arrays)), Examples(tuple(a[held] for a in self.arrays))


def held_out(arrays: Sequence[Array], holdout: float) -> npt.NDArray[np.bool_]:
    """bool[n]: which examples are held out, iff the first four bytes of sha256(domain + its bytes) are below `holdout`.

    An example's bytes are those of its row of every array, in the order given, little-endian.
    """
    rows = [np.ascontiguousarray(a, a.dtype.newbyteorder("<")).reshape(len(a), -1).view(np.uint8) for a in arrays]
    bound = int(holdout * 2**32)
    held = np.zeros(len(arrays[0]), np.bool_)
    for index, parts in enumerate(zip(*rows, strict=True)):
        digest = hashlib.sha256(_HOLDOUT)
        for part in parts:
            digest.update(part)
        held[index] = int.from_bytes(digest.digest()[:4], "big") < bound
    return held


def files(source: Source) -> list[Path]:
    """The file of a source, or its folder's files of that kind by name; TrainingError("data") if there is none."""
    path = Path(source.path)
    try:
        found = sorted(p for p in path.iterdir() if _is_data(p, source.kind)) if path.is_dir() else [path]
    except OSError as error:
        raise _bad(path, error.strerror or "cannot be read") from None
    if not found:
        raise _bad(path, f"the folder has no .{source.kind} file")
    return found


def load(source: Source, contract: DataContract) -> Examples:
    """All examples of a source; TrainingError("data") naming file and row where they break the contract."""
    parts: list[tuple[Array, ...]] = []
    size = 0
    for path in files(source):
        try:
            wanted = [*contract.inputs, contract.target]
            arrays = _npz(path, wanted, BYTES_MAX - size) if source.kind == "npz" else _csv(path, wanted)
        except OSError as error:
            raise _bad(path, error.strerror or "cannot be read") from None
        parts.append(arrays)
        size += sum(a.nbytes for a in arrays)
        if size > BYTES_MAX:
            raise _bad(path, f"the data set exceeds {BYTES_MAX} bytes with this file")
    joined = parts[0] if len(parts) == 1 else tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    if len(joined[0]) < contract.min_examples:
        raise _bad(Path(source.path), f"{len(joined[0])} examples, the task asks for {contract.min_examples}")
    return Examples(joined)


def inputs(path: Path, kind: str, contract: DataContract) -> list[Array]:
    """The inputs alone of one file, to predict from: as `load`, but a target need not be there and is not looked at.

    A .csv file has the inputs' columns, and may have the target's after them.
    """
    try:
        if kind == "npz":
            arrays = _npz(path, contract.inputs, BYTES_MAX)
        else:
            arrays = _csv(path, contract.inputs, math.prod(contract.target.shape))
    except OSError as error:
        raise _bad(path, error.strerror or "cannot be read") from None
    if not len(arrays[0]):
        raise _bad(path, "holds no example")
    return list(arrays)


# -- .npz --------------------------------------------------------------------------------------------------------


def _npz(path: Path, wanted: Sequence[TensorContract], budget: int) -> tuple[Array, ...]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            arrays = []
            for tensor in wanted:
                info = members.get(f"{tensor.name}.npy")
                if info is None:
                    raise _bad(path, f"has no array {tensor.name!r}")
                with archive.open(info) as member:
                    arrays.append(_npy(path, member, tensor, min(info.file_size, budget)))
                budget -= arrays[-1].nbytes
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # RuntimeError: a member is encrypted; ValueError: numpy's word for a header that is none.
        raise _bad(path, f"not a sound .npz file ({type(error).__name__})") from None
    count = len(arrays[0])
    for tensor, values in zip(wanted, arrays, strict=True):
        if len(values) != count:
            raise _bad(path, f"{tensor.name} has {len(values)} rows, {wanted[0].name} has {count}")
        if broken := _broken(tensor, values):
            row, what = broken
            raise _bad(path, f"{tensor.name}[{row}]: {what}")
    return tuple(arrays)


def _npy(path: Path, member: IO[bytes], tensor: TensorContract, budget: int) -> Array:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member, _HEADER_MAX)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(member, _HEADER_MAX)
    else:
        raise _bad(path, f"{tensor.name} is of .npy version {version}")
    if dtype != np.dtype(tensor.dtype).newbyteorder("<"):
        raise _bad(path, f"{tensor.name} is {dtype.name}, the task asks for {tensor.dtype}")
    if list(shape[1:]) != tensor.shape or not shape:
        raise _bad(path, f"{tensor.name} has the shape {list(shape)}, the task asks for {['n', *tensor.shape]}")
    count = math.prod(shape)
    if count * dtype.itemsize > budget:
        raise _bad(path, f"{tensor.name} claims {count * dtype.itemsize} bytes, more than it has or may have")
    flat = np.empty(count, dtype)
    view = flat.view(np.uint8).data
    filled = 0
    while filled < len(view):
        piece = member.read(min(len(view) - filled, 1 << 20))
        if not piece:
            raise _bad(path, f"{tensor.name} ends after {filled} of {len(view)} bytes")
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    if member.read(1):
        raise _bad(path, f"{tensor.name} has more bytes than its shape needs")
    return np.ascontiguousarray(flat.reshape(shape[::-1]).T) if fortran else flat.reshape(shape)


# -- .csv --------------------------------------------------------------------------------------------------------


def _csv(path: Path, tensors: Sequence[TensorContract], more: int = 0) -> tuple[Array, ...]:
    """The columns of `tensors`; after them every line may have `more`, which are passed over."""
    if path.stat().st_size > BYTES_MAX:
        raise _bad(path, f"larger than {BYTES_MAX} bytes")
    widths = [math.prod(tensor.shape) for tensor in tensors]
    width = sum(widths)
    values, lines = array("d"), array("Q")
    for line, fields in _lines(path):
        if len(fields) not in (width, width + more):
            raise _bad(path, f"line {line}: {len(fields)} columns, the task asks for {width}")
        try:
            values.extend(map(float, fields[:width]))
        except ValueError:
            raise _bad(path, f"line {line}: a field is not a number") from None
        lines.append(line)
    table = np.frombuffer(values, np.float64) if values else np.empty(0)
    table = table.reshape(len(lines), width)
    arrays: list[Array] = []
    start = 0
    for tensor, span in zip(tensors, widths, strict=True):
        block = table[:, start : start + span].reshape(len(table), *tensor.shape)
        start += span
        broken = _unfit(tensor, block)
        if broken is None:
            # A float32 column may overflow to infinity here: that is found just below.
            with np.errstate(over="ignore"):
                arrays.append(np.ascontiguousarray(block, np.dtype(tensor.dtype)))
            broken = _broken(tensor, arrays[-1])
        if broken is not None:
            row, what = broken
            raise _bad(path, f"line {lines[row]}: {tensor.name}: {what}")
    return tuple(arrays)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number counted from 1, fields) of every line after the header that is not empty."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, None)
            if header is None or all(map(_is_number, header)):
                raise _bad(path, "line 1: a header row with the columns' names belongs here")
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise _bad(path, f"near line {reader.line_num}: not text in CSV form ({type(error).__name__})") from None


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _unfit(tensor: TensorContract, block: npt.NDArray[np.float64]) -> tuple[int, str] | None:
    """The first row of a text column that its dtype cannot hold exactly, and why; floats are rounded, not refused."""
    dtype = np.dtype(tensor.dtype)
    if dtype.kind == "f":
        return None
    low, high = (0.0, 1.0) if dtype.kind == "b" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
    low, high = max(low, -_WHOLE_MAX), min(high, _WHOLE_MAX)
    return _first(~((block >= low) & (block <= high) & (block == np.floor(block))), f"no {tensor.dtype}")


# -- both --------------------------------------------------------------------------------------------------------


def _broken(tensor: TensorContract, values: Array) -> tuple[int, str] | None:
    """The first row that breaks the contract, and how."""
    if values.dtype.kind == "f" and (found := _first(~np.isfinite(values), "not finite")):
        return found
    if values.dtype.kind == "b" and (found := _first(values.view(np.uint8) > 1, "neither true nor false")):
        return found
    if not tensor.classes:
        return None
    numbers = values.astype(np.float64)
    outside = (numbers < 0) | (numbers >= tensor.classes) | (numbers != np.floor(numbers))
    return _first(outside, f"not a whole number from 0 to {tensor.classes - 1}")


def _first(bad: npt.NDArray[np.bool_], what: str) -> tuple[int, str] | None:
    rows = bad.any(axis=tuple(range(1, bad.ndim)))
    return (int(rows.argmax()), what) if rows.any() else None


def _is_data(path: Path, kind: str) -> bool:
    return path.suffix == f".{kind}" and not path.name.startswith(".") and path.is_file()


def _bad(path: Path, what: str) -> TrainingError:
    return TrainingError("data", f"{path}: {what}")
