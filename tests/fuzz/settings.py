"""Configurations and task files: whatever stands in them, what comes back is settings or a ConfigError."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import aggregator.config
import edge_agent.config
from aggregator import task
from shared import config, wire
from shared.errors import ConfigError
from shared.messages import TaskManifest
from shared.opset import OPSET_VERSION
from tests.fuzz.mutate import edit
from tests.fuzz.target import Target, folder
from tests.records import LAYOUT, NOW, Records

_SAMPLES = Path(__file__).parents[2] / "docs" / "samples"
_TASK = (_SAMPLES / "task.toml").read_text()
_GATED = _TASK.replace(
    "[conditions]",
    "until = 0.95\ngate = { drop = 0.1, reporters = 4 }\n\n[conditions]\nidle_user = true\nunmetered = true",
)
SOURCES: dict[str, list[str]] = {
    "agent.toml": [(_SAMPLES / name).read_text() for name in ("agent.toml", "agent.full.toml")],
    "aggregator.toml": [(_SAMPLES / "aggregator.toml").read_text()],
    "task.toml": [_TASK, _GATED],
}
_TEXTS = [text for texts in SOURCES.values() for text in texts]
_BESIDE = ("ca.crt", "device.crt", "device.key", "root.msgpack", "agg-0.crt", "agg-0.key", "signing.key")
_NAMES = (
    "BROKER__HOST",
    "BROKER__PORT",
    "POLICY__WINDOWS",
    "DATA__X__PATH",
    "LOG__LEVEL",
    "A__B",
    "BROKER__",
    "__",
    "X__Y__Z",
)
_TOLD = ("x", "", "1", "-1", "true", "nan", "[1]", '["sun"]', "{", "[" * 3_000, "\0", "\n", '"', "1e400", "é")


@dataclass(frozen=True)
class Files:
    """What is on the disk, and in the environment, when a daemon starts or a release is built."""

    name: str
    text: str
    drop_in: str | None = None
    environ: tuple[tuple[str, str], ...] = ()


@cache
def _folder() -> Path:
    """A folder with the files that the samples name."""
    made = folder("settings")
    for name in _BESIDE:
        (made / name).write_bytes(b"")
    for name in SOURCES:
        (made / f"{name}.d").mkdir()
    return made


def _make(rng: Random) -> Files:
    name = list(SOURCES)[rng.randrange(len(SOURCES))]
    texts = SOURCES[name]
    text = texts[rng.randrange(len(texts))]
    drop_in, environ = None, []
    if name == "task.toml" or rng.randrange(4):
        text = edit(text, rng, _TEXTS)
    elif rng.randrange(2):
        drop_in = edit("\n".join(text.splitlines()[: rng.randrange(12)]), rng, _TEXTS)
    for _ in range(rng.randrange(3) * (rng.randrange(4) == 0)):
        environ.append((f"FIELDFARE_{rng.choice(_NAMES)}", rng.choice(_TOLD)))
    return Files(name, text, drop_in, tuple(environ))


def judge(files: Files) -> bool:
    """ConfigError with a word of advice, or settings that are whole; a task's make a manifest that everybody reads."""
    there = _folder()
    path, beside = there / files.name, there / f"{files.name}.d" / "10-more.toml"
    path.write_bytes(files.text.encode("utf-8", "surrogateescape"))
    beside.unlink(missing_ok=True)
    if files.drop_in is not None:
        beside.write_bytes(files.drop_in.encode("utf-8", "surrogateescape"))
    try:
        found = _LOADERS[files.name](path, dict(files.environ))
    except ConfigError as error:
        assert error.advice and len(str(error)) < 4_000, "no advice, or one that nobody reads"
        return False
    assert config.effective(found)
    return True


def _task(path: Path, environ: dict[str, str]) -> Any:
    found = task.load(path)
    records = Records()
    manifest = task.manifest(
        path,
        found,
        now=NOW.utc,
        opset=OPSET_VERSION,
        train_graph=bytes(32),
        eval_graph=bytes(32),
        layout=LAYOUT,
        aggregator_keys=records.manifest().aggregator_keys,
    )
    data = wire.pack(manifest)
    assert wire.pack(wire.unpack(data, TaskManifest)) == data
    return found


_LOADERS: dict[str, Callable[[Path, dict[str, str]], Any]] = {
    "agent.toml": edge_agent.config.load,
    "aggregator.toml": aggregator.config.load,
    "task.toml": _task,
}


def _good() -> list[Files]:
    return [Files(name, text) for name, texts in SOURCES.items() for text in texts]


SETTINGS = Target("settings", _make, judge, _good, examples=400)
TARGETS = [SETTINGS]
