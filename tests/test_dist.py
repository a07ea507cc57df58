"""The wheel installs alone: no dependency, the client imports, and the command answers."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import cached

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What a fresh venv holds by itself; setuptools up to Python 3.11.
BARE = {"pip", "setuptools"}


def output(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout, so that only what is installed can be imported."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    output(sys.executable, *build, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a venv with the wheel and nothing else."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # --no-index: a dependency could not be found, so the installation would fail
    output(python, "-m", "pip", "-qq", "install", "--no-index", wheel, cwd=home)
    return home / "bin"


def test_the_wheel_holds_the_typed_package_and_its_licence_only(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"cached_models-{cached.__version__}-py3-none-any.whl"
    assert "cached/py.typed" in names
    assert f"cached_models-{cached.__version__}.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {
        "cached",
        f"cached_models-{cached.__version__}.dist-info",
    }


def test_nothing_is_installed_beside_it(fresh: Path):
    listed = output(fresh / "python", "-m", "pip", "list", "--format=freeze", cwd=fresh)
    assert {line.split("==")[0] for line in listed.splitlines()} - BARE == {"cached-models"}


def test_it_imports_from_where_it_was_installed(fresh: Path):
    show = "import cached; print(cached.__version__, cached.__file__)"
    version, file = output(fresh / "python", "-c", show, cwd=fresh).split()
    assert version == cached.__version__
    assert Path(file).is_relative_to(fresh.parent)


def test_the_command_tells_its_version(fresh: Path):
    assert output(fresh / "cached", "--version", cwd=fresh) == f"cached {cached.__version__}"
