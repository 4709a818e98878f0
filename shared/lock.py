"""A lock as pip-compile writes it: which of its packages a few need, with their versions and hashes. Pure.

It reads the comments `# via ...` that say who asked for a package, so it needs no index and no installed package.
"""

import re
from collections.abc import Iterable

PROJECT = "fieldfare"

_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==[^\s;]+ *\\?$")
_VIA = re.compile(r"    #(?: via)? *(?P<parent>[A-Za-z0-9._-]+)?(?P<rest>.*)$")


def canonical(name: str) -> str:
    """The name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def subset(lock: str, wanted: Iterable[str]) -> str:
    """The entries of `lock` that the distributions `wanted` need, directly or not, themselves included.

    One of `wanted` may be missing from the lock if others are in it because of that one, as torch is; ValueError for
    a name that the lock does not know at all.
    """
    entries, parents = _read(lock)
    known = set(entries).union(*parents.values())
    needed = {canonical(name) for name in wanted}
    strangers = needed - known
    if strangers:
        raise ValueError(f"the lock knows no {', '.join(sorted(strangers))}")
    grown = True
    while grown:
        more = {name for name, of in parents.items() if of & needed} - needed
        needed |= more
        grown = bool(more)
    return "".join(entries[name] for name in sorted(needed & set(entries)))


def names(lock: str) -> set[str]:
    """The distributions that the lock pins."""
    return set(_read(lock)[0])


def _read(lock: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Each package's own lines, and who asked for it; whom only the project asked for has no parents."""
    entries: dict[str, str] = {}
    parents: dict[str, set[str]] = {}
    name = ""
    for line in lock.splitlines():
        if found := _ENTRY.match(line):
            name = canonical(found["name"])
            entries[name], parents[name] = line + "\n", set()
        elif name and line.startswith("    --hash="):
            entries[name] += line + "\n"
        elif name and (via := _VIA.match(line)) and via["parent"] and canonical(via["parent"]) != PROJECT:
            parents[name].add(canonical(via["parent"]))
    return entries, parents
