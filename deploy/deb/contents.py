"""Writes what the Debian packages hold beside code: requirements, manual pages, completions, systemd's files.

    .venv/bin/python -m deploy.deb.contents FOLDER VERSION

Manual pages and completions come from the argparse parsers of the commands, so they cannot be older than these.
"""

import argparse
import hashlib
import re
import sys
import tomllib
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from aggregator import cli as aggregator_cli
from edge_agent import cli as agent_cli
from shared import lock
from shared.version import VERSION

ROOT = Path(__file__).parents[2]
PARSERS = {"edge-agent": agent_cli._parser, "aggregator": aggregator_cli._parser}
EXTRAS = {"fieldfare-agent": (), "fieldfare-aggregator": ("aggregator", "registrar")}
"""What of pyproject.toml each package installs beside the base."""
SHELLS = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}
"""How a shell wants the file called that completes a command."""
_AGENTS = re.compile(r"fieldfare-agent|edge-agent|/device\.")
_EVERYBODYS = re.compile(r"^(#|d /etc/fieldfare )")


def requirements(package: str) -> str:
    """The part of the lock that `package` installs, with its hashes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"]]
    for extra in EXTRAS[package]:
        listed += project["optional-dependencies"][extra]
    wanted = {re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0] for one in listed}
    return lock.subset((ROOT / "requirements" / "lock.txt").read_text(), wanted)


def systemd_file(kind: str, package: str) -> str:
    """The lines of systemd/fieldfare.<kind> that belong to `package`; what names no agent is the aggregator's."""
    lines = (ROOT / "systemd" / f"fieldfare.{kind}").read_text().splitlines(keepends=True)
    mine = [
        line
        for line in lines
        if _EVERYBODYS.match(line) or bool(_AGENTS.search(line)) == (package == "fieldfare-agent")
    ]
    return "".join(line for line in mine if not line.startswith("#"))


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Every command that `parser` knows, those of groups too, in the order of its help."""
    found: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                nested = commands(below)
                found += nested or [below]
    return found


def manual(program: str) -> str:
    """The manual page of a command: what it is for, then a section for each of its commands."""
    parser = PARSERS[program]()
    page = Manpage(parser)
    page.date, page.source, page.manual = "", f"fieldfare {VERSION}", "Fieldfare"
    page.description = (parser.description or "").replace("\n", " ").rstrip(".")
    text = str(page)
    head = text[: text.index(".SH OPTIONS")] if ".SH OPTIONS" in text else text[: text.index(".SH")]
    return head + "".join(_section(each) for each in [*commands(parser)]) + _ending(parser)


def _section(parser: argparse.ArgumentParser) -> str:
    lines = [f".SH {_roff(parser.prog.upper())}", _roff(_flat(parser.description or "")), ".PP", ".nf"]
    lines += [_roff(line) for line in parser.format_usage().removeprefix("usage: ").splitlines()]
    lines += [".fi"]
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        lines += [".TP", rf"\fB{_roff(formatter._format_action_invocation(action))}\fR"]
        lines += [_roff(_flat(formatter._expand_help(action))) if action.help else r"\&"]
    return "\n".join(lines) + "\n" + _examples(parser)


def _examples(parser: argparse.ArgumentParser) -> str:
    shown = re.match(r"examples?:\n((?:  .*\n)+)", parser.epilog or "")
    return ".PP\nFor example:\n.PP\n.nf\n" + _roff(shown[1].rstrip("\n")) + "\n.fi\n" if shown else ""


def _ending(parser: argparse.ArgumentParser) -> str:
    codes = re.findall(r"^ +(\d+)  (.+)$", (parser.epilog or "").partition("exit codes:")[2], re.MULTILINE)
    rows = "".join(f".TP\n{code}\n{_roff(meaning)}\n" for code, meaning in codes)
    return f".SH EXIT STATUS\n{rows}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _roff(text: str) -> str:
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in safe.split("\n"))


def completion(program: str, shell: str) -> str:
    """The script that completes a command's words in `shell`."""
    parser = PARSERS[program]()
    _complete_paths(parser)
    return str(shtab.complete(parser, shell=shell))


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    for each in [parser, *commands(parser)]:
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main(folder: Path, version: str) -> None:
    """Everything, below `folder`, where debian/ and wheel/ lie already."""
    (wheel,) = (folder / "wheel").glob("fieldfare-*.whl")
    own = f"fieldfare=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    units = {"fieldfare-agent": ["edge-agent"], "fieldfare-aggregator": []}
    for unit in sorted((ROOT / "systemd").glob("*.service")):
        units["fieldfare-agent" if unit.stem == "edge-agent" else "fieldfare-aggregator"] += (
            [] if unit.stem == "edge-agent" else [unit.stem]
        )
    for package, names in units.items():
        _write(folder / f"{package}.requirements", f"--find-links {folder}/wheel\n{own}{requirements(package)}")
        for name in names:
            _write(folder / "debian" / f"{package}.{name}.service", (ROOT / "systemd" / f"{name}.service").read_text())
        _write(folder / "debian" / f"{package}.sysusers", systemd_file("sysusers", package))
        _write(folder / "debian" / f"{package}.tmpfiles", systemd_file("tmpfiles", package))
        _write(folder / f"50-{package}.preset", systemd_file("preset", package))
        _write(folder / f"{package}.units", "".join(f"{name}\n" for name in names))
    for program in PARSERS:
        _write(folder / "manual" / f"{program}.1", manual(program))
        for shell, name in SHELLS.items():
            _write(folder / "completions" / shell / name.format(program), completion(program, shell))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
