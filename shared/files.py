"""Files that are there whole or not at all, also after a power cut."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` (mode 0600) beside `path`, fsync it, and put it in its place."""
    temporary = path.with_name(f".{path.name}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
