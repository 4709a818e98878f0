"""docs/samples: every sample loads, and none lies there without a test."""

from pathlib import Path

import pytest

from aggregator import config as aggregator_config
from aggregator import task
from edge_agent import config as agent_config

SAMPLES = Path(__file__).parents[2] / "docs/samples"
NEEDED = (
    *("ca.crt", "device.crt", "device.key", "agg-0.crt", "agg-0.key", "signing.key", "root.msgpack"),
    *("ca.key", "registrar.crt", "registrar.key", "bundles.pem"),
)


@pytest.mark.parametrize("sample", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_sample_loads(tmp_path: Path, sample: Path) -> None:
    """A sample is what a reader copies, so it must be right."""
    for name in NEEDED:
        (tmp_path / name).write_text("x")
    copy = tmp_path / sample.name
    copy.write_bytes(sample.read_bytes())
    match sample.name.split("."):
        case ["agent", *_, "toml"]:
            assert agent_config.load(copy).broker.host
        case ["aggregator", *_, "toml"]:
            assert aggregator_config.load(copy).broker.host
        case ["registrar", *_, "toml"]:
            assert aggregator_config.load_registrar(copy).broker.host
        case ["task", *_, "toml"]:
            assert task.load(copy).name
        case _:
            pytest.fail(f"nothing knows how to load {sample.name}")
