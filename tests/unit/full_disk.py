"""Disks that are really full: a small tmpfs where this process may mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes mounted on `folder`, which must not exist."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "fieldfare-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(folder: Path, leave: int = 0) -> Iterator[None]:
    """Nothing more fits on the file system of `folder` but about `leave` bytes, as long as this lasts."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        if leave:
            file.truncate(max(0, file.tell() - leave))
    try:
        yield
    finally:
        ballast.unlink()
