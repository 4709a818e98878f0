"""Puts PyTorch, which the agent's package does not bring, into the agent's own virtual environment, or takes it out.

Versions and hashes are those of the lock that this version was tested with; torch itself has one version, and comes
from an index of CPU builds or a folder of wheels. pip does the work, in a child. It never imports what it installs, and
the daemon never imports it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from edge_agent.libraries import INDEX, WANTED
from shared import lock
from shared.errors import FieldfareError

ROOM = 1_200_000_000
"""Bytes that must be free: 0.8 GB of files, and 0.2 GB of wheels while they are unpacked."""
MACHINES = ("x86_64", "aarch64")
"""For which there are wheels of torch."""

_CHECK_TIMEOUT = 300.0
_CHECK = """
import json, torch
from torch import nn
import numpy, safetensors, zstandard
convolution = nn.Conv2d(1, 2, 3)
convolution(torch.ones(2, 1, 8, 8)).sum().backward()
assert torch.isfinite(convolution.weight.grad).all()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda}))
"""


class InstallError(FieldfareError):
    """The trainer could not be installed or removed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """What is installed."""

    version: str | None
    """Of torch; None: it is not there."""
    wanted: str
    """The version that this agent was tested with."""
    missing: tuple[str, ...]
    """Of WANTED, what is not there."""


def installed() -> Trainer:
    """What is installed for this process's interpreter."""
    return Trainer(_version("torch"), torch_version(), tuple(name for name in WANTED if _version(name) is None))


def torch_version() -> str:
    """The one version of torch that this agent was tested with."""
    found = re.search(r"^torch==(\S+)$", _requirement("torch.txt"), re.MULTILINE)
    assert found is not None
    return found[1]


def install(say: Callable[[str], None], index: str = INDEX, wheels: Path | None = None, cuda: bool = False) -> Trainer:
    """Install what the trainer needs into this process's virtual environment, and try it; InstallError if that fails.

    `wheels`: a folder to take everything from, without any index. With `cuda` torch's GPU build is taken, with all that
    it depends on, where the index has it. Running it again repairs and does no harm.
    """
    site = _site()
    _refuse_what_cannot_work(site, wheels)
    source = ["--no-index", f"--find-links={wheels}"] if wheels is not None else []
    pinned = f"torch=={torch_version()}"
    with tempfile.TemporaryDirectory(prefix=".trainer-", dir=sys.prefix) as folder:
        # pip unpacks where there is room for certain; /tmp may be small and in memory.
        pip = _Pip(say, Path(folder))
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(lock.subset(_requirement("lock.txt"), WANTED))
        say("installing what PyTorch needs, at the versions of this agent, hashes checked")
        pip.run("install", "--no-deps", "--require-hashes", *source, "-r", str(requirements))
        say(f"installing {pinned} from {wheels or index}")
        dependencies = [] if cuda else ["--no-deps"]
        pip.run("install", *dependencies, *(source or [f"--index-url={index}"]), pinned)
        if not cuda and _wants_cuda():
            pip.run("uninstall", "--yes", "torch")
            raise InstallError(
                f"{wheels or index} has a build of torch for CUDA, gigabytes more than a CPU needs: "
                f"name an index of CPU builds such as {INDEX}, or ask for it with --cuda"
            )
    say("trying it: import, and one convolution with its gradient")
    _try()
    return installed()


def remove(say: Callable[[str], None]) -> Trainer:
    """Take out what `install` put in; what the agent itself needs stays. InstallError if that fails."""
    _writable(_site())
    own = lock.subset(_requirement("lock.txt"), _needs_of("fieldfare"))
    there = sorted((lock.names(lock.subset(_requirement("lock.txt"), WANTED)) | {"torch"}) - lock.names(own))
    going = [name for name in there if _version(name) is not None]
    if going:
        say(f"removing {', '.join(going)}")
        with tempfile.TemporaryDirectory(prefix=".trainer-", dir=sys.prefix) as folder:
            _Pip(say, Path(folder)).run("uninstall", "--yes", *going)
    return installed()


# -- before ------------------------------------------------------------------------------------------------------------


def _refuse_what_cannot_work(site: Path, wheels: Path | None) -> None:
    if sys.prefix == sys.base_prefix:
        raise InstallError(f"{sys.executable} is no virtual environment; the package fieldfare-agent brings one")
    if platform.machine() not in MACHINES:
        raise InstallError(f"there are no builds of PyTorch for {platform.machine()}, only for {', '.join(MACHINES)}")
    if platform.libc_ver()[0] != "glibc":
        raise InstallError("there are no builds of PyTorch for this C library; it needs glibc")
    if wheels is not None and not any(wheels.glob("torch-*.whl")):
        raise InstallError(f"there is no wheel of torch in {wheels}: `pip download torch=={torch_version()}` gets one")
    _writable(site)
    free = shutil.disk_usage(site).free
    if free < ROOM and _version("torch") is None:
        raise InstallError(f"{free >> 20} MiB are free where {site} is, {ROOM >> 20} MiB are needed")


def _writable(site: Path) -> None:
    if not os.access(site, os.W_OK):
        raise InstallError(f"{site} is not yours to change: run it as root, with sudo")


# -- pip ---------------------------------------------------------------------------------------------------------------

_SAYS: Mapping[str, str] = {
    r"No space left on device": "the disk is full; {room} MiB are needed",
    r"DO NOT MATCH THE HASHES": "a file is not the one that this agent was tested with; nothing of it was installed",
    r"Temporary failure in name resolution|Name or service not known|Failed to establish a new connection"
    r"|Network is unreachable|Connection (?:refused|timed out|reset)|Read timed out|Max retries exceeded"
    r"|ProxyError": "the index cannot be reached; --wheels DIR installs from a folder of wheels without a network",
    r"No matching distribution found for|Could not find a version": "no build for this machine and Python {python} "
    "was found there: {line}",
    r"Permission denied": "it may not write there: run it as root, with sudo",
    r"No module named pip": "this virtual environment has no pip",
}


def explained(lines: Iterable[str]) -> str:
    """What pip's complaints mean and what to do, in one line; the last of them where nothing better is known."""
    lines = [line.strip() for line in lines if line.strip()]
    for pattern, text in _SAYS.items():
        for line in lines:
            if re.search(pattern, line):
                version = ".".join(map(str, sys.version_info[:2]))
                return text.format(room=ROOM >> 20, python=version, line=line.removeprefix("ERROR: "))
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed and said nothing"]
    return errors[-1].removeprefix("ERROR: ")


class _Pip:
    """Runs pip in a child; its words go on to a person, and the last of them are kept."""

    def __init__(self, say: Callable[[str], None], scratch: Path) -> None:
        self._say, self._scratch = say, scratch

    def run(self, verb: str, *arguments: str) -> None:
        terminal = sys.stderr.isatty()
        common = ["--disable-pip-version-check", "--no-input"]
        if verb == "install":
            # root's cache would keep 200 MB that nobody needs again.
            common += ["--no-cache-dir", f"--progress-bar={'on' if terminal else 'off'}"]
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "pip", verb, *common, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if terminal else subprocess.PIPE,  # a progress bar has no lines
                stderr=subprocess.PIPE if terminal else subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "TMPDIR": str(self._scratch), "PYTHONWARNINGS": "ignore"},
                umask=0o022,  # the agent's own user has to read it
            )
        except OSError as error:
            raise InstallError(f"{sys.executable}: {error.strerror}") from None
        said: list[str] = []
        stream = child.stderr or child.stdout
        assert stream is not None
        with stream:
            for line in stream:
                said = [*said[-200:], line]
                self._say(f"  {line.rstrip()}")
        if child.wait() != 0:
            raise InstallError(explained(said))


# -- after -------------------------------------------------------------------------------------------------------------


def _wants_cuda() -> bool:
    """Whether the torch that is installed is a build that needs NVIDIA's libraries."""
    needs = metadata.requires("torch") or []
    return any(re.match(r"(?:nvidia|cuda)-", need) and "extra ==" not in need for need in needs)


def _try() -> None:
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _CHECK], capture_output=True, text=True, timeout=_CHECK_TIMEOUT, cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        raise InstallError(
            f"PyTorch is installed, but did nothing for {_CHECK_TIMEOUT:g} s when it was tried"
        ) from None
    if ran.returncode != 0:
        words = (ran.stderr.strip().splitlines() or [f"status {ran.returncode}"])[-1]
        reason = f"signal {-ran.returncode}, such as of an instruction this CPU lacks" if ran.returncode < 0 else words
        raise InstallError(f"PyTorch is installed, but does not work here: {reason}")
    json.loads(ran.stdout)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needs_of(name: str) -> set[str]:
    """What a distribution needs without any extra, by its own metadata."""
    needs = metadata.requires(name) or []
    return {re.split(r"[^A-Za-z0-9_.-]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need}


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _requirement(name: str) -> str:
    return files("edge_agent").joinpath("_requirements", name).read_text(encoding="utf-8")
