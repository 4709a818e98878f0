"""Strict configuration: a TOML file, drop-ins beside it and the environment become one frozen struct, or an error.

Precedence, lowest first: defaults in the struct, FILE, FILE.d/*.toml in the order of their names, environment variables
PREFIX + SECTION__KEY (two underscores between levels; a name without them is none of ours). Tables merge, anything else
replaces. Relative paths, also those from drop-ins, the environment and the defaults, start at FILE's folder.
Sizes are bytes and times are seconds everywhere. Secrets never stand in a configuration, only paths to them.

It raises ConfigError, which names the source, the dotted key and what to write instead, and nothing else. It never
reads the files that settings point to; it only checks that those marked `ReadableFile` can be read.
"""

import os
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence, Sized
from enum import Enum
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    runtime_checkable,
)

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from shared import migration
from shared.errors import ConfigError
from shared.files import write_durably

PREFIX = "FIELDFARE_"
FILE_MAX = 1 << 20
"""Bytes of one configuration file that are read at all."""


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What configuration structs derive from. `__post_init__` may raise ValueError for what concerns several keys."""


@runtime_checkable
class Parsed(Protocol):
    """A value written as text. `parse` raises ValueError with advice; `str()` gives the text back.

    Its docstring's first line says what to write. Not for dataclasses and Structs: those are tables.
    """

    @classmethod
    def parse(cls, text: str) -> Self:
        """The value that `text` describes."""


class _Must(Enum):
    READ = "readable"


ReadableFile = Annotated[Path, _Must.READ]
"""A path to a file that must exist and be readable by this process when the configuration is loaded."""


class BrokerSection(Section, frozen=True):
    """What both daemons say of their one connection, MQTT 5 over TLS 1.3; each adds certificate, key and patience."""

    host: Annotated[str, Meta(min_length=1, max_length=253, description="the broker's host name or address in quotes")]
    """Must be in the broker's certificate."""
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    """The port registered for MQTT over TLS."""
    ca: ReadableFile = Path("ca.crt")
    """PEM of the fleet's CA; the broker's certificate must come from it."""
    keepalive: Annotated[int, Meta(ge=5, le=65_535)] = 60
    """Seconds: a dead link is noticed after one and a half of them; shorter wakes radios for nothing."""
    message_max: Annotated[int, Meta(ge=65_536, le=268_435_455)] = 64 << 20
    """Bytes of one message that is taken; the broker's limit applies too where it is lower. MQTT ends at 256 MiB."""
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,32}(/[A-Za-z0-9_-]{1,32}){0,3}$")] = "fl"
    """Of every topic but the models'; the same on devices, aggregator and in the broker's ACL."""


class LogSection(Section, frozen=True):
    """How much is told, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "journal", "json", "console"] = "auto"
    """auto: the journal under systemd, a console on a terminal, JSON lines elsewhere."""


C = TypeVar("C", bound=Struct)

_AT = re.compile(r" - at `(?:key in )?\$(?P<at>[^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`")


def load(
    path: Path, kind: type[C], environ: Mapping[str, str] | None = None, prefix: str = PREFIX, files: bool = True
) -> C:
    """The settings of `path`, its drop-ins and `environ` (none: no overrides) as a `kind`; raises ConfigError.

    Without `files` it does not matter whether those marked ReadableFile can be read: for who needs none of them.
    """
    reader = _Reader(path, files)
    reader.merge(_read(path), str(path))
    for drop_in in _drop_ins(path):
        reader.merge(_read(drop_in), str(drop_in))
    for name in sorted(environ or ()):
        if name.startswith(prefix) and "__" in name.removeprefix(prefix):
            reader.override(kind, name, name.removeprefix(prefix).lower().split("__"), (environ or {})[name])
    return cast(C, reader.build(kind, reader.tree, ""))


def migrate(path: Path, renames: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Rewrite `path` and its drop-ins where settings have new names (shared.migration); returns the old ones, by file.

    Each file is replaced whole or not at all, with its owner and mode. ConfigError at the first that needs hands.
    """
    renamed = {}
    for file in [path, *_drop_ins(path)]:
        _read(file)
        text, found = migration.migrate(str(file), file.read_text(encoding="utf-8"), renames)
        if found:
            before = file.stat()
            write_durably(file, text.encode())
            os.chown(file, before.st_uid, before.st_gid)
            file.chmod(before.st_mode & 0o7777)
            renamed[str(file)] = found
    return renamed


def effective(config: Struct) -> dict[str, object]:
    """All settings, defaults included, as plain values: what `config check` prints."""
    plain: dict[str, object] = msgspec.to_builtins(config, enc_hook=str)
    return plain


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(str(path), "", "there is no such file; name another with --config") from None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read ({error.strerror}); check its owner and mode") from None
    if len(data) > FILE_MAX:
        raise ConfigError(str(path), "", f"is larger than {FILE_MAX} bytes, so it is no configuration")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "", f"is not UTF-8 text (byte {error.start})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(str(path), "", f"is not valid TOML: {error}") from None


def _drop_ins(path: Path) -> list[Path]:
    folder = path.with_name(path.name + ".d")
    try:
        return sorted(entry for entry in folder.iterdir() if entry.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(str(folder), "", f"cannot be listed ({error.strerror})") from None


class _Reader:
    """One load: the merged tree, and which source each key came from, so that an error names the right one."""

    def __init__(self, path: Path, files: bool) -> None:
        self.tree: dict[str, Any] = {}
        self._path, self._files = path, files
        self._sources: dict[str, str] = {}

    # -- sources -------------------------------------------------------------------------------------------------

    def merge(self, table: Mapping[str, Any], source: str) -> None:
        _merge(self.tree, table)
        self._sources.update((key, source) for key in _leaves(table, ""))

    def override(self, kind: type[Struct], name: str, parts: list[str], text: str) -> None:
        source, key = f"environment {name}", ".".join(parts)
        self._sources[key] = source
        hint: Any = kind
        for depth, part in enumerate(parts):
            hint = self._below(hint, part, ".".join(parts[:depth]), source)
        value: Any = text
        if not _takes_text(hint):
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except (tomllib.TOMLDecodeError, RecursionError):
                raise ConfigError(source, key, f"must be {_describe(hint)}, written as in TOML") from None
        for part in reversed(parts):
            value = {part: value}
        self.merge(value, source)

    def _below(self, hint: Any, part: str, key: str, source: str) -> Any:
        for kind in _alternatives(hint):
            if _is_struct(kind):
                for field in msgspec.structs.fields(kind):
                    if field.encode_name == part:
                        return field.type
                raise ConfigError(source, _join(key, part), _unknown(part, kind))
            if get_origin(kind) is dict:
                return get_args(kind)[1]
        raise ConfigError(source, _join(key, part), f"{key} is {_describe(hint)}, it has no keys of its own")

    # -- values --------------------------------------------------------------------------------------------------

    def build(self, hint: Any, value: Any, key: str) -> Any:
        structs = [kind for kind in _alternatives(hint) if _is_struct(kind)]
        if structs and isinstance(value, dict):
            return self._struct(structs, value, key)
        for kind, metas in _members(hint):
            if get_origin(kind) is dict and isinstance(value, dict):
                names, inner = get_args(kind)
                if _is_struct(*_alternatives(inner)):
                    self._count(metas, value, key)
                    below = {name: _join(key, name) for name in value}
                    return {
                        self._leaf(names, name, at): self.build(inner, value[name], at) for name, at in below.items()
                    }
            if get_origin(kind) is list and isinstance(value, list) and _is_struct(*_alternatives(get_args(kind)[0])):
                self._count(metas, value, key)
                return [self.build(get_args(kind)[0], item, f"{key}[{at}]") for at, item in enumerate(value)]
        return self._leaf(hint, value, key)

    def _count(self, metas: list[Meta], value: Sized, key: str) -> None:
        for meta in metas:
            least, most = meta.min_length or 0, meta.max_length
            if len(value) < least or (most is not None and len(value) > most):
                bound = f"at least {least}" if most is None else f"from {least} to {most}"
                raise self._error(key, f"must have {bound} entries; it has {len(value)}")

    def _struct(self, structs: list[type[Struct]], value: dict[str, Any], key: str) -> Struct:
        kind, value = self._choose(structs, value, key)
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        for name in value:
            if name not in fields:
                raise self._error(_join(key, name), _unknown(name, kind))
        found: dict[str, Any] = {}
        for name, field in fields.items():
            below = _join(key, name)
            if name in value:
                found[field.name] = self.build(field.type, value[name], below)
            elif field.required:
                raise self._error(below, f"is missing; it must be {_describe(field.type)}")
            else:
                default = field.default if field.default is not NODEFAULT else field.default_factory()
                # A default may hold relative paths, so it takes the same way as a value that was written down.
                plain = msgspec.to_builtins(default, enc_hook=str) if isinstance(default, Struct | Path) else None
                found[field.name] = default if plain is None else self.build(field.type, plain, below)
        try:
            return kind(**found)
        except ValueError as error:
            raise self._error(key, str(error)) from None

    def _choose(
        self, structs: list[type[Struct]], value: dict[str, Any], key: str
    ) -> tuple[type[Struct], dict[str, Any]]:
        field = structs[0].__struct_config__.tag_field
        if field is None:
            return structs[0], value
        tags = {kind.__struct_config__.tag: kind for kind in structs}
        tag = value.get(field, next(iter(tags)) if len(tags) == 1 else None)
        if not isinstance(tag, str) or tag not in tags:
            raise self._error(_join(key, field), f"must be {_one_of(tags)}{_close(tag, tags)}")
        return tags[tag], {name: item for name, item in value.items() if name != field}

    def _leaf(self, hint: Any, value: Any, key: str) -> Any:
        found = self._check(hint, value, key)
        if self._files and get_origin(hint) is Annotated and _Must.READ in hint.__metadata__:
            self._readable(found, key)
        return found

    def _check(self, hint: Any, value: Any, key: str) -> Any:
        try:
            return msgspec.convert(value, hint, strict=True, dec_hook=self._text)
        except msgspec.ValidationError as error:
            at = _AT.search(str(error))
            text = str(error)[: at.start()] if at else str(error)
            unknown = _UNKNOWN.search(text)
            if unknown:
                raise self._error(
                    _join(key + (at["at"] if at else ""), unknown["name"]), "is not a known key"
                ) from None
            inside = at["at"].replace("[...]", "") if at else ""
            said = "" if text.startswith(("Expected", "Invalid")) and not inside else f" ({text})"
            advice = f"must be {_describe(hint)}; it is {_shown(value)}{_close(value, _choices(hint))}{said}"
            raise self._error(key + inside, advice) from None

    def _text(self, kind: Any, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError("expected text in quotes")
        if kind is Path:
            if not value or "\0" in value:
                raise ValueError("expected a path")
            return (self._path.parent / value).absolute()
        if issubclass(kind, Parsed):
            return kind.parse(value)
        raise NotImplementedError(f"no way to read a {kind.__name__} from text")

    def _readable(self, file: Path, key: str) -> None:
        try:
            with file.open("rb"):
                return
        except FileNotFoundError:
            advice = "there is no such file"
        except IsADirectoryError:
            advice = "is a folder, a file is needed"
        except OSError as error:
            advice = f"cannot be read ({error.strerror}); check its owner and mode"
        raise self._error(key, f"{file}: {advice}")

    def _error(self, key: str, advice: str) -> ConfigError:
        at = key
        while at and at not in self._sources:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return ConfigError(self._sources.get(at, str(self._path)), key, advice)


# -- trees -------------------------------------------------------------------------------------------------------


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _leaves(table: Mapping[str, Any], key: str) -> Iterator[str]:
    for name, value in table.items():
        yield _join(key, name)
        if isinstance(value, dict):
            yield from _leaves(value, _join(key, name))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


# -- types, and how to say them to a person ------------------------------------------------------------------------


def _members(hint: Any, metas: tuple[Any, ...] = ()) -> list[tuple[Any, list[Meta]]]:
    """What a value may be, each with its own limits."""
    if get_origin(hint) is Annotated:
        return _members(hint.__origin__, metas + hint.__metadata__)
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) for member in _members(part, metas)]
    return [(hint, [meta for meta in metas if isinstance(meta, Meta)])]


def _alternatives(hint: Any) -> list[Any]:
    return [kind for kind, _ in _members(hint)]


def _is_struct(*kinds: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, Struct) for kind in kinds)


def _takes_text(hint: Any) -> bool:
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            return all(isinstance(value, str) for value in get_args(kind))
        if isinstance(kind, type) and (issubclass(kind, str | Path) or issubclass(kind, Parsed)):
            return True
    return False


def _choices(hint: Any) -> list[str]:
    found: list[str] = []
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            found += [str(value) for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found += [str(member.value) for member in kind]
    return found


def _describe(hint: Any) -> str:
    said = [_kind(kind, metas) for kind, metas in _members(hint) if kind is not type(None)]
    return " or ".join(dict.fromkeys(said))


def _kind(kind: Any, metas: list[Meta]) -> str:
    origin = get_origin(kind)
    described = [meta.description for meta in metas if meta.description]
    if described:
        return described[-1]
    if _choices(kind):
        return _one_of(_choices(kind))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(metas)
    if kind is Path:
        return "a path in quotes"
    if origin in (list, tuple, set, frozenset):
        return f"a list, each item {_describe(get_args(kind)[0])}" if get_args(kind) else "a list"
    if origin is dict or kind is dict or _is_struct(kind):
        return "a table"
    if kind is str or not isinstance(kind, type):
        return "text in quotes" + _range(metas)
    return (kind.__doc__ or "text in quotes").splitlines()[0].rstrip(".")


def _range(metas: list[Meta]) -> str:
    said = []
    for meta in metas:
        low, high = (meta.ge, meta.gt), (meta.le, meta.lt)
        said += [f" from {low[0]}"] if low[0] is not None else [f" above {low[1]}"] if low[1] is not None else []
        said += [f" to {high[0]}"] if high[0] is not None else [f" below {high[1]}"] if high[1] is not None else []
        said += [f" that matches {meta.pattern}"] if meta.pattern else []
        said += [f" of at least {meta.min_length} characters"] if meta.min_length else []
        said += [f" of at most {meta.max_length} characters"] if meta.max_length is not None else []
    return "".join(said)


def _one_of(values: Any) -> str:
    return "one of " + ", ".join(f'"{value}"' for value in values)


def _unknown(name: str, kind: type[Struct]) -> str:
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    return f"is not a known key{_close(name, known)}; known here: {', '.join(known)}"


def _close(value: object, known: Any) -> str:
    import difflib  # which is of use to nobody whose configuration is sound

    match = difflib.get_close_matches(str(value), [str(one) for one in known], 1)
    return f" (did you mean {match[0]}?)" if match else ""


def _shown(value: object) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
