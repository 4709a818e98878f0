"""shared.migration: an old configuration gets today's names and keeps everything else."""

import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.config import AggregatorConfig, RegistrarConfig
from edge_agent.config import AgentConfig
from shared import migration
from shared.errors import ConfigError

RENAMES = (("policy.on_mains", "policy.mains"), ("policy.mains", "policy.plugged"), ("broker.address", "broker.host"))
OLD = """\
# ours
[policy]     # when
  on_mains = false   # the panel feeds it
min_battery = 30.0
text = '''
[broker]
address = "not a key"
'''

[broker]
address = "broker.example.org" # moved in spring
port=8883
"""


def test_an_old_file_gets_the_new_names() -> None:
    """Renames of several versions follow one another; comments, order, spaces and look-alikes in texts stay."""
    text, found = migration.migrate("a.toml", OLD, RENAMES)
    assert found == ["policy.on_mains", "policy.mains", "broker.address"]
    assert text == OLD.replace("on_mains", "plugged").replace('address = "broker', 'host = "broker')
    assert migration.migrate("a.toml", text, RENAMES) == (text, [])


def test_both_names_are_for_a_person_to_decide() -> None:
    """Where old and new stand side by side nothing is guessed."""
    with pytest.raises(ConfigError, match=r"a\.toml: broker\.address: is called broker\.host now, and both"):
        migration.migrate("a.toml", "[broker]\naddress = 'a'\nhost = 'b'\n", RENAMES)


@pytest.mark.parametrize(
    "text", ["broker = {address = 'a'}\n", "broker.address = 'a'\n", "[broker]\n'address' = 'a'\n"]
)
def test_what_is_written_otherwise_is_named(text: str) -> None:
    """A way of writing that the renaming does not know is refused with what to do, and not half done."""
    with pytest.raises(ConfigError, match=r"is called broker\.host now; it could not be renamed"):
        migration.migrate("a.toml", text, RENAMES)


def test_no_toml_is_no_file_of_ours() -> None:
    """What cannot be read is not rewritten."""
    with pytest.raises(ConfigError, match="not valid TOML"):
        migration.migrate("a.toml", "[broker\n", RENAMES)


@given(st.dictionaries(st.sampled_from(["address", "port", "x"]), st.integers(), max_size=3), st.booleans())
def test_only_names_change(values: dict[str, int], between: bool) -> None:
    """The values of the new file are those of the old one."""
    lines = [f"{key} = {value}\n" for key, value in values.items()]
    text = "".join(["[broker]\n", *lines[:1], "# note\n" if between else "", *lines[1:]])
    new, _ = migration.migrate("a.toml", text, RENAMES)
    wanted = {{"address": "host"}.get(key, key): value for key, value in values.items()}
    assert tomllib.loads(new)["broker"] == wanted and new.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("renames", "kind"),
    [
        (migration.AGENT, AgentConfig),
        (migration.AGGREGATOR, AggregatorConfig),
        (migration.REGISTRAR, RegistrarConfig),
    ],
)
def test_listed_renames_lead_to_settings_that_exist(renames: tuple[tuple[str, str], ...], kind: type) -> None:
    """What a rename ends in is a setting of today, what it begins with is none, and both are in one table."""
    ends = {new for _, new in renames} - {old for old, _ in renames}
    for old, new in renames:
        assert old.rpartition(".")[0] == new.rpartition(".")[0] and not _is_setting(kind, old)
    assert all(_is_setting(kind, new) for new in ends)
    assert _is_setting(kind, "broker.host") and not _is_setting(kind, "broker.address")


def _is_setting(kind: Any, key: str) -> bool:
    for part in key.split("."):
        known = msgspec.structs.fields(kind) if hasattr(kind, "__struct_fields__") else ()
        fields = {field.name: field.type for field in known}
        if part not in fields:
            return False
        kind = fields[part]
    return True
