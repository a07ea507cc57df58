"""A root on a tmpfs where there is one, as in real use."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import TmpfsSegments

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHM = "/dev/shm"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[str]:
    try:
        path = tempfile.mkdtemp(prefix="cached-test-", dir=SHM)
    except OSError:
        path = str(tmp_path / "root")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def segments(root: str) -> Iterator[TmpfsSegments]:
    segments = TmpfsSegments(root)
    yield segments
    segments.close()
