"""Tries what training needs, for `edge-agent doctor`: `python -m edge_agent.confined --trial`, behind the same limits.

Data sets to read come as JSON on stdin; what was found goes to stdout as one line of JSON. It trains nothing, keeps
nothing, and like the trainer it tells counts, files and rows, and never a value.
"""

import json
import sys

import msgspec
import numpy as np
import safetensors
import torch
import zstandard

from edge_agent import data
from edge_agent.jobs import Source
from shared.errors import TrainingError
from shared.messages import DataContract, Wire

INPUT_MAX = 16 << 20


class Wanted(Wire, frozen=True):
    """A data set as one task asks for it."""

    task: str
    source: Source
    contract: DataContract


def main() -> None:
    """Try PyTorch, then read what stdin names; a traceback and status 1 where PyTorch does not work."""
    wanted = msgspec.json.decode(sys.stdin.buffer.read(INPUT_MAX), type=list[Wanted], dec_hook=_path)
    convolution = torch.nn.Conv2d(1, 2, 3)
    convolution(torch.ones(2, 1, 8, 8)).sum().backward()
    gradient = convolution.weight.grad
    assert gradient is not None and bool(torch.isfinite(gradient).all())
    found = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "zstandard": zstandard.__version__,
        "data": [_read(each) for each in wanted],
    }
    sys.stdout.write(json.dumps(found) + "\n")


def _path(kind: type, raw: object) -> object:
    return kind(raw)  # the only type that JSON does not have


def _read(wanted: Wanted) -> dict[str, object]:
    told = {"task": wanted.task, "dataset": wanted.contract.dataset}
    try:
        return {**told, "examples": len(data.load(wanted.source, wanted.contract)), "refused": ""}
    except TrainingError as error:
        return {**told, "examples": None, "refused": error.detail}
    except MemoryError:
        return {**told, "examples": None, "refused": "it does not fit into trainer.memory_max"}
