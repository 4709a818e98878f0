"""Files that are there whole or not at all, also after a power cut; and files that one process holds."""

import contextlib
import os
from io import BufferedWriter
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


def hold(path: Path) -> BufferedWriter | None:
    """Hold a lock file until the result is closed, or the process ends in any way; None while another one holds it."""
    import fcntl

    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
