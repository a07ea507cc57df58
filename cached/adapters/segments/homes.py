"""Where published versions lie: ``models/NAME/VERSION`` and the link ``models/NAME/current``."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.root import make_directory, remove
from cached.core.errors import ObjectRefused
from cached.core.manifest import layout_path

if TYPE_CHECKING:
    from cached.core.objects import Manifest, VersionRef

CURRENT: Final = "current"


def check_names(of: VersionRef, manifest: Manifest) -> None:
    """Refuse names that would lie anywhere but in one directory of this version.

    Raises:
        ObjectRefused: a name is no file name, or is taken.
    """
    for name in (of.name, of.version):
        if "/" in layout_path(name, ""):
            message = f"{name!r} cannot be the name of a directory"
            raise ObjectRefused(message)
    if of.version.lstrip(".") == CURRENT:
        message = f"{of.version!r} cannot be a version: that name is taken"
        raise ObjectRefused(message)
    for stored in manifest.objects:
        layout_path(stored.path, "")


def home_of(root: str, of: VersionRef) -> str:
    """Return the directory of a model."""
    return f"{root}/models/{of.name}"


def show(root: str, of: VersionRef, directory: str, mode: int) -> str:
    """Move a complete directory to where it is found; return that place.

    Raises:
        OSError: of the system; it is where it was.
    """
    home = home_of(root, of)
    with contextlib.suppress(FileExistsError):
        make_directory(home, mode)
    shown = f"{home}/{of.version}"
    os.rename(directory, shown)
    return shown


def make_current(root: str, of: VersionRef) -> None:
    """Let ``current`` point to a version, from one moment to the next."""
    home = home_of(root, of)
    link = f"{home}/.{CURRENT}"
    remove(link)  # of a daemon that was killed
    os.symlink(of.version, link)
    os.rename(link, f"{home}/{CURRENT}")


def current(home: str) -> str | None:
    """Return the version that ``current`` names; None if there is no such link."""
    try:
        return os.readlink(f"{home}/{CURRENT}")
    except OSError:
        return None


def hide(home: str, version: str) -> None:
    """Take a version's name away from ``current``."""
    if current(home) == version:
        os.unlink(f"{home}/{CURRENT}")


def leave(home: str) -> None:
    """Remove a model's directory if nothing is in it."""
    with contextlib.suppress(OSError):  # not empty, or not there
        os.rmdir(home)
