"""The newest good model of each task, as programs on this device find it: a folder behind a symbolic link.

    models/digits -> .digits.5f0c9a1e2b3d4c5f     changed at once, and only when all of it is written
        model.safetensors   the weights           eval.graph      the outputs, as data (shared.graph)
        manifest.msgpack    layout and contract   model.json      what it is, for people and programs

A reader opens the folder once and reads all from it, so that it never mixes two releases: edge_agent.local does. The
folder of the release before is removed at the next change. A model goes on answering when its task is not followed any
more, but for the oldest of many such. It imports neither torch nor numpy and decides nothing.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import wire
from shared.errors import RemoteProtocolError, StorageError
from shared.files import sync_folder, write_durably
from shared.messages import TaskManifest
from shared.topics import is_name

WEIGHTS, GRAPH, MANIFEST, ABOUT = "model.safetensors", "eval.graph", "manifest.msgpack", "model.json"
UNFOLLOWED_MAX = 16
"""Models of tasks that are not followed any more: programs may still use them, and the disk is the owner's."""
_ABOUT_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Model:
    """What lies on the shelf, of one task."""

    task: str
    version: int
    release: int
    digest: bytes
    """Of the signed release."""
    metrics: Mapping[str, float]
    """On this device's hold-out; empty where it was not judged."""
    examples: int
    """That it was judged on."""
    since: int
    """UTC seconds at which it was put here."""


class Shelf:
    """The folder of models; `public` lets other users of this device read it."""

    def __init__(self, directory: Path, public: bool) -> None:
        self._directory, self._public = directory, public

    @property
    def closed(self) -> str:
        """Why no model can be put here; "" if one can, as far as can be told without trying."""
        there = next(each for each in (self._directory, *self._directory.parents) if os.path.exists(each))
        if os.access(there, os.W_OK | os.X_OK):
            return ""
        return f"{there} is closed to the agent: ReadWritePaths= in a drop-in of the unit, and its own user, open it"

    def path(self, task: str) -> Path:
        """The link by which programs find a task's model."""
        return self._directory / task

    def weights(self, manifest: TaskManifest) -> Path | None:
        """The weights in use of this task, if they are of the same layout."""
        folder = self.path(manifest.task).resolve()
        with contextlib.suppress(OSError, RemoteProtocolError):
            kept = wire.unpack((folder / MANIFEST).read_bytes(), TaskManifest)
            if kept.layout == manifest.layout and (folder / WEIGHTS).exists():
                return folder / WEIGHTS
        return None

    def put(self, model: Model, manifest: TaskManifest, graph: Path, weights: Path) -> None:
        """Make this the model of its task; StorageError if the disk refuses, and the one before stays."""
        link = self.path(model.task)
        folder = self._directory / f".{model.task}.{model.digest.hex()[:16]}"
        if link.resolve() == folder.absolute():
            folder = folder.with_name(f"{folder.name}+")  # the same release again: what is in use is never half
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            _place(weights, folder / WEIGHTS, copy=self._public)
            _place(graph, folder / GRAPH, copy=self._public)
            write_durably(folder / MANIFEST, wire.pack(manifest))
            about = {name: getattr(model, name) for name in Model.__slots__} | {"digest": model.digest.hex()}
            write_durably(folder / ABOUT, json.dumps(about | {"metrics": dict(model.metrics)}).encode() + b"\n")
            if self._public:
                for file in folder.iterdir():
                    file.chmod(0o644)
                folder.chmod(0o755)
                self._directory.chmod(0o755)
            fresh = self._directory / f".{model.task}.new"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(folder.name)
            os.replace(fresh, link)
            sync_folder(self._directory)
        except OSError as error:
            raise StorageError.of(link, error) from None
        self._sweep(model.task, folder.name)

    def prune(self, followed: Collection[str]) -> None:
        """Of the models of tasks that are not `followed` any more keep the newest UNFOLLOWED_MAX; the rest go."""
        unfollowed = [model for model in self.models() if model.task not in followed]
        for model in sorted(unfollowed, key=lambda each: each.since)[:-UNFOLLOWED_MAX]:
            with contextlib.suppress(OSError):
                self.path(model.task).unlink(missing_ok=True)
            self._sweep(model.task, "")

    def models(self) -> list[Model]:
        """All that lie here and can be read, by name."""
        found = []
        with contextlib.suppress(OSError):
            for link in sorted(self._directory.iterdir()):
                if is_name(link.name) and link.is_symlink() and (model := read(link)) is not None:
                    found.append(model)
        return found

    def _sweep(self, task: str, used: str) -> None:
        with contextlib.suppress(OSError):
            for folder in list(self._directory.glob(f".{task}.*")):
                if folder.name != used:
                    shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> Model | None:
    """What a folder of the shelf says it holds; None if it cannot be read."""
    try:
        with (folder / ABOUT).open("rb") as file:
            about: Any = json.loads(file.read(_ABOUT_MAX))
        metrics = {str(name): float(value) for name, value in about["metrics"].items()}
        numbers = [int(about[name]) for name in ("version", "release", "examples", "since")]
        digest = bytes.fromhex(about["digest"])
        return Model(str(about["task"]), numbers[0], numbers[1], digest, metrics, numbers[2], numbers[3])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _place(source: Path, target: Path, copy: bool) -> None:
    """The same file under another name; a copy where that cannot be, or where its mode is to differ."""
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    with source.open("rb") as file, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as to:
        shutil.copyfileobj(file, to, 1 << 20)
        to.flush()
        os.fsync(to.fileno())
