"""edge_agent.data: a device's examples are read as the contract asks, or refused with file and row."""

import io
import zipfile
from hashlib import sha256
from pathlib import Path
from struct import pack
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import data
from edge_agent.data import Examples
from edge_agent.jobs import Source
from shared.errors import TrainingError
from shared.messages import DataContract, TensorContract

X = TensorContract("x", "float32", [2, 3])
Y = TensorContract("y", "int64", [], classes=4)
CONTRACT = DataContract("digits", [X], Y)


def arrays(count: int = 5) -> dict[str, np.ndarray]:
    """Sound data for CONTRACT."""
    x = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
    return {"x": x, "y": np.arange(count, dtype=np.int64) % 4}


def npz(path: Path, **given: Any) -> Source:
    """A source of one .npz file with these arrays."""
    np.savez(path, **given)
    return Source("npz", str(path))


def csv(path: Path, *lines: str) -> Source:
    """A source of one .csv file with these lines after its header."""
    path.write_text("\n".join(["a,b,c,d,e,f,label", *lines]) + "\n")
    return Source("csv", str(path))


def refused(source: Source, contract: DataContract = CONTRACT) -> str:
    """The text of the refusal."""
    with pytest.raises(TrainingError) as caught:
        data.load(source, contract)
    assert caught.value.reason == "data"
    return caught.value.detail


# -- .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: object) -> None:
    """Arrays come back as they were saved, compressed or not; arrays the contract does not name are ignored."""
    save(tmp_path / "d.npz", **arrays(), extra=np.zeros(3))  # type: ignore[operator]
    x, y = data.load(Source("npz", str(tmp_path / "d.npz")), CONTRACT).arrays
    assert (x == arrays()["x"]).all() and x.dtype == np.float32
    assert (y == arrays()["y"]).all() and y.dtype == np.int64


def test_npz_column_order(tmp_path: Path) -> None:
    """An array saved in column order has the same values."""
    given = arrays()
    (x, _) = data.load(npz(tmp_path / "d.npz", x=np.asfortranarray(given["x"]), y=given["y"]), CONTRACT).arrays
    assert (x == given["x"]).all() and x.flags.c_contiguous


def test_folder_in_order_of_names(tmp_path: Path) -> None:
    """A folder's files are read in the order of their names; hidden files and other kinds are left alone."""
    npz(tmp_path / "b.npz", **arrays(3))
    npz(tmp_path / "a.npz", **arrays(2))
    (tmp_path / ".c.npz").write_bytes(b"half written")
    (tmp_path / "readme.txt").write_text("hello")
    loaded = data.load(Source("npz", str(tmp_path)), CONTRACT)
    assert loaded.arrays[1].tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": np.zeros((5, 2, 3))}, "x is float64, the task asks for float32"),
        ({"x": np.zeros((5, 3, 2), np.float32)}, "x has the shape [5, 3, 2], the task asks for ['n', 2, 3]"),
        ({"x": np.zeros((2, 3), np.float32)}, "x has the shape"),
        ({"x": np.zeros((), np.float32)}, "x has the shape []"),
        ({"x": arrays(4)["x"]}, "y has 5 rows, x has 4"),
        ({"y": np.array([0, 1, 2, 4, 1])}, "y[3]: not a whole number from 0 to 3"),
        ({"y": np.array([0, 1, -1, 4, 1])}, "y[2]: not a whole number"),
        ({"y": np.zeros((5, 1), np.int64)}, "y has the shape"),
        ({"x": np.array([{}] * 5)}, "x is object"),
        ({"x": arrays()["x"].astype(">f4")}, "x is"),
    ],
)
def test_npz_refused(tmp_path: Path, changed: dict[str, np.ndarray], said: str) -> None:
    """Wrong dtype, shape, count, label, byte order or pickled objects are refused, naming file, array and row."""
    detail = refused(npz(tmp_path / "d.npz", **(arrays() | changed)))
    assert said in detail and "d.npz" in detail


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_npz_not_finite(tmp_path: Path, value: float) -> None:
    """A NaN or an infinity is refused with its row."""
    given = arrays()
    given["x"][3, 1, 2] = value
    assert "x[3]: not finite" in refused(npz(tmp_path / "d.npz", **given))


def test_npz_without_an_array(tmp_path: Path) -> None:
    """An array the contract asks for must be there."""
    assert "no array 'y'" in refused(npz(tmp_path / "d.npz", x=arrays()["x"]))


def archive(path: Path, member: bytes, name: str = "x.npy", method: int = zipfile.ZIP_STORED) -> Source:
    """An .npz file whose array x is these bytes."""
    with zipfile.ZipFile(path, "w", method) as writer:
        writer.writestr(name, member)
        buffer = io.BytesIO()
        np.save(buffer, arrays()["y"])
        writer.writestr("y.npy", buffer.getvalue())
    return Source("npz", str(path))


def npy(header: str, body: bytes = b"") -> bytes:
    """Bytes of an .npy file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    "member",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2, 3)}", bytes(24)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 2, 3)}", bytes(24)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 2, 3)}", bytes(121)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 3)}", bytes(24)),
        npy("{'descr': '<f4', 'fortran_order': False}"),
        npy("__import__('os').system('true')"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (5, 2, 3)}", b"cos\nsystem\n(S'true'\ntR."),
        b"\x93NUMPY\x09\x00" + bytes(40),
        b"\x93NUMPY\x01\x00\xff\xff",
        b"",
        b"junk",
    ],
)
def test_npz_that_lies(tmp_path: Path, member: bytes) -> None:
    """Headers that lie, are cut short or hold code are refused before anything of their size exists."""
    assert "d.npz" in refused(archive(tmp_path / "d.npz", member))


def test_npz_that_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unpacks to more than the limit is refused by what it claims."""
    monkeypatch.setattr(data, "BYTES_MAX", 1 << 20)
    bomb = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 2, 3)}", bytes(2_400_000))
    source = archive(tmp_path / "d.npz", bomb, method=zipfile.ZIP_DEFLATED)
    assert Path(source.path).stat().st_size < 1 << 14
    assert "claims 2400000 bytes" in refused(source)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2_000), st.integers(0, 255))
def test_npz_damaged(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    """A file with any byte changed loads as it was or is refused; nothing else escapes."""
    path = tmp_path_factory.mktemp("damaged") / "d.npz"
    source = npz(path, **arrays())
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        loaded = data.load(source, CONTRACT)
    except TrainingError as error:
        assert error.reason == "data"
    else:
        assert (loaded.arrays[0] == arrays()["x"]).all()


# -- .csv


def test_csv(tmp_path: Path) -> None:
    """Columns are the inputs in flattened order, then the target; empty lines and a byte order mark do not matter."""
    source = csv(tmp_path / "d.csv", "0,1,2,3,4,5,3", "", '6,7,8,9,10,"11",0')
    path = tmp_path / "d.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    x, y = data.load(source, CONTRACT).arrays
    assert x.dtype == np.float32 and x.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert y.dtype == np.int64 and y.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,2,3,4,5,6", "line 3: 6 columns, the task asks for 7"),
        ("1,2,3,4,5,6,1,1", "line 3: 8 columns"),
        ("1,2,secret,4,5,6,1", "line 3: a field is not a number"),
        ("1,2,,4,5,6,1", "line 3: a field is not a number"),
        ("1,2,nan,4,5,6,1", "line 3: x: not finite"),
        ("1,2,1e39,4,5,6,1", "line 3: x: not finite"),
        ("1,2,3,4,5,6,4", "line 3: y: not a whole number from 0 to 3"),
        ("1,2,3,4,5,6,1.5", "line 3: y: no int64"),
        ("1,2,3,4,5,6,nan", "line 3: y: no int64"),
        ("1,2,3,4,5,6,1e300", "line 3: y: no int64"),
        ('1,2,3,4,5,6,"1', "near line 3:"),
    ],
)
def test_csv_refused(tmp_path: Path, line: str, said: str) -> None:
    """What breaks the contract is refused with file and line, and without the value."""
    detail = refused(csv(tmp_path / "d.csv", "0,1,2,3,4,5,3", line))
    assert said in detail and "d.csv" in detail and "secret" not in detail.split(": ", 1)[1]


def test_csv_without_header(tmp_path: Path) -> None:
    """A first line of numbers is data that would be lost: refused."""
    (tmp_path / "d.csv").write_text("0,1,2,3,4,5,3\n")
    assert "header" in refused(Source("csv", str(tmp_path / "d.csv")))
    (tmp_path / "d.csv").write_text("")
    assert "header" in refused(Source("csv", str(tmp_path / "d.csv")))


@pytest.mark.parametrize(
    "content", [b"a,b\n\xff\xfe\x00", b"PK\x03\x04" + bytes(range(256)), b"a" * 200_000 + b"\n1\n"]
)
def test_csv_that_is_none(tmp_path: Path, content: bytes) -> None:
    """Binary files and endless fields are refused, not a traceback."""
    (tmp_path / "d.csv").write_bytes(content)
    assert "d.csv" in refused(Source("csv", str(tmp_path / "d.csv")))


def test_csv_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file above the limit is refused by its size."""
    monkeypatch.setattr(data, "BYTES_MAX", 10)
    assert "larger" in refused(csv(tmp_path / "d.csv", "0,1,2,3,4,5,3"))


# -- both


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_no_source(tmp_path: Path, kind: str) -> None:
    """A path that is not there, and a folder without data, are named."""
    assert "nowhere" in refused(msgspec.convert({"kind": kind, "path": str(tmp_path / "nowhere")}, Source))
    assert f"no .{kind} file" in refused(msgspec.convert({"kind": kind, "path": str(tmp_path)}, Source))


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_no_example_at_all(tmp_path: Path, kind: str) -> None:
    """A file with nothing but its form is too few examples, and nothing to predict from."""
    source = npz(tmp_path / "a.npz", **arrays(0)) if kind == "npz" else csv(tmp_path / "a.csv")
    assert refused(source).endswith("0 examples, the task asks for 1")
    with pytest.raises(TrainingError, match="holds no example"):
        data.inputs(Path(source.path), kind, CONTRACT)


def test_fewest_examples(tmp_path: Path) -> None:
    """Fewer examples than the contract asks for are refused with both numbers."""
    contract = msgspec.structs.replace(CONTRACT, min_examples=6)
    assert "5 examples, the task asks for 6" in refused(npz(tmp_path / "d.npz", **arrays()), contract)
    npz(tmp_path / "e.npz", **arrays(1))
    assert len(data.load(Source("npz", str(tmp_path)), contract)) == 6


def test_truth_values(tmp_path: Path) -> None:
    """A truth value other than 0 and 1 is refused: such bytes are true and not equal to true."""
    contract = DataContract("d", [TensorContract("x", "bool", [])], TensorContract("y", "float32", []))
    strange = np.array([0, 1, 2], np.uint8).view(np.bool_)
    assert "x[2]: neither" in refused(npz(tmp_path / "d.npz", x=strange, y=np.zeros(3, np.float32)), contract)


# -- the hold-out


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.floats(0, 0.9))
def test_holdout_depends_on_the_example_alone(values: list[int], share: float) -> None:
    """Equal examples fall on the same side, in any order and company; both sides together are all of them."""
    x = np.array(values, np.float32)
    y = np.array(values, np.int64)
    fit, held = Examples((x, y)).split(share)
    assert not set(fit.arrays[0].tolist()) & set(held.arrays[0].tolist())
    assert sorted([*fit.arrays[1].tolist(), *held.arrays[1].tolist()]) == sorted(values)
    alone = [bool(data.held_out((x[i : i + 1], y[i : i + 1]), share)[0]) for i in range(len(x))]
    assert data.held_out((x, y), share).tolist() == alone


def test_holdout_share() -> None:
    """About the asked share is held out; none for 0; a larger share keeps what a smaller one holds out."""
    x = np.random.default_rng(1).normal(size=(5000, 3)).astype(np.float32)
    held = data.held_out((x,), 0.2)
    assert 900 < held.sum() < 1100
    assert not data.held_out((x,), 0.0).any()
    assert data.held_out((x,), 0.5)[held].all()


def test_holdout_is_fixed() -> None:
    """The rule never changes between versions: a device would train on what it has been judged by."""
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    y = np.arange(20, dtype=np.int64)
    digests = [sha256(b"fieldfare/v1/holdout\0" + pack("<ffq", *x[i], y[i])).digest() for i in range(20)]
    expected = [int.from_bytes(digest[:4], "big") < 0.3 * 2**32 for digest in digests]
    assert data.held_out((x, y), 0.3).tolist() == expected
    assert any(expected) and not all(expected)
