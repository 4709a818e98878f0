"""Modules that libraries import and the agent has no use for: left out of its memory until something asks for them.

structlog imports rich for tracebacks that the agent never draws, and asyncio for loggers that it does not have; paho
imports urllib.request, with an HTTP client and a parser of mail, for proxies. Together they are 7 MB of resident
memory. Nothing is replaced: whoever reads an attribute of one that was put off gets that of the real module.
"""

import importlib
import sys
from types import ModuleType

_NEVER = ("rich",)
"""Optional to who imports it."""
_LATER = ("asyncio", "urllib.request")


class _Later(ModuleType):
    """Imports the module of its name when it is first asked for something."""

    def __getattr__(self, attribute: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


def put_off() -> None:
    """Before any other import: those that are imported already stay."""
    for name in _NEVER:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    for name in _LATER:
        if name not in sys.modules:
            sys.modules[name] = later = _Later(name)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(importlib.import_module(parent), child, later)
