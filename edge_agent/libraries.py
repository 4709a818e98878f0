"""Whether the trainer's libraries, which the agent itself never imports, are installed: a few looks at folders.

The agent looks again with every look at the device, so that installing them needs no restart. It must stay cheap and
light: the resident agent imports it.
"""

import importlib.util
import re
from pathlib import Path

WANTED = ("numpy", "safetensors", "torch", "zstandard")
"""What the trainer imports; pyproject.toml's extra `train`."""
INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of builds without CUDA."""

_MISSING = re.compile(rf"ModuleNotFoundError: No module named '(?:{'|'.join(WANTED)})'")


def present(python: Path | None = None) -> bool | None:
    """Whether all of WANTED is installed for `python` (None: this process's own interpreter); nothing is imported.

    None: that cannot be told without running the other interpreter.
    """
    if python is None:
        return all(map(_importable, WANTED))
    # The folder of the link, not of what it leads to: that is what makes an interpreter one of a virtual environment.
    prefix = python.parent.parent
    places = [*prefix.glob("lib/python3*/site-packages"), *prefix.glob("lib/python3*/dist-packages")]
    if any(all((place / name).is_dir() for name in WANTED) for place in places):
        return True
    alone = re.search(r"(?m)^include-system-site-packages *= *false", _text(prefix / "pyvenv.cfg"))
    lent = any(True for place in places for _ in place.glob("*.pth"))
    return False if alone and not lent else None


def lacks_one(line: str) -> bool:
    """Whether a line on a trainer's standard error says that one of WANTED is not installed."""
    return _MISSING.match(line) is not None


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # somebody has said that it must not be imported here
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
