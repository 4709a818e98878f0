"""The deny list: names of devices that may take no part, one a line. The one authority on who is shut out, and instant.

Several programs read the same file, each by itself; `add` puts a name in so that none of them ever reads half a file.
"""

import os
from pathlib import Path

from shared.errors import ConfigError
from shared.files import sync_folder


class DenyList:
    """Names of denied devices, read again when the file changes."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._seen = path, (0, 0, 0)
        self._names: frozenset[str] = frozenset()

    def has(self, device: str) -> bool:
        """Whether a device is denied; ConfigError if the list cannot be read."""
        return device in self.names()

    def names(self) -> frozenset[str]:
        """All that are denied; an absent file denies nobody. ConfigError if it cannot be read."""
        if self._path is None:
            return frozenset()
        try:
            stat = self._path.stat()
            # The inode too: a replaced file may have the same size, within the same tick of the clock.
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                self._names = frozenset(self._path.read_text(encoding="utf-8").split())
                self._seen = seen
        except FileNotFoundError:
            return frozenset()
        except (OSError, UnicodeDecodeError) as error:
            # Nobody may count whom it might deny, so this ends the daemon and not just one update.
            raise ConfigError(str(self._path), "trust.deny", f"cannot be read: {error}") from None
        return self._names


def add(path: Path, device: str) -> bool:
    """Put a device on the list, durably; False if it is there already. OSError where the file cannot be written."""
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Two at a time would lose one of their names.
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            before = path.stat()
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            before, text = None, ""
        if device in text.split():
            return False
        if text and not text.endswith("\n"):
            text += "\n"
        fresh = path.with_name(f".{path.name}.new")
        fresh.unlink(missing_ok=True)
        # Daemons of several users read it.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with open(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644 if before is None else before.st_mode & 0o777)
            if before is not None and os.geteuid() == 0:
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(f"{text}{device}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync_folder(path.parent)
    finally:
        os.close(folder)
    return True
