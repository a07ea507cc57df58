"""The import contracts in pyproject.toml catch what they forbid.

Each case plants one module in a copy of the package. A contract that no longer matches the package
(a renamed layer, a wrong option) would pass silently otherwise.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LAYERS = "Layers: imports point down only"
CORE_LAYERS = "Core layers: engine over policies over formats and accounting"
PURE = "The core is pure: no I/O, no clock, no randomness, no threads, no logging"
INDEPENDENT = "Adapters do not know each other"
LIGHT_CLIENT = "The worker's client stays light"
FAST_START = "What runs before the first GET starts fast"

PLANTED = {
    "a core that reads a clock": ("core/units.py", "import time", PURE),
    "a core that imports a library": ("core/units.py", "import aiohttp", PURE),
    "an import upward": ("core/units.py", "import cached.adapters.clock", LAYERS),
    "an adapter that imports another": (
        "adapters/clock.py",
        "import cached.adapters.memory",
        INDEPENDENT,
    ),
    "a policy below its place": ("core/errors.py", "import cached.core.ledger", CORE_LAYERS),
    "a module that no layer names": ("helpers.py", "import json", LAYERS),
    "a core module that no layer names": ("core/helpers.py", "import json", CORE_LAYERS),
    "a heavy client": ("client/fresh.py", "def later():\n    import boto3", LIGHT_CLIENT),
    "a client that imports the engine": (
        "client/fresh.py",
        "import cached.core.engine",
        LIGHT_CLIENT,
    ),
    "a slow start": ("adapters/clock.py", "import logging", FAST_START),
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    command = (tool, "--no-cache", "--config", root / "pyproject.toml")
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "cached", tmp_path / "cached")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_all_contracts(copy: Path):
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", PLANTED)
def test_a_contract_catches(copy: Path, case: str):
    name, code, contract = PLANTED[case]
    with (copy / "cached" / name).open("a") as file:
        file.write(f"\n{code}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())
