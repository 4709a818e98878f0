"""edge_agent.config: the shipped sample loads, the defaults hold, and what cannot work is refused by name."""

import re
from datetime import datetime
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

from edge_agent import config
from edge_agent.config import AgentConfig, load, zone
from shared.config import effective
from shared.errors import ConfigError

SAMPLES = Path(__file__).parents[2] / "docs/samples"
FILES = ("ca.crt", "device.crt", "device.key", "root.msgpack")
MINIMAL = '[broker]\nhost = "broker.example"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all files that the defaults name."""
    for name in FILES:
        (tmp_path / name).write_text("x")
    return tmp_path


def read(folder: Path, text: str) -> AgentConfig:
    """Load `text` as agent.toml."""
    (folder / "agent.toml").write_text(text)
    return load(folder / "agent.toml")


def test_host_is_all_that_must_be_written(folder: Path) -> None:
    """Everything else has a default, and files lie beside the configuration."""
    found = read(folder, MINIMAL)
    assert found.broker.port == 8883
    assert found.broker.key == folder / "device.key"
    assert found.trust.root == folder / "root.msgpack"
    assert found.device.state_dir == Path("/var/lib/fieldfare-agent")
    assert found.policy.mains
    assert found.data == {}


def test_sample_shows_every_key_with_its_default(folder: Path) -> None:
    """agent.full.toml is the reference: nothing missing, nothing outdated."""
    found = effective(read(folder, (SAMPLES / "agent.full.toml").read_text()))
    written = {**effective(read(folder, MINIMAL)), "broker": {**effective(read(folder, MINIMAL))["broker"]}}  # type: ignore[dict-item]
    for section, kind in get_type_hints(AgentConfig).items():
        if section == "data":
            continue
        text = (SAMPLES / "agent.full.toml").read_text().partition(f"[{section}]")[2].partition("\n[")[0]
        for field in msgspec.structs.fields(kind):
            assert re.search(rf"^(# )?{field.encode_name} = ", text, re.MULTILINE), f"{section}.{field.encode_name}"
    del found["data"], written["data"]
    assert found == written


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_found_at_start(folder: Path, name: str) -> None:
    """Each file the agent cannot do without is asked for by its key."""
    (folder / name).unlink()
    with pytest.raises(ConfigError, match="no such file") as caught:
        read(folder, MINIMAL)
    keys = dict(zip(FILES, ("broker.ca", "broker.cert", "broker.key", "trust.root"), strict=True))
    assert caught.value.key == keys[name]


def test_who_needs_no_key_need_not_read_it(folder: Path) -> None:
    """`edge-agent status` only needs to know where the socket is."""
    (folder / "device.key").unlink()
    (folder / "agent.toml").write_text(MINIMAL)
    assert load(folder / "agent.toml", files=False).broker.key == folder / "device.key"


@pytest.mark.parametrize(
    ("text", "key", "advice"),
    [
        ('[policy]\nwindows = ["22:00"]\n', "policy.windows[0]", "has no end"),
        ('[policy]\nwindows = ["22:00-06:00", "fry 1:00-2:00"]\n', "policy.windows[1]", "weekdays"),
        ('[policy]\ntimezone = "Europe/Berlim"\n', "policy.timezone", "no time zone"),
        ('[policy]\ntimezone = "../../etc/passwd"\n', "policy.timezone", "no time zone"),
        ("[policy]\ncpu_pressure = 101\n", "policy.cpu_pressure", "from 0.0 to 100.0"),
        ("[policy]\nmin_batery = 5\n", "policy.min_batery", "did you mean min_battery?"),
        ('[device]\nname = "Pump 1"\n', "device.name", "matches"),
        ('[data.digits]\npath = "digits.bin"\n', "data.digits", 'kind must be "npz" or "csv"'),
        ('[data.Digits]\npath = "digits.npz"\n', "data.Digits", "matches"),
        ('[data.digits]\npath = "d"\nkind = "pickle"\n', "data.digits.kind", 'one of "npz", "csv"'),
        ("[trainer]\nthreads = -1\n", "trainer.threads", "from 0 to 1024"),
    ],
)
def test_what_cannot_work_is_refused(folder: Path, text: str, key: str, advice: str) -> None:
    """The key and the remedy are named."""
    with pytest.raises(ConfigError) as caught:
        read(folder, MINIMAL + text)
    assert caught.value.key == key
    assert advice in caught.value.advice


def test_data_kind_follows_the_suffix(folder: Path) -> None:
    """What the name says need not be said again, and what is said counts."""
    found = read(folder, MINIMAL + '[data.a]\npath = "a.csv"\n[data.b]\npath = "parts"\nkind = "npz"\n')
    assert (found.data["a"].format, found.data["b"].format) == ("csv", "npz")
    assert found.data["a"].path == folder / "a.csv"


def test_zone_is_the_devices_own_by_default(tmp_path: Path) -> None:
    """/etc/localtime decides; a device without one lives in UTC."""
    summer = datetime.fromisoformat("2026-07-01T12:00:00+00:00")
    berlin = zone("Europe/Berlin")
    assert summer.astimezone(berlin).hour == 14
    assert summer.astimezone(zone("", tmp_path / "absent")).hour == 12
    (tmp_path / "garbage").write_bytes(b"TZif but not really")
    assert summer.astimezone(zone("", tmp_path / "garbage")).hour == 12


def test_every_setting_is_explained() -> None:
    """A default without a reason is a riddle: each field but the plainest has its docstring in the source."""
    source = Path(config.__file__).read_text()
    undocumented = re.findall(r"^    (\w+): .*= .*\n    (?!\"\"\")(?=\w+:)", source, re.MULTILINE)
    plain = {"cert", "device", "trust", "enrol", "policy", "trainer", "local", "log", "sys_root", "level"}
    assert set(undocumented) <= plain
