"""What both command lines share: exit codes, one-line errors, output for people and for scripts.

It never reads a setting, never opens a connection and never decides what a command does.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

from shared.errors import ConfigError, EnrolmentError, FieldfareError, LinkError, RemoteProtocolError
from shared.version import VERSION

_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class Exit(IntEnum):
    """The exit codes of both commands; documented in docs/cli.md and never renumbered."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    TIMED_OUT = 4
    UNREACHABLE = 5
    CONFIG = 78
    INTERRUPTED = 130


MEANING: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILED: "failed; the line on standard error says why",
    Exit.USAGE: "wrong options or arguments",
    Exit.REFUSED: "refused: a record does not verify, or the other side said no",
    Exit.TIMED_OUT: "done on this side, or may still be done, but nobody answered in time",
    Exit.UNREACHABLE: "the broker or the daemon cannot be reached",
    Exit.CONFIG: "a configuration or task file is wrong, or the fleet's folder; the line names file, key and remedy",
    Exit.INTERRUPTED: "interrupted from the keyboard",
}


Command = Callable[[argparse.Namespace], int]
"""Does what the options say and returns the exit code."""


class Failure(FieldfareError):
    """A command ends early with `code`; the text is its one line."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code


def epilog(*examples: str) -> str:
    """The end of a --help page: examples and the exit codes."""
    shown = "".join(f"  {line}\n" for line in examples)
    codes = "".join(f"  {code.value:>3}  {text}\n" for code, text in MEANING.items())
    return (
        f"{'example' if len(examples) == 1 else 'examples'}:\n{shown}\n" if examples else ""
    ) + f"exit codes:\n{codes}"


class Parser(argparse.ArgumentParser):
    """An argparse parser as both commands want it: no abbreviations, examples and exit codes printed as written."""

    def __init__(self, *, description: str = "", examples: tuple[str, ...] = (), **options: object) -> None:
        super().__init__(
            description=textwrap.fill(description, 80),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=epilog(*examples),
            **options,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        """One line and where to read more, instead of the whole usage."""
        self.exit(Exit.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(
    group: "argparse._SubParsersAction[Parser]",
    name: str,
    command: Command,
    text: str,
    description: str,
    *examples: str,
) -> Parser:
    """One command of `group`, without options yet; `text` is its line in the list of commands."""
    parser = group.add_parser(name, help=text, description=description, examples=examples)
    parser.set_defaults(command=command)
    return parser


def run(parser: Parser, arguments: Sequence[str] | None) -> int:
    """Run the command that `arguments` (None: the process's own) choose; returns the exit code."""
    options = parser.parse_args(arguments)
    command: Command = options.command
    return guarded(parser.prog, lambda: command(options))


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, the same in both commands."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="print the version and exit")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, wherever a script reads the output."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for scripts instead of text")


def add_migrate(
    group: "argparse._SubParsersAction[Parser]", command: Command, add_config: Callable[[Parser], None]
) -> None:
    """`migrate`, the same for every daemon."""
    one = add_command(
        group,
        "migrate",
        command,
        "give settings that were renamed their new names",
        "Rewrite the configuration and its drop-ins where settings have new names in this version, comments kept, and "
        "print what was renamed. The upgrade of a package does it; what is up to date stays as it is.",
    )
    add_config(one)
    add_json(one)


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run a command and turn every error a user can meet into one line on standard error and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
        return int(code)
    except Failure as error:
        return complain(program, error, error.code)
    except ConfigError as error:
        return complain(program, error, Exit.CONFIG)
    except (RemoteProtocolError, EnrolmentError) as error:
        return complain(program, error, Exit.REFUSED)
    except LinkError as error:
        return complain(program, error, Exit.UNREACHABLE)
    except FieldfareError as error:
        return complain(program, error, Exit.FAILED)
    except (KeyboardInterrupt, EOFError):
        return complain(program, "interrupted", Exit.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except OSError as error:
        return complain(program, _plain(error), Exit.FAILED)


def complain(program: str, error: object, code: Exit) -> int:
    """Say what is wrong in one line."""
    text = printable(" ".join(str(error).split()))
    print(f"{program}: {text or type(error).__name__}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Progress for a person: standard error, so that standard output stays what a script reads."""
    print(text, file=sys.stderr, flush=True)


def show(value: Mapping[str, object], as_json: bool) -> None:
    """Print a result: one JSON object, or aligned `key  value` lines (nested values indented)."""
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=False, default=_jsonable))
        return
    for line in _lines(value, 0):
        print(line)


def printable(text: str) -> str:
    """What may be shown on a terminal: some of it comes from peers, and must not move the cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def duration(text: str) -> int:
    """An option's time in seconds, at most a year."""
    found = _DURATION.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= 365 * 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 2h or 1d, at most 365d")
    return seconds


def moment(seconds: int) -> str:
    """A time on the wire (UTC seconds) for a person; one that no calendar holds is told as a number."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970"


def table(heads: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print rows in aligned columns."""
    for line in columns([heads, *(tuple(str(cell) for cell in row) for row in rows)]):
        print(line)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equally many cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def save(target: Path, data: bytes | memoryview, *, force: bool) -> None:
    """Write a file whole or not at all; Failure where one lies already and `force` is not given."""
    if target.exists() and not force:
        raise Failure(Exit.FAILED, f"{target} exists; give another name, or --force to replace it")
    if not target.parent.is_dir():
        raise Failure(Exit.FAILED, f"there is no folder {target.parent}")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":
            # mkstemp lets only the owner read; what a command writes is as readable as what the shell writes.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes; Failure for a larger one, OSError where it cannot be read."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Failure(Exit.FAILED, f"{path} has more than {limit} bytes; is it the right file?")
    return data


def _lines(value: Mapping[str, object], depth: int) -> list[str]:
    width = max((len(key) for key in value), default=0)
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines += [f"{'  ' * depth}{printable(key)}", *_lines({str(k): v for k, v in item.items()}, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{printable(key).ljust(width)}  {_word(item)}".rstrip())
    return lines


def _word(item: object) -> str:
    match item:
        case bool():
            return "yes" if item else "no"
        case None:
            return "-"
        case bytes():
            return item.hex()
        case list() | tuple():
            return ", ".join(_word(one) for one in item) or "-"
        case Mapping():
            return ", ".join(f"{printable(str(key))} {_word(one)}" for key, one in item.items()) or "-"
        case float():
            return f"{item:.6g}"
        case _:
            return printable(str(item))


def _jsonable(item: object) -> object:
    if isinstance(item, bytes):
        return item.hex()
    raise TypeError(f"{type(item).__name__} is not printed as JSON")


def _plain(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
