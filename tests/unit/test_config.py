"""shared.config: whatever stands in a file, the result is exact settings or an error that says where and what to do."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from shared.config import FILE_MAX, ReadableFile, Section, effective, load, migrate
from shared.errors import ConfigError


class Colour:
    """a colour such as "red"."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def parse(cls, text: str) -> Self:
        """Only three are known."""
        if text not in ("red", "green", "blue"):
            raise ValueError(f"{text} is no colour")
        return cls(text)

    def __str__(self) -> str:
        return self.name


class Link(Section, frozen=True):
    """A section with a value that is required."""

    host: str
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    retry: bool = True
    mode: Literal["fast", "slow"] = "fast"
    ratio: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    cert: ReadableFile | None = None


class Place(Section, frozen=True):
    """A section of paths."""

    here: Path = Path("state")
    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low must not be above high")


class Item(Section, frozen=True):
    """One of many."""

    path: Path


class Sgd(Section, frozen=True, tag="sgd", tag_field="kind"):
    """A choice."""

    lr: float


class Adam(Section, frozen=True, tag="adam", tag_field="kind"):
    """Another choice."""

    lr: float
    beta: float = 0.9


class Settings(Section, frozen=True):
    """The whole."""

    link: Link
    place: Place = Place()
    items: Annotated[dict[Annotated[str, Meta(pattern="^[a-z]+$")], Item], Meta(max_length=2)] = msgspec.field(
        default_factory=dict
    )
    optimizer: Sgd | Adam = Sgd(lr=0.1)
    steps: Annotated[list[Item], Meta(min_length=1)] | None = None
    colours: tuple[Colour, ...] = ()
    names: list[str] = msgspec.field(default_factory=list)


MINIMAL = '[link]\nhost = "a"\n'


def read(folder: Path, text: str, environ: dict[str, str] | None = None, kind: type[Any] = Settings) -> Any:
    """Load `text` as if it were a file of the operator's."""
    file = folder / "agent.toml"
    file.write_text(text)
    return load(file, kind, environ)


def refused(folder: Path, text: str, environ: dict[str, str] | None = None) -> ConfigError:
    """The error for `text`."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, environ)
    return caught.value


def test_file_beats_default_and_keeps_the_rest(tmp_path: Path) -> None:
    """What is written counts, what is not keeps its default."""
    found = read(tmp_path, '[link]\nhost = "a"\nport = 1\n')
    assert (found.link.host, found.link.port, found.link.retry) == ("a", 1, True)


def test_drop_ins_merge_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Of two drop-ins the later name wins, and neither erases what it does not name."""
    folder = tmp_path / "agent.toml.d"
    folder.mkdir()
    (folder / "20-b.toml").write_text("[link]\nport = 20\n")
    (folder / "10-a.toml").write_text('[link]\nport = 10\nmode = "slow"\n')
    (folder / "30-c.toml.bak").write_text("[link]\nport = 30\n")
    found = read(tmp_path, MINIMAL)
    assert (found.link.host, found.link.port, found.link.mode) == ("a", 20, "slow")


def test_environment_beats_every_file(tmp_path: Path) -> None:
    """An override may stand in the environment, whatever its type, also for a section of many."""
    environ = {
        "FIELDFARE_LINK__PORT": "7",
        "FIELDFARE_LINK__RETRY": "false",
        "FIELDFARE_LINK__HOST": "10",
        "FIELDFARE_ITEMS__DIGITS__PATH": "digits.npz",
        "FIELDFARE_LINK": "not ours: no two underscores",
        "OTHER__KEY": "1",
    }
    found = read(tmp_path, MINIMAL + "port = 6\n", environ)
    assert (found.link.port, found.link.retry, found.link.host) == (7, False, "10")
    assert found.items["digits"].path == tmp_path / "digits.npz"


@pytest.mark.parametrize(
    ("environ", "key", "advice"),
    [
        ({"FIELDFARE_LINK__PROT": "7"}, "link.prot", "did you mean port?"),
        ({"FIELDFARE_LINK__PORT": "seven"}, "link.port", "a whole number from 1 to 65535"),
        ({"FIELDFARE_LINK__PORT": "0"}, "link.port", "a whole number from 1 to 65535"),
        ({"FIELDFARE_LINK__PORT__MORE": "0"}, "link.port.more", "no keys of its own"),
        ({"FIELDFARE_NOWHERE__PORT": "0"}, "nowhere", "known here: link, place"),
    ],
)
def test_bad_environment_names_the_variable(tmp_path: Path, environ: dict[str, str], key: str, advice: str) -> None:
    """An override that cannot be is an error that names the variable, not the file."""
    error = refused(tmp_path, MINIMAL, environ)
    assert error.path == f"environment {next(iter(environ))}"
    assert error.key == key
    assert advice in error.advice


@pytest.mark.parametrize(
    ("text", "key", "advice"),
    [
        ('[link]\nhots = "a"\n', "link.hots", "did you mean host?"),
        (MINIMAL + "[plaice]\n", "plaice", "did you mean place?"),
        ("", "link", "is missing"),
        ("[link]\n", "link.host", "is missing; it must be text in quotes"),
        ("link = 3\n", "link", "must be a table; it is 3"),
        (MINIMAL + "port = 0\n", "link.port", "from 1 to 65535; it is 0"),
        (MINIMAL + 'port = "8883"\n', "link.port", "a whole number from 1 to 65535; it is '8883'"),
        (MINIMAL + "port = true\n", "link.port", "it is true"),
        (MINIMAL + "retry = 1\n", "link.retry", "true or false"),
        (MINIMAL + 'mode = "fats"\n', "link.mode", 'one of "fast", "slow"; it is \'fats\' (did you mean fast?)'),
        (MINIMAL + "ratio = 1.0\n", "link.ratio", "a number above 0.0 below 1.0"),
        (MINIMAL + "[place]\nhere = 3\n", "place.here", "a path in quotes"),
        (MINIMAL + "[place]\nlow = 11\n", "place", "low must not be above high"),
        (
            MINIMAL + '[items.DIGITS]\npath = "x"\n',
            "items.DIGITS",
            "text in quotes that matches ^[a-z]+$; it is 'DIGITS'",
        ),
        (
            MINIMAL + '[items.a]\npath = "x"\n[items.b]\npath = "x"\n[items.c]\npath = "x"\n',
            "items",
            "from 0 to 2 entries; it has 3",
        ),
        (MINIMAL + '[items.digits]\npaht = "x"\n', "items.digits.paht", "did you mean path?"),
        (MINIMAL + '[optimizer]\nkind = "adamm"\nlr = 1\n', "optimizer.kind", '"sgd", "adam" (did you mean adam?)'),
        (MINIMAL + "[optimizer]\nlr = 1\n", "optimizer.kind", 'one of "sgd", "adam"'),
        (MINIMAL + '[optimizer]\nkind = "sgd"\nlr = 1\nbeta = 1\n', "optimizer.beta", "known here: lr"),
        ('colours = ["red", "rad"]\n' + MINIMAL, "colours[1]", "rad is no colour"),
        (MINIMAL + "[[steps]]\npath = 'a'\n[[steps]]\npaht = 'b'\n", "steps[1].paht", "did you mean path?"),
        (MINIMAL + "[[steps]]\npath = 'a'\n[[steps]]\npath = 3\n", "steps[1].path", "a path in quotes; it is 3"),
        ("steps = []\n" + MINIMAL, "steps", "at least 1 entries; it has 0"),
        ("names = [1]\n" + MINIMAL, "names[0]", "a list, each item text in quotes"),
    ],
)
def test_bad_value_names_key_and_remedy(tmp_path: Path, text: str, key: str, advice: str) -> None:
    """Unknown, missing, mistyped or out of range: the error names the file, the dotted key and what is allowed."""
    error = refused(tmp_path, text)
    assert (error.path, error.key) == (str(tmp_path / "agent.toml"), key)
    assert advice in error.advice


def test_error_names_the_drop_in_it_comes_from(tmp_path: Path) -> None:
    """The operator is sent to the file in which the wrong value stands."""
    folder = tmp_path / "agent.toml.d"
    folder.mkdir()
    (folder / "10-a.toml").write_text("[link]\nport = -1\n")
    assert refused(tmp_path, MINIMAL).path == str(folder / "10-a.toml")
    (folder / "10-a.toml").write_text("[link\n")
    assert refused(tmp_path, MINIMAL).path == str(folder / "10-a.toml")


def test_broken_toml_gives_the_line(tmp_path: Path) -> None:
    """A file that is no TOML is refused with the place at which it stops being one."""
    assert "line 2" in refused(tmp_path, "[link]\nhost = \n").advice


def test_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """No file, a folder, bytes that are no text and far too many bytes are all the operator's to mend."""
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml", Settings)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, Settings)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.toml", Settings)
    (tmp_path / "huge.toml").write_bytes(b"#" * (FILE_MAX + 1))
    with pytest.raises(ConfigError, match="larger"):
        load(tmp_path / "huge.toml", Settings)


def test_relative_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    """Written, overridden and default paths mean the same wherever the process was started."""
    environ = {"FIELDFARE_ITEMS__B__PATH": "b.csv"}
    found = read(tmp_path, MINIMAL + '[items.a]\npath = "/abs/a.csv"\n', environ)
    assert found.place.here == tmp_path / "state"
    assert found.items["a"].path == Path("/abs/a.csv")
    assert found.items["b"].path == tmp_path / "b.csv"


def test_file_that_a_setting_needs_must_be_there(tmp_path: Path) -> None:
    """A certificate that is missing is found out at start, under its key."""

    class Needs(Section, frozen=True):
        """With a file that must exist, by default too."""

        cert: ReadableFile = Path("device.crt")

    for text in ("", 'cert = "device.crt"\n'):
        with pytest.raises(ConfigError, match="no such file") as caught:
            read(tmp_path, text, kind=Needs)
        assert caught.value.key == "cert"
    (tmp_path / "device.crt").mkdir()
    with pytest.raises(ConfigError, match="folder"):
        read(tmp_path, "", kind=Needs)
    (tmp_path / "device.crt").rmdir()
    (tmp_path / "device.crt").write_text("x")
    assert read(tmp_path, "", kind=Needs).cert == tmp_path / "device.crt"


def test_effective_shows_everything_as_plain_values(tmp_path: Path) -> None:
    """`config check` prints defaults too, and what it prints is again a valid configuration."""
    found = read(tmp_path, 'colours = ["red"]\n' + MINIMAL + '[items.a]\npath = "x"\n')
    plain: Any = effective(found)
    assert plain["link"]["port"] == 8883
    assert list(plain["colours"]) == ["red"]
    assert plain["items"]["a"]["path"] == str(tmp_path / "x")
    assert plain["optimizer"] == {"kind": "sgd", "lr": 0.1}


values = st.recursive(
    st.one_of(st.booleans(), st.integers(-9, 9), st.sampled_from(["a", "fast", "red", "sgd"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["host", "port", "kind", "lr", "path", "here", "low", "x"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["link", "place", "items", "optimizer", "colours", "names", "z"]), values))
def test_any_tree_loads_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    """Whatever an operator writes, there is no other outcome, and what loads has the declared types."""
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in tree.items()))
    try:
        found = load(file, Settings)
    except ConfigError as error:
        assert error.advice
    else:
        assert isinstance(found.link, Struct)
        assert isinstance(found.link.host, str)
        assert 1 <= found.link.port <= 65_535


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_migration_rewrites_files_in_place(tmp_path: Path) -> None:
    """File and drop-ins get the new names with their mode kept; a second time there is nothing to do."""
    main, extra = tmp_path / "a.toml", tmp_path / "a.toml.d" / "b.toml"
    extra.parent.mkdir()
    main.write_text("# ours\n[broker]\naddress = 'a'  # old\n")
    extra.write_text("[broker]\nport = 1\n")
    main.chmod(0o640)
    renames = [("broker.address", "broker.host")]
    assert migrate(main, renames) == {str(main): ["broker.address"]}
    assert main.read_text() == "# ours\n[broker]\nhost = 'a'  # old\n" and main.stat().st_mode & 0o777 == 0o640
    assert migrate(main, renames) == {} and extra.read_text() == "[broker]\nport = 1\n"
