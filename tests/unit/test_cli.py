"""shared.cli: exit codes, one-line errors, and what is printed for people and scripts."""

import json
import re
from pathlib import Path

import pytest

from shared import cli
from shared.cli import Exit, Failure
from shared.errors import ConfigError, ExportError, LinkError, LocalProtocolError, Reason, RemoteProtocolError

DOCUMENTED = Path(__file__).parents[2] / "docs" / "cli.md"


def _raising(error: BaseException) -> int:
    def command() -> int:
        raise error

    return cli.guarded("program", command)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a.toml", "b.c", "must be 1"), Exit.CONFIG),
        (RemoteProtocolError(Reason.EXPIRED, "long ago"), Exit.REFUSED),
        (LinkError("nobody listens"), Exit.UNREACHABLE),
        (ExportError("too large"), Exit.FAILED),
        (LocalProtocolError("a bug"), Exit.FAILED),
        (Failure(Exit.TIMED_OUT, "nobody came"), Exit.TIMED_OUT),
        (FileNotFoundError(2, "No such file or directory", "x.msgpack"), Exit.FAILED),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (EOFError(), Exit.INTERRUPTED),
    ],
)
def test_every_error_is_one_line_and_a_code(
    error: BaseException, code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a user can meet ends in its documented code and one line on standard error."""
    assert _raising(error) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("program: ") and err.count("\n") == 1


def test_a_line_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks inside an error do not break the one line."""
    _raising(ExportError("first\nsecond"))
    assert capsys.readouterr().err == "program: first second\n"


def test_a_terminal_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    """What a peer named with control characters is shown without them, in results and in errors."""
    cli.show({"a\x1b": "b\x1b[2Jc\x07", "d": ["e\x9bf"]}, False)
    _raising(ExportError("g\x1b[1A"))
    out, err = capsys.readouterr()
    assert all(letter.isprintable() for letter in (out + err).replace("\n", ""))
    assert "\\x1b[2J" in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1970-01-01T00:00:00+00:00"), (2**63 - 1, "9223372036854775807 s after 1970")]
)
def test_every_time_can_be_told(seconds: int, text: str) -> None:
    """A time that no calendar holds is no reason to fail."""
    assert cli.moment(seconds) == text


def test_a_good_command_returns_its_code() -> None:
    """Nothing is added to what a command returns."""
    assert cli.guarded("program", lambda: Exit.OK) == 0
    assert cli.guarded("program", lambda: Exit.TIMED_OUT) == 4


def test_exit_codes_are_documented() -> None:
    """docs/cli.md lists every exit code, and only those, with the program's own words."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|$", DOCUMENTED.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): text for code, text in rows} == {code.value: text for code, text in cli.MEANING.items()}
    assert set(cli.MEANING) == set(Exit)


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json a result is one JSON object; bytes are hex digits."""
    cli.show({"a": 1, "b": {"c": b"\x01\xff", "d": [1.5, None]}}, True)
    assert json.loads(capsys.readouterr().out) == {"a": 1, "b": {"c": "01ff", "d": [1.5, None]}}


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a result is aligned lines, nested ones indented."""
    deep = {"one": b"\x01", "two": ["a", "b"], "three": [{"c": 1, "d": None}], "four": {}}
    cli.show({"name": "x", "on": True, "none": None, "deep": deep}, False)
    assert capsys.readouterr().out.splitlines() == [
        "name  x",
        "on    yes",
        "none  -",
        "deep",
        "  one    01",
        "  two    a, b",
        "  three  c 1, d -",
        "  four   -",
    ]


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns of a table start below one another."""
    cli.table(("task", "round"), [("a", 10), ("longer", 2)])
    assert capsys.readouterr().out.splitlines() == ["task    round", "a       10", "longer  2"]


def test_a_file_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """A file that exists is kept without force; no temporary file is left, not even after a failure."""
    target = tmp_path / "file"
    cli.save(target, b"one", force=False)
    with pytest.raises(Failure, match="--force"):
        cli.save(target, b"two", force=False)
    assert target.read_bytes() == b"one"
    cli.save(target, b"two", force=True)
    assert target.read_bytes() == b"two"
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        cli.save(folder, b"three", force=True)
    with pytest.raises(Failure, match="no folder"):
        cli.save(tmp_path / "none" / "file", b"", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """A limit on a file's size holds before its bytes are used."""
    file = tmp_path / "file"
    file.write_bytes(bytes(11))
    assert cli.load(file, 11) == bytes(11)
    with pytest.raises(Failure, match="more than 10 bytes"):
        cli.load(file, 10)
