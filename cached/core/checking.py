"""Checking what came: which bytes are read back, what the store says of them, what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.effects import Check, Looked, Mismatched, ReadDigests
from cached.core.errors import ChecksumMismatch, LoadFailed
from cached.core.events import Checked
from cached.core.objects import FileRef
from cached.core.parts import MAX_PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core import events
    from cached.core.errors import CachedError
    from cached.core.loads import Load
    from cached.core.objects import ObjectFacts
    from cached.core.shelf import Shelf


class Checking:
    """The checks of all loads that are being filled.

    Args:
        shelf: models, loads and the ledger.
        failed: called when a load cannot go on, with the reason and the time.
    """

    def __init__(self, shelf: Shelf, failed: Callable[[Load, CachedError, float], None]) -> None:
        self._shelf = shelf
        self._failed = failed

    def came(self, load: Load, index: int) -> None:
        """Ask for what more bytes of a file make possible."""
        integrity = load.integrity
        is_begun = next(iter(load.planner.ranges(index)), None) is not None
        if is_begun and index not in load.looked and integrity.wants_look(index):
            load.looked.add(index)
            load.undescribed[index] = None
        is_list = index == integrity.list_index and not load.is_list_asked
        if is_list and load.planner.has(index, 0, load.manifest.objects[index].size_bytes):
            load.is_list_asked = True
            self._shelf.effects.append(ReadDigests(FileRef(load.of, index)))
        for due in integrity.due(index):
            self._shelf.effects.append(Check(FileRef(load.of, index), *due))

    def described(self, load: Load, file: FileRef, facts: ObjectFacts) -> None:
        """Take note of what the store told about an object."""
        algorithm = load.integrity.described(file.index, facts.checksum)
        path = load.manifest.objects[file.index].path
        self._shelf.effects.append(Looked(file, path, facts, algorithm))

    def digests_read(self, event: events.DigestsRead, now_s: float) -> Load | None:
        """Take the list of digests; return its load if that can go on."""
        load = self._shelf.coming(event.file.of)
        if load is None:
            return None
        try:
            load.integrity.listed(event.digests, load.manifest)
        except LoadFailed as error:
            self._failed(load, LoadFailed(error.message, hint=error.hint), now_s)
            return None
        for index in range(len(load.manifest.objects)):
            self.came(load, index)
        return load

    def digests_refused(self, event: events.DigestsRefused, now_s: float) -> None:
        """A list that is broken makes the model unusable."""
        load = self._shelf.coming(event.file.of)
        if load is not None:
            self._failed(load, event.error, now_s)

    def passed(self, load: Load, event: events.PartFetched, now_s: float) -> bool:
        """Take note of the sum of a part that came; return whether the load goes on."""
        part, value = event.part, event.checksum
        if value is None or not load.integrity.claim(part.file.index, part.start, part.stop):
            return True
        sum_of = Checked(part.file, part.algorithm, part.start, part.stop, value)
        return self.checked(sum_of, now_s) is not None

    def checked(self, event: events.Checked, now_s: float) -> Load | None:
        """Take note of a sum; return its load if that can go on."""
        load = self._shelf.coming(event.file.of)
        if load is None:
            return None
        index = event.file.index
        path = load.manifest.objects[index].path
        wrong = load.integrity.checked(index, event.start, event.stop, event.value)
        if wrong is not None:
            start, stop = wrong.span
            self._shelf.effects.append(
                Mismatched(event.file, path, event.algorithm, start, stop, wrong.is_final)
            )
            if wrong.is_final:
                what = f"bytes {start} to {stop} were wrong twice ({event.algorithm})"
                message = f"cannot load {load.of.name}: {path}: {what}"
                self._failed(load, ChecksumMismatch(message, hint=_mismatch_hint(load)), now_s)
                return None
            load.doubt_header(index)
        self.came(load, index)
        return load

    def heals_header(self, load: Load, index: int) -> bool:
        """Return whether the beginning of a file, which is no header, is fetched once more.

        Not what was found right, or was fetched again for this before. A file that was uploaded
        broken fails after one more GET; one that was broken on its way does not fail.
        """
        there = load.planner.ranges(index).first(0, 1)
        if there is None or index in load.shared or index in load.healed:
            return False
        stop = min(there.stop, MAX_PART_BYTES)
        if load.integrity.found_right(index, 0, stop):
            return False
        load.healed.add(index)
        load.planner.forget(index, 0, stop)
        load.header_asked.pop(index, None)
        file, path = FileRef(load.of, index), load.manifest.objects[index].path
        self._shelf.effects.append(Mismatched(file, path, "header", 0, stop, is_final=False))
        return True

    def check_failed(self, event: events.CheckFailed, now_s: float) -> None:
        """Bytes that cannot be read back cannot be served."""
        load = self._shelf.coming(event.file.of)
        if load is not None:
            self._failed(load, event.error, now_s)


def _mismatch_hint(load: Load) -> str:
    if load.integrity.list_index is None:
        return "upload the file again, or look at the proxies between"
    uri = load.manifest.uri
    return f"upload the file again; if it is newer than the list of digests: cached digest {uri}"
