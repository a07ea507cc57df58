"""Commands run in this process, and the model that they are about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.cli.main import main
from tests.fakes.local_daemon import padded

if TYPE_CHECKING:
    import pytest

WEIGHTS = padded("w", bytes(range(256)) * 32)
HELD = "model.safetensors"


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command, and return what it printed and what it said on stderr."""
    found = main(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err
