"""What lies in a root, looked at without belief: by whom it was left, and what can be made of it.

Layout, with a number N for each version that is only this root's::

    about/N.json, about/N.map       what the next daemon is told: description.py
    about/N.over                    the versions that the operator went back from, to this one
    about/N.checked                 by what each of its files was checked, once it is published
    filling/N/PATH                  being filled
    models/NAME/VERSION/PATH        published

A description is renamed into place once all files are there at full length, and removed before
any of them is. So one without ``filling/N`` belongs to the published version that it names, and
what has none was being made or removed. A file is 0600 until it is complete and 0444 from then on.
"""

from __future__ import annotations

import contextlib
import os
import stat
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from cached.adapters.segments.description import MAX_BYTES, parse, ranges
from cached.adapters.segments.homes import CURRENT, current, leave
from cached.adapters.segments.root import is_directory, remove
from cached.core.checksums import WAYS
from cached.core.objects import Left, Range, VersionRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

    from cached.adapters.segments.description import Description

FILLING_MODE: Final = 0o600
COMPLETE_MODE: Final = 0o444
MAX_PATH_BYTES: Final = 4095  # PATH_MAX without the NUL: limits.h(0p)
MAX_DIGITS: Final = 15  # of a number in a root
ROOM: Final = 10**9  # numbers, more than a daemon ever gives to versions
MORE: Final = ("over", "checked")  # beside description and map; may be missing
MAX_OVER_BYTES: Final = 4096  # of some names of versions


class Relic(NamedTuple):
    """A version that lies in a root.

    Attributes:
        left: for those who decide what becomes of it.
        place: its directory, as the system spells it.
        stem: its number in ``about``, if it has a description.
    """

    left: Left
    place: str
    stem: str | None


def survey(root: str, boot_id: str) -> list[Relic]:
    """Return the versions that lie in a root; remove what belongs to none.

    Args:
        root: with real directories ``about``, ``filling`` and ``models`` of this user.
        boot_id: of this start of the machine.

    Raises:
        OSError: the system refuses.
    """
    told = _descriptions(f"{root}/about")
    relics: list[Relic] = []
    for place, home in _places(root):
        name = os.path.basename(place)
        stem = _stem(told, root, place) if home else name
        description = told.pop(stem, None) if stem else None
        found = _files(place) if description else None
        there = _there(f"{root}/about/{stem}.map", description, found, is_complete=bool(home))
        left = Left(
            of=_named(description, place, home),
            manifest=description.manifest if description and there is not None else None,
            path=_printable(place),
            is_published=bool(home),
            is_current=bool(home) and current(home) == name,
            size_bytes=0,  # told below, once all are known
            is_trusted=bool(boot_id and description and description.boot_id == boot_id),
            passed_over=_passed_over(f"{root}/about/{stem}.over"),
            inodes=_inodes(description, found) if there is not None else (),
            there=there or (),
            checked_by=_checked_by(f"{root}/about/{stem}.checked", found) if home else (),
        )
        relics.append(Relic(left, place, stem if description else None))
    _sweep(root, {relic.stem for relic in relics if relic.left.manifest})
    return _sized(_numbered(relics))


def last_number(root: str) -> int:
    """Return the highest number that anything in a root has; 0 if nothing has any.

    Not one above which there are not enough for the versions to come: we never get so far.
    """
    entries = [*_entries(f"{root}/about"), *_entries(f"{root}/filling")]
    stems = {entry.name.partition(".")[0] for entry in entries}
    numbers = sorted({0, 10**MAX_DIGITS, *map(int, filter(_is_number, stems))})
    return max(number for number, above in pairwise(numbers) if above - number > ROOM)


def _descriptions(about: str) -> dict[str, Description]:
    """Return what can be read and believed, by number."""
    found = {}
    for entry in _entries(about):
        stem, dot, kind = entry.name.rpartition(".")
        if dot and kind == "json" and _is_number(stem):
            with contextlib.suppress(ValueError, OSError):
                found[stem] = parse(_content(entry.path, MAX_BYTES))
    return found


def _is_number(text: str) -> bool:
    return (
        text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS and str(int(text)) == text
    )


def _places(root: str) -> Iterator[tuple[str, str]]:
    """Return the directories of versions: being filled, without a home, before all others."""
    for entry in _entries(f"{root}/filling"):
        if entry.is_dir(follow_symlinks=False):
            yield entry.path, ""
    for home in _entries(f"{root}/models"):
        for entry in _entries(home.path):
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, home.path


def _stem(told: dict[str, Description], root: str, place: str) -> str | None:
    """Return the number of a published version; None unless exactly one of what is left fits."""
    stems = [
        stem
        for stem, one in told.items()
        if f"{root}/models/{one.of.name}/{one.of.version}" == place
    ]
    return stems[0] if len(stems) == 1 else None


def _named(description: Description | None, place: str, home: str) -> VersionRef:
    if description:
        return description.of
    version = _printable(os.path.basename(place))
    return VersionRef(_printable(os.path.basename(home)) if home else "unknown", version)


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _there(
    map_path: str,
    description: Description | None,
    found: dict[str, os.stat_result] | None,
    *,
    is_complete: bool,
) -> tuple[tuple[Range, ...], ...] | None:
    """Return what is there of each file; None if it is not all as it was described."""
    if description is None or found is None:
        return None
    objects = description.manifest.objects
    if found.keys() != {stored.path for stored in objects}:
        return None
    try:
        marked = ranges(_content(map_path, MAX_BYTES), description.manifest)
    except (ValueError, OSError):
        return None
    there = []
    for stored, runs in zip(objects, marked, strict=True):
        mode = is_ours(found[stored.path], stored.size_bytes)
        if mode is None or (is_complete and mode != COMPLETE_MODE):
            return None
        whole = [Range(0, stored.size_bytes)] if stored.size_bytes else []
        there.append(tuple(whole if mode == COMPLETE_MODE else runs))
    return tuple(there)


def _inodes(
    description: Description | None, found: dict[str, os.stat_result] | None
) -> tuple[tuple[int, int], ...]:
    if description is None or found is None:
        return ()
    facts = (found[stored.path] for stored in description.manifest.objects)
    return tuple((one.st_dev, one.st_ino) for one in facts)


def _passed_over(path: str) -> tuple[str, ...]:
    """Return the versions that a file names, a line each; none if it cannot be believed."""
    try:
        return tuple(_content(path, MAX_OVER_BYTES).decode().split("\n"))
    except (ValueError, OSError):
        return ()


def _checked_by(path: str, found: Sized | None) -> tuple[str, ...]:
    """Return by what files were checked, a line each; none if it cannot be believed."""
    try:
        *ways, end = _content(path, MAX_BYTES).decode().split("\n")
    except (ValueError, OSError):
        return ()
    is_sound = found is not None and len(ways) == len(found) and not end and WAYS.issuperset(ways)
    return tuple(ways) if is_sound else ()


def is_ours(found: os.stat_result, size_bytes: int) -> int | None:
    """Return the mode of a file that we can have made; None: somebody else made or changed it."""
    mode = stat.S_IMODE(found.st_mode)
    is_like_ours = (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and found.st_size == size_bytes
        and mode in {FILLING_MODE, COMPLETE_MODE}
    )
    return mode if is_like_ours else None


def _files(place: str) -> dict[str, os.stat_result] | None:
    """Return the files below a directory, by path; None if there is anything that we never make."""
    found = {}
    for entry in walk(place):
        if not _has_path(entry):
            return None
        facts = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(facts.st_mode):
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                return None
        elif stat.S_ISREG(facts.st_mode):
            found[entry.path[len(place) + 1 :]] = facts
        else:
            return None
    top = os.lstat(place)
    return None if top.st_uid != os.geteuid() or top.st_mode & 0o022 else found


def walk(place: str) -> Iterator[os.DirEntry[str]]:
    """Return all that lies below a directory, following no link; a directory before its entries.

    Not what lies below a directory whose own path is too long for the system.
    """
    directories = [place]
    for directory in directories:  # grows
        for entry in _entries(directory):
            if entry.is_dir(follow_symlinks=False) and _has_path(entry):
                directories.append(entry.path)
            yield entry


def _has_path(entry: os.DirEntry[str]) -> bool:
    """Return whether a path is as short as the system asks; ours are, or we could not make them."""
    return len(os.fsencode(entry.path)) <= MAX_PATH_BYTES


def _sized(relics: list[Relic]) -> list[Relic]:
    """Return the relics with what each takes in memory; a file of several counts in one of them.

    That is the one which the core would rather go on with (core/adoption.py): it counts all files
    of what goes on, so no file counts in what goes as well.
    """
    counted: set[tuple[int, int]] = set()
    sizes = {
        relic.left.of: _size_bytes(relic.place, counted)
        for relic in sorted(relics, key=_rank, reverse=True)
    }
    return [
        relic._replace(left=relic.left._replace(size_bytes=sizes[relic.left.of]))
        for relic in relics
    ]


def _numbered(relics: list[Relic]) -> list[Relic]:
    """Return the relics in the order in which they were made, their loads numbered so."""
    relics = sorted(relics, key=lambda relic: int(relic.stem or 0))
    return [
        relic._replace(left=relic.left._replace(of=relic.left.of._replace(load=number)))
        for number, relic in enumerate(relics, 1)
    ]


def _rank(relic: Relic) -> tuple[bool, bool, bool, int]:
    left = relic.left
    return left.manifest is not None, left.is_current, left.is_published, left.of.load


def _size_bytes(place: str, counted: set[tuple[int, int]]) -> int:
    """Return what the files take that were not counted yet, by device and inode."""
    size_bytes = 0
    for entry in filter(_has_path, walk(place)):
        found = entry.stat(follow_symlinks=False)
        key = (found.st_dev, found.st_ino)
        if stat.S_ISREG(found.st_mode) and key not in counted:
            counted.add(key)
            size_bytes += found.st_blocks * 512
    return size_bytes


def _entries(path: str) -> list[os.DirEntry[str]]:
    """Return what lies in a directory, by name; nothing if it is a link or something else."""
    if not is_directory(path):
        return []
    with os.scandir(path) as found:
        return sorted(found, key=lambda entry: entry.name)


def _content(path: str, most_bytes: int) -> bytes:
    """Return a small regular file of this user.

    Raises:
        ValueError: it is another's, is too long, or is no such file.
        OSError: of the system; also if it is a link.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not is_ours or found.st_mode & 0o022 or found.st_size > most_bytes:
            message = f"{path} is not what this daemon writes"
            raise ValueError(message)
        return file.read(most_bytes)


def _sweep(root: str, stems: set[str | None]) -> None:
    """Remove what belongs to no version."""
    kept = {f"{stem}.{kind}" for stem in stems for kind in ("json", "map", *MORE)}
    for entry in _entries(f"{root}/about"):
        if entry.name not in kept:
            remove(entry.path)
    for entry in _entries(f"{root}/filling"):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    for home in _entries(f"{root}/models"):
        if home.is_dir(follow_symlinks=False):
            _sweep_home(home.path)
        else:
            os.unlink(home.path)


def _sweep_home(home: str) -> None:
    named = current(home)
    for entry in _entries(home):
        is_version = entry.is_dir(follow_symlinks=False)
        is_link = entry.name == CURRENT and named is not None and "/" not in named
        if not is_version and not (is_link and is_directory(f"{home}/{named}")):
            os.unlink(entry.path)
    leave(home)
