"""aggregator.model: verified weights leave as a file that plain PyTorch takes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aggregator import ca, model, release
from shared import identity, wire
from shared.cli import Failure
from shared.errors import ExportError, Reason, RemoteProtocolError
from shared.messages import ReleaseMessage

NOW = 1_795_000_000.0

TASK = """\
name = "buffers"
expires = "30d"
[training]
lr = 0.1
batch_size = 4
epochs = 1
[data]
dataset = "images"
inputs = [{ name = "x", dtype = "float32", shape = [3, 4, 4] }]
target = { name = "y", dtype = "int64", shape = [], classes = 2 }
[plan]
goal = 2
min_updates = 2
rounds = 2
deadline = 60
"""

MODULE = """\
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("seen", torch.tensor([3, 1], dtype=torch.int64))
        self.head = nn.Linear(8, 2)
    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).flatten(1))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fleet, a module with buffers of two kinds, its task and its release."""
    folder = tmp_path_factory.mktemp("site")
    ca.init_fleet(folder / "fleet", "test-fleet", ["localhost"], now=NOW, passphrase=None)
    (folder / "task.toml").write_text(TASK, encoding="utf-8")
    (folder / "net.py").write_text(MODULE, encoding="utf-8")
    keys = release.fleet_keys(folder / "fleet", lambda path: None)
    data = release.build(f"{folder / 'net.py'}:Net", "cross_entropy", folder / "task.toml", keys, now=NOW, seed=4)
    (folder / "release.msgpack").write_bytes(data)
    return folder


def _verified(site: Path, now: float = NOW, task: str = "buffers") -> tuple[release.Description, bool]:
    root = identity.load_root(site / "fleet" / "root" / "root.msgpack")
    return model.verified((site / "release.msgpack").read_bytes(), task, root, now)


def test_export_round_trips_into_the_module(site: Path, tmp_path: Path) -> None:
    """Every parameter and buffer, whole numbers included, comes back bit for bit through load_state_dict(strict)."""
    found, current = _verified(site)
    model.write(found, tmp_path / "net.safetensors")
    torch.manual_seed(4)
    expected = release.load(f"{site / 'net.py'}:Net")
    torch.manual_seed(5)
    fresh = release.load(f"{site / 'net.py'}:Net")
    assert current and isinstance(expected, nn.Module) and isinstance(fresh, nn.Module)
    fresh.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    assert fresh.state_dict()["norm.num_batches_tracked"].dtype == torch.int64


def test_expiry_does_not_end_the_use_of_a_model(site: Path) -> None:
    """The model of an expired task is still handed out, marked as such."""
    found, current = _verified(site, NOW + 31 * 86_400)
    assert found.verified and not current


def test_another_task_is_refused(site: Path) -> None:
    """A release of another task than the one asked for is not exported."""
    with pytest.raises(RemoteProtocolError) as refused:
        _verified(site, task="other")
    assert refused.value.reason is Reason.WRONG_TASK


def test_what_does_not_verify_is_refused(site: Path, tmp_path: Path) -> None:
    """Weights are exported only under the fleet's own root, also after expiry."""
    ca.init_fleet(tmp_path / "other", "other", ["localhost"], now=NOW, passphrase=None)
    root = identity.load_root(tmp_path / "other" / "root" / "root.msgpack")
    for now in (NOW, NOW + 31 * 86_400):
        with pytest.raises(RemoteProtocolError) as refused:
            model.verified((site / "release.msgpack").read_bytes(), "buffers", root, now)
        assert refused.value.reason is Reason.UNKNOWN_KEY


def test_nothing_is_overwritten_unasked(site: Path, tmp_path: Path) -> None:
    """A file that lies there is replaced only with force, and no temporary file is left."""
    found, _ = _verified(site)
    target = tmp_path / "net.safetensors"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(Failure, match="--force"):
        model.write(found, target)
    assert target.read_text(encoding="utf-8") == "mine"
    model.write(found, target, force=True)
    assert target.read_bytes() == found.message.weights
    assert list(tmp_path.iterdir()) == [target]


def test_an_announcement_has_no_weights(site: Path, tmp_path: Path) -> None:
    """Signed records alone cannot be exported, and the error says what can."""
    message = wire.unpack((site / "release.msgpack").read_bytes(), ReleaseMessage)
    bare = wire.pack(ReleaseMessage(v=1, manifest=message.manifest, release=message.release))
    root = identity.load_root(site / "fleet" / "root" / "root.msgpack")
    found, _ = model.verified(bare, "buffers", root, NOW)
    with pytest.raises(ExportError, match="without its weights"):
        model.write(found, tmp_path / "net.safetensors")
