"""edge_agent.local: a program on the device predicts with the model in use, and with nothing that is not sound."""

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn

from aggregator import export
from edge_agent import local, shelf
from edge_agent.shelf import Model, Shelf
from shared import wire
from shared.errors import TrainingError
from shared.messages import DataContract, TaskManifest, TensorContract
from tests.records import Records

X, Y = TensorContract("x", "float32", [6]), TensorContract("y", "int64", [], classes=3)
CONTRACT = DataContract("blobs", [X], Y)


def network(seed: int) -> nn.Module:
    """A small classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def publish(folder: Path, module: nn.Module, number: int = 1, **changes: object) -> tuple[Path, TaskManifest]:
    """A release of it on a shelf."""
    exported = export.export(module, "cross_entropy", [X], Y)
    (folder / "graph").write_bytes(exported.eval)
    (folder / "weights").unlink(missing_ok=True)
    (folder / "weights").write_bytes(exported.weights)
    manifest = structs.replace(Records().manifest(), layout=exported.layout, data=CONTRACT, metric="accuracy")
    models = Shelf(folder / "models", public=False)
    about = Model("points", 1, number, bytes([number]) * 32, {}, 0, 0)
    models.put(about, manifest, folder / "graph", folder / "weights")
    return models.path("points"), manifest


def rows(count: int) -> np.ndarray:
    """Inputs."""
    return np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 5, local.BATCH + 3])
def test_it_predicts_as_the_module_does(tmp_path: Path, count: int) -> None:
    """In eval mode, any number of examples, without a target."""
    module = network(1)
    link, _ = publish(tmp_path, module)
    model = local.load(link)
    module.eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(rows(count))).numpy()
    for inputs in ({"x": rows(count), "more": np.zeros(1)}, [rows(count)]):
        answer = model.predict(inputs)
        assert np.allclose(answer.outputs[0], expected, atol=1e-6)
        assert answer.labels is not None and np.array_equal(answer.labels, expected.argmax(1))
    assert model.inputs == {"x": ("float32", [6])} and model.about.release == 1


def test_a_newer_release(tmp_path: Path) -> None:
    """A loaded model says when another one is in use, and goes on as it was."""
    link, _ = publish(tmp_path, network(1))
    model = local.load(link)
    before = model.predict([rows(3)]).outputs[0]
    assert not model.outdated()
    publish(tmp_path, network(2), number=2)
    assert model.outdated() and np.array_equal(model.predict([rows(3)]).outputs[0], before)
    assert local.load(link).about.release == 2
    assert not np.array_equal(local.load(link).predict([rows(3)]).outputs[0], before)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "no input x"),
        ([], "0 inputs where x"),
        ([rows(2).astype(np.float64)], "must be float32"),
        ([rows(2)[:, :5]], "must be float32"),
        ([rows(2)[:0]], "0 examples"),
        ([np.float32(1)], "must be float32"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, inputs: object, words: str) -> None:
    """Name what is wanted."""
    model = local.load(publish(tmp_path, network(1))[0])
    with pytest.raises(TrainingError, match=words) as caught:
        model.predict(inputs)  # type: ignore[arg-type]
    assert caught.value.reason == "data"


def test_files(tmp_path: Path) -> None:
    """CSV with or without the target's column, and NPZ with or without its array; answers as a table."""
    model = local.load(publish(tmp_path, network(1))[0])
    x = rows(4)
    np.savez(tmp_path / "bare.npz", x=x)
    np.savez(tmp_path / "full.npz", x=x, y=np.zeros(4, np.int64))
    header = ",".join("abcdef")
    lines = [",".join(f"{value!r}" for value in row.tolist()) for row in x]
    (tmp_path / "bare.csv").write_text("\n".join([header, *lines]) + "\n")
    (tmp_path / "full.csv").write_text("\n".join([header + ",y", *(line + ",1" for line in lines)]) + "\n")
    expected = model.predict([x])
    for name in ("bare.npz", "full.npz", "bare.csv", "full.csv"):
        found = model.predict(model.read(tmp_path / name, "csv" if name.endswith("csv") else "npz"))
        assert np.allclose(found.outputs[0], expected.outputs[0], atol=1e-5)
    table = model.table(expected).splitlines()
    assert table[0] == "class,output_0,output_1,output_2" and len(table) == 5
    assert expected.labels is not None and table[1].startswith(f"{expected.labels[0]},")
    (tmp_path / "bad.csv").write_text(header + "\n1,2,3\n")
    with pytest.raises(TrainingError, match="line 2: 3 columns, the task asks for 6"):
        model.read(tmp_path / "bad.csv", "csv")
    with pytest.raises(TrainingError, match="No such file"):
        model.read(tmp_path / "absent.npz", "npz")


def test_nothing_there(tmp_path: Path) -> None:
    """Before the first release there is no model."""
    with pytest.raises(TrainingError, match="no release of this task was accepted"):
        local.load(tmp_path / "models" / "points")


@pytest.mark.parametrize("file", [shelf.WEIGHTS, shelf.GRAPH, shelf.MANIFEST])
def test_damaged_files(tmp_path: Path, file: str) -> None:
    """Cut or changed, a part is refused with its reason; nothing of it is run."""
    link, manifest = publish(tmp_path, network(1))
    path = link / file
    whole = path.read_bytes()
    path.unlink()  # the store's file of that name stays as it is
    for content in (b"", whole[: len(whole) // 2], b"\x80" + whole[1:]):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"graph|weights"):
            local.load(link)
    path.write_bytes(whole)
    local.load(link)
    (link / shelf.MANIFEST).write_bytes(wire.pack(structs.replace(manifest, layout=manifest.layout[:-1])))
    with pytest.raises(TrainingError):
        local.load(link)
