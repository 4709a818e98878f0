"""Files that are there whole or not at all, also after a power cut."""

import contextlib
import os
from pathlib import Path


def write_durably(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` (mode 0600) beside `path`, fsync it, and put it in its place."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        # A full disk needs the room.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which names are in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
