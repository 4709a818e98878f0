"""aggregator.release: what is built reads back as a device reads it, and nothing else does."""

import contextlib
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator import ca, release
from shared import chunks, identity, signing, wire
from shared.cli import Failure
from shared.errors import ConfigError, ExportError, Reason, RemoteProtocolError
from shared.messages import Graphs, Release, ReleaseMessage, Role, TaskManifest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
MODEL = f"{DIGITS / 'model.py'}:Digits"
NOW = 1_795_000_000.0

ODD = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layer = nn.Linear(width, 10)
    def forward(self, x):
        return self.layer(x)

class Own(Net):
    def forward(self, x, y=None):
        scores = self.layer(x)
        return scores if y is None else nn.functional.cross_entropy(scores, y)

class Loss(nn.Module):
    def forward(self, outputs, target):
        return nn.functional.cross_entropy(outputs, target, label_smoothing=0.1)

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(no_such_name, 10)

class Branches(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return -self.layer(x)

def make():
    return Net()

made = Net()
number = 7
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet's folder with open keys."""
    folder = tmp_path_factory.mktemp("fleet") / "fleet"
    ca.init_fleet(folder, "test-fleet", ["localhost"], now=NOW, passphrase=None)
    return folder


@pytest.fixture(scope="module")
def keys(fleet: Path) -> release.FleetKeys:
    """The fleet's keys."""
    return release.fleet_keys(fleet, lambda path: None)


@pytest.fixture(scope="module")
def built(keys: release.FleetKeys) -> bytes:
    """The demo's release."""
    return release.build(MODEL, "cross_entropy", DIGITS / "task.toml", keys, now=NOW)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A publisher's file with models of every kind, good and bad."""
    path = tmp_path / "odd.py"
    path.write_text(ODD, encoding="utf-8")
    return path


def _message(data: bytes) -> ReleaseMessage:
    return wire.unpack(data, ReleaseMessage)


def test_a_release_reads_back(built: bytes, keys: release.FleetKeys) -> None:
    """A built file verifies under the fleet's root and says what the task file said."""
    found = release.read(built, keys.root, NOW)
    assert found.verified
    assert (found.manifest.task, found.release.number, found.release.parent) == ("digits", 0, None)
    assert found.release.manifest == signing.digest(found.message.manifest)
    assert found.message.weights is not None
    assert found.weights is not None and bytes(found.weights) == found.message.weights
    assert found.release.weights.sha256 == hashlib.sha256(found.message.weights).digest()
    assert found.release.weights.size == len(found.message.weights)
    assert found.manifest.aggregator_keys[0].key == keys.aggregator


def test_building_is_repeatable(built: bytes, keys: release.FleetKeys) -> None:
    """The same module, task, seed and time give the same bytes; another seed gives other weights."""
    again = release.build(MODEL, "cross_entropy", DIGITS / "task.toml", keys, now=NOW)
    other = release.build(MODEL, "cross_entropy", DIGITS / "task.toml", keys, now=NOW, seed=1)
    assert again == built
    assert _message(other).weights != _message(built).weights


@pytest.mark.parametrize("attribute", ["Net", "made", "make"])
def test_a_class_an_instance_and_a_function_are_models(odd: Path, keys: release.FleetKeys, attribute: str) -> None:
    """All three ways of naming a module give a release."""
    data = release.build(f"{odd}:{attribute}", "cross_entropy", DIGITS / "task.toml", keys, now=NOW)
    assert [one.name for one in release.read(data, keys.root, NOW).manifest.layout] == ["layer.weight", "layer.bias"]


def test_a_publishers_own_loss(odd: Path, keys: release.FleetKeys) -> None:
    """A module as loss, and a model that computes its own, become part of the train graph."""
    task = DIGITS / "task.toml"
    plain = release.build(f"{odd}:Net", "cross_entropy", task, keys, now=NOW)
    smooth = release.build(f"{odd}:Net", f"{odd}:Loss", task, keys, now=NOW)
    own = release.build(f"{odd}:Own", "own", task, keys, now=NOW)
    graphs = [release.read(data, keys.root, NOW).manifest.train_graph for data in (plain, smooth, own)]
    assert graphs[0] != graphs[1] and graphs[2] != graphs[1]


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        ("{odd}:Nothing", "cross_entropy", "no attribute 'Nothing'"),
        ("{odd}:Broken", "cross_entropy", "odd.py line 23"),
        ("{odd}:Branches", "cross_entropy", "odd.py"),
        ("{odd}:number", "cross_entropy", "name an nn.Module"),
        ("{odd}:Net", "crossentropy", "cross_entropy"),
        ("{odd}:Net", "{odd}:number", "name an nn.Module"),
        ("/nowhere/model.py:Net", "cross_entropy", "there is no file"),
        ("no.such.module:Net", "cross_entropy", "No module named"),
        ("model", "cross_entropy", "write package.module:attribute"),
        ("{odd}:", "cross_entropy", "write package.module:attribute"),
    ],
)
def test_what_cannot_be_released_is_explained(
    odd: Path, keys: release.FleetKeys, model: str, loss: str, said: str
) -> None:
    """A model or loss that cannot become a release gives one error that says what and where."""
    with pytest.raises(ExportError) as refused:
        release.build(model.format(odd=odd), loss.format(odd=odd), DIGITS / "task.toml", keys, now=NOW)
    assert said in str(refused.value)


def test_a_release_over_the_limit_is_refused(keys: release.FleetKeys) -> None:
    """A model that does not fit one message is refused with its size, the limit and the remedy."""
    with pytest.raises(ExportError) as refused:
        release.build(MODEL, "cross_entropy", DIGITS / "task.toml", keys, now=NOW, limit=20_000)
    assert all(word in str(refused.value) for word in ("20000", "19544", "max_packet_size", "message_max"))


# -- weights in chunks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose weights take 260 KB."""
    path = tmp_path_factory.mktemp("wide") / "wide.py"
    path.write_text("from torch import nn\nclass Wide(nn.Sequential):\n    def __init__(self):\n        "
                    "super().__init__(nn.Linear(64, 870), nn.Linear(870, 10))\n", encoding="utf-8")  # fmt: skip
    return f"{path}:Wide"


@pytest.fixture(scope="module")
def large(wide: str, keys: release.FleetKeys) -> bytes:
    """Its release."""
    return release.build(wide, "cross_entropy", DIGITS / "task.toml", keys, now=NOW)


def test_large_weights_are_named_in_chunks_and_lie_in_the_file(large: bytes, keys: release.FleetKeys) -> None:
    """The file holds them whole and is taken by a plain client; what the command publishes names them in chunks."""
    found = release.read(large, keys.root, NOW)
    blob = found.release.weights
    assert found.weights is not None
    assert blob == chunks.describe(found.weights, 122_880)
    assert (len(blob.chunks), found.release.v) == (3, 2)
    assert (found.message.v, found.message.weights) == (2, None)
    assert wire.unpack(large, ReleaseMessage).weights == bytes(found.weights)
    again = release.read(wire.pack(found.message), keys.root, NOW)
    assert (again.weights, again.message) == (None, found.message)


def test_large_weights_are_not_copied(large: bytes, keys: release.FleetKeys, tmp_path: Path) -> None:
    """A file of gigabytes is mapped: the weights are a window on it."""
    path = tmp_path / "release.msgpack"
    path.write_bytes(large)
    mapped = release.open_file(path)
    found = release.read(mapped, keys.root, NOW)
    assert found.weights is not None and found.weights.obj is mapped
    assert found.size == len(large) and bytes(found.weights) == large[-found.release.weights.size :]


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1024, 256), (200_000, 2)])
def test_the_chunk_size_is_the_publishers_choice(wide: str, keys: release.FleetKeys, size: int, count: int) -> None:
    """It follows the broker's limit; with 0 the weights travel whole, in the words of protocol 1."""
    data = release.build(wide, "cross_entropy", DIGITS / "task.toml", keys, now=NOW, chunk_size=size)
    found = release.read(data, keys.root, NOW)
    assert len(found.release.weights.chunks) == count
    assert (found.release.v, found.message.weights is None) == ((2, True) if count else (1, False))


def test_chunks_that_are_not_of_the_weights_are_refused(large: bytes, keys: release.FleetKeys) -> None:
    """A publisher who signs other hashes is told so; a device could never collect such a release."""
    message = _message(large)
    record = wire.unpack(message.release.payload, Release)
    other = msgspec.structs.replace(record.weights, chunks=list(reversed(record.weights.chunks)))
    forged = signing.sign(msgspec.structs.replace(record, weights=other), Role.PUBLISHER, keys.publisher)
    with pytest.raises(RemoteProtocolError, match="chunks of the weights"):
        release.read(_swapped(large, release=forged), keys.root, NOW)


def test_weights_far_larger_than_the_layout_are_refused(large: bytes, keys: release.FleetKeys) -> None:
    """Nobody collects gigabytes for a model of kilobytes."""
    message = _message(large)
    record = wire.unpack(message.release.payload, Release)
    other = msgspec.structs.replace(record.weights, size=1 << 40, chunk_size=1 << 40, chunks=[bytes(32)])
    forged = signing.sign(msgspec.structs.replace(record, weights=other), Role.PUBLISHER, keys.publisher)
    with pytest.raises(RemoteProtocolError) as refused:
        release.read(wire.pack(msgspec.structs.replace(message, v=2, release=forged, weights=None)), keys.root, NOW)
    assert refused.value.reason is Reason.TOO_LARGE


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_spoilt_large_file_is_refused(large: bytes, keys: release.FleetKeys, at: float, byte: int, cut: int) -> None:
    """One changed byte or a cut end never verifies."""
    data = bytearray(large)
    data[int(at * len(data))] = byte
    spoilt = bytes(data[: len(data) - cut])
    if spoilt != large:
        with pytest.raises(RemoteProtocolError):
            release.read(spoilt, keys.root, NOW)


def test_a_release_continues_from_anothers_weights(
    wide: str, large: bytes, keys: release.FleetKeys, tmp_path: Path
) -> None:
    """The next version of a task starts where the last one stands; other layouts, tasks and versions are refused."""
    text = (DIGITS / "task.toml").read_text(encoding="utf-8")
    text = text.replace("version = 1 ", "version = 2 ", 1)
    task = tmp_path / "task.toml"
    task.write_text(text, encoding="utf-8")
    before = release.read(large, keys.root, NOW)
    data = release.build(wide, "cross_entropy", task, keys, now=NOW, seed=9, start=before)
    found = release.read(data, keys.root, NOW)
    assert (found.weights, found.manifest.version, found.release.number) == (before.weights, 2, 0)
    with pytest.raises(ExportError, match="raise `version`"):
        release.build(wide, "cross_entropy", DIGITS / "task.toml", keys, now=NOW, start=before)
    with pytest.raises(ExportError, match="do not fit this model"):
        release.build(MODEL, "cross_entropy", task, keys, now=NOW, start=before)
    bare = release.read(wire.pack(before.message), keys.root, NOW)
    with pytest.raises(ExportError, match="without its weights"):
        release.build(wide, "cross_entropy", task, keys, now=NOW, start=bare)
    task.write_text(text.replace('"digits"', '"other"', 1), encoding="utf-8")
    with pytest.raises(ExportError, match="the task file is of other"):
        release.build(wide, "cross_entropy", task, keys, now=NOW, start=before)


def test_files_beyond_reason_are_not_read(tmp_path: Path) -> None:
    """A file above the limit is refused by its size; an empty one is no release."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(release.FILE_MAX + 1)
    with pytest.raises(Failure, match="is it the right file"):
        release.open_file(path)
    with path.open("wb") as file:
        file.truncate(wire.MESSAGE_MAX + 1)
    with pytest.raises(RemoteProtocolError):
        release.read(release.open_file(path))
    path.write_bytes(b"")
    assert release.open_file(path) == b""


def test_a_publisher_that_the_root_does_not_name_is_refused(keys: release.FleetKeys) -> None:
    """Building with a key that devices would refuse fails on the publisher's machine."""
    stranger = release.FleetKeys(keys.root, Ed25519PrivateKey.generate(), keys.aggregator)
    with pytest.raises(ExportError, match="does not name this publisher"):
        release.build(MODEL, "cross_entropy", DIGITS / "task.toml", stranger, now=NOW)


def test_an_expired_publisher_is_refused(keys: release.FleetKeys) -> None:
    """Building after the publisher's key expired fails on the publisher's machine."""
    late = float(keys.root.publishers[0].expires)
    with pytest.raises(ExportError, match="expired"):
        release.build(MODEL, "cross_entropy", DIGITS / "task.toml", keys, now=late)


def test_a_foreign_root_does_not_verify(built: bytes, tmp_path: Path) -> None:
    """A release of one fleet is refused under the root of another."""
    ca.init_fleet(tmp_path / "other", "other", ["localhost"], now=NOW, passphrase=None)
    with pytest.raises(RemoteProtocolError) as refused:
        release.read(built, identity.load_root(tmp_path / "other" / "root" / "root.msgpack"), NOW)
    assert refused.value.reason is Reason.UNKNOWN_KEY


def test_an_expired_task_does_not_verify(built: bytes, keys: release.FleetKeys) -> None:
    """After its expiry a release is refused where a time is given."""
    with pytest.raises(RemoteProtocolError) as refused:
        release.read(built, keys.root, NOW + 91 * 86_400)
    assert refused.value.reason is Reason.EXPIRED


def _swapped(data: bytes, **parts: object) -> bytes:
    return wire.pack(msgspec.structs.replace(_message(data), **parts))


@pytest.mark.parametrize("root", [True, False])
def test_tampered_parts_are_refused(built: bytes, keys: release.FleetKeys, root: bool) -> None:
    """Another graph, other weights or another manifest than the release names are refused, with and without a root."""
    message = _message(built)
    assert message.graphs is not None and message.weights is not None
    trusted = keys.root if root else None
    flipped = message.weights[:-1] + bytes([message.weights[-1] ^ 1])
    swapped = Graphs(train=message.graphs.eval, eval=message.graphs.train)
    manifest = wire.unpack(message.manifest.payload, TaskManifest)
    later = signing.sign(msgspec.structs.replace(manifest, version=2), Role.PUBLISHER, keys.publisher)
    for parts, reason in (
        ({"weights": flipped}, Reason.WRONG_DIGEST),
        ({"weights": b""}, Reason.WRONG_DIGEST),
        ({"graphs": swapped}, Reason.WRONG_DIGEST),
        ({"manifest": later}, Reason.WRONG_MANIFEST),
    ):
        with pytest.raises(RemoteProtocolError) as refused:
            release.read(_swapped(built, **parts), trusted, NOW)
        assert refused.value.reason is reason


def test_an_aggregator_cannot_sign_release_0(built: bytes, keys: release.FleetKeys) -> None:
    """The first release is a publisher's alone."""
    forged = signing.sign(wire.unpack(_message(built).release.payload, Release), Role.AGGREGATOR, keys.publisher)
    with pytest.raises(RemoteProtocolError):
        release.read(_swapped(built, release=forged), keys.root, NOW)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), b"\x80", b"\xc1" * 100])
def test_other_files_are_refused(data: bytes) -> None:
    """Anything but a release gives the one documented error."""
    with pytest.raises(RemoteProtocolError):
        release.read(data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_spoilt_file_is_refused_or_told(
    built: bytes, keys: release.FleetKeys, at: float, byte: int, cut: int
) -> None:
    """One changed byte or a cut end never verifies, and without a root never fails but with the documented error."""
    data = bytearray(built)
    data[int(at * len(data))] = byte
    spoilt = bytes(data[: len(data) - cut])
    if spoilt == built:
        return
    with pytest.raises(RemoteProtocolError):
        release.read(spoilt, keys.root, NOW)
    with contextlib.suppress(RemoteProtocolError):
        release.read(spoilt).facts()


def test_facts_say_whether_signatures_were_checked(built: bytes, keys: release.FleetKeys) -> None:
    """A description without a root never claims verified signatures."""
    assert release.read(built, keys.root).facts()["signatures"] == "verified"
    assert "not checked" in str(release.read(built).facts()["signatures"])


def test_missing_keys_are_named(tmp_path: Path) -> None:
    """A folder that is no fleet is the operator's to mend."""
    with pytest.raises(ConfigError, match="aggregator fleet init"):
        release.fleet_keys(tmp_path, lambda path: None)
    with pytest.raises(ConfigError, match="aggregator fleet init"):
        identity.load_root(tmp_path / "root.msgpack")
    (tmp_path / "root.msgpack").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="not a fleet's root record"):
        identity.load_root(tmp_path / "root.msgpack")


def test_an_encrypted_publisher_key_asks_once(tmp_path: Path) -> None:
    """The passphrase is asked for the publisher's key, and a wrong one is refused."""
    ca.init_fleet(tmp_path / "fleet", "test-fleet", ["localhost"], now=NOW, passphrase=b"right")
    asked: list[Path] = []

    def answer(path: Path) -> bytes:
        asked.append(path)
        return b"right"

    release.fleet_keys(tmp_path / "fleet", answer)
    assert asked == [tmp_path / "fleet" / "publisher" / "publisher.key"]
    with pytest.raises(ConfigError):
        release.fleet_keys(tmp_path / "fleet", lambda path: b"wrong")


_WINDOWS = """\
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog"}:
            raise ModuleNotFoundError(name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
"""


def test_build_show_and_publish_import_without_linux_modules(tmp_path: Path, fleet: Path) -> None:
    """Building, showing and publishing work where modules that only Unix has are missing."""
    file = tmp_path / "release.msgpack"
    common = ["--fleet", str(fleet)]
    build = ["release", "build", MODEL, "--loss", "cross_entropy", "--task", str(DIGITS / "task.toml"), "-o", str(file)]
    script = f"""{_WINDOWS}
from aggregator import cli
for arguments in ({build + common!r}, {["release", "show", str(file), *common]!r}):
    code = cli.main(arguments)
    assert code == 0, (arguments, code)
# Nothing listens there: it must come as far as the connection.
code = cli.main({["release", "publish", str(file), "--host", "127.0.0.1", "--port", "1", *common]!r})
assert code == 5, code
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mtime <= time.time()


def test_show_and_publish_need_no_torch(tmp_path: Path, fleet: Path, built: bytes) -> None:
    """Only building imports torch."""
    file = tmp_path / "release.msgpack"
    file.write_bytes(built)
    script = f"""
import sys
sys.modules["torch"] = None
from aggregator import cli, publish, model
assert cli.main({["release", "show", str(file), "--fleet", str(fleet)]!r}) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
