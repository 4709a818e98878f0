"""What the scenarios on a real machine share: the two Debian packages, built once, and machines that end."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent import install
from edge_agent.libraries import INDEX, WANTED
from shared import lock
from tests.system import machine
from tests.system.machine import Machine, Wire

ROOT = Path(__file__).parents[2]
TOOLS = {"dh": "debhelper", "dh_virtualenv": "dh-virtualenv", "dpkg-buildpackage": "dpkg-dev", "fakeroot": "fakeroot"}


@dataclass(frozen=True, slots=True)
class Packages:
    """The packages of this checkout."""

    agent: Path
    aggregator: Path

    def install(self, on: Machine, *chosen: Path) -> None:
        """Install them (or those chosen) as an administrator would."""
        for package in chosen or (self.agent, self.aggregator):
            on.copy_in(package, f"/root/{package.name}")
            on.run("apt-get", "install", "-y", "-q", "--reinstall", f"/root/{package.name}", timeout=120)
            on.run("rm", f"/root/{package.name}")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Both packages, built by the script that `make deb` runs."""
    absent = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"building packages needs Debian and {', '.join(absent)}")
    out = tmp_path_factory.mktemp("packages")
    quick = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
    env = {**os.environ, **quick, "OUT": str(out), "PYTHON": sys.executable}
    built = subprocess.run([ROOT / "deploy/deb/build.sh"], env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (agent,), (aggregator,) = out.glob("fieldfare-agent_*.deb"), out.glob("fieldfare-aggregator_*.deb")
    return Packages(agent, aggregator)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that `edge-agent trainer install` wants, from where this environment's packages come."""
    folder = tmp_path_factory.mktemp("wheels")
    requirements = folder / "requirements.txt"
    requirements.write_text(lock.subset((ROOT / "requirements/lock.txt").read_text(), WANTED))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    torch = ["--extra-index-url", INDEX, f"torch=={install.torch_version()}"]
    for what in (["-r", str(requirements)], torch):
        try:
            ran = subprocess.run([*pip, *what], capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("torch could not be downloaded within five minutes")
        if ran.returncode != 0:
            pytest.skip(f"the wheels cannot be downloaded here: {ran.stderr[-300:]}")
    requirements.unlink()
    return folder


@pytest.fixture(scope="module")
def machines() -> Iterator[Callable[..., Machine]]:
    """Makes machines, running, that end with the module: `machines(name, wire=..., lend=...)`."""
    if (why := machine.missing()) is not None:
        pytest.skip(why)
    made: list[Machine] = []

    def make(name: str = "machine", wire: Wire | None = None, lend: dict[Path, str] | None = None) -> Machine:
        made.append(Machine(name, wire, lend))
        made[-1].boot()
        return made[-1]

    yield make
    for each in made:
        each.end()
