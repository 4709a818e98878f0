"""The wheel as a stranger gets it: built from the source archive, installed into a venv of its own, commands run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.version import VERSION

ROOT = Path(__file__).parents[2]
FOLDERS = ("shared", "edge_agent", "aggregator", "mosquitto", "systemd", "requirements")
pytestmark = pytest.mark.system


@dataclass(frozen=True)
class Installed:
    """A wheel and the virtual environment it was installed into."""

    wheel: Path
    venv: Path

    def run(self, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a program of the venv in `cwd`, with nothing of the repository on Python's path."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        command = [str(self.venv / "bin" / program), *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a fresh venv; its dependencies are lent by the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because a build writes beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def python(*arguments: str) -> None:
        ran = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    python("build", "--no-isolation", "--outdir", str(folder / "dist"), str(source))
    (wheel,) = (folder / "dist").glob("*.whl")
    venv = folder / "venv"
    python("venv", "--without-pip", str(venv))
    python("pip", "--python", str(venv / "bin" / "python"), "install", "-q", "--no-deps", "--no-index", str(wheel))
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return Installed(wheel, venv)


def test_wheel_holds_all_and_only_the_packages(installed: Installed) -> None:
    """Every module and template is in the wheel, under three top-level names; no test, example or bytecode is."""
    inside = set(zipfile.ZipFile(installed.wheel).namelist())
    links = {
        "mosquitto": "aggregator/_mosquitto",
        "systemd": "aggregator/_systemd",
        "requirements": "edge_agent/_requirements",
    }
    wanted = set()
    for folder in FOLDERS:
        for root, _, names in os.walk(ROOT / folder):  # does not follow the links
            place = Path(links.get(folder, folder)) / Path(root).relative_to(ROOT / folder)
            wanted |= {str(place / name) for name in names if not root.endswith("__pycache__")}
    metadata = {name for name in inside if name.startswith(f"fieldfare-{VERSION}.dist-info/")}
    assert inside - metadata == wanted
    assert f"fieldfare-{VERSION}.dist-info/licenses/LICENSE" in metadata


@pytest.mark.parametrize("command", ["edge-agent", "aggregator"])
def test_installed_command_says_its_version(installed: Installed, command: str, tmp_path: Path) -> None:
    """Both commands are installed and start."""
    ran = installed.run(command, "--version", cwd=tmp_path)
    assert (ran.returncode, ran.stdout.split()) == (0, [command, VERSION]), ran.stderr


def test_code_comes_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    """The installed packages are the ones under test, not those of the repository."""
    code = (
        "import shared, edge_agent, aggregator as a; print(*(m.__file__ for m in (shared, edge_agent, a)), sep='\\n')"
    )
    for place in installed.run("python", "-c", code, cwd=tmp_path).stdout.splitlines():
        assert Path(place).is_relative_to(installed.venv)


def test_installed_command_makes_a_fleet(installed: Installed, tmp_path: Path) -> None:
    """`aggregator fleet init` finds its broker templates in the wheel and renders them."""
    ran = installed.run("aggregator", "fleet", "init", "fleet", "--host", "localhost", "--no-passphrase", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "fleet" / "broker" / "mosquitto.conf").is_file()
