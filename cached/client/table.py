"""The tensors of all files of a model, by name.

Files of one model may hold tensors of the same name (two components of a pipeline do). None
of them is *the* tensor of that name, so such a one is found as ``FILE::NAME`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core import header

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.client.mappings import File
    from cached.core.header import Header, Tensor


class Table(NamedTuple):
    """What the headers of a model's files say.

    Attributes:
        tensors: index of the file and place in it, in the order of the files.
        metadata: ``__metadata__`` of all files; of equal keys that of the last.
        ambiguous: names that several files have, with the names to use instead.
    """

    tensors: dict[str, tuple[int, Tensor]]
    metadata: dict[str, str]
    ambiguous: dict[str, list[str]]


def read(files: Iterable[File]) -> Table:
    """Return the table of mapped files, whose headers are there and valid."""
    headers = [
        (index, file.path, header.read(file.view(0, file.header_bytes), file.size_bytes))
        for index, file in enumerate(files)
        if file.header_bytes is not None
    ]
    tensors: dict[str, tuple[int, Tensor]] = {}
    metadata: dict[str, str] = {}
    count = 0
    for index, _, found in headers:
        metadata.update(found.metadata)
        count += len(found.tensors)
        for name, tensor in found.tensors.items():
            tensors[name] = (index, tensor)
    if len(tensors) == count:
        return Table(tensors, metadata, {})
    return _qualified(headers, metadata)


def _qualified(headers: list[tuple[int, str, Header]], metadata: dict[str, str]) -> Table:
    homes: dict[str, list[str]] = {}
    for _, path, found in headers:
        for name in found.tensors:
            homes.setdefault(name, []).append(f"{path}::{name}")
    tensors = {
        name if len(homes[name]) == 1 else f"{path}::{name}": (index, tensor)
        for index, path, found in headers
        for name, tensor in found.tensors.items()
    }
    ambiguous = {name: names for name, names in homes.items() if len(names) > 1}
    return Table(tensors, metadata, ambiguous)
