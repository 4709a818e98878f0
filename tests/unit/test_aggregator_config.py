"""aggregator.config: the aggregator's TOML, as a fleet's folder has it and as it may go wrong."""

from pathlib import Path

import pytest

from aggregator import ca, config
from shared.errors import ConfigError

NOW = 1_795_000_000.0


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aggregator.toml that `fleet init` writes."""
    folder = tmp_path_factory.mktemp("fleet") / "fleet"
    ca.init_fleet(folder, "test-fleet", ["broker.example.org"], now=NOW, passphrase=None, port=1883, prefix="site/fl")
    return folder / "aggregator" / "aggregator.toml"


def test_what_fleet_init_writes_loads(rendered: Path) -> None:
    """The rendered file is valid, and every path in it is absolute and beside it."""
    found = config.load(rendered)
    assert (found.broker.host, found.broker.port, found.broker.prefix) == ("broker.example.org", 1883, "site/fl")
    assert found.broker.key == rendered.parent / "agg-0.key"
    assert found.trust.root == rendered.parent / "root.msgpack"
    assert found.state.directory == rendered.parent / "state"
    assert found.device_ca == found.broker.ca == rendered.parent / "ca.crt"
    assert found.database.parent == found.status_file.parent == found.state.directory


def test_the_environment_overrides(rendered: Path) -> None:
    """FIELDFARE_SECTION__KEY replaces a setting, and other variables are none of ours."""
    found = config.load(rendered, {"FIELDFARE_BROKER__PORT": "8884", "FIELDFARE_PASSPHRASE": "secret"})
    assert found.broker.port == 8884


@pytest.mark.parametrize(
    ("old", "new", "key", "advice"),
    [
        ("port = 1883", "port = 0", "broker.port", "from 1"),
        ("port = 1883", 'port = "1883"', "broker.port", "whole number"),
        ("port = 1883", "prot = 1883", "broker.prot", "did you mean port"),
        ('key = "agg-0.key"', 'key = "none.key"', "broker.key", "no such file"),
        ('root = "root.msgpack"', 'root = "none"', "trust.root", "no such file"),
        ('prefix = "site/fl"', 'prefix = "#"', "broker.prefix", "matches"),
        ('directory = "state"', "directory = 7", "state.directory", "path"),
        ("[state]", "[log]\nlevel = 'loud'\n[state]", "log.level", '"warning"'),
        ("[state]", "[limits]\ninbound_messages = 0\n[state]", "limits.inbound_messages", "from 1"),
        ("[state]", "[metrics]\n[state]", "metrics", "not a known key"),
        ('host = "broker.example.org"\n', "", "broker.host", "missing"),
    ],
)
def test_a_wrong_setting_is_named(rendered: Path, old: str, new: str, key: str, advice: str) -> None:
    """Each wrong setting is refused with file, key and what is allowed."""
    text = rendered.read_text(encoding="utf-8")
    assert old in text
    path = rendered.with_name("wrong.toml")
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert (refused.value.path, refused.value.key) == (str(path), key)
    assert advice in refused.value.advice


def test_text_that_is_no_toml_is_named(tmp_path: Path) -> None:
    """A file that is no TOML gives the one documented error."""
    path = tmp_path / "aggregator.toml"
    path.write_text("[broker", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(path)
