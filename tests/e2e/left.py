"""What lies in a segment root: whether it is known, and what it takes in memory."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def found(root: Path) -> list[str]:
    """Return all that is in a root, sorted; directories end with a slash."""
    return sorted(
        path.relative_to(root).as_posix() + ("/" if path.is_dir() and not path.is_symlink() else "")
        for path in root.rglob("*")
    )


def number_in(root: Path) -> str:
    """Return the number of the one version of which something is told."""
    (description,) = root.glob("about/*.json")
    return description.stem


def assert_nothing_but(root: Path, version: str, paths: Iterable[str]) -> None:
    """See that there is one published version of the model ``llm``, whole, and nothing else."""
    number = number_in(root)
    home = f"models/llm/{version}/"
    files = [home + path for path in paths]
    parents = {file[: at + 1] for file in files for at, char in enumerate(file) if char == "/"}
    told = [f"about/{number}.{kind}" for kind in ("checked", "json", "map")]
    known = ["about/", *told, "filling/", "lock", "models/llm/current", *parents, *files]
    assert found(root) == sorted(known)


def blocks_bytes(root: Path) -> int:
    """Return what the files of models take in memory, or on the disk."""
    facts = [path.lstat() for path in root.rglob("*") if "about" not in path.parts]
    return sum(
        each.st_blocks * 512 for each in facts if stat.S_ISREG(each.st_mode) and each.st_size
    )


def assert_counts(root: Path, memory: Mapping[str, int]) -> None:
    """See that a daemon counts what lies in its root, to the page."""
    used_bytes = memory["budget_bytes"] - memory["free_bytes"]
    assert used_bytes == memory["reserved_bytes"] + memory["committed_bytes"]
    lock_bytes = (root / "lock").stat().st_blocks * 512
    assert used_bytes == blocks_bytes(root) - lock_bytes
