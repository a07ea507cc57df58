"""Which bytes of a load were found right: what is to be summed, and what the sums say.

A CRC of the whole file is put together of those of the parts, which are computed while their
bytes pass; what came before the store had told the algorithm, and all other sums, are read back
from memory.
A checksum covers a file; until it is known to be right, tensors may be read early all the same:
pinned to the ETag. A digest covers a block of 8 MiB; what it covers is released only after it
matched. What is wrong is fetched once more, in place; the second time the load fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from cached.core import checksums
from cached.core.digests import MANIFEST_NAME
from cached.core.errors import LoadFailed
from cached.core.objects import Range
from cached.core.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cached.core.checksums import Checksum
    from cached.core.digests import Digests
    from cached.core.objects import Manifest
    from cached.core.parts import Planner

PIECE_BYTES: Final = 64 << 20  # of what one check reads, at most: others get their turn
OFF: Final = "off"
CHECKSUM: Final = "checksum"
DIGEST: Final = "digest"


class Due(NamedTuple):
    """Bytes that can be summed now: see ``effects.Check``."""

    algorithm: str
    start: int
    stop: int
    is_running: bool = False


class Wrong(NamedTuple):
    """Bytes that are not what they should be.

    Attributes:
        span: what the checksum or digest is of: all of a file, or a block.
        is_final: it is the second time; else they are planned to be fetched once more.
    """

    span: Range
    is_final: bool


class _WholeCrc:
    """A CRC of the whole file, put together of those of its ranges, in any order."""

    def __init__(self, checksum: Checksum, size_bytes: int) -> None:
        self.algorithm = checksum.algorithm
        self._checksum = checksum
        self._size_bytes = size_bytes
        self._begin()

    def _begin(self) -> None:
        self._asked = RangeSet()
        self._sums = checksums.Sums(self.algorithm)

    def due(self, there: RangeSet) -> list[Due]:
        found = [
            Due(self.algorithm, start, min(start + PIECE_BYTES, gap.stop))
            for span in there
            for gap in self._asked.missing(span.start, span.stop)
            for start in range(gap.start, gap.stop, PIECE_BYTES)
        ]
        for piece in found:
            self._asked.add(piece.start, piece.stop)
        return found

    def claim(self, start: int, stop: int) -> bool:
        """Return whether nothing of a range was asked for yet; then all of it was."""
        if self._asked.first(start, stop) is not None:
            return False
        self._asked.add(start, stop)
        return True

    def take(self, start: int, stop: int, value: bytes) -> tuple[Range, bool] | None:
        self._sums.add(start, stop, value)
        whole = self._sums.whole(self._size_bytes)
        if whole is None:
            return None
        return Range(0, self._size_bytes), whole == self._checksum.value

    def forget(self, wrong: Range) -> None:
        self._begin()


class _WholeSha:
    """A SHA of the whole file: in order, one check after the other."""

    def __init__(self, checksum: Checksum, size_bytes: int) -> None:
        self.algorithm = checksum.algorithm
        self._checksum = checksum
        self._size_bytes = size_bytes
        self._at = 0
        self._is_under_way = False

    def due(self, there: RangeSet) -> list[Due]:
        first = next(iter(there), Range(0, 0))
        if self._is_under_way or first.start > 0 or first.stop <= self._at:
            return []
        self._is_under_way = True
        stop = min(first.stop, self._at + PIECE_BYTES)
        return [Due(self.algorithm, self._at, stop, is_running=True)]

    def take(self, start: int, stop: int, value: bytes) -> tuple[Range, bool] | None:
        self._at = stop
        self._is_under_way = False
        if stop < self._size_bytes:
            return None
        return Range(0, stop), value == self._checksum.value

    def forget(self, wrong: Range) -> None:
        self._at = 0


class _Blocks:
    """Sums of blocks of one length; the last may be shorter."""

    def __init__(self, algorithm: str, block_bytes: int, size_bytes: int) -> None:
        self.algorithm = algorithm
        self._block_bytes = block_bytes
        self._size_bytes = size_bytes
        self._asked = RangeSet()  # whole blocks: a big file has thousands, of which few are new

    def due(self, there: RangeSet) -> list[Due]:
        gaps = [
            gap
            for span in there
            for gap in self._asked.missing(self._up(span.start), self._down(span.stop))
        ]
        for gap in gaps:
            self._asked.add(gap.start, gap.stop)
        return [
            Due(self.algorithm, start, min(start + self._block_bytes, gap.stop))
            for gap in gaps
            for start in range(gap.start, gap.stop, self._block_bytes)
        ]

    @property
    def count(self) -> int:
        return -(-self._size_bytes // self._block_bytes)

    def _up(self, at: int) -> int:
        """Return where the first block begins that has no byte before ``at``."""
        return -(-at // self._block_bytes) * self._block_bytes

    def _down(self, at: int) -> int:
        """Return where the last block ends that has no byte from ``at`` on."""
        return at if at == self._size_bytes else at - at % self._block_bytes

    def forget(self, wrong: Range) -> None:
        self._asked.remove(wrong.start - wrong.start % self._block_bytes, self._up(wrong.stop))


class _Digests(_Blocks):
    """Digests of blocks, each of which tells by itself."""

    def __init__(self, blocks: Sequence[bytes], block_bytes: int, size_bytes: int) -> None:
        super().__init__("sha256", block_bytes, size_bytes)
        self._blocks = blocks

    def take(self, start: int, stop: int, value: bytes) -> tuple[Range, bool] | None:
        return Range(start, stop), value == self._blocks[start // self._block_bytes]


class _Composite(_Blocks):
    """The sum of the sums of the parts of an upload."""

    def __init__(self, checksum: Checksum, part_bytes: int, size_bytes: int) -> None:
        super().__init__(checksum.algorithm, part_bytes, size_bytes)
        self._checksum = checksum
        self._values: dict[int, bytes] = {}

    def take(self, start: int, stop: int, value: bytes) -> tuple[Range, bool] | None:
        self._values[start // self._block_bytes] = value
        if len(self._values) < self.count:
            return None
        values = [self._values[at] for at in range(self.count)]
        whole = checksums.composite(self.algorithm, values)
        return Range(0, self._size_bytes), whole == self._checksum.value

    def forget(self, wrong: Range) -> None:
        super().forget(wrong)
        self._values.clear()


_Way = _WholeCrc | _WholeSha | _Composite | _Digests


class _File:
    """One file.

    Attributes:
        way: how it is checked; None if it cannot be, or nobody knows yet.
        by: one of ``checksums.WAYS``.
        is_known: whether ``way`` is settled.
        is_early: whether its bytes may be read before they were checked.
        good: bytes that were found right.
        refetched: starts of what was fetched once more.
    """

    __slots__ = ("by", "good", "is_early", "is_known", "refetched", "size_bytes", "way")

    def __init__(self, size_bytes: int, by: str, *, is_known: bool, is_early: bool) -> None:
        self.size_bytes = size_bytes
        self.by = by
        self.is_known = is_known
        self.is_early = is_early
        self.way: _Way | None = None
        self.good = RangeSet()
        self.refetched: set[int] = set()


class Integrity:
    """What of a load was checked, file by file.

    Args:
        manifest: of the load.
        planner: of the load: what came.
        verify: ``off``, ``checksum`` or ``digest``.
        can: algorithms that this host computes.
        trusted: whether what is there already may be believed by its length: False for what an
            earlier boot left.
        checked: by what files were checked before, such as those of another load: by index.
    """

    __slots__ = ("_can", "_files", "_list", "_planner", "_verify")

    def __init__(
        self,
        manifest: Manifest,
        planner: Planner,
        *,
        verify: str,
        can: frozenset[str],
        trusted: bool = True,
        checked: Mapping[int, str] | None = None,
    ) -> None:
        self._planner = planner
        self._verify = verify
        self._can = can
        self._list: int | None = None  # index of the list of digests
        self._files: list[_File] = []
        before = checked or {}
        for index, stored in enumerate(manifest.objects):
            is_list = verify == DIGEST and stored.path == MANIFEST_NAME
            if is_list:
                self._list = index
            is_known = verify == OFF or is_list or index in before or not stored.size_bytes
            is_early = trusted and (verify != DIGEST or is_known)
            by = DIGEST if verify == DIGEST and not is_list else before.get(index, "")
            self._files.append(_File(stored.size_bytes, by, is_known=is_known, is_early=is_early))

    @property
    def list_index(self) -> int | None:
        """Return the index of the file with the digests, if they are asked for and there is one."""
        return self._list

    @property
    def wants_list(self) -> bool:
        """Whether digests are asked for and not known yet."""
        return self._verify == DIGEST and any(not file.is_known for file in self._files)

    @property
    def is_complete(self) -> bool:
        """Whether every byte that is there was found right, as far as that can be told."""
        return all(
            file.is_known and (file.way is None or file.good.covers(0, file.size_bytes))
            for file in self._files
        )

    @property
    def checked_by(self) -> tuple[str, ...]:
        """Return by what each file is checked, or was: of ``checksums.WAYS``."""
        return tuple(file.by for file in self._files)

    def found_right(self, index: int, start: int, stop: int) -> bool:
        """Return whether all these bytes were compared with what the store, or the list, says."""
        return self._files[index].good.covers(start, stop)

    def wants_look(self, index: int) -> bool:
        """Return whether the store is to be asked for the checksum of a file."""
        return self._verify == CHECKSUM and not self._files[index].is_known

    def releases(self, index: int, start: int, stop: int) -> bool:
        """Return whether bytes may be read."""
        return self.released(index).covers(start, stop)

    def released(self, index: int) -> RangeSet:
        """Return what of a file may be read; only to be looked at."""
        file = self._files[index]
        return self._planner.ranges(index) if file.is_early else file.good

    def described(self, index: int, text: str | None) -> str:
        """Take note of the checksum of a file; return its algorithm.

        Args:
            index: of the file.
            text: as ``ObjectFacts.checksum``.

        Returns:
            Empty if there is none that this host can compute: then the length alone must do, and
            bytes that are not trusted are fetched anew.
        """
        file = self._files[index]
        if file.is_known:
            return ""
        file.is_known = True
        file.way = _way(text, file.size_bytes, self._can)
        if file.way is None:
            file.by = checksums.LENGTH
            if not file.is_early:
                self._planner.forget(index, 0, file.size_bytes)
                file.is_early = True
            return ""
        file.by = file.way.algorithm
        return file.by

    def listed(self, digests: Digests, manifest: Manifest) -> None:
        """Take the digests that came with the model.

        Raises:
            LoadFailed: a file is missing in it, or has another length.
        """
        for index, file in enumerate(self._files):
            if file.is_known:
                continue
            path = manifest.objects[index].path
            found = digests.files.get(path)
            if found is None or found.size_bytes != file.size_bytes:
                what = "does not list" if found is None else "has another length of"
                message = f"{MANIFEST_NAME} of {manifest.uri} {what} {path}"
                raise LoadFailed(message, hint=f"write it anew: cached digest {manifest.uri}")
            file.is_known = True
            file.way = _Digests(found.blocks, digests.block_bytes, file.size_bytes)

    def due(self, index: int) -> list[Due]:
        """Return what of a file can be summed now; each is to be done, and told by ``checked``."""
        file = self._files[index]
        return [] if file.way is None else file.way.due(self._planner.ranges(index))

    def passing(self, index: int) -> str:
        """Return the algorithm by which bytes of a file are to be summed while they pass, or ""."""
        way = self._files[index].way
        return way.algorithm if isinstance(way, _WholeCrc) else ""

    def claim(self, index: int, start: int, stop: int) -> bool:
        """Return whether the sum of bytes that passed is wanted: ``checked`` is to follow."""
        way = self._files[index].way
        return isinstance(way, _WholeCrc) and way.claim(start, stop)

    def checked(self, index: int, start: int, stop: int, value: bytes) -> Wrong | None:
        """Take note of a sum; return what is known to be wrong by it."""
        file = self._files[index]
        way = file.way
        verdict = way.take(start, stop, value) if way is not None else None
        if way is None or verdict is None:
            return None
        span, is_right = verdict
        if is_right:
            file.good.add(span.start, span.stop)
            return None
        if span.start in file.refetched:
            return Wrong(span, is_final=True)
        file.refetched.add(span.start)
        if self._verify == CHECKSUM:
            file.is_early = True  # all of it comes from the store now, whoever left it
        way.forget(span)
        file.good.remove(span.start, span.stop)
        self._planner.forget(index, span.start, span.stop)
        return Wrong(span, is_final=False)


def _way(text: str | None, size_bytes: int, can: frozenset[str]) -> _Way | None:
    """Return how a file with this checksum is checked; None if it cannot be."""
    try:
        checksum = checksums.parse(text) if text else None
    except ValueError:
        return None
    if checksum is None or checksum.algorithm not in can:
        return None
    if checksum.part_bytes is not None:
        return _Composite(checksum, checksum.part_bytes, size_bytes)
    make: Callable[[Checksum, int], _Way] = (
        _WholeCrc if checksum.algorithm.startswith("crc") else _WholeSha
    )
    return make(checksum, size_bytes)
