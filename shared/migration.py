"""Settings that got new names: rewrites a configuration of an earlier version, comments and order kept. Pure.

The lists of the daemons hold every rename that there ever was; a file says by its keys how old it is,
so one that is new already is left alone. What a line of text cannot be made of (a key inside an inline table, a table
that moved) is refused with what to do by hand; nothing is ever lost or guessed.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.errors import ConfigError

AGENT: tuple[tuple[str, str], ...] = ()
"""(old, new) dotted keys of agent.toml, oldest first. Both are in one table: only the last part differs."""
AGGREGATOR: tuple[tuple[str, str], ...] = ()
"""The same of aggregator.toml."""
REGISTRAR: tuple[tuple[str, str], ...] = ()
"""The same of registrar.toml."""

_KEY = re.compile(r"^(?P<space>\s*)(?P<key>[A-Za-z0-9_-]+)(?P<rest>\s*=.*)$", re.DOTALL)


def migrate(path: str, text: str, renames: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """The text of the configuration file `path` with today's names, and the old names that it had.

    ConfigError if it is no TOML, has both the old name and the new one, or writes an old one in a way that needs hands.
    """
    try:
        wanted: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", f"is not valid TOML: {error}") from None
    found = []
    for old, new in renames:
        table, _, key = old.rpartition(".")
        fresh = new.rpartition(".")[2]
        inside = _table(wanted, table)
        if inside is None or key not in inside:
            continue
        if fresh in inside:
            raise ConfigError(path, old, f"is called {new} now, and both are there: remove the one that is wrong")
        inside[fresh] = inside.pop(key)
        # Which of the lines that look like it is it? The one that gives what is wanted; the others are in other tables,
        # or inside a text.
        texts = (each for each in _renamed(text, key, fresh) if _says(each, wanted))
        renamed = next(texts, None)
        if renamed is None:
            raise ConfigError(path, old, f"is called {new} now; it could not be renamed by itself, please do")
        text = renamed
        found.append(old)
    return text, found


def _table(tree: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    at: Any = tree
    for part in name.split(".") if name else []:
        at = at.get(part) if isinstance(at, dict) else None
    return at if isinstance(at, dict) else None


def _renamed(text: str, old: str, new: str) -> Iterator[str]:
    """The text with one line changed, for each line that may be meant."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if (key := _KEY.match(line)) and key["key"] == old:
            yield "".join([*lines[:number], f"{key['space']}{new}{key['rest']}", *lines[number + 1 :]])


def _says(text: str, wanted: Mapping[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        return False
