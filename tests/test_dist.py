"""The wheel installs alone and opens a model without any dependency; the sdist holds the tests."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cached
from bench import gpt2
from tests.e2e.served import MIB, Served, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What a fresh venv holds by itself; setuptools up to Python 3.11.
BARE = {"pip", "setuptools"}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # of a page to another file
# Those of the tests that read the tree that they lie in, and those of the benches.
OF_THE_TREE = (
    "tests/test_layers.py",
    "tests/test_mirror.py",
    "tests/cli/test_reference.py",
    "bench/tests",
)
READ = """
import hashlib, cached
with cached.open("llm", timeout_s=15) as model:
    print(model.dtype("wte.weight"), *model.shape("wte.weight"))
    print(hashlib.sha256(model.buffer("wte.weight")).hexdigest())
    with open(f"{model.path}/config.json", "rb") as file:
        print(hashlib.sha256(file.read()).hexdigest())
    try:
        model["wte.weight"]
    except cached.MissingPackage as error:
        print(error)
"""


def output(*command: str | Path, cwd: Path, more: Mapping[str, str] | None = None) -> str:
    """Run a command outside the checkout, so that only what is installed can be imported."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**environment(), "PYTHONPATH": "", **(more or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def built(kind: str, out: Path) -> Path:
    """Return what ``python -m build`` makes of the checkout."""
    build = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, ROOT)
    output(sys.executable, *build, cwd=out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the source archive."""
    archive = built("sdist", tmp_path_factory.mktemp("sdist"))
    assert archive.stat().st_size < 2 * MIB  # sources, and no leavings of a bench
    into = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    return into / f"cached_models-{cached.__version__}"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A daemon of the development environment, with a small model."""
    gpt2.write_model(tmp_path, gpt2.TINY)
    served = Served({"llm": f"file://{tmp_path}/"})
    try:
        served.wait_for_start()
        yield served
        assert served.stop() == 0
    finally:
        served.remove()


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


def test_it_opens_a_model_without_any_dependency(fresh: Path, served: Served, tmp_path: Path):
    wte = gpt2.load_files(tmp_path)["wte.weight"]
    told, tensor, config, refusal = output(
        fresh / "python", "-c", READ, cwd=fresh, more=served.worker_environment()
    ).splitlines()
    assert told == f"BF16 {wte.shape[0]} {wte.shape[1]}"
    assert tensor == hashlib.sha256(wte.tobytes()).hexdigest()
    assert config == hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    assert "numpy is not installed" in refusal


def test_every_link_of_a_page_leads_to_a_file_of_the_source_archive(unpacked: Path):
    pages = sorted(unpacked.rglob("*.md"))
    links = {(page, link) for page in pages for link in LINK.findall(page.read_text())}
    assert (unpacked / "README.md", "SECURITY.md") in links
    assert {link for page, link in links if not (page.parent / link).exists()} == set()


def test_the_source_archive_holds_every_test_and_they_run_from_it(unpacked: Path):
    def tests(root: Path) -> set[str]:
        found = [path for top in ("tests", "bench") for path in (root / top).rglob("test_*.py")]
        return {path.relative_to(root).as_posix() for path in found}

    assert tests(unpacked) == tests(ROOT)
    pytest_q = (sys.executable, "-m", "pytest", "-q")
    more = {"PYTHONPATH": os.fspath(unpacked)}  # before the checkout, for processes as well
    output(*pytest_q, "--collect-only", cwd=unpacked, more=more)
    output(*pytest_q, "-m", "not slow", *OF_THE_TREE, cwd=unpacked, more=more)
