"""The nouns that every layer shares: names, objects, ranges, parts.

All of them are plain values. They are imported before the first GET, so they are
NamedTuples: a frozen dataclass costs ten times as much to define.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

PeerId = NewType("PeerId", int)
"""One accepted connection of a worker; never used again after it closed."""


class ModelRef(NamedTuple):
    """A model as the operator named it; from configuration only.

    Attributes:
        name: what workers ask for: letters, digits, ``.``, ``_``, ``-``.
        uri: ``s3://bucket/prefix/``, ``s3://bucket/key``, ``file:///directory/`` or a file.
        prefetch: fetch at start, before anybody asks.
        pinned: never evicted to make room.
    """

    name: str
    uri: str
    prefetch: bool = True
    pinned: bool = False


class VersionRef(NamedTuple):
    """One version of one model, as one load holds it: filled, leased, published, freed as a whole.

    Attributes:
        load: number of the load; a version that failed and is still mapped by somebody is
            another than the one that is loaded in its place.
    """

    name: str
    version: str
    load: int = 0

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class FileRef(NamedTuple):
    """One file of one version.

    Attributes:
        of: the version.
        index: position in ``Manifest.objects``.
    """

    of: VersionRef
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs


class Range(NamedTuple):
    """Bytes ``[start, stop)`` of one file."""

    start: int
    stop: int


class StoredObject(NamedTuple):
    """One object as the store described it.

    Attributes:
        key: the full key in the bucket, or the path of a local file.
        path: where the file lies in the model's directory: relative, with ``/``,
            checked by ``manifest.layout_path``.
        size_bytes: exact length.
        etag: as the store sent it, quotes included; pins every GET by ``If-Match``.
        version_id: of a versioned bucket; ``None`` if unknown.
        checksum: ``"crc64nvme:<base64>"`` and the like, if the store told; else ``None``.
    """

    key: str
    path: str
    size_bytes: int
    etag: str
    version_id: str | None = None
    checksum: str | None = None

    @property
    def is_safetensors(self) -> bool:
        """Whether its header is parsed; every other file is carried as it is."""
        return self.path.endswith(".safetensors")


class ObjectFacts(NamedTuple):
    """What a store tells of one object when it is asked for that object alone.

    Attributes:
        checksum: ``algorithm:base64`` of the whole object; or ``algorithm:base64-N@PART_BYTES``,
            of the checksums of the N parts that it was uploaded in; ``None``: not told.
        version_id: of a versioned bucket; ``None``: not told.
        encryption: ``AES256``, ``aws:kms``, ``aws:kms:dsse``, or ``SSE-C`` (a key that the
            customer gives with each request); ``None``: not told.
        kms_key: its ARN or id, if the store told one.
        has_bucket_key: whether one key of the bucket is used, and not KMS for each GET.
    """

    checksum: str | None = None
    version_id: str | None = None
    encryption: str | None = None
    kms_key: str | None = None
    has_bucket_key: bool = False


class Manifest(NamedTuple):
    """The objects of one version of a model.

    Attributes:
        uri: where it was resolved from.
        version: the id; equal for equal objects (``manifest.version_of``).
        objects: sorted by path, at least one.
    """

    uri: str
    version: str
    objects: tuple[StoredObject, ...]

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(stored.size_bytes for stored in self.objects)


class Part(NamedTuple):
    """One ranged GET, as planned.

    Attributes:
        part_id: unique in the daemon's life.
        file: which file it belongs to.
        uri: of the model, to find the store.
        stored: the object.
        start: first byte, an offset in the file.
        stop: one past the last byte.
        attempt: 0 for the first; counts failed attempts that made no progress.
        hedge: 0; 1 for a second GET of the same part beside one that brings nothing.
        algorithm: of the CRC that is computed while its bytes pass; empty: none.
    """

    part_id: int
    file: FileRef
    uri: str
    stored: StoredObject
    start: int
    stop: int
    attempt: int = 0
    hedge: int = 0
    algorithm: str = ""


class Left(NamedTuple):
    """A version that an earlier daemon left in the place of the segments.

    Attributes:
        of: its name here; ``load`` is 1, 2, … in the order in which they were found.
        manifest: as it was described; None if that is missing, broken, of a layout that is not
            known, or not what lies there: it can only be freed.
        path: its directory.
        is_published: complete; else it was being filled.
        is_current: ``current`` points to it.
        size_bytes: pages of its files. One that several versions share counts in one of them, the
            one that is likelier to go on: the sum of all is what the file system holds.
        is_trusted: written since this machine was started, so what is said to be there is there;
            else look at the content before it is served.
        passed_over: the versions that the operator went back from, to this one.
        inodes: device and inode of each object's file; empty if there is no manifest.
        there: which bytes of each object's file are there; empty if there is no manifest.
        checked_by: by what each object's file was checked (``checksums.WAYS``); empty: not told.
    """

    of: VersionRef
    manifest: Manifest | None
    path: str
    is_published: bool
    is_current: bool
    size_bytes: int
    is_trusted: bool
    passed_over: tuple[str, ...] = ()
    inodes: tuple[tuple[int, int], ...] = ()
    there: tuple[tuple[Range, ...], ...] = ()
    checked_by: tuple[str, ...] = ()
