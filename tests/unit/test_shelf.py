"""edge_agent.shelf: what programs on the device find is whole, of one release, and the newest."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from edge_agent import shelf
from edge_agent.shelf import Model, Shelf
from shared.errors import StorageError
from tests.records import Records

MANIFEST = Records().manifest()
FILES = {"model.safetensors", "eval.graph", "manifest.msgpack", "model.json"}


def model(number: int, task: str = "points") -> Model:
    """A release."""
    return Model(task, 1, number, bytes([number]) * 32, {"loss": number / 2}, 40, 1_800_000_000)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """(graph, weights) as the store keeps them."""
    for name in ("graph", "weights"):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).chmod(0o600)
    return tmp_path / "graph", tmp_path / "weights"


@pytest.fixture
def models(tmp_path: Path) -> Shelf:
    """An empty shelf."""
    return Shelf(tmp_path / "state" / "models", public=False)


def test_what_lies_there(models: Shelf, parts: tuple[Path, Path]) -> None:
    """Everything that a program needs, behind one link; nobody else may read it unless the owner says so."""
    assert models.models() == []
    models.put(model(1), MANIFEST, *parts)
    link = models.path("points")
    assert link.is_symlink() and {path.name for path in link.iterdir()} == FILES
    assert (link / "model.safetensors").read_bytes() == b"weights"
    assert (link / "model.safetensors").stat().st_ino == parts[1].stat().st_ino  # no second copy on the disk
    assert json.loads((link / "model.json").read_text())["release"] == 1
    assert models.models() == [model(1)] == [shelf.read(link)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (link.parent, link.resolve(), *link.iterdir()))


def test_a_folder_that_is_closed(models: Shelf, tmp_path: Path) -> None:
    """It is known before the first model comes, also where the folder is not there yet."""
    assert models.closed == ""
    (tmp_path / "file").touch()
    closed = Shelf(tmp_path / "file" / "models", public=True).closed
    assert closed.startswith(str(tmp_path / "file")) and "ReadWritePaths=" in closed


def test_the_next_release(models: Shelf, parts: tuple[Path, Path]) -> None:
    """The link changes at once; who has the old folder open reads on, and it is gone then."""
    models.put(model(1), MANIFEST, *parts)
    old = models.path("points").resolve()
    opened = os.open(old / "model.safetensors", os.O_RDONLY)
    parts[1].unlink()
    parts[1].write_bytes(b"other weights")
    models.put(model(2), MANIFEST, *parts)
    models.put(model(3, "other"), structs.replace(MANIFEST, task="other"), *parts)
    assert os.read(opened, 100) == b"weights"
    os.close(opened)
    assert not old.exists() and models.models() == [model(3, "other"), model(2)]
    assert len(list(models.path("points").parent.iterdir())) == 4


def test_tasks_that_are_not_followed_any_more(models: Shelf, parts: tuple[Path, Path]) -> None:
    """Their models stay, until there are many: then the oldest go, and never one that is followed."""
    names = [f"task-{number}" for number in range(shelf.UNFOLLOWED_MAX + 3)]
    for age, name in enumerate(names):
        models.put(replace(model(1, name), since=age), structs.replace(MANIFEST, task=name), *parts)
    models.prune(names)
    assert len(models.models()) == len(names)
    models.prune(names[:1])
    assert {each.task for each in models.models()} == {names[0], *names[3:]}
    assert len(list(models.path("points").parent.iterdir())) == 2 * (1 + shelf.UNFOLLOWED_MAX)


def test_the_same_release_again(models: Shelf, parts: tuple[Path, Path]) -> None:
    """A second judgement, or a repair, replaces it in a folder of its own: the link never leads to half a model."""
    folders = set()
    for _ in range(3):
        models.put(model(1), MANIFEST, *parts)
        assert models.models() == [model(1)]
        folders.add(models.path("points").resolve())
    assert len(folders) == 2 and len(list(models.path("points").parent.iterdir())) == 2


def test_for_everybody(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    """A public shelf has copies of its own, which other users may read, while the store's files stay closed."""
    models = Shelf(tmp_path / "models", public=True)
    models.put(model(1), MANIFEST, *parts)
    link = models.path("points")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (link.parent, link.resolve(), *link.iterdir()))
    assert parts[1].stat().st_mode & 0o077 == 0


def test_weights_to_judge_by(models: Shelf, parts: tuple[Path, Path]) -> None:
    """Only those of the same layout; none where none are in use, or what is there is damaged."""
    assert models.weights(MANIFEST) is None
    models.put(model(1), MANIFEST, *parts)
    found = models.weights(structs.replace(MANIFEST, version=2))
    assert found is not None and found.read_bytes() == b"weights"
    assert models.weights(structs.replace(MANIFEST, layout=[])) is None
    (models.path("points") / "manifest.msgpack").write_bytes(b"junk")
    assert models.weights(MANIFEST) is None


@pytest.mark.parametrize("about", [b"", b"[]", b"{}", b'{"metrics": 1}', b"\xff", b"[" * 100_000])
def test_damaged(models: Shelf, parts: tuple[Path, Path], about: bytes) -> None:
    """A model that cannot say what it is is none."""
    models.put(model(1), MANIFEST, *parts)
    (models.path("points") / "model.json").write_bytes(about)
    assert models.models() == []
    models.put(model(1), MANIFEST, *parts)
    assert models.models() == [model(1)]


def test_a_disk_that_refuses(models: Shelf, parts: tuple[Path, Path]) -> None:
    """The model in use stays, whole."""
    models.put(model(1), MANIFEST, *parts)
    with pytest.raises(StorageError):
        models.put(model(2), MANIFEST, parts[0], parts[1].with_name("gone"))
    assert models.models() == [model(1)]
