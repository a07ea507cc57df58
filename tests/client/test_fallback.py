"""Without a daemon a worker reads the model itself, if it asked for that, with one warning."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import cached
from cached.core.errors import DaemonUnavailable, InvalidConfig
from cached.core.header import write

if TYPE_CHECKING:
    from pathlib import Path

DATA = write([("t", "U8", (5,))]) + b"12345"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model on disk, and no daemon."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(DATA)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("CACHED_MODELS", f"m=file://{folder}/")
    return folder


@pytest.mark.usefixtures("alone")
def test_without_leave_a_missing_daemon_is_an_error():
    with pytest.raises(DaemonUnavailable):
        cached.open("m")


@pytest.mark.usefixtures("alone")
def test_the_model_is_read_from_its_uri_with_one_warning():
    with pytest.warns(RuntimeWarning, match="m") as warned:
        model = cached.open("m", fallback="s3")
    with model:
        assert bytes(model.buffer("t")) == b"12345"
        assert bytes(model.file("config.json")) == b"{}"
        path = model.path
        assert sorted(os.listdir(path)) == ["a.safetensors", "config.json"]

    assert len(warned) == 1


@pytest.mark.usefixtures("alone")
def test_a_model_without_a_uri_says_where_to_name_it():
    with pytest.raises(InvalidConfig, match="CACHED_MODELS"):
        cached.open("other", fallback="s3")
