"""A task's model as a file for plain PyTorch: the weights of a release, verified, as safetensors.

It never writes weights whose release does not verify against the fleet's root, and never loads torch.
"""

import mmap
from pathlib import Path

from aggregator import release
from shared import cli
from shared.errors import ExportError, Reason, RemoteProtocolError
from shared.messages import Root


def verified(data: bytes | mmap.mmap, task: str, root: Root, now: float) -> tuple[release.Description, bool]:
    """A release of `task` that the fleet signed, and whether its task may still be trained at `now` (UTC seconds).

    An expired task is no error: expiry ends training, never the use of the model. RemoteProtocolError otherwise.
    """
    try:
        found, current = release.read(data, root, now), True
    except RemoteProtocolError as error:
        if error.reason is not Reason.EXPIRED:
            raise
        found, current = release.read(data, root), False
    if found.manifest.task != task:
        raise RemoteProtocolError(Reason.WRONG_TASK, f"this is a release of {found.manifest.task}, not of {task}")
    return found, current


def write(found: release.Description, target: Path, *, force: bool = False) -> None:
    """Write the weights as safetensors with every parameter and buffer under its name in the module's state_dict.

    `load_state_dict(load_file(target), strict=True)` takes it. The file appears whole or not at all; a file that
    lies there is replaced only with `force`. ExportError where the release came without its weights.
    """
    if found.weights is None:
        raise ExportError(
            f"release {found.release.number} of {found.manifest.task} came without its weights; "
            "export from the release file or from the broker's models/TASK/release"
        )
    cli.save(target, found.weights, force=force)
