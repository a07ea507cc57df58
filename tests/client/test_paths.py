"""A model that cannot be opened by path from here says why, and what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cached.client import paths
from cached.core.errors import NotPermitted

if TYPE_CHECKING:
    from pathlib import Path


def test_what_can_be_opened_is_fine(tmp_path: Path):
    (tmp_path / "w").write_bytes(b"")
    paths.check("llm", str(tmp_path / "w"))
    assert paths.can_open(str(tmp_path / "w"))


def test_a_link_to_a_process_that_cannot_be_seen_says_so(tmp_path: Path):
    link = tmp_path / "w.safetensors"
    os.symlink("/proc/4194305/fd/7", link)  # above the largest pid: proc(5)
    assert not paths.can_open(str(link))
    with pytest.raises(NotPermitted) as caught:
        paths.check("llm", str(link))
    assert caught.value.message == (
        f"llm is in sealed memory, and {link} leads to /proc/4194305/fd/7: "
        "No such file or directory"
    )
    assert "read tensors or buffers instead" in caught.value.hint
    assert "--segments tmpfs" in caught.value.hint


def test_a_directory_that_is_not_mounted_here_says_so(tmp_path: Path):
    with pytest.raises(NotPermitted, match="No such file or directory") as caught:
        paths.check("llm", str(tmp_path / "none" / "w"))
    assert "must be mounted at the same place" in caught.value.hint
