"""Only who knows the token passes; a file that others can read is no secret, and is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.http import TokenFile
from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer  {TOKEN} "])
def test_the_token_passes(path: Path, header: str):
    assert TokenFile(str(path)).allows(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \u00e4\udc80",
        f"Bearer\t{TOKEN}",
    ],
)
def test_nothing_else_does(path: Path, header: str):
    assert not TokenFile(str(path)).allows(header)


@given(st.text())
def test_no_text_passes(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    assert not TokenFile(str(path)).allows(text)


def test_a_token_that_was_replaced_counts_at_once(path: Path):
    token = TokenFile(str(path))
    path.write_text("f" * 32)
    assert token.allows("Bearer " + "f" * 32)
    assert not token.allows(f"Bearer {TOKEN}")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_others_can_read_or_change_is_refused(path: Path, mode: int):
    token = TokenFile(str(path))
    path.chmod(mode)
    said = f"http_token_file {path} has mode {mode:04o}: others may read or change it; make one:"
    with pytest.raises(InvalidConfig) as caught:
        TokenFile(str(path))
    assert str(caught.value).startswith(said)
    with pytest.raises(InvalidConfig):
        token.allows(f"Bearer {TOKEN}")


def test_a_file_that_is_not_there_is_refused(path: Path):
    token = TokenFile(str(path))
    path.unlink()
    with pytest.raises(InvalidConfig, match="cannot be read: No such file"):
        TokenFile(str(path))
    with pytest.raises(InvalidConfig):
        token.allows(f"Bearer {TOKEN}")


@pytest.mark.parametrize("content", ["", " \n", "x" * 15, "x" * 5000])
def test_what_is_too_short_or_too_long_is_no_token(path: Path, content: str):
    path.write_text(content)
    with pytest.raises(InvalidConfig, match="must hold 16 to 4096 bytes, holds"):
        TokenFile(str(path))


def test_a_pipe_is_no_file_and_is_not_waited_for(path: Path):
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(InvalidConfig, match="is no file"):
        TokenFile(str(path))


def test_no_message_holds_the_token(path: Path):
    path.chmod(0o644)
    with pytest.raises(InvalidConfig) as caught:
        TokenFile(str(path))
    assert TOKEN not in str(caught.value)
